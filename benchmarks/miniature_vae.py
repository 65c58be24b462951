"""How well does the miniature's autoencoder reconstruct pictures it has never seen?

    python benchmarks/miniature_vae.py --train      # train it: about 10 minutes on one core
    python benchmarks/miniature_vae.py --measure    # PSNR, latents and what the judge reads

Pictures come from the demo generator with other seeds than the demo itself, resized to the miniature's bucket shapes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from demo_quality import judge_picture
from sdxl_training.data.demo_set import PICTURE_SIZES_HW, PictureSpec, draw_picture, draw_specs

FOLDER = Path(__file__).parents[1] / "src" / "sdxl_training" / "model" / "miniature" / "vae"
SHARES_OF_BUCKET_HW = {
    (64, 64): 0.5,
    (48, 80): 0.15,
    (80, 48): 0.15,
    (48, 64): 0.07,
    (64, 48): 0.07,
    (32, 96): 0.03,
    (96, 32): 0.03,
}
TRAINING_SEED, LATENT_SEED, HELD_OUT_SEED = 1001, 1002, 1003
SCALING_FACTOR = 0.13025  # SDXL's own; the latents are standardised to fit it, so no code path is spared
KL_WEIGHT = 1e-3


def new_autoencoder() -> AutoencoderKL:
    """Return the untrained autoencoder: SDXL's classes and factor 8, narrow and one residual block deep."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def pictures_in_bucket(specs: list[PictureSpec], bucket_hw: tuple[int, int]) -> Tensor:
    """Draw `specs` at the demo's size of the nearest aspect ratio, fit it to the bucket; (N, 3, H, W) in [-1, 1]."""

    def aspect_gap(size_hw: tuple[int, int]) -> float:
        return abs(math.log(size_hw[0] / size_hw[1] * bucket_hw[1] / bucket_hw[0]))

    size_hw = min(PICTURE_SIZES_HW, key=aspect_gap)
    pictures = [Image.fromarray(draw_picture(spec, size_hw)) for spec in specs]
    fitted = [ImageOps.fit(picture, bucket_hw[::-1], Image.Resampling.LANCZOS) for picture in pictures]
    return (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted])).permute(0, 3, 1, 2).float() / 127.5
        - 1.0
    )


def pictures_by_bucket(seed: int, count: int) -> dict[tuple[int, int], Tensor]:
    return {
        bucket_hw: pictures_in_bucket(draw_specs(seed + 10 * number, max(8, int(count * share))), bucket_hw)
        for number, (bucket_hw, share) in enumerate(SHARES_OF_BUCKET_HW.items())
    }


def training_batches(steps: int, batch_size: int) -> Iterator[Tensor]:
    torch.manual_seed(TRAINING_SEED)
    pictures = pictures_by_bucket(TRAINING_SEED, 6000)
    shapes, shares = list(pictures), torch.tensor(list(SHARES_OF_BUCKET_HW.values()))
    for _ in range(steps):
        pool = pictures[shapes[int(torch.multinomial(shares, 1))]]
        yield pool[torch.randint(len(pool), (batch_size,))].contiguous(memory_format=torch.channels_last)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for convolutions and matrices (K. Jordan et al., "Muon", 2024).

    AdamW stayed below 16 dB in the 400 steps it was given here: pictures of flat colour give badly scaled gradients.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every weight from its gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal(weight.grad + group["momentum"] * velocity)
                stretch = max(1.0, weight.shape[0] / weight[0].numel()) ** 0.5
                weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * stretch)


def orthogonal(tensor: Tensor) -> Tensor:
    """Bring all singular values of the flattened tensor near 1 by Newton and Schulz's iteration."""
    matrix = tensor.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x if wide else x.T).reshape(tensor.shape)


