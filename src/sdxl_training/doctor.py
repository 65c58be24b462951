"""What this machine can train with, in a table; and for everything that is wrong, a sentence with the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
PACKAGES = (
    "diffusers",
    "transformers",
    "safetensors",
    "pydantic",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pyarrow",
    "tensorboard",
)
# Packages whose mere presence breaks others when they do not match torch.
PRESENCE_MATTERS = ("torchvision", "torchaudio", "xformers")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# 2.567 billion parameters as float32, with AdamW's two moments: 12 bytes each.
SDXL_CHECKPOINT_GIB = 29
SMALLEST_DISK_GIB = 1

# SDXL's U-Net in kind (cross-attention, text and size conditioning), a few hundred thousand parameters in size.
TINY_UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


class Verdict(Enum):
    """How a finding bears on training."""

    OK = "ok"
    WARNING = "warning"  # training works, though not as well as it could
    FAILED = "failed"  # training cannot work


@dataclass(frozen=True)
class Finding:
    """One line of the table; `remedy` is a sentence for everything that is not ok."""

    subject: str
    value: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""


def python_finding(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Judge the Python version."""
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Finding("Python", platform.python_version())
    remedy = "Python 3.10 to 3.13 is needed; make the environment again, for example: make PYTHON=python3.12 demo"
    return Finding("Python", f"{version[0]}.{version[1]}", Verdict.FAILED, remedy)


def platform_finding(release: str = platform.release(), folder: str | None = None) -> Finding:
    """Name the platform; under WSL2, warn where the folder lies on a Windows drive."""
    if "microsoft" not in release.lower():
        return Finding("platform", platform.platform(terse=True))
    folder = str(Path.cwd()) if folder is None else folder
    if folder.startswith("/mnt/"):
        remedy = (
            f"{folder} lies on a Windows drive, which WSL2 reads many times more slowly than its own; "
            "move the project and the pictures into the Linux home folder."
        )
        return Finding("platform", f"WSL2, {release}", Verdict.WARNING, remedy)
    return Finding("platform", f"WSL2, {release}")


