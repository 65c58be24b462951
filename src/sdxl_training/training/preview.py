"""Pictures drawn from prompts: during a run, by `sample`, and to judge a run.

Shape legend: B pictures, C latent channels, H x W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from sdxl_training.model.architecture import LATENT_CHANNELS, VAE_FACTOR
from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.grids import GRIDS, Grid, Linear, default_grid
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import NoisePath
from sdxl_training.objectives.sampling import draw, guide
from sdxl_training.records import Conditioning, SizeHW, UserError
from sdxl_training.rng import Stream, torch_generator

Picture = NDArray[numpy.uint8]
"""One picture, height x width x RGB."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the knobs of `global_config.previews` that do not say what or when."""

    steps: int
    guidance: float
    seed: int
    sampler: str
    grid: str
    shift: float
    guidance_rescale: float

    def grid_for(self, path: NoisePath) -> Grid:
        """Return the grid of this name; auto is the path's own. Raises UserError for a shift that has no effect."""
        grid = default_grid(path) if self.grid == "auto" else GRIDS[self.grid]()
        if isinstance(grid, Linear):
            return Linear(self.shift)
        if self.shift != 1:
            raise UserError(
                f"shift = {self.shift:g}: only the linear grid has one, and this model is drawn by another (grid = "
                f"{self.grid}). Choose grid linear, or leave the shift out."
            )
        return grid


class UnusablePictureError(UserError):
    """The model draws values that are no picture."""


@dataclass
class Painter:
    """Draws prompts with the model that is being trained, by the objective it is trained with.

    encode_prompts: captions -> (text_BLD, pooled_BP). decode: latents_BCHW -> pixels_BCHW in [-1, 1]. zero_null:
    whether the unconditional side is zero text and zero pooled text, SDXL's own, or the states of the empty prompt.
    """

    model: nn.Module
    objective: Objective
    encode_prompts: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    precision: AbstractContextManager[object]
    device: torch.device
    zero_null: bool = True

    def paint(self, prompts: Sequence[str], size_hw: SizeHW, sampling: Sampling) -> list[Picture]:
        """Draw one picture a prompt. Picture i's noise comes from (seed, i) alone, whatever else is drawn with it."""
        pictures: list[Picture] = []
        for first in range(0, len(prompts), 16):
            chunk = prompts[first : first + 16]
            noise_BCHW = torch.stack([prompt_noise(size_hw, sampling.seed, first + i) for i in range(len(chunk))])
            pictures += self.paint_from(noise_BCHW.to(self.device), chunk, size_hw, sampling)
        return pictures

    @torch.no_grad()
    def paint_from(
        self, noise_BCHW: Tensor, prompts: Sequence[str], size_hw: SizeHW, sampling: Sampling
    ) -> list[Picture]:
        """Draw prompts from given noise."""
        (text_BLD, pooled_BP), (null_BLD, null_BP) = self._encode_both(prompts)
        sizes_B6 = torch.tensor([*size_hw, 0, 0, *size_hw], dtype=torch.float32, device=self.device).expand(
            len(prompts), 6
        )
        conditional = Conditioning(text_BLD, pooled_BP, sizes_B6)
        both = Conditioning(
            torch.cat([null_BLD, text_BLD]),
            torch.cat([null_BP, pooled_BP]),
            torch.cat([sizes_B6, sizes_B6]),
        )

        def predict_guided(x_BCHW: Tensor, label_B: Tensor) -> Tensor:
            with self.precision:
                if sampling.guidance == 1.0:
                    return predict(self.model, x_BCHW, label_B, conditional)
                output = predict(self.model, torch.cat([x_BCHW, x_BCHW]), torch.cat([label_B, label_B]), both)
            unconditional, with_prompt = output.float().chunk(2)
            return guide(unconditional, with_prompt, sampling.guidance, sampling.guidance_rescale)

        grid = sampling.grid_for(self.objective.path)
        latents_BCHW = draw(predict_guided, self.objective, noise_BCHW, sampling.steps, sampling.sampler, grid)
        pixels_BCHW = self.decode(latents_BCHW).float().cpu()
        if not pixels_BCHW.isfinite().all():
            raise UnusablePictureError(
                "a drawn picture holds values that are not finite; the weights or the VAE have overflowed. Draw from "
                "an earlier checkpoint."
            )
        return [to_picture(pixels_CHW) for pixels_CHW in pixels_BCHW]

    def _encode_both(self, prompts: Sequence[str]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return text and pooled text of the prompts and of the unconditional side."""
        if self.zero_null:
            text_BLD, pooled_BP = self.encode_prompts(prompts)
            return (text_BLD, pooled_BP), (torch.zeros_like(text_BLD), torch.zeros_like(pooled_BP))
        # Encoded with the prompts, the empty one has as many states as they do.
        text_BLD, pooled_BP = self.encode_prompts([*prompts, ""])
        null_BLD, null_BP = text_BLD[-1:].expand(len(prompts), -1, -1), pooled_BP[-1:].expand(len(prompts), -1)
        return (text_BLD[:-1], pooled_BP[:-1]), (null_BLD, null_BP)


def prompt_noise(size_hw: SizeHW, seed: int, index: int) -> Tensor:
    """Return picture `index`'s starting noise C x H x W for pictures of `size_hw` pixels."""
    shape = (LATENT_CHANNELS, size_hw[0] // VAE_FACTOR, size_hw[1] // VAE_FACTOR)
    return torch.randn(shape, generator=torch_generator(seed, Stream.PREVIEW, index))


def to_picture(pixels_CHW: Tensor) -> Picture:
    """Turn pixels in [-1, 1] into 8 bits."""
    bytes_HWC = ((pixels_CHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return numpy.ascontiguousarray(bytes_HWC.numpy())


def make_grid(pictures: Sequence[Picture], prompts: Sequence[str], columns: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows with their prompts below; small ones are enlarged to be seen."""
    enlarge = max(1, round(160 / max(pictures[0].shape[:2])))
    height, width = (side * enlarge for side in pictures[0].shape[:2])
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    gap, strip = 8, 20
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + strip + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + strip + gap)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        while prompt and pen.textlength(prompt, font=font) > width:
            prompt = prompt[:-2].rstrip(" …") + "…" if len(prompt) > 2 else ""
        pen.text((left, top + height + 3), prompt, fill=(60, 60, 60), font=font)
    return sheet