def new_optimizers(model: AutoencoderKL, peak_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner weights, AdamW for biases, norms and the layers at the two ends and at the latents."""
    ends = ("conv_in.weight", "quant_conv.weight", "decoder.conv_out.weight")
    inner, others = [], []
    for name, weight in model.named_parameters():
        (inner if weight.ndim >= 2 and not name.endswith(ends) else others).append(weight)
    return [Muon(inner, lr=peak_lr), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)]


def train(steps: int, batch_size: int = 8, peak_lr: float = 0.04) -> AutoencoderKL:
    torch.manual_seed(0)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    with torch.no_grad():  # begin with a narrow posterior: pure noise teaches the decoder nothing
        model.quant_conv.weight[4:] *= 0.1
        model.quant_conv.bias[4:] = -5.0

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 30) * (1.0 - step / steps)

    optimizers = new_optimizers(model, peak_lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step, pixels in enumerate(training_batches(steps, batch_size)):
        posterior = model.encode(pixels).latent_dist
        difference = model.decode(posterior.sample()).sample - pixels
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = difference.abs().mean() + difference.square().mean() + KL_WEIGHT * divergence
        model.zero_grad()
        loss.backward()
        for acting in (*optimizers, *schedules):
            acting.step()
        if step % 50 == 0:
            psnr = 10 * math.log10(4.0 / difference.square().mean().item())
            print(f"step {step}  loss {loss.item():.4f}  KL {divergence.item():.3f}  PSNR {psnr:.2f} dB", flush=True)
    return model.eval()


@torch.no_grad()
def standardise_latents(model: AutoencoderKL) -> None:
    """Fold shift and scale per channel into the 1x1 convolutions: scaled latents get mean 0, standard deviation 1."""
    means = [
        model.encode(pool).latent_dist.mean.transpose(0, 1).flatten(1)
        for pool in pictures_by_bucket(LATENT_SEED, 1000).values()
    ]
    std_C, mean_C = torch.std_mean(torch.cat(means, dim=1), dim=1)
    gain_C = 1.0 / (SCALING_FACTOR * std_C)
    to_mean, to_log_variance = model.quant_conv.weight[:4], model.quant_conv.bias[4:]
    model.quant_conv.bias[:4] = (model.quant_conv.bias[:4] - mean_C) * gain_C
    to_mean *= gain_C[:, None, None, None]
    to_log_variance += 2.0 * gain_C.log()
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean_C
    model.post_quant_conv.weight /= gain_C[None, :, None, None]


def save(model: AutoencoderKL, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {"_class_name": "AutoencoderKL", **{k: v for k, v in model.config.items() if not k.startswith("_")}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(folder: Path, pictures: int) -> dict[str, float]:
    """PSNR over held-out pixels, statistics of scaled latents, share of reconstructions that the judge reads right."""
    model = AutoencoderKL.from_pretrained(folder).eval()
    squares, latents, right, judged = [], [], 0, 0
    for number, (bucket_hw, share) in enumerate(SHARES_OF_BUCKET_HW.items()):
        specs = draw_specs(HELD_OUT_SEED + 10 * number, max(8, int(pictures * share)))
        pixels = pictures_in_bucket(specs, bucket_hw)
        latent = model.encode(pixels).latent_dist.mean
        drawn = model.decode(latent).sample.clamp(-1, 1)
        squares.append((drawn - pixels).square().flatten())
        latents.append(latent.transpose(0, 1).flatten(1) * model.config.scaling_factor)
        for spec, image in zip(specs, (drawn * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy(), strict=True):
            if spec.size != "small":
                judged += 1
                right += judge_picture(image) == (spec.colour, spec.background, spec.shape)
    flat = torch.cat(latents, dim=1)
    return {
        "psnr_db": 10 * math.log10(4.0 / torch.cat(squares).mean().item()),
        "judged_right": right / judged,
        "latent_mean": flat.mean().item(),
        "latent_std": flat.std().item(),
        "latent_kurtosis": ((flat - flat.mean()) / flat.std()).pow(4).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train anew and overwrite the files in --folder")
    parser.add_argument("--measure", action="store_true", help="measure the files in --folder on held-out pictures")
    parser.add_argument("--steps", type=int, default=1400, help="training steps of 8 pictures")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if not (arguments.train or arguments.measure):
        parser.error("name --train, --measure or both")
    if arguments.train:
        model = train(arguments.steps)
        standardise_latents(model)
        save(model, arguments.folder)
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.pictures), indent=2))


if __name__ == "__main__":
    main()
