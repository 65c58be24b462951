"""How fast, and in how much memory, does one GPU train the U-Net of SDXL?

    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step_h100
    python benchmarks/gpu_step.py --device cpu --tiny --batch-sizes 1 2    # the same code, no GPU needed

Whole updates are timed: noise levels, forward, backward, clipping, fused AdamW, through the package's own `train_step`.
The weights are random and so is every input (latents 4x128x128, which is 1024x1024 pixels, and their noise; text states
77x2048; pooled text 1280; time_ids), which changes neither the work nor the memory. There is no VAE, no text encoder
and no data loading, where noise is drawn.

`share` is the model's arithmetic per second, counted without recomputation, over that of a bfloat16 product of two
8192 x 8192 matrices measured in the same process: what the card really gives, not what its data sheet says.
Weights: `fp32` is bfloat16 autocast over float32 weights; `bf16` holds weights, gradients and AdamW's moments in
bfloat16 too (rounded to nearest here, so it is a figure for speed and memory, not a way to train).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdxl_training.memory.precision import autocast
from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.objective import make_objective
from sdxl_training.objectives.weights import NoWeight
from sdxl_training.optim.averaging import NoAverage
from sdxl_training.optim.loss_scale import NoLossScale
from sdxl_training.optim.schedules import Constant
from sdxl_training.optim.update import Update, make_adamw
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Conditioning
from sdxl_training.training.step import Run, train_step

SDXL_PARAMETERS = 2_567_463_684
RAW_FLOW = {"mode": "raw", "zero_terminal_snr": True}

# SDXL base 1.0, unet/config.json; keys that equal the class's defaults are left out.
SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

TINY_UNET = {
    **SDXL_UNET,
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@dataclass(frozen=True)
class Shape:
    """What is trained: the U-Net, the sizes of its inputs, and the edge of the matrices it is compared with."""

    name: str
    unet: Mapping[str, Any]
    tokens: int
    pooled_width: int
    product_edge: int


SDXL = Shape("SDXL", SDXL_UNET, tokens=77, pooled_width=1280, product_edge=8192)
TINY = Shape("tiny", TINY_UNET, tokens=7, pooled_width=32, product_edge=256)


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    weights: str  # fp32 or bf16
    checkpointing: bool
    batch_size: int


@dataclass(frozen=True)
class Timing:
    """What was measured; all None where the case does not fit into memory."""

    images_per_second: float | None = None
    share: float | None = None
    peak_gib: float | None = None


def build_unet(shape: Shape) -> UNet2DConditionModel:
    """Return the U-Net with random weights on the current default device."""
    unet = UNet2DConditionModel(**shape.unet).train()
    if shape is SDXL:
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        assert parameters == SDXL_PARAMETERS, f"{parameters} parameters: this is not SDXL's U-Net"
    return unet


def random_batch(shape: Shape, batch_size: int, device: torch.device) -> Batch:
    """Return random latents with random conditioning: text states, pooled text, size conditioning."""
    edge = shape.unet["sample_size"]
    pixels = float(8 * edge)
    conditioning = Conditioning(
        text_BLD=torch.randn(batch_size, shape.tokens, shape.unet["cross_attention_dim"], device=device),
        pooled_BP=torch.randn(batch_size, shape.pooled_width, device=device),
        time_ids_B6=torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]], device=device).repeat(batch_size, 1),
    )
    return Batch(
        latents_BCHW=torch.randn(batch_size, 4, edge, edge, device=device),
        noise_BCHW=torch.randn(batch_size, 4, edge, edge, device=device),
        conditioning=conditioning,
        weight_B=torch.ones(batch_size, device=device),
        sample_ids=tuple(range(batch_size)),
        visits=(0,) * batch_size,
        step=0,
        slots=tuple(range(batch_size)),
        global_batch=batch_size,
    )


def build_run(shape: Shape, case: Case, device: torch.device) -> Run:
    """Return everything one update needs: flow matching, AdamW, clipping; one process."""
    with device:
        unet = build_unet(shape)
    if case.weights == "bf16":
        unet.to(torch.bfloat16)
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = dict(unet.named_parameters())
    return Run(
        model=unet,
        objective=make_objective("flow_matching", RAW_FLOW, LogNormal(0.0, 1.0), NoWeight()),
        update=Update(
            parameters=parameters,
            optimizer=make_adamw(parameters.values(), 1e-6, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01),
            learning_rate=1e-6,
            schedule=Constant(warmup_steps=0),
            loss_scale=NoLossScale(),
            average=NoAverage(),
            max_grad_norm=1.0,
        ),
        precision=autocast("bf16", device),
        group=Group(rank=0, world_size=1, device=device),
        seed=0,
    )


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return seconds per call of `work`, by events on the GPU's own clock where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def product_tflop_per_second(edge: int, device: torch.device) -> float:
    """Return the rate of one bfloat16 product of two square matrices: 2 edge^3 operations."""
    left, right = torch.randn(2, edge, edge, device=device, dtype=torch.bfloat16)
    seconds(lambda: left @ right, 10, device)
    return 2 * edge**3 / 1e12 / seconds(lambda: left @ right, 50, device)


def count_tflop_per_image(shape: Shape) -> float:
    """Return the TFLOP of one image's forward and backward without recomputation, counted on shapes alone."""
    meta = torch.device("meta")
    with meta, FlopCounterMode(display=False) as counter:
        batch = random_batch(shape, 1, meta)
        label_B = torch.zeros(1)
        predict(build_unet(shape), batch.latents_BCHW, label_B, batch.conditioning).sum().backward()
    return counter.get_total_flops() / 1e12


