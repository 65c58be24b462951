"""Frozen records that cross the layers.

Shape legend: B samples, C latent channels, H x W latent rows and columns, L tokens, D text width, P pooled text width.
`size_hw` is always (height, width); pixels unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is slow to import and the configuration is checked before it
    from torch import Tensor

SizeHW = tuple[int, int]


class UserError(Exception):
    """A mistake a user can mend: printed as a sentence without a traceback, exit status 2.

    The message names the place, the value, the rule and the remedy.
    """


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture of a source whose header could be read, before it is decoded.

    `sample_id` is stable across machines and moves of the source: it hashes the source's number and the picture's name.
    path: what people are shown. captions: alternatives, of which a visit shows one; at least one, which may be empty.
    tags: those of the first caption, or given beside it. source: its number in the configuration. picture: its number
    among all pictures, by which its bytes and its content hash are found. focus: the box (top, left, height, width) to
    keep, as written.
    """

    sample_id: int
    path: str
    size_hw: SizeHW
    captions: tuple[str, ...]
    tags: tuple[str, ...]
    repeats: int = 1
    source: int = 0
    picture: int = 0
    focus: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A picture that cannot be used, and why; one line of quarantine.jsonl."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A picture size that a whole global batch shares."""

    size_hw: SizeHW

    @property
    def aspect(self) -> float:
        """Height divided by width."""
        return self.size_hw[0] / self.size_hw[1]

    def __str__(self) -> str:
        return f"{self.size_hw[0]}x{self.size_hw[1]}"


@dataclass(frozen=True, slots=True)
class CropPlan:
    """How a picture becomes its bucket: resize to `resized_hw` (always covering), cut the bucket out, maybe mirror it.

    `crop_tl` is (top, left) in pixels of the resized picture before it is mirrored.
    """

    original_hw: SizeHW
    resized_hw: SizeHW
    crop_tl: tuple[int, int]
    bucket: Bucket
    flipped: bool = False

    @property
    def cropped_fraction(self) -> float:
        """Share of the resized picture's area that the crop cuts away."""
        kept = self.bucket.size_hw[0] * self.bucket.size_hw[1]
        return 1.0 - kept / (self.resized_hw[0] * self.resized_hw[1])

    @property
    def scale(self) -> float:
        """Resized length over original length; above 1 is an upscale."""
        return max(self.resized_hw[0] / self.original_hw[0], self.resized_hw[1] / self.original_hw[1])

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original (h, w), crop (top, left), target (h, w), of the picture as shown.

        In a mirrored picture the crop's left is counted from the side that was the right one.
        """
        (top, left), (target_h, target_w) = self.crop_tl, self.bucket.size_hw
        if self.flipped:
            left = self.resized_hw[1] - target_w - left
        return (*self.original_hw, top, left, target_h, target_w)


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of a record in training.

    `visit` counts how often the record has been drawn before it, over epochs and repeats. All randomness of the
    sample is a function of (seed, stream, visit, sample id), so it does not depend on step, batch size or world size.
    """

    record: int
    visit: int


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the U-Net is told beside the latents: text states, pooled text, SDXL size conditioning."""

    text_BLD: Tensor
    pooled_BP: Tensor
    time_ids_B6: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on the device; the only thing the training step sees of the data.

    latents_BCHW: scaled latents, fp32. noise_BCHW: the noise of the targets, fp32. weight_B: loss weight per sample,
    mean 1 over the data set, fp32.
    sample_ids and visits: one integer a sample; together with the seed they fix the sample's randomness. tagged: number
    of the picture whose tags a sample's caption tells of, -1 where the caption is dropped or empty, or the picture has
    no finite latent.
    step, slots and global_batch: the update, the samples' places in its global batch, and how many samples that has.
    """

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    conditioning: Conditioning
    weight_B: Tensor
    sample_ids: tuple[int, ...]
    visits: tuple[int, ...]
    step: int
    slots: tuple[int, ...]
    global_batch: int
    tagged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer update leaves behind; tensors stay on the device until somebody logs them.

    loss: this rank's share of the weighted mean over the global batch; shares add up. grad_norm: global norm before
    clipping. skipped: 1 where a non-finite loss or gradient made the update void.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
