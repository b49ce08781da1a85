"""What families share that goes from pixels to latents and back."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from diffedit.models.autoencoder import drawn, grain
from diffedit.models.preview import Look

#: Hints that are kept encoded: those of a pass.
HINTS = 8


class AutoencodedModel(ABC):
    """The part of a `LatentModel` that its autoencoder does.

    Args:
        vae: the autoencoder, one of diffusers'.

    Attributes:
        cell: pixels along one side of a latent cell.
        channels: of the latents.
        space: equal for models that understand each other's latents.
        video: whether the autoencoder is one of videos, of which a picture is one frame.
        unscaled: roles of channels that take latents as the autoencoder makes them (Brooks et al.
            2023, "InstructPix2Pix", arXiv:2211.09800, was trained so).
    """

    video: ClassVar[bool] = False
    unscaled: frozenset[str] = frozenset({"image"})

    def __init__(self, vae: Any) -> None:
        self.vae: Any = vae
        self.cell, self.channels = grain(vae.config)
        said = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        scales = [vae.config.get(name) for name in said]
        self.space = json.dumps([self.cell, self.channels, *scales])
        self._look: Look | None = None
        self._hints: list[tuple[Tensor, int, float | None, Tensor]] = []

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type that the denoiser computes in."""

    def forget(self) -> None:
        """Let go of the hints of a pass."""
        self._hints = []

    @property
    def _vae_dtype(self) -> torch.dtype:
        return cast(torch.dtype, next(self.vae.parameters()).dtype)

    def encode(
        self,
        pixels: Tensor,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        """Encode ``(b, 3, h, w)`` in [0, 1]: the posterior's mean, or a sample with a generator."""
        latents = self._encoded(pixels, generator)
        return latents if role in self.unscaled else self._scaled(latents)

    def _scaled(self, latents: Tensor) -> Tensor:
        """As the denoiser takes what the autoencoder makes."""
        settings = self.vae.config
        if (known := self._statistics()) is not None:
            mean, deviation = known
            return cast(Tensor, (latents - mean) * settings.scaling_factor / deviation)
        if shift := settings.get("shift_factor"):
            return cast(Tensor, (latents - shift) * settings.scaling_factor)
        return cast(Tensor, settings.scaling_factor * latents)

    def _encoded(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        pixels = (2.0 * pixels - 1.0).to(self.device)
        if self.video:
            pixels = pixels[:, :, None]
        if generator is None:
            made = drawn(self.vae.encode(pixels.to(self._vae_dtype)))
        else:  # to compare, rounded as in diffusers, also where an autoencoder computes more finely
            finer = pixels.to(self.dtype).to(self._vae_dtype)
            made = drawn(self.vae.encode(finer), generator).to(self.dtype)
        return made[:, :, 0] if self.video else made

    def _shown(self, hint: Tensor, rows: int, shift: float | None = None) -> Tensor:
        """A hint as latents, encoded once; for every row, as a batch of one has other bits.

        Args:
            hint: ``(1 or rows, 3, H, W)`` in [0, 1].
            rows: how many are wanted.
            shift: of the latents; None: the autoencoder's own.
        """
        for known, for_rows, known_shift, made in self._hints:
            if known is hint and (for_rows, known_shift) == (rows, shift):
                return made
        latents = self._encoded(hint.expand(rows, -1, -1, -1), None)
        if shift is None:
            latents = self._scaled(latents)
        else:
            latents = (latents - shift) * self.vae.config.scaling_factor
        self._hints = [(hint, rows, shift, latents), *self._hints[: HINTS - 1]]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to ``(b, 3, h, w)`` in [0, 1], float32."""
        settings = self.vae.config
        scale = settings.get("scaling_factor") or 1.0
        if (known := self._statistics()) is not None:
            mean, deviation = known
            latents = latents * deviation + mean * scale
        latents = (latents / scale + (settings.get("shift_factor") or 0.0)).to(self._vae_dtype)
        if self.video:
            latents = latents[:, :, None]
        pixels = self.vae.decode(latents, return_dict=False)[0].float()
        return cast(Tensor, ((pixels[:, :, 0] if self.video else pixels) / 2 + 0.5).clamp(0, 1))

    def _statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel, of autoencoders that name them."""
        said = [self.vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in said:
            return None
        mean, deviation = (torch.tensor(one, device=self.device).view(1, -1, 1, 1) for one in said)
        return mean, deviation

    def preview(self, x0: Tensor) -> Tensor:
        """A rough look at latents, by a map that is fitted once; see `models.preview`."""
        if self._look is None:
            self._look = Look(self.encode, self.cell, self.channels)
        return self._look(x0)