def time_updates(run: Run, batch: Batch, warmup: int, steps: int) -> float:
    """Return seconds per update; raise FloatingPointError where the loss is not finite: a broken run has no speed."""
    numbers = itertools.count()

    def update() -> torch.Tensor:
        step = next(numbers)
        fresh = dataclasses.replace(batch, visits=(step,) * len(batch.visits), step=step)  # other levels each time
        return train_step(run, step, [fresh]).loss

    for _ in range(warmup):
        update()
    per_update = seconds(update, steps, run.group.device)
    if not update().isfinite():
        raise FloatingPointError(f"the loss became non-finite within {warmup + steps + 1} updates")
    return per_update


def measure(shape: Shape, case: Case, device: torch.device, warmup: int, steps: int, limit_images: float) -> Timing:
    """Time one case from scratch. `limit_images` is the images/s at which the card would run at the product's rate."""
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run = build_run(shape, case, device)
        rate = case.batch_size / time_updates(run, random_batch(shape, case.batch_size, device), warmup, steps)
    except torch.OutOfMemoryError:
        return Timing()
    return Timing(rate, rate / limit_images, torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None)


HEADER = "| U-Net | weights | checkpointing | batch | images/s | share | peak GiB |\n|---|---|---|---|---|---|---|"


def markdown_line(shape: Shape, case: Case, timing: Timing) -> str:
    """Return one row of the table under HEADER."""
    if timing.images_per_second is None or timing.share is None:
        figures = ["does not fit", "-", "-"]
    else:
        peak = "-" if timing.peak_gib is None else f"{timing.peak_gib:.1f}"
        figures = [f"{timing.images_per_second:.2f}", f"{timing.share:.1%}", peak]
    on_off = "on" if case.checkpointing else "off"
    return "| " + " | ".join([shape.name, case.weights, on_off, str(case.batch_size), *figures]) + " |"


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what a reader needs to compare the figures with others."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def write_results(out: Path, head: Mapping[str, Any], rows: list[tuple[Case, Timing]], lines: list[str]) -> None:
    """Write `out`.json and `out`.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = [dataclasses.asdict(case) | dataclasses.asdict(timing) for case, timing in rows]
    out.with_name(out.name + ".json").write_text(json.dumps({**head, "cases": cases}, indent=2) + "\n")
    legend = ", ".join(f"{key} {value}" for key, value in head.items())
    out.with_name(out.name + ".md").write_text(f"{legend}\n\n{HEADER}\n" + "\n".join(lines) + "\n")


def four_digits(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a U-Net of a few hundred thousand parameters")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--weights", choices=["fp32", "bf16"], nargs="+", default=["fp32"])
    parser.add_argument("--checkpointing", choices=["off", "on"], nargs="+", default=["off", "on"])
    parser.add_argument("--warmup", type=int, default=3, help="updates before the clock starts")
    parser.add_argument("--steps", type=int, default=10, help="updates timed")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure every case asked for; print a table row as soon as it is known."""
    options = parse(arguments)
    device, shape = torch.device(options.device), TINY if options.tiny else SDXL
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; try --device cpu --tiny", file=sys.stderr)
        return 2
    head: dict[str, Any] = describe_machine(device)
    head["tflop_per_image"] = four_digits(count_tflop_per_image(shape))
    head["product_tflop_per_second"] = four_digits(product_tflop_per_second(shape.product_edge, device))
    print("\n".join(f"{key}: {value}" for key, value in head.items()), HEADER, sep="\n\n", flush=True)
    limit_images = head["product_tflop_per_second"] / head["tflop_per_image"]
    rows: list[tuple[Case, Timing]] = []
    lines: list[str] = []
    for weights, checkpointing in itertools.product(options.weights, options.checkpointing):
        for batch_size in sorted(options.batch_sizes):
            case = Case(weights, checkpointing == "on", batch_size)
            timing = measure(shape, case, device, options.warmup, options.steps, limit_images)
            rows.append((case, timing))
            lines.append(markdown_line(shape, case, timing))
            print(lines[-1], flush=True)
            if options.out:  # after each case: a later one may end the process
                write_results(options.out, head, rows, lines)
            if timing.images_per_second is None:
                break  # larger batches need more memory still
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
