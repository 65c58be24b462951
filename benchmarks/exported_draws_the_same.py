"""Does stock diffusers draw from the exported folder what our sampler draws from the run?

    python benchmarks/exported_draws_the_same.py --run runs/miniature_v_prediction

Exports the run, loads the folder in StableDiffusionXLPipeline, draws the demo's 72 prompts in both from the same noise
in fp32, and prints the mean absolute difference in units of 1/255. For runs whose export is an epsilon, v-prediction or
x0 model: all but raw flows and EDM with labels of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from demo_quality import prompts
from sdxl_training.assemble import draw_prompts, export
from sdxl_training.assemble.drawing import sampling_of
from sdxl_training.config.load import load_config
from sdxl_training.config.schema import Previews
from sdxl_training.training.preview import prompt_noise

STEPS, GUIDANCE, SEED = 25, 4.0, 0


def draw_with_diffusers(folder: Path, texts: list[str], side: int, ddim: bool) -> np.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if ddim:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pictures = []
    for i, text in enumerate(texts):
        noise = prompt_noise((side, side), SEED, i)[None]
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": side, "width": side}
        pictures.append(pipeline(text, latents=noise, output_type="np", **settings).images[0])
    return np.stack(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    run = parser.parse_args().run
    texts = [text for text, _ in prompts()]
    side = load_config(run / "config.resolved.yaml").config.data.resolution
    sampling = sampling_of(Previews(steps=STEPS, guidance=GUIDANCE, seed=SEED, grid="trailing"))
    ours = np.stack(draw_prompts(run, texts, sampling))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        export(run, None, True, "diffusers", folder)
        for name, ddim in (("the exported scheduler (Euler)", False), ("DDIM, trailing", True)):
            theirs = draw_with_diffusers(folder, texts, side, ddim) * 255
            gap_N = np.abs(ours - theirs).mean(axis=(1, 2, 3))
            print(f"{name}: mean absolute difference {gap_N.mean():.3f}/255, worst picture {gap_N.max():.3f}/255")


if __name__ == "__main__":
    main()
