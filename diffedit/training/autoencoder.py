"""The autoencoder: 8 pixels to a latent cell, 4 channels, made to be cheap on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from diffedit.training.loop import Ema
from diffedit.training.optim import optimizers
from diffedit.training.pool import pool, vae_picture

WIDTHS = (32, 64, 96, 96)
HELD_OUT = 1_000_003
"""Added to a world's seed for the scenes that are judged on, never trained on."""


def build_autoencoder(widths: tuple[int, ...] = WIDTHS) -> AutoencoderKL:
    """An ``AutoencoderKL`` of random weights whose posterior starts narrow.

    The default start has a posterior of σ ≈ 1, which drowns the latents in noise and stalls the
    first thousand steps; a log-variance of -6 (σ = 0.05) does not.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        # Attention in the middle would tie the cost to the square of the picture's area.
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        weight[4:] *= 0.1
        bias[4:] = -6.0
    return vae


def to_tensor(pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of (n, 3, h, w) in [-1, 1], averaged over pictures."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
    return float((10 * torch.log10(4 / error)).mean())


class AutoencoderTask:
    """Reconstruction of 64-px crops of drawn scenes and of the training photographs."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        pictures: int = 16_384,
        batch: int = 32,
        crop: int = 64,
        held_out: int = 128,
        widths: tuple[int, ...] = WIDTHS,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.vae = build_autoencoder(widths).to(device, memory_format=torch.channels_last)
        self.modules: Mapping[str, nn.Module] = {"vae": self.vae}
        self.optimizers = optimizers([self.vae], muon_lr=2e-3, adam_lr=1e-3)
        self.batch, self.crop, self.device = batch, crop, torch.device(device)
        self.part = batch if device != "cpu" else max(1, batch // 4)
        self.pool = pool(
            folder / "pictures.npy", pictures, partial(vae_picture, seed=seed, side=128), 128
        )
        held = [vae_picture(i, seed=seed + HELD_OUT, side=128) for i in range(held_out)]
        self.held_scenes = to_tensor(np.stack([held[i] for i in range(held_out) if i % 8 < 4]))
        self.held_crops = to_tensor(np.stack([held[i] for i in range(held_out) if 4 <= i % 8 < 7]))

    def parts(self, step: int, generator: torch.Generator) -> list[Callable[[], Tensor]]:
        """Batch number ``step``: random crops of the pool's pictures."""
        numbers = torch.randint(len(self.pool), (self.batch,), generator=generator)
        room = self.pool.shape[1] - self.crop + 1
        corners = torch.randint(room, (self.batch, 2), generator=generator).tolist()
        crops = [
            self.pool[int(n), y : y + self.crop, x : x + self.crop]
            for n, (y, x) in zip(numbers, corners, strict=True)
        ]
        pixels = to_tensor(np.stack(crops))
        noise = torch.randn(self.batch, 4, self.crop // 8, self.crop // 8, generator=generator)
        pieces = zip(pixels.split(self.part), noise.split(self.part), strict=True)
        return [partial(self._loss, *piece) for piece in pieces]

    def rate(self, step: int) -> float:
        """One learning rate throughout."""
        return 1.0

    def _loss(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """A part's share of: squared and absolute error of a reconstruction, a whisper of KL."""
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            posterior = self.vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * noise.to(self.device)
            output = self.vae.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss: Tensor = 4 * F.mse_loss(output, pixels) + F.l1_loss(output, pixels) + 1e-5 * kl
        share: Tensor = loss * (len(pixels) / self.batch)
        return share

    @torch.no_grad()
    def validate(self, ema: Ema) -> dict[str, float]:
        """PSNR in dB on held-out scenes and on unseen crops of the training photographs."""
        with ema.applied(self.modules):
            return {
                "scenes_db": round(psnr(self.reconstruct(self.held_scenes), self.held_scenes), 2),
                "photos_db": round(psnr(self.reconstruct(self.held_crops), self.held_crops), 2),
            }

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] through the autoencoder, without noise, on the CPU."""
        parts = []
        for part in pixels.split(16):
            part = part.to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16):
                parts.append(self.vae.decode(self.vae.encode(part).latent_dist.mode()).sample)
        return torch.cat(parts).float().cpu()
