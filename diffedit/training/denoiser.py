"""The denoiser and its text encoder, trained together on latents of drawn scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffedit.training.autoencoder import HELD_OUT, to_tensor
from diffedit.training.latents import Growth, LatentPool, World, encode
from diffedit.training.loop import Ema
from diffedit.training.optim import optimizers
from diffedit.training.scenes import draw_scene, render
from diffedit.training.text import HIDDEN, build_text_encoder, tokenise

WIDTHS = (64, 128, 192)

FOCUS = (550, 900)
"""The timesteps at which the words decide the outline (signal-to-noise ratios 0.2 to 0.004).

Measured half-way through the training: a wrong shape word raises the error there by 6 %, by less
than 1 % below timestep 400.
"""


def build_unet(widths: tuple[int, ...] = WIDTHS, sample_size: int = 16) -> UNet2DConditionModel:
    """A ``UNet2DConditionModel`` of random weights with cross-attention at every level.

    Without it at the finest level the words reach only the coarse ones, and shapes are not learnt.
    ``sample_size`` is the native side in latent cells of 8 pixels.
    """
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        # diffusers reads this as the number of heads: 32 channels to a head at every level.
        attention_head_dim=tuple(max(1, width // 32) for width in widths),
        norm_num_groups=32 if min(widths) >= 32 else min(widths),
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to zero terminal signal (Lin et al. 2023, arXiv:2305.08891)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )


@dataclass(frozen=True, slots=True)
class Phase:
    """From step ``start`` on, batches come from ``worlds`` with these shares (they sum to 1).

    ``rate`` multiplies the learning rates; ``focus`` is the share of timesteps drawn from
    :data:`FOCUS`, the rest comes from the whole range; ``floor`` is the least weight at its noisy
    end; ``backdrop`` is the weight of the cells away from objects.
    """

    start: int
    worlds: tuple[tuple[World, float], ...]
    rate: float = 1.0
    focus: float = 0.0
    floor: float = 0.2
    backdrop: float = 1.0


class DenoiserTask:
    """v-prediction with min-SNR weights (Hang et al. 2023) and caption dropout.

    The min-SNR-5 weight of v-prediction, min(snr, 5) / (snr + 1), vanishes where the signal does;
    there the picture's composition is decided, so the weight has a floor at that end.
    """

    def __init__(
        self,
        folder: Path,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        phases: Sequence[Phase],
        *,
        seed: int = 0,
        batch: int = 32,
        widths: tuple[int, ...] = WIDTHS,
        dropout: float = 0.1,
        growth: Growth | None = None,
        held_out: int = 96,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed + 1)
        self.unet = build_unet(widths).to(device)
        if device == "cpu":
            # At these sizes the fused kernel's backward costs more than the whole plain attention.
            self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = build_text_encoder(tokenizer).to(device)
        self.modules: Mapping[str, nn.Module] = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
        }
        self.optimizers = optimizers(self.modules.values(), muon_lr=2e-3, adam_lr=5e-4)
        self.phases, self.batch, self.dropout = phases, batch, dropout
        self.growth = growth or Growth()
        self.device = torch.device(device)
        self.signal = build_scheduler().alphas_cumprod
        self.empty = tokenise(tokenizer, [""])
        worlds = {world.name: world for phase in phases for world, _ in phase.worlds}
        self.pools = {
            name: LatentPool(folder, vae, tokenizer, world, seed, self.growth.size)
            for name, world in worlds.items()
        }
        first = phases[0].worlds[0][0]
        scenes = [draw_scene(seed + HELD_OUT, i, first.mix) for i in range(held_out)]
        drawn = [torch.from_numpy(render(scene, first.side).image) for scene in scenes]
        self.held_latents = encode(vae, to_tensor(torch.stack(drawn).numpy()))
        self.held_tokens = tokenise(tokenizer, [scene.caption for scene in scenes])

    def parts(self, step: int, generator: torch.Generator) -> list[Callable[[], Tensor]]:
        """Batch number ``step``, all of one world, with some captions dropped."""
        phase = self._phase(step)
        shares = torch.tensor([share for _, share in phase.worlds])
        world = phase.worlds[int(torch.multinomial(shares, 1, generator=generator))][0]
        begun = min(p.start for p in self.phases if any(w.name == world.name for w, _ in p.worlds))
        chunks = self.growth.chunks(step - begun)
        # A picture of twice the side costs four times as much: half as many of them.
        size = max(1, self.batch * 128 // max(world.side, 128))
        latents, tokens, objects = self.pools[world.name].batch(size, chunks, generator)
        dropped = torch.rand(size, 1, generator=generator) < self.dropout
        tokens = torch.where(dropped, self.empty, tokens)
        focused = round(phase.focus * size)
        timesteps = torch.cat(
            [_spread(focused, FOCUS, generator), _spread(size - focused, (0, 1000), generator)]
        )
        noise = torch.randn(latents.shape, generator=generator)
        # Weights of cells leave the best prediction of each cell what it is, but less of the
        # gradient is then noise from photographs, which no caption describes.
        where = phase.backdrop + (1 - phase.backdrop) * objects
        # Dealt out like cards: each part sees the whole range of timesteps.
        count = 1 if self.device.type != "cpu" else min(2, size)
        deals = [slice(first, None, count) for first in range(count)]
        return [
            partial(
                self._loss,
                latents[d],
                tokens[d],
                timesteps[d],
                noise[d],
                where[d],
                phase.floor,
                size,
            )
            for d in deals
        ]

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied with in the phase of ``step``."""
        return self._phase(step).rate

    def _phase(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.start <= step][-1]

    def _loss(
        self,
        latents: Tensor,
        tokens: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        where: Tensor,
        floor: float,
        size: int,
    ) -> Tensor:
        """A part's share of the weighted v error of a batch of ``size``."""
        error, snr = self.error(latents, tokens, timesteps, noise, where)
        weight = snr.clamp_max(5) / (snr + 1)
        weight = torch.where(snr < 1, weight.clamp_min(floor), weight)
        return (weight * error).sum() / size

    def error(
        self,
        latents: Tensor,
        tokens: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        where: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The squared v error of each item and its signal-to-noise ratio, both (n,).

        ``where`` weighs the cells, (n, h, w).
        """
        alpha = self.signal[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            words = self.text_encoder(tokens.to(self.device)).last_hidden_state
            predicted = self.unet(
                noised.to(self.device),
                timesteps.to(self.device),
                encoder_hidden_states=words,
            ).sample
        error = F.mse_loss(predicted.float(), target.to(self.device), reduction="none")
        snr = (alpha / (1 - alpha)).flatten().to(self.device)
        if where is not None:
            error = error * where.unsqueeze(1).to(self.device)
        return error.mean(dim=(1, 2, 3)), snr

    @torch.no_grad()
    def validate(self, ema: Ema) -> dict[str, float]:
        """The min-SNR-5 loss (no floor) on held-out scenes, at fixed noise and timesteps."""
        generator = torch.Generator().manual_seed(1)
        count = len(self.held_latents)
        noise = torch.randn(self.held_latents.shape, generator=generator)
        timesteps = (torch.arange(count) + 0.5).mul(1000 / count).long()
        timesteps = timesteps[torch.randperm(count, generator=generator)]
        total = 0.0
        with ema.applied(self.modules):
            for rows in torch.arange(count).split(32):
                error, snr = self.error(
                    self.held_latents[rows], self.held_tokens[rows], timesteps[rows], noise[rows]
                )
                total += float((snr.clamp_max(5) / (snr + 1) * error).sum())
        return {"loss": round(total / count, 5)}


def _spread(count: int, span: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``count`` random timesteps in ``[low, high)``, one in each of as many equal cells.

    Covering the range in every batch steadies the gradient.
    """
    low, high = span
    cells = (torch.arange(count) + torch.rand(count, generator=generator)) / max(1, count)
    return (low + cells * (high - low)).long().clamp_max(high - 1)
