"""What do noise per sample and everything around the loss cost?

    OMP_NUM_THREADS=1 python benchmarks/noise_cost.py        # about a minute

First table: the noise of 32 latents of 4 x 128 x 128 (1024 pixels), each from its own generator as the loader draws it,
against one `torch.randn` of the same size. Goal: no more than 1.5 times as long.

Second table: what an objective adds to an update of the miniature's U-Net (32 latents of 4 x 8 x 8, forward and
backward, without the optimizer): levels, weights, noisy input, error, loss and its backward to the network's output,
and the memory of adaptive levels. Goal: less than 2 %. The loader's workers draw the noise and couple it.

One thread. Every time is the process's own (neighbours on the machine do not count) and the best of many turns, in
which the cases take turns.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_training.model.load import MINIATURE_FOLDER
from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.adaptive import AdaptiveLevels, AdaptiveSettings
from sdxl_training.objectives.couplings import ConditionalTransport, OptimalTransport
from sdxl_training.objectives.densities import LogNormal, Uniform
from sdxl_training.objectives.noise import InputNoise, Noise
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.shapes import PseudoHuber
from sdxl_training.objectives.shifts import FixedShift
from sdxl_training.objectives.strata import StratifiedDraws
from sdxl_training.objectives.uncertainty import LogVariance
from sdxl_training.objectives.weights import MinSNR, NoWeight
from sdxl_training.records import Batch, Conditioning

CPU = torch.device("cpu")
SAMPLES, TOKENS = 32, 32
NOISE_GOAL, OBJECTIVE_GOAL = 1.5, 0.02


def best_seconds(cases: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return each case's shortest time in seconds of this process; the cases take turns."""
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(turns):
        for name, work in cases.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    return best


# --- noise -----------------------------------------------------------------------------------------------------------


def noise_cases(*shape: int) -> dict[str, Callable[[], Tensor]]:
    """Return ways to draw the noise of a batch; the first is one call for all."""
    latents_BCHW = torch.randn(SAMPLES, *shape)

    def per_sample(noise: Noise) -> Callable[[], Tensor]:
        return lambda: torch.stack([noise(latents_BCHW[i], 0, 7, i) for i in range(SAMPLES)])

    def in_place() -> Tensor:
        noise_BCHW = torch.empty(SAMPLES, *shape)
        for i in range(SAMPLES):
            Noise()(latents_BCHW[i], 0, 7, i, out=noise_BCHW[i])
        return noise_BCHW

    return {
        "one torch.randn for all": lambda: torch.randn(SAMPLES, *shape),
        "per sample, stacked (the loader)": per_sample(Noise()),
        "per sample, written in place": in_place,
        "per sample, offset": per_sample(Noise(offset=0.05)),
        "per sample, pyramid": per_sample(Noise(pyramid=0.5)),
        "per sample, nearest of 4": per_sample(Noise(nearest_of=4)),
    }


# --- objectives ------------------------------------------------------------------------------------------------------


def make_batch(unet: UNet2DConditionModel) -> Batch:
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    sizes_B6 = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * SAMPLES)
    return Batch(
        latents_BCHW=torch.randn(SAMPLES, 4, 8, 8),
        noise_BCHW=torch.randn(SAMPLES, 4, 8, 8),
        conditioning=Conditioning(torch.randn(SAMPLES, TOKENS, width), torch.randn(SAMPLES, pooled), sizes_B6),
        weight_B=torch.ones(SAMPLES),
        sample_ids=tuple(range(SAMPLES)),
        visits=(0,) * SAMPLES,
        step=0,
        slots=tuple(range(SAMPLES)),
        global_batch=SAMPLES,
    )


def objectives() -> dict[str, Objective]:
    raw, zero_terminal_snr = {"mode": "raw", "zero_terminal_snr": True}, {"zero_terminal_snr": True}
    levels = LogNormal(0.0, 1.0)
    adaptive = AdaptiveSettings(bins=32, warmup_samples=20, decay=0.99, uniform_share=0.1, every_steps=1)
    return {
        "flow matching, logit-normal": make_objective("flow_matching", raw, levels, NoWeight()),
        "v, uniform, Min-SNR": make_objective("v_prediction", zero_terminal_snr, Uniform(), MinSNR(5.0, "plus_one")),
        "flow matching with everything": make_objective(
            "flow_matching",
            raw,
            levels,
            NoWeight(),
            shift=FixedShift(3.0),
            draws=StratifiedDraws(),
            level_draw=AdaptiveLevels(adaptive, CPU),
            shape=PseudoHuber(0.1, "snr"),
            input_noise=InputNoise(0.1),
            uncertainty=LogVariance(seed=0),
        ),
    }


