"""The exported model, loaded in stock diffusers, draws what our sampler draws from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors import safe_open

from sdxl_training.assemble import draw_prompts
from sdxl_training.assemble.drawing import export, sampling_of
from sdxl_training.config.load import load_config, write_resolved
from sdxl_training.config.schema import Previews
from sdxl_training.model.load import load_sdxl
from sdxl_training.training.checkpoint import Checkpoint, RunState, save_checkpoint
from sdxl_training.training.preview import prompt_noise
from tests.tiny_sdxl import tiny_pipeline

PROMPTS = ["red circle", "blue square"]
SIZE = (64, 64)
OBJECTIVES = {
    "v": "{type: v_prediction}",
    "v without ztsnr": "{type: v_prediction, zero_terminal_snr: false}",
    "epsilon": "{type: epsilon}",
    "flow": "{type: flow_matching, mode: raw}",
    "flow preconditioned": "{type: flow_matching, mode: preconditioned}",
    "flow preconditioned without ztsnr": "{type: flow_matching, mode: preconditioned, zero_terminal_snr: false}",
    "x0": "{type: x0}",
    "edm": "{type: edm}",
    "edm c_noise": "{type: edm, label: c_noise, sigma_data: 0.5}",
    "edm as cosxl": "{type: edm, label: c_noise}",
}
OWN_LABELS = ("edm c_noise", "edm as cosxl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder)
    return folder


def make_run(folder: Path, model: Path, objective: str, captions: str = "{}") -> Path:
    """Write what `sample` and `export` read of a run: its configuration and one checkpoint."""
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{source: {model}}}\ndata: {{sources: [{{path: x}}], resolution: 64, "
        f"buckets: {{step_px: 16, min_side_px: 32, max_side_px: 128}}, captions: {captions}}}\n"
        f"training: {{objective: {objective}, ema: {{type: none}}}}\n"
    )
    run = folder / "run"
    run.mkdir()
    write_resolved(load_config(config), run / "config.resolved.yaml")
    unet = load_sdxl(str(model), seed=0, device="cpu").unet
    save_checkpoint(run / "checkpoints", Checkpoint(RunState(1, {}, "adamw"), {"unet": unet.state_dict()}))
    return run


def draw_with_ours(run: Path, previews: Previews) -> numpy.ndarray:
    return numpy.stack(draw_prompts(run, PROMPTS, sampling_of(previews))) / 255.0


def draw_with_diffusers(
    folder: Path, steps: int, guidance: float, scheduler: object = None, **how: object
) -> numpy.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    noise = torch.stack([prompt_noise(SIZE, seed=7, index=i) for i in range(len(PROMPTS))])
    return pipeline(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        **(how or {"num_inference_steps": steps}),
        guidance_scale=guidance,
        latents=noise,
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("flow", *OWN_LABELS)])
def test_the_exported_folder_draws_the_same(tmp_path: Path, model: Path, objective: str, guidance: float) -> None:
    run = make_run(tmp_path, model, OBJECTIVES[objective])
    export(run, None, True, "diffusers", tmp_path / "exported")
    ours = draw_with_ours(run, Previews(steps=25, guidance=guidance, seed=7, grid="trailing"))
    theirs = draw_with_diffusers(tmp_path / "exported", 25, guidance)
    assert ours.std() > 0.05  # not a flat picture
    assert numpy.abs(ours - theirs).mean() < 1 / 255
    if objective == "v":  # any step count that divides 1000 evenly: DDIM counts its steps in whole timesteps
        ddim = draw_with_diffusers(tmp_path / "exported", 25, guidance, DDIMScheduler)
        assert numpy.abs(ours - ddim).mean() < 1 / 255


@pytest.mark.parametrize("null_mode", ["zeros", "empty_string"])
def test_the_unconditional_side_is_the_same_in_the_exported_folder(tmp_path: Path, model: Path, null_mode: str) -> None:
    """And it matters: drawn with the other one the picture differs."""
    drawn = {}
    for mode in ("zeros", "empty_string"):
        (tmp_path / mode).mkdir()
        run = make_run(tmp_path / mode, model, OBJECTIVES["v"], f"{{null_mode: {mode}}}")
        drawn[mode] = (
            numpy.stack(
                draw_prompts(run, PROMPTS, sampling_of(Previews(steps=25, guidance=6.0, seed=7, grid="trailing")))
            )
            / 255.0
        )
    export(tmp_path / null_mode / "run", None, True, "diffusers", tmp_path / "exported")
    theirs = draw_with_diffusers(tmp_path / "exported", 25, 6.0)
    assert numpy.abs(drawn.pop(null_mode) - theirs).mean() < 1 / 255
    (other,) = drawn.values()
    assert numpy.abs(other - theirs).mean() > 2 / 255


@pytest.mark.parametrize("objective", OWN_LABELS)
def test_edm_with_its_own_labels_is_drawn_by_diffusers_edm_scheduler(
    tmp_path: Path, model: Path, objective: str
) -> None:
    """sigma_data, labels, input and output scale are all EDM's; the pipeline needs nothing but the exported folder."""
    run = make_run(tmp_path, model, OBJECTIVES[objective])
    export(run, None, True, "diffusers", tmp_path / "exported")
    ours = draw_with_ours(run, Previews(steps=25, guidance=3.0, seed=7, grid="karras"))
    assert ours.std() > 0.05
    assert numpy.abs(ours - draw_with_diffusers(tmp_path / "exported", 25, 3.0)).mean() < 1 / 255


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_preconditioned_flow_is_drawn_the_same_on_its_own_grid(tmp_path: Path, model: Path, shift: float) -> None:
    """The flow sampler's own times, given to stock diffusers' v-prediction scheduler as sigmas = t / (1 - t)."""
    run = make_run(tmp_path, model, OBJECTIVES["flow preconditioned"])
    export(run, None, True, "diffusers", tmp_path / "exported")
    ours = draw_with_ours(run, Previews(steps=20, guidance=3.0, seed=7, grid="linear", shift=shift))
    times = numpy.linspace(1, 1 / 20, 20)
    times = shift * times / (1 + (shift - 1) * times)
    sigmas = [4096.0, *(times[1:] / (1 - times[1:]))]  # diffusers' own stand-in for an infinite sigma
    theirs = draw_with_diffusers(tmp_path / "exported", 20, 3.0, sigmas=[*sigmas, 0.0])
    assert ours.std() > 0.05
    assert numpy.abs(ours - theirs).mean() < 1 / 255


