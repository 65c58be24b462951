"""The doctor's judgements, one by one, and the whole examination on this machine."""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sdxl_training import doctor
from sdxl_training.doctor import Finding, Verdict

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "verdict"),
    [((3, 9), Verdict.FAILED), ((3, 10), Verdict.OK), ((3, 13), Verdict.OK), ((3, 14), Verdict.FAILED)],
)
def test_python_versions(version: tuple[int, int], verdict: Verdict) -> None:
    assert doctor.python_finding(version).verdict is verdict


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.10.1", Verdict.FAILED),
        ("2.11.0+cu128", Verdict.OK),
        ("2.13.0+cpu", Verdict.OK),
        ("2.14.0a0+git1", Verdict.FAILED),
        ("3.0.0", Verdict.FAILED),
    ],
)
def test_torch_versions(version: str, verdict: Verdict) -> None:
    assert doctor.torch_finding(version).verdict is verdict


def test_wsl2_is_recognised_and_a_windows_drive_is_warned_about() -> None:
    release = "6.6.87.2-microsoft-standard-WSL2"
    assert doctor.platform_finding(release, "/home/me").value.startswith("WSL2")
    assert doctor.platform_finding(release, "/home/me").verdict is Verdict.OK
    assert doctor.platform_finding(release, "/mnt/c/me").verdict is Verdict.WARNING
    assert doctor.platform_finding("6.12.0-generic", "/mnt/disk").verdict is Verdict.OK


@pytest.mark.parametrize(
    ("driver", "cuda_build", "words"),
    [(None, None, "driver"), ("580.1", None, "CPU build"), ("480.1", "13.0", "update the driver")],
)
def test_a_missing_gpu_is_a_warning_with_its_own_remedy(driver: str | None, cuda_build: str | None, words: str) -> None:
    finding = doctor.no_gpu_finding(driver, cuda_build)
    assert finding.verdict is Verdict.WARNING
    assert words in finding.remedy


@pytest.mark.parametrize(("free_gib", "verdict"), [(0.5, Verdict.FAILED), (20.0, Verdict.WARNING), (500.0, Verdict.OK)])
def test_disk_space(free_gib: float, verdict: Verdict) -> None:
    assert doctor.disk_finding(Path(), free_gib).verdict is verdict


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    present, missing = doctor.package_findings(["rich", "no-such-package-here"])
    assert present == Finding("rich", importlib.metadata.version("rich"))
    assert missing.verdict is Verdict.FAILED
    assert "pip install no-such-package-here" in missing.remedy


@pytest.mark.parametrize(
    ("source", "value"),
    [("", "present, can be imported"), ("raise RuntimeError('operator nms')", "present, cannot be imported")],
)
def test_a_harmful_package_is_noticed_without_being_imported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, value: str
) -> None:
    (tmp_path / "harmful_for_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.presence_finding("harmful_for_test")
    assert (finding.value, finding.verdict) == (value, Verdict.WARNING)
    assert "pip uninstall harmful_for_test" in finding.remedy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_works_on_the_cpu(precision: str) -> None:
    assert doctor.step_finding(CPU, precision).verdict is Verdict.OK


def test_a_step_that_fails_names_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device, precision: str) -> float:
        raise RuntimeError("no kernel image is available\nmore lines")

    monkeypatch.setattr(doctor, "tiny_step_seconds", fail)
    finding = doctor.step_finding(CPU, "bf16")
    assert finding.verdict is Verdict.WARNING
    assert finding.remedy.startswith("no kernel image is available. Set training.precision to fp32 or fp16")
    assert doctor.step_findings()[-1].verdict is Verdict.FAILED


def test_gradients_that_are_not_finite_fail_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(float("nan")))
    assert doctor.step_finding(CPU, "fp32").value == "does not work"


def test_the_table_shows_every_finding_and_a_sentence_for_what_is_wrong() -> None:
    findings = [Finding("disk", "9 GiB free in /a[b]"), Finding("GPU", "none", Verdict.WARNING, "Install [x].")]
    printed = io.StringIO()
    doctor.print_findings(findings, Console(file=printed, width=100))
    assert "9 GiB free in /a[b]" in printed.getvalue()
    assert "GPU: Install [x]." in printed.getvalue()


@pytest.mark.parametrize(("verdict", "status"), [(Verdict.OK, 0), (Verdict.WARNING, 0), (Verdict.FAILED, 1)])
def test_exit_status_says_whether_training_can_work(
    verdict: Verdict, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("x", "y", verdict, "do this")])
    assert doctor.main() == status


def test_this_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine on which the suite runs can train."""
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for word in ("Python", "platform", torch.__version__, "GPU", "diffusers", "torchvision", "GiB free", "step on cpu"):
        assert word in printed
