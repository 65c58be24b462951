"""The GPU benchmark's code path, run on the CPU with a tiny U-Net; its figures for SDXL are checked on shapes alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CPU = torch.device("cpu")
_PATH = Path(__file__).parents[2] / "benchmarks" / "gpu_step.py"


@pytest.fixture(scope="module")
def gpu_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_step", _PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sdxl_is_the_real_shape(gpu_step: ModuleType) -> None:
    with torch.device("meta"):
        unet = gpu_step.build_unet(gpu_step.SDXL)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    batch = gpu_step.random_batch(gpu_step.SDXL, 2, torch.device("meta"))
    assert batch.latents_BCHW.shape == (2, 4, 128, 128)
    assert batch.conditioning.text_BLD.shape == (2, 77, 2048)
    assert batch.conditioning.pooled_BP.shape == (2, 1280)
    assert batch.conditioning.time_ids_B6.shape == (2, 6)


def test_another_shape_is_not_taken_for_sdxl(gpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "SDXL_PARAMETERS", 1)
    with torch.device("meta"), pytest.raises(AssertionError, match="not SDXL"):
        gpu_step.build_unet(gpu_step.SDXL)


def test_counted_work_is_the_published_figure(gpu_step: ModuleType) -> None:
    assert gpu_step.count_tflop_per_image(gpu_step.SDXL) == pytest.approx(20.2, rel=0.01)


def test_time_ids_name_the_pixels_of_the_latents(gpu_step: ModuleType) -> None:
    time_ids_B6 = gpu_step.random_batch(gpu_step.TINY, 1, CPU).conditioning.time_ids_B6
    assert time_ids_B6.tolist() == [[64, 64, 0, 0, 64, 64]]


@pytest.mark.parametrize(("weights", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_timed_updates_are_updates(gpu_step: ModuleType, weights: str, dtype: torch.dtype) -> None:
    run = gpu_step.build_run(gpu_step.TINY, gpu_step.Case(weights, True, 1), CPU)
    assert {parameter.dtype for parameter in run.model.parameters()} == {dtype}
    assert run.model.is_gradient_checkpointing
    run.update.learning_rate = 0.1  # large enough to show in bfloat16
    before = run.model.conv_in.weight.detach().clone()
    assert gpu_step.time_updates(run, gpu_step.random_batch(gpu_step.TINY, 1, CPU), warmup=0, steps=1) > 0
    assert not torch.equal(before, run.model.conv_in.weight)


def test_a_run_that_broke_gives_no_figure(gpu_step: ModuleType) -> None:
    run = gpu_step.build_run(gpu_step.TINY, gpu_step.Case("fp32", False, 1), CPU)
    with torch.no_grad():
        run.model.conv_in.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="non-finite"):
        gpu_step.time_updates(run, gpu_step.random_batch(gpu_step.TINY, 1, CPU), warmup=0, steps=1)


def test_rate_and_share_follow_from_seconds_per_update(gpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "time_updates", lambda *_: 0.5)
    timing = gpu_step.measure(gpu_step.TINY, gpu_step.Case("fp32", False, 4), CPU, 0, 1, limit_images=40.0)
    assert timing == gpu_step.Timing(images_per_second=8.0, share=0.2, peak_gib=None)


def test_a_batch_that_does_not_fit_is_reported_and_ends_its_series(
    gpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def time_updates(_run: object, batch: object, _warmup: int, _steps: int) -> float:
        if len(batch.sample_ids) >= 2:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(gpu_step, "time_updates", time_updates)
    command = ["--device", "cpu", "--tiny", "--batch-sizes", "4", "2", "1", "--checkpointing", "off"]
    assert gpu_step.main([*command, "--out", str(tmp_path / "new" / "h1.5")]) == 0
    cases = json.loads((tmp_path / "new" / "h1.5.json").read_text())["cases"]
    assert [(case["batch_size"], case["images_per_second"]) for case in cases] == [(1, 1.0), (2, None)]
    assert "| tiny | fp32 | off | 2 | does not fit | - | - |" in (tmp_path / "new" / "h1.5.md").read_text()


def test_whole_program_on_the_cpu(gpu_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--device", "cpu", "--tiny", "--batch-sizes", "1", "--warmup", "0", "--steps", "1", "--out"]
    assert gpu_step.main([*command, str(tmp_path / "result")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [case["checkpointing"] for case in result["cases"]] == [False, True]
    assert all(case["images_per_second"] > 0 and case["share"] > 0 for case in result["cases"])
    assert result["product_tflop_per_second"] > 0
    rows = [line for line in (tmp_path / "result.md").read_text().splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_what_to_do(gpu_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err
