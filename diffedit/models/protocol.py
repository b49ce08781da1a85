"""What a model family must be able to do, and the records that pass between it and the core.

Everything outside `diffedit.models` speaks in these terms; nothing outside asks which family a
model belongs to. Latents are ``(b, c, h, w)`` on this side of the protocol; a family that packs
them into tokens does so inside `LatentModel.predict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffedit.attention import Transform
from diffedit.rows import RowMap, index_on
from diffedit.schedulers import Schedule


@dataclass(frozen=True)
class Conditioning:
    """What the text (and the picture's geometry) say to the denoiser.

    `tensors` belongs to the family, with one rule: the first dimension of each counts prompts, so
    that the core can stack and repeat it without knowing what it means.
    """

    tensors: Mapping[str, Tensor]

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the first dimension, in order."""
        keys = parts[0].tensors.keys()
        return Conditioning({key: torch.cat([part.tensors[key] for part in parts]) for key in keys})

    def rows(self, indices: Sequence[int]) -> Conditioning:
        """Pick rows by index; an index may repeat."""
        return Conditioning(
            {
                key: value[index_on(tuple(indices), value.device)]
                for key, value in self.tensors.items()
            }
        )

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


@dataclass(frozen=True)
class Residuals:
    """What a control network adds to the features of a denoiser, one tensor per place."""

    places: tuple[Tensor, ...]

    def __add__(self, other: Residuals) -> Residuals:
        return Residuals(tuple(a + b for a, b in zip(self.places, other.places, strict=True)))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of the tensor at each place."""
        return [tuple(place.shape) for place in self.places]

    def spread(self, indices: Sequence[int], total: int) -> Residuals:
        """Put row ``k`` at row ``indices[k]`` of ``total`` rows; the others get zero."""
        if list(indices) == list(range(total)):
            return self
        places = []
        for place in self.places:
            full = place.new_zeros(total, *place.shape[1:])
            full[index_on(tuple(indices), place.device)] = place
            places.append(full)
        return Residuals(tuple(places))


@dataclass(frozen=True)
class ModelInput:
    """One call of the denoiser.

    Attributes:
        latents: ``(rows, c, h, w)``, scaled for the model, before `channels` are joined to them.
        timestep: scalar tensor, in the scheduler's units.
        conditioning: one entry per row.
        rows: what each row is: branch, item, and the reference it shows, if it shows one.
        channels: further inputs by role (``mask``: ``(rows, 1, h, w)``, 1 = may change;
            ``masked``: ``(rows, c, h, w)`` latents of the picture with the hole greyed out).
        residuals: what control networks add.
        guidance: the guidance scale, for models that take it as an input.
    """

    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning
    rows: RowMap
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    residuals: Residuals | None = None
    guidance: float | None = None

    def only(self, indices: Sequence[int]) -> ModelInput:
        """The same call with some of its rows."""
        if list(indices) == list(range(len(self.rows))):
            return self
        pick = index_on(tuple(indices), self.latents.device)
        return ModelInput(
            latents=self.latents[pick],
            timestep=self.timestep,
            conditioning=self.conditioning.rows(indices),
            rows=self.rows.only(indices),
            channels={role: value[pick] for role, value in self.channels.items()},
            guidance=self.guidance,
        )


class LatentModel(Protocol):
    """A latent-diffusion model as the core sees it.

    Attributes:
        capabilities: what edits may ask for. In use: ``control`` (control networks),
            ``shared_attention`` (attention terms and reference rows), ``mask_channels`` (the
            denoiser itself takes the mask and the masked picture), ``embedded_guidance`` (the
            guidance scale is an input of the denoiser).
        grid: pixels per latent cell along one side; working sizes are multiples of it.
        sides: the smallest and the largest side, in pixels, at which the model draws: of a working
            region, and of a picture from nothing.
        whole: the largest side at which it works on a whole picture that is there already.
        channels: channels of a latent.
        roles: further inputs of the denoiser by role, and how many channels each has: ``mask`` and
            ``masked`` of an inpainting model.
    """

    capabilities: frozenset[str]
    grid: int
    sides: tuple[int, int]
    whole: int
    channels: int
    roles: Mapping[str, int]

    @property
    def info(self) -> Mapping[str, Any]:
        """Name, family, sizes and the like, for people to read."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""

    def embed(self, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        """Embed prompts, one row each; `size` is the working (width, height) in pixels."""

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode ``(b, 3, h, w)`` in [0, 1] to latents: the mean, or a sample with a generator."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels ``(b, 3, h, w)`` in [0, 1], float32."""

    def preview(self, x0: Tensor) -> Tensor:
        """A cheap, rough look at latents: ``(b, 3, h, w)`` or smaller in [0, 1], float32."""

    def schedule(
        self, name: str | None, steps: int, at: float = 1.0, *, compat: bool = False
    ) -> Schedule:
        """The calls of a trip that starts at noise level `at`; None: the model's own scheduler."""

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a control network from a folder or hub id; None: the model's own for `kind`."""

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a control network on `x`; `hint` is ``(1 or rows, 3, H, W)`` in [0, 1]."""

    def attending(self, transform: Transform) -> AbstractContextManager[None]:
        """While inside, every attention of the denoiser goes through `transform`."""

    def predict(self, x: ModelInput) -> Tensor:
        """The denoiser's raw output (epsilon, v, …) for every row, ``(rows, c, h, w)``."""

    def parts(self) -> Iterable[torch.nn.Module]:
        """The modules whose state a pass must leave as it found it."""


@runtime_checkable
class ModelFamily(Protocol):
    """How a family of models is recognised and loaded; what `register_models` returns."""

    name: str

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` (a model_index.json, or the keys of a single file) is this family's."""

    def load(self, source: str, **options: Any) -> LatentModel:
        """Load the model. Raises `ModelError` in one clear line."""


__all__ = [
    "Conditioning",
    "LatentModel",
    "ModelFamily",
    "ModelInput",
    "Residuals",
]
