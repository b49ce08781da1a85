"""What a model family must be able to do, and the records that pass between it and the core.

Everything outside `diffedit.models` speaks in these terms; nothing outside asks which family a
model belongs to. Latents are ``(b, c, h, w)`` on this side of the protocol; a family that packs
them into tokens does so inside `LatentModel.predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffedit.attention import Addition, Transform
from diffedit.images import Picture
from diffedit.rows import RowMap, index_on
from diffedit.schedule import Schedule

#: Capabilities that a family has or has not, whichever of its models is loaded.
FAMILY_WIDE = frozenset({"control", "shared_attention"})


@dataclass(frozen=True)
class Conditioning:
    """What the text (and the picture's geometry) say to the denoiser.

    `tensors` belongs to the family, with one rule: the first dimension of each counts prompts, so
    that the core can stack and repeat it without knowing what it means.

    Attributes:
        tensors: by names that are the family's.
        ragged: the names of those whose second dimension counts tokens, of which texts have as many
            as they need; where such are joined, the shorter get zeros at the end, or `filler`.
        filler: makes what the shorter get instead, again and again, ``(1, tokens, …)`` by name:
            where all tokens are looked at, an empty text says nothing and zeros say something.
    """

    tensors: Mapping[str, Tensor]
    ragged: frozenset[str] = frozenset()
    filler: Callable[[], Mapping[str, Tensor]] | None = None

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the first dimension, in order."""
        first = parts[0]
        joined = {}
        for key in first.tensors:
            some = [part.tensors[key] for part in parts]
            if key in first.ragged:
                longest = max(one.shape[1] for one in some)
                some = [part._filled(key, longest) for part in parts]
            joined[key] = torch.cat(some)
        return Conditioning(joined, first.ragged, first.filler)

    def _filled(self, key: str, longest: int) -> Tensor:
        """One of the tensors, with so many tokens."""
        own = self.tensors[key]
        rest = longest - own.shape[1]
        if not rest:
            return own
        zeros = own.new_zeros(1, 1, *own.shape[2:])
        one = zeros if self.filler is None else self.filler()[key].to(own)
        more = torch.cat([one] * -(-rest // one.shape[1]), dim=1)[:, :rest]
        return torch.cat([own, more.expand(len(own), *more.shape[1:])], dim=1)

    def rows(self, indices: Sequence[int]) -> Conditioning:
        """Pick rows by index; an index may repeat."""
        return Conditioning(
            {
                key: value[index_on(tuple(indices), value.device)]
                for key, value in self.tensors.items()
            },
            self.ragged,
            self.filler,
        )

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


@dataclass(frozen=True)
class Residuals:
    """What control networks add to the features of a denoiser, one tensor per place.

    Attributes:
        places: where ControlNets add.
        inside: where T2I-Adapters do: within the levels of a UNet, as far as it has taken the
            picture apart.
    """

    places: tuple[Tensor, ...] = ()
    inside: tuple[Tensor, ...] = ()

    def __add__(self, other: Residuals) -> Residuals:
        def both(mine: tuple[Tensor, ...], its: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not mine or not its:
                return mine or its
            return tuple(a + b for a, b in zip(mine, its, strict=True))

        return Residuals(both(self.places, other.places), both(self.inside, other.inside))

    def fits(self, other: Residuals) -> bool:
        """Whether both can be added: where both add anything, the shapes are the same."""
        pairs = (self.places, other.places), (self.inside, other.inside)
        return all(not a or not b or _shapes(a) == _shapes(b) for a, b in pairs)

    def each(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """With every tensor changed alike."""
        return Residuals(*(tuple(change(x) for x in some) for some in (self.places, self.inside)))

    def spread(self, indices: Sequence[int], total: int) -> Residuals:
        """Put row ``k`` at row ``indices[k]`` of ``total`` rows; the others get zero."""
        if list(indices) == list(range(total)):
            return self

        def spread(place: Tensor) -> Tensor:
            full = place.new_zeros(total, *place.shape[1:])
            full[index_on(tuple(indices), place.device)] = place
            return full

        return self.each(spread)


def _shapes(some: tuple[Tensor, ...]) -> list[torch.Size]:
    return [one.shape for one in some]


@dataclass(frozen=True)
class ModelInput:
    """One call of the denoiser.

    Attributes:
        latents: ``(rows, c, h, w)``, scaled for the model, before `channels` are joined to them.
        timestep: scalar tensor, in the scheduler's units.
        conditioning: one entry per row.
        rows: what each row is: branch, item, and the reference it shows, if it shows one.
        channels: further inputs by role (``mask``: ``(rows, 1, h, w)``, 1 = may change;
            ``masked``: ``(rows, c, h, w)`` latents of the picture with the hole greyed out;
            ``blackened``: of one where it is black; ``hole``: ``(rows, 1, H, W)``, the mask in
            pixels).
        residuals: what control networks add.
        guidance: the guidance scale, for models that take it as an input.
        tokens: pictures that become part of the sequence, by role, ``(rows, c, h, w)`` each; sizes
            may differ from the canvas's.
    """

    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning
    rows: RowMap
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    residuals: Residuals | None = None
    guidance: float | None = None
    tokens: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def only(self, indices: Sequence[int]) -> ModelInput:
        """The same call with some of its rows."""
        if list(indices) == list(range(len(self.rows))):
            return self
        pick = index_on(tuple(indices), self.latents.device)
        residuals = self.residuals
        return ModelInput(
            latents=self.latents[pick],
            timestep=self.timestep,
            conditioning=self.conditioning.rows(indices),
            rows=self.rows.only(indices),
            channels={role: value[pick] for role, value in self.channels.items()},
            residuals=residuals and residuals.each(lambda place: place[pick]),
            guidance=self.guidance,
            tokens={role: tuple(one[pick] for one in some) for role, some in self.tokens.items()},
        )

    def branches(self) -> list[ModelInput]:
        """The call in parts, one for each branch; a branch's rows stand together."""
        names = [key.branch for key in self.rows.keys]
        return [
            self.only([i for i, name in enumerate(names) if name == branch])
            for branch in dict.fromkeys(names)
        ]


class LatentModel(Protocol):
    """A latent-diffusion model as the core sees it.

    Attributes:
        capabilities: what edits may ask for. In use: ``control`` (control networks),
            ``shared_attention`` (attention terms and reference rows), ``mask_channels`` (the
            denoiser itself takes the mask and the masked picture), ``embedded_guidance`` (the
            guidance scale is an input of the denoiser), ``inpaint_control`` (it brings a control
            network that is shown the hole in a picture, which leads wherever a pass has a mask
            and no edit's residuals see the hole), ``reference_tokens`` (a reference becomes
            part of the denoiser's sequence), ``instructions`` (its prompts say what to change in a
            picture, which it takes as a channel ``image`` or as reference tokens), ``image_prompt``
            (adapters that make a prompt of a picture), ``lora`` (low-rank additions to the
            weights), ``textual_inversion`` (words that its text encoders learned),
            ``prompt_weights`` (it reads prompts as `diffedit.prompts` writes them, and is given
            them as they are; the others get the text).
        sized: whether what `embed` makes depends on the size.
        cell: pixels per latent cell along one side.
        grid: working sizes are multiples of so many pixels: a cell, or what the denoiser takes of
            them for one token.
        sides: the smallest and the largest side, in pixels, at which the model draws: of a working
            region, and of a picture from nothing.
        whole: the largest side at which it works on a whole picture that is there already.
        channels: channels of a latent.
        space: what latents are: a model can go on from the unfinished ones of another with an equal
            one.
        one_by_one: predictions are made one after the other instead of as one batch, which takes
            longer and needs less memory.
        roles: further inputs of the denoiser by role, and how many channels each has: ``mask`` and
            ``masked`` of an inpainting model (a mask of more than one channel holds the pixels of a
            cell), ``hint`` of a model that is led by one, ``image`` of one that follows
            instructions.
    """

    capabilities: frozenset[str]
    sized: bool
    cell: int
    grid: int
    sides: tuple[int, int]
    whole: int
    channels: int
    space: str
    one_by_one: bool
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

    @property
    def compat_dtype(self) -> torch.dtype:
        """The type of the latents that are sampled in compat mode; float32 elsewhere."""

    @property
    def compat_source_dtype(self) -> torch.dtype:
        """The type of picture and noise in compat mode, where a picture is encoded first."""

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        """Embed prompts, one row each.

        Args:
            prompts: texts, which may be empty.
            size: the working (width, height) in pixels.
            negative: they say what guidance leads away from; some families were trained to be led
                away from something else than an empty text.
            pictures: those that become reference tokens, in order, ``(1, 3, h, w)`` each in [0, 1];
                some families read a prompt together with the pictures it speaks of.
        """

    def encode(
        self,
        pixels: Tensor,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        """Encode ``(b, 3, h, w)`` in [0, 1] to latents: the mean, or a sample with a generator.

        Args:
            role: the channel that they are for; some take latents of another scale.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels ``(b, 3, h, w)`` in [0, 1], float32."""

    def preview(self, x0: Tensor) -> Tensor:
        """A cheap, rough look at latents: ``(b, 3, h, w)`` or smaller in [0, 1], float32."""

    def schedule(
        self,
        name: str | None,
        steps: int,
        at: float = 1.0,
        *,
        shape: tuple[int, int, int] | None = None,
        eta: float | None = None,
        since: float = 0.0,
        until: float = 1.0,
        compat: bool = False,
    ) -> Schedule:
        """The calls of a trip that starts at noise level `at`.

        Args:
            name: of the scheduler; None: the model's own.
            shape: (c, h, w) of the latents: some families take larger steps through more noise for
                larger pictures; None: of a picture of the model's own size.
            since, until: the share of the way from noise to data that this trip makes.
            eta: share of noise that DDIM and TCD draw at each step; None: the usual one.
        """

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a control network from a folder or hub id; None: the model's own for `kind`."""

    def control_roles(self, net: Any) -> frozenset[str]:
        """Roles of channels that a control network takes besides the hint: `Contribution.sees`."""

    def in_mode(self, net: Any, kind: str, mode: int | None) -> Any:
        """A control network for a kind of hint: of a union of them the one that is meant.

        Args:
            mode: its number in the union; None: by the kind.
        """

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a control network on `x`; `hint` is ``(1 or rows, 3, H, W)`` in [0, 1]."""

    def load_ip_adapter(
        self, source: str, encoder: str | None, load: Callable[[str, Callable[[], Any]], Any]
    ) -> Any:
        """Load what makes a prompt of a picture; see `models.ip_adapter.load_ip_adapter`."""

    def image_prompt(
        self, adapter: Any, picture: Picture, weight: float, mask: Tensor | None = None
    ) -> Addition:
        """The attention to a picture, as a prompt, beside that to the text.

        Args:
            weight: how much of it is added.
            mask: where, ``(1, 1, h, w)`` of the working size, 1 = there; None: everywhere.
        """

    def load_textual_inversion(self, source: str, token: str | None = None) -> Any:
        """Read a word that text encoders learned, and check that they can learn it; `Word`."""

    def add_textual_inversion(self, word: Any) -> Callable[[], None]:
        """Have the text encoders know it; returns what has them forget. Last in, first out."""

    def load_lora(self, source: str) -> Any:
        """Read low-rank additions from a file, a folder or the hub, and check that they fit."""

    def add_lora(self, lora: Any, weight: float) -> Callable[[], None]:
        """Add what was read to the weights; returns what takes it away. Last in, first out."""

    def attending(self, transform: Transform) -> AbstractContextManager[None]:
        """While inside, every attention of the denoiser goes through `transform`."""

    def predict(self, x: ModelInput) -> Tensor:
        """The denoiser's raw output (epsilon, v, …) for every row, ``(rows, c, h, w)``."""

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """The guided prediction, ``(items, c, h, w)``, where no edit says how to make it.

        As a rule `guidance.classifier_free`; some families are meant to be guided otherwise.

        Args:
            predictions: raw outputs by name; without a negative one the positive one is returned.
            scale: of guidance.
        """

    def readers(self) -> Iterable[torch.nn.Module]:
        """The modules by which `embed` reads: with equal weights they make equal conditioning."""

    def forget(self) -> None:
        """Let go of what was kept for the pass that ends."""

    def save_memory(self) -> str | None:
        """Give up speed for memory from now on.

        Returns:
            What was given up, for people; None: there is nothing left to give up.
        """

    def parts(self) -> Iterable[torch.nn.Module]:
        """The modules whose state a pass must leave as it found it."""


@runtime_checkable
class ModelFamily(Protocol):
    """How a family of models is recognised and loaded; what `register_models` returns.

    Attributes:
        name: of the family.
        carries: capabilities that every model of it has, so that an edit can be refused before
            anything is loaded. A family may leave it out.
        sometimes: capabilities that some models of it have besides; left out, nobody knows.
        half: the name of the 16-bit type that its models were trained in; left out: float16.
    """

    name: str

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` is this family's: a model_index.json, or a file's ``_class_name``."""

    def load(self, source: str, **options: Any) -> LatentModel:
        """Load the model. Raises `ModelError` in one clear line.

        Args:
            options: ``device``, ``dtype``, ``revision`` and ``variant``; where they are asked for
                ``config``, ``storage``, ``room`` and ``vae``.
        """


__all__ = [
    "Conditioning",
    "LatentModel",
    "ModelFamily",
    "ModelInput",
    "Residuals",
]