def test_step_counts_that_do_not_divide_the_schedule(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path, model, OBJECTIVES["v"])
    export(run, None, True, "diffusers", tmp_path / "exported")
    ours = draw_with_ours(run, Previews(steps=28, guidance=3.0, seed=7))
    assert numpy.abs(ours - draw_with_diffusers(tmp_path / "exported", 28, 3.0)).mean() < 1 / 255


def test_the_parity_test_can_fail(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path, model, OBJECTIVES["v"])
    export(run, None, True, "diffusers", tmp_path / "exported")
    ours = draw_with_ours(run, Previews(steps=25, guidance=4.0, seed=8))
    assert numpy.abs(ours - draw_with_diffusers(tmp_path / "exported", 25, 4.0)).mean() > 5 / 255


def test_a_flow_model_names_its_scheduler_and_who_can_sample_it(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path, model, OBJECTIVES["flow"])
    export(run, None, True, "diffusers", tmp_path / "exported")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "exported", subfolder="scheduler")
    assert scheduler.config.shift == 1.0
    assert "sdxl-training sample" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize(
    ("objective", "markers", "prediction"),
    [
        ("v", {"v_pred", "ztsnr"}, "v"),
        ("v without ztsnr", {"v_pred"}, "v"),
        ("epsilon", set(), "epsilon"),
        ("flow", set(), "flow"),
        ("flow preconditioned", {"v_pred", "ztsnr"}, "v"),
        ("flow preconditioned without ztsnr", {"v_pred"}, "v"),
        ("edm", {"v_pred"}, "v"),
        ("edm c_noise", set(), "edm"),  # ComfyUI takes sigma_data 1 for granted with the markers
        ("edm as cosxl", {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}, "edm"),
        ("x0", set(), "x0"),
    ],
)
def test_the_single_file_says_what_it_predicts(
    tmp_path: Path, model: Path, objective: str, markers: set[str], prediction: str
) -> None:
    run = make_run(tmp_path, model, OBJECTIVES[objective])
    export(run, None, True, "single_file", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert markers == {key for key in file.keys() if key.startswith(("v_pred", "ztsnr", "edm"))}  # noqa: SIM118
        assert "model.diffusion_model.input_blocks.0.0.weight" in file.keys()  # noqa: SIM118
        assert file.metadata()["modelspec.prediction_type"] == prediction
