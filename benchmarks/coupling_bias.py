"""What do couplings gain, and how far do they bend the noise of a caption away from standard normal?

    python benchmarks/coupling_bias.py        # seconds

Draws batches of synthetic latents whose mean depends on a class, told by the tag, couples them with noise, and prints
by how much the transport cost falls and where the mean of a class's noise lies along the class's direction, in standard
deviations of the noise. Sampling draws every caption from 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from sdxl_training.objectives.couplings import ConditionalTransport, OptimalTransport

Couple = Callable[[Tensor, Tensor, list[tuple[str]]], Tensor]
COUPLINGS: dict[str, Couple] = {
    "optimal_transport": OptimalTransport(),
    "conditional_transport, strength 1": ConditionalTransport(1.0),
    "conditional_transport, strength 2": ConditionalTransport(2.0),
    "conditional_transport, strength 4": ConditionalTransport(4.0),
}
SHAPE, BATCHES = (4, 64, 64), 40


def measure(couple: Couple, classes: int, share: float, batch: int) -> tuple[float, float, float]:
    """Return (mean of eps along the class's direction, share of the cost saved, share of noises that move)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((classes, *SHAPE), generator=generator)
    along, saved, moved = [], [], []
    for _ in range(BATCHES):
        label = torch.randint(classes, (batch,), generator=generator)
        own = torch.randn((batch, *SHAPE), generator=generator)
        x0 = share**0.5 * means[label] + (1 - share) ** 0.5 * own
        eps = torch.randn((batch, *SHAPE), generator=generator)
        order = couple(x0, eps, [(str(int(one)),) for one in label])
        direction = (means / means.flatten(1).norm(dim=1)[:, None, None, None])[label]
        along.append((eps[order] * direction).sum(dim=(1, 2, 3)))
        before, after = (float((x0 - noise).square().sum()) for noise in (eps, eps[order]))
        saved.append(1 - after / before)
        moved.append(float((order != torch.arange(batch)).float().mean()))
    return float(torch.cat(along).mean()), sum(saved) / BATCHES, sum(moved) / BATCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="pictures of a global batch")
    batch = parser.parse_args().batch
    print("| coupling | classes | share of variance | noise of a class | cost saved | noises that move |")
    print("|---|---|---|---|---|---|")
    for classes, share in ((2, 0.5), (4, 0.5), (4, 0.1)):
        for name, couple in COUPLINGS.items():
            along, saved, moved = measure(couple, classes, share, batch)
            print(f"| {name} | {classes} | {share:g} | {along:+.2f} | {saved:.2%} | {moved:.0%} |")


if __name__ == "__main__":
    main()
