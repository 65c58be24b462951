"""How long should torch's CPU threads spin before they sleep, on a machine that does other things too?

    python benchmarks/cpu_threads.py        # about five minutes; leave the machine alone meanwhile

Times an update of the miniature's U-Net (batch 32, forward, backward, AdamW) on two threads, on an otherwise idle
machine and beside one and two other processes that train on one thread each, for several values of GOMP_SPINCOUNT (how
often a waiting thread looks before it sleeps). Prints seconds an update. The plainest alternatives are one thread, and
two with the library's own default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack

CASES = [(1, None), *((2, spins) for spins in ("0", "3000", "30000", None))]
LIMIT_S, UPDATES = 90, 8


def time_updates(threads: int, updates: int = UPDATES) -> float:
    """Return seconds an update, after one to warm up."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdxl_training.model.load import MINIATURE_FOLDER

    torch.set_num_threads(threads)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MINIATURE_FOLDER / "unet"))
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    extra = {"text_embeds": torch.randn(32, pooled), "time_ids": torch.randn(32, 6)}
    started = 0.0
    for update in range(updates + 1):
        if update == 1:
            started = time.perf_counter()
        output = unet(torch.randn(32, 4, 8, 8), torch.rand(32), torch.randn(32, 32, width), added_cond_kwargs=extra)
        output.sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / updates


def measure(threads: int, spins: str | None) -> str:
    environment = dict(os.environ) if spins is None else os.environ | {"GOMP_SPINCOUNT": spins}
    command = [sys.executable, __file__, "--threads", str(threads)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        return f"over {LIMIT_S // (UPDATES + 1)}"
    return f"{float(done.stdout):.2f}"


def measure_beside(neighbours: int) -> list[str]:
    command = [sys.executable, __file__, "--neighbour"]
    with ExitStack() as stack:
        others = [stack.enter_context(subprocess.Popen(command)) for _ in range(neighbours)]
        time.sleep(10 * bool(others))  # they import torch first
        seconds = [measure(*case) for case in CASES]
        for other in others:
            other.kill()
    return seconds


def main() -> None:
    if "--threads" in sys.argv:
        print(time_updates(int(sys.argv[-1])))
        return
    while "--neighbour" in sys.argv:
        time_updates(1)
    columns = [measure_beside(neighbours) for neighbours in range(3)]
    print("| threads | GOMP_SPINCOUNT | alone | beside one other | beside two others |\n|---|---|---|---|---|")
    for (threads, spins), *row in zip(CASES, *columns, strict=True):
        print(f"| {threads} | {spins or 'default'} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
