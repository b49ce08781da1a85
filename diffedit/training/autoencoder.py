"""The autoencoder: 8 pixels to a latent cell, 4 channels, made to be cheap on a CPU."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diffedit.errors import InputError
from diffedit.training import parts as models
from diffedit.training.config import AutoencoderTraining
from diffedit.training.data import Subset, split
from diffedit.training.denoising import source
from diffedit.training.export import export, fold_statistics
from diffedit.training.kernels import quick
from diffedit.training.loop import Picture, Rows
from diffedit.training.optim import adamw, optimizers
from diffedit.training.pictures import psnr, stored, to_pictures, to_tensor
from diffedit.training.world.source import Drawn

log = logging.getLogger(__name__)

_SHOWN = 6
"""Reconstructions in a sample grid."""

_STRIDES = (2, 2, 1, 1)
"""Of the discriminator's convolutions."""

_MOMENTS = 256
"""Pictures from which the statistics of a new autoencoder's latents are taken."""


class AutoencoderTask:
    """Reconstruction of random crops: squared and absolute error, edges, KL, perhaps a judge.

    ``widths`` in the training makes a new autoencoder (Rombach et al. 2022, arXiv:2112.10752); the
    other parts of the model are kept as they are, and its UNet does not know the new latents.
    ``decoder_only`` trains what comes after the latents, on the latents' means.

    With ``adversarial``, a patch discriminator learns beside it to tell reconstructions from
    pictures, by the hinge loss. Both are one sum, whose parts share no gradients: the
    reconstruction is judged by frozen weights, and the discriminator sees it detached.
    """

    def __init__(self, training: AutoencoderTraining, device: torch.device) -> None:
        torch.manual_seed(training.seed + 1)
        self.training, self.device = training, device
        every = source(training.data, training.seed)
        rest, held = split(every, min(training.data.held_out, len(every) // 4), training.seed)
        self.parts = models.load(training.model, device)
        if training.widths is not None:
            made = new_autoencoder(training.widths, training.data.side).to(device)
            self.parts.vae = made.to(memory_format=torch.channels_last)
            quick(made)
        self.vae = self.parts.vae
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side, crop = training.data.side, training.crop
        if crop > side or crop % self.factor or side % self.factor:
            raise InputError(
                f"crops of {crop} pixels of pictures of {side}: should be no larger, and both"
                f" multiples of {self.factor}"
            )
        self.digest = rest.digest
        self.pictures_on_disk = stored(training.out, rest)
        self.held = {name: stored(training.out, held)[rows] for name, rows in _groups(held).items()}
        self.vae.requires_grad_(True).train()
        if training.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        if training.checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.modules: Mapping[str, nn.Module] = {"vae": self.vae}
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers(
            [self.vae], training.optimiser
        )
        self.judge = Discriminator().to(device)
        if training.adversarial:
            self.modules = {**self.modules, "discriminator": self.judge}
            # Less momentum than usual: what it is to find moves.
            own = adamw([*self.judge.parameters()], training.optimiser.rate, betas=(0.5, 0.9))
            self.optimizers = [*self.optimizers, own]

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        """Random crops, the noise of their latents, ``judged`` once the discriminator counts."""
        size, crop = self.training.batch, self.training.crop
        every = self.pictures_on_disk
        numbers = torch.randint(len(every), (size,), generator=generator).tolist()
        room = every.shape[1] - crop + 1
        corners = torch.randint(room, (size, 2), generator=generator).tolist()
        crops = [
            every[number, y : y + crop, x : x + crop]
            for number, (y, x) in zip(numbers, corners, strict=True)
        ]
        cells = crop // self.factor
        shape = (size, self.vae.config.latent_channels, cells, cells)
        rows = {
            "pixels": to_tensor(np.stack(crops)),
            "noise": torch.randn(shape, generator=generator),
        }
        if self.training.adversarial and step >= self.training.adversarial_from:
            rows["judged"] = torch.ones(size)
        return rows

    def loss(self, rows: Rows) -> Tensor:
        """The weighted sum of all losses; each is a mean over numbers, KL over latent numbers."""
        training = self.training
        pixels = rows["pixels"].to(self.device, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean
        if not training.decoder_only:
            latents = mean + torch.exp(0.5 * logvar) * rows["noise"].to(self.device)
        output = self.vae.decode(latents).sample.float()
        # Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = training.mse * functional.mse_loss(output, pixels)
        loss = loss + training.l1 * functional.l1_loss(output, pixels)
        if training.gradient:
            loss = loss + training.gradient * edge_error(output, pixels)
        if not training.decoder_only:
            loss = loss + training.kl * kl
        if "judged" in rows:
            loss = loss + adversarial_loss(self.judge, output, pixels, training.adversarial)
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB on whole held-out pictures; of a drawn world, scenes and photographs apart."""
        return {
            f"{name}, dB": psnr(self.reconstructed(pixels), pixels)
            for name, pixels in ((name, to_tensor(held)) for name, held in self.held.items())
        }

    @torch.no_grad()
    def pictures(self) -> list[tuple[str, Picture]]:
        """Held-out pictures, each with its reconstruction to the right."""
        made: list[tuple[str, Picture]] = []
        share = -(-_SHOWN // max(1, len(self.held)))
        for name, held in self.held.items():
            shown = held[:share]
            again = to_pictures(self.reconstructed(to_tensor(shown)))
            made += [
                (name, np.concatenate(pair, axis=1)) for pair in zip(shown, again, strict=True)
            ]
        return made

    @torch.no_grad()
    def reconstructed(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] through the autoencoder, without noise, on the CPU."""
        made = []
        for part in pixels.split(8):
            on_device = part.to(self.device, memory_format=torch.channels_last)
            latents = self.vae.encode(on_device).latent_dist.mode()
            made.append(self.vae.decode(latents).sample.float().cpu())
        return torch.cat(made)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """The whole model with this autoencoder, as a Stable Diffusion folder.

        A new autoencoder's latents get mean 0 and standard deviation 1 per channel first.
        """
        vae = copy.deepcopy(self.vae).eval()
        side = self.factor * int(self.parts.unet.config.sample_size)
        if self.training.widths is not None:
            side = self.training.data.side
            chosen = np.linspace(0, len(self.pictures_on_disk) - 1, _MOMENTS).astype(int)
            moments = [
                vae.encode(part.to(self.device)).latent_dist.parameters
                for part in to_tensor(self.pictures_on_disk[np.unique(chosen)]).split(8)
            ]
            fold_statistics(vae, torch.cat(moments))
            log.info("the UNet in %s knows no latents like these: train a denoiser next", folder)
        export(folder, replace(self.parts, vae=vae), side=side)


def new_autoencoder(widths: tuple[int, ...], side: int) -> AutoencoderKL:
    """An ``AutoencoderKL`` of random weights whose posterior starts narrow.

    The default start has a posterior of σ ≈ 1, which drowns the latents in noise and stalls the
    first thousand steps; a log-variance of -6 (σ = 0.05) does not.

    Args:
        widths: channels per level, the finest first; multiples of 8.
        side: what the configuration names as native size, in pixels.
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
        sample_size=side,
        scaling_factor=1.0,
        # Attention in the middle would tie the cost to the square of the picture's area.
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    return vae


class Discriminator(nn.Module):
    """Says of every patch of 34 pixels whether it is of a picture: (n, 3, h, w) -> (n, 1, h', w').

    Isola et al. 2017 (arXiv:1611.07004), section 3.2.2 and appendix 6.1.2, with group
    instead of batch normalisation, so that rows do not depend on each other.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(
            [
                nn.Conv2d(3, width, 4),
                nn.Conv2d(width, 2 * width, 4, bias=False),
                nn.Conv2d(2 * width, 4 * width, 4, bias=False),
                nn.Conv2d(4 * width, 1, 4),
            ]
        )
        self.norms = nn.ModuleDict(
            {"1": nn.GroupNorm(8, 2 * width), "2": nn.GroupNorm(8, 4 * width)}
        )

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """High where a patch passes for one of a picture; ``frozen`` weights get no gradient."""
        # Detached here and not in the module, which other threads are using.
        weights = {k: v.detach() if frozen else v for k, v in self.named_parameters()}
        for number, stride in enumerate(_STRIDES):
            name = f"kernels.{number}"
            bias = weights.get(f"{name}.bias")
            x = functional.conv2d(x, weights[f"{name}.weight"], bias, stride, padding=1)
            if str(number) in self.norms:
                name = f"norms.{number}"
                x = functional.group_norm(x, 8, weights[f"{name}.weight"], weights[f"{name}.bias"])
            if number + 1 < len(_STRIDES):
                x = functional.leaky_relu(x, 0.2)
        return x


def adversarial_loss(judge: Discriminator, output: Tensor, real: Tensor, weight: float) -> Tensor:
    """``weight`` times the generator's hinge loss, plus the discriminator's: a scalar.

    −E[D(x̂)] and E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))] (Lim & Ye 2017, arXiv:1705.02894,
    eqs. 7-8). The first moves ``output`` alone, the second ``judge`` alone.
    """
    fooled = judge(output, frozen=True).float().mean()
    of_real, of_made = judge(real).float(), judge(output.detach()).float()
    told = functional.relu(1 - of_real).mean() + functional.relu(1 + of_made).mean()
    loss: Tensor = told - weight * fooled
    return loss


def edge_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, along both axes; a scalar.

    The gradient difference loss of Mathieu et al. 2016 (arXiv:1511.05440, eq. 6) with α = 1 and
    signed differences, so that an edge of the wrong direction is an error too.
    """
    error = output - target
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def _groups(held: Subset) -> dict[str, NDArray[np.int64]]:
    """Which held-out rows are judged together, by name."""
    drawn = held.source
    if not len(held):
        return {}
    if not isinstance(drawn, Drawn):
        return {"pictures": np.arange(len(held))}
    scenes = [drawn.scene(int(row)) for row in held.rows]
    bare = np.array([s.background.kind == "photo" and not s.things for s in scenes])
    groups = {"scenes": np.flatnonzero(~bare), "photographs": np.flatnonzero(bare)}
    return {name: rows for name, rows in groups.items() if len(rows)}