def around_the_network(objective: Objective, batch: Batch, output_BCHW: Tensor) -> Callable[[], None]:
    """Return all that an update computes but the network itself, as `training/step.py` has it."""

    def work() -> None:
        drawn = objective.draw_levels(0, batch, (64, 64))
        noise_BCHW = objective.input_noise(batch.noise_BCHW, 0, batch.visits, batch.sample_ids)
        objective.add_noise(batch.latents_BCHW, noise_BCHW, drawn.levels)
        errors_B = objective.errors(output_BCHW, batch.latents_BCHW, batch.noise_BCHW, drawn.levels)
        objective.level_draw.see(drawn.uniform_B, errors_B * drawn.weight_B)
        (objective.losses(errors_B, drawn) * batch.weight_B).sum().backward()
        objective.level_draw.after_update(0, lambda value: value)

    return work


def update_cases() -> dict[str, Callable[[], object]]:
    """Return the network's forward and backward, and what each objective adds; then what the loader adds."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MINIATURE_FOLDER / "unet")).train()
    batch = make_batch(unet)
    tags = [(f"color {i % 6}", f"shape {i % 3}") for i in range(SAMPLES)]
    output_BCHW = torch.randn(SAMPLES, 4, 8, 8, requires_grad=True)
    label_B = torch.rand(SAMPLES) * 1000

    def network() -> None:
        predict(unet, batch.latents_BCHW, label_B, batch.conditioning).square().mean().backward()
        unet.zero_grad()

    def in_the_loader(couple: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: couple(batch.latents_BCHW, batch.noise_BCHW, tags)

    return {
        "forward and backward of the U-Net": network,
        **{name: around_the_network(objective, batch, output_BCHW) for name, objective in objectives().items()},
        "loader: noise of 32 samples": noise_cases(4, 8, 8)["per sample, stacked (the loader)"],
        "loader: optimal transport": in_the_loader(OptimalTransport()),
        "loader: conditional transport": in_the_loader(ConditionalTransport(4.0)),
    }


def table(seconds: Mapping[str, float], head: str, relative: str) -> str:
    """Return milliseconds of each case and their ratio to the first."""
    first = next(iter(seconds.values()))
    lines = [f"| {head} | ms | {relative} |", "|---|---|---|"]
    for name, value in seconds.items():
        share = f"{value / first:.2f}" if relative == "ratio" else f"{value / first:.2%}"
        lines.append(f"| {name} | {1000 * value:.2f} | {share} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print both tables; exit status 1 where a goal is missed."""
    torch.set_num_threads(1)
    date = datetime.now(timezone.utc).date().isoformat()
    machine = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    print(f"{date}, {machine}, Python {platform.python_version()}, torch {torch.__version__}, one thread\n")
    noise = best_seconds(noise_cases(4, 128, 128), turns=60)
    print(table(noise, "noise of 32 x 4 x 128 x 128", "ratio"), end="\n\n")
    update = best_seconds(update_cases(), turns=40)
    print(table(update, "an update of the miniature, batch 32", "share"), end="\n\n")
    x0_GCHW, eps_GCHW = torch.randn(2, SAMPLES, 4, 128, 128)
    large = best_seconds({"couple": lambda: OptimalTransport()(x0_GCHW, eps_GCHW, [()] * SAMPLES)}, turns=40)
    print(f"optimal transport of 32 latents of 4 x 128 x 128: {1000 * large['couple']:.2f} ms")
    ratio = noise["per sample, stacked (the loader)"] / noise["one torch.randn for all"]
    share = max(update[name] for name in objectives()) / update["forward and backward of the U-Net"]
    print(f"noise: {ratio:.2f} times one call, the goal is at most {NOISE_GOAL}")
    print(f"objective: {share:.2%} of forward and backward at most, the goal is less than {OBJECTIVE_GOAL:.0%}")
    return int(ratio > NOISE_GOAL or share >= OBJECTIVE_GOAL)


if __name__ == "__main__":
    sys.exit(main())