def torch_finding(version: str = torch.__version__) -> Finding:
    """Judge torch's version against the range the code is run on."""
    major, minor = (int(number) for number in version.split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    value = f"{version}, {build}"
    if OLDEST_TORCH <= (major, minor) <= NEWEST_TORCH:
        return Finding("torch", value)
    return Finding("torch", value, Verdict.FAILED, "torch 2.11 to 2.13 is needed: pip install 'torch>=2.11,<2.14'")


def ask_driver() -> str | None:
    """Return the NVIDIA driver's version, or None where no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else None


def gpu_findings() -> Iterator[Finding]:
    """Describe each GPU, or say why torch sees none."""
    driver = ask_driver()
    if torch.cuda.is_available():
        yield Finding("GPU driver", driver or "present")
        for index in range(torch.cuda.device_count()):
            yield gpu_finding(index)
    else:
        yield no_gpu_finding(driver, torch.version.cuda)


def gpu_finding(index: int) -> Finding:
    """Describe one CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    # bfloat16 came with capability 8.0; before that torch emulates it
    bfloat16 = "bf16 in hardware" if properties.major >= 8 else "bf16 emulated and slow, use fp16"
    return Finding(f"GPU {index}", f"{properties.name}, {memory}, {capability}, {bfloat16}")


def no_gpu_finding(driver: str | None, cuda_build: str | None) -> Finding:
    """Say what stands between torch and a GPU."""
    if driver is None:
        remedy = (
            "No NVIDIA driver answers, so only the miniature can be trained here. "
            "If there is a card in the machine, install its driver (under WSL2: on the Windows side)."
        )
    elif cuda_build is None:
        remedy = f"There is a GPU (driver {driver}), but this torch is a CPU build; install a CUDA build of torch."
    else:
        remedy = (
            f"Driver {driver} answers, but torch for CUDA {cuda_build} cannot use the card; "
            "update the driver, and see whether CUDA_VISIBLE_DEVICES hides it."
        )
    return Finding("GPU", "none", Verdict.WARNING, remedy)


def package_findings(names: Iterable[str] = PACKAGES) -> Iterator[Finding]:
    """Name the version of each package the project stands on."""
    for name in names:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", Verdict.FAILED, f"{name} is not installed: pip install {name}")


def presence_finding(name: str) -> Finding:
    """Judge a package that does harm where it does not match torch; imported in a process of its own."""
    if importlib.util.find_spec(name) is None:
        return Finding(name, "absent, as it should be")
    command = [sys.executable, "-c", f"import {name}"]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        remedy = f"{name} is not needed; an update of torch can turn it into a fault: pip uninstall {name}"
        return Finding(name, "present, can be imported", Verdict.WARNING, remedy)
    remedy = f"{name} does not match this torch and breaks packages that import it: pip uninstall {name}"
    return Finding(name, "present, cannot be imported", Verdict.WARNING, remedy)


def disk_finding(folder: Path, free_gib: float | None = None) -> Finding:
    """Judge the free space where runs are written."""
    if free_gib is None:
        free_gib = shutil.disk_usage(folder).free / 2**30
    value = f"{free_gib:.0f} GiB free in {folder}"
    if free_gib < SMALLEST_DISK_GIB:
        return Finding("disk", value, Verdict.FAILED, "Too little even for the miniature; free some space.")
    if free_gib < SDXL_CHECKPOINT_GIB:
        remedy = (
            f"One checkpoint of fully trained SDXL takes about {SDXL_CHECKPOINT_GIB} GiB; "
            "write to a larger disk: --set global_config.output_dir=..."
        )
        return Finding("disk", value, Verdict.WARNING, remedy)
    return Finding("disk", value)


def cpu_finding() -> Finding:
    """Name the threads torch computes with."""
    return Finding("CPU", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}")


def tiny_step_seconds(device: torch.device, precision: str) -> float:
    """Run forward and backward of a tiny U-Net twice; return the seconds of the second.

    Raises RuntimeError where device or precision does not work, ArithmeticError where a gradient is not finite.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_UNET).to(device)
    x_BCHW = torch.randn(1, 4, 8, 8, device=device)
    text = {"text_embeds": torch.randn(1, 32, device=device), "time_ids": torch.full((1, 6), 64.0, device=device)}
    states_BLD = torch.randn(1, 7, 32, device=device)
    label_B = torch.full((1,), 500.0, device=device)
    dtype = PRECISIONS[precision]
    took = 0.0
    for _ in range(2):
        unet.zero_grad()
        start = time.perf_counter()
        with nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype):
            output = unet(x_BCHW, label_B, encoder_hidden_states=states_BLD, added_cond_kwargs=text).sample
        output.float().square().mean().backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in unet.parameters() if p.grad is not None]))
        took = time.perf_counter() - start
        if not 0.0 < norm < float("inf"):
            raise ArithmeticError(f"the gradient norm is {norm}")
    return took


def step_finding(device: torch.device, precision: str) -> Finding:
    """Say whether one training step works on a device in a precision."""
    subject = f"step on {device}, {precision}"
    try:
        took = tiny_step_seconds(device, precision)
    except (RuntimeError, ArithmeticError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        others = " or ".join(name for name in PRECISIONS if name != precision)
        remedy = (
            f"{reason.rstrip('.')}. Set training.precision to {others}, whichever works, "
            "or global_config.device to another device."
        )
        return Finding(subject, "does not work", Verdict.WARNING, remedy)
    return Finding(subject, f"works, {1000 * took:.0f} ms")


def step_findings() -> list[Finding]:
    """Try every device in every precision; training fails only where nothing works."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    found = [step_finding(device, precision) for device in devices for precision in PRECISIONS]
    if all(finding.verdict is not Verdict.OK for finding in found):
        remedy = "No device runs a step in any precision; reinstall torch for this machine."
        found.append(Finding("training", "cannot work", Verdict.FAILED, remedy))
    return found


def examine() -> Iterator[Finding]:
    """Yield everything there is to say, in the order of the table."""
    yield python_finding()
    yield platform_finding()
    yield cpu_finding()
    yield disk_finding(Path.cwd())
    yield torch_finding()
    yield from gpu_findings()
    yield from package_findings()
    yield from (presence_finding(name) for name in PRESENCE_MATTERS)
    yield from step_findings()


_STYLE = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "red"}


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print the table, then a sentence for each line that is not ok."""
    findings = list(findings)
    table = Table("", Column("found", overflow="fold"), "verdict")
    for finding in findings:  # Text, since a path or an error message may hold what looks like markup
        table.add_row(Text(finding.subject), Text(finding.value), Text(finding.verdict.value, _STYLE[finding.verdict]))
    console.print(table)
    for finding in findings:
        if finding.remedy:
            sentence = Text.assemble((finding.subject, _STYLE[finding.verdict]), f": {finding.remedy}")
            console.print(sentence, soft_wrap=True)


def main() -> int:
    """Examine this machine; return 0 where training can work, 1 where it cannot."""
    findings = list(examine())
    print_findings(findings, Console())
    return int(any(finding.verdict is Verdict.FAILED for finding in findings))
