"""What goes from pass to pass of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffedit.canvas import Canvas, Frame
from diffedit.embeddings import Embeddings
from diffedit.errors import InputError
from diffedit.models.protocol import LatentModel
from diffedit.plugins import Plugins
from diffedit.run import Load, Streams, load_each_time


@dataclass(frozen=True, eq=False)
class Handover:
    """What a pass leaves to the next one.

    Latents stay latents where region and mask stay the same and nothing was done to the pixels;
    otherwise the composite is encoded again.

    Attributes:
        canvas: the picture so far.
        latents: of the working region, ``(b, c, h, w)``; None when the pixels say more.
        masks: the pass's mask and alpha over the full image.
        done: the share of the way that the latents have made; less than 1 where the pass stopped
            early, and the next one goes on from them.
        level: ``(a, s)`` of them then: they are ``a * x0 + s * noise``.
        noise: what they were noised with, and what is kept of the picture under a mask.
        origin: where sampling began, as a share of the schedule.
        model: that made them; another encodes the picture again.
    """

    canvas: Canvas
    latents: Tensor | None = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    done: float = 1.0
    level: tuple[float, float] = (1.0, 0.0)
    noise: Tensor | None = None
    origin: float | None = None
    model: LatentModel | None = None

    @property
    def unfinished(self) -> bool:
        """Whether the latents still hold noise."""
        return self.done < 1

    def latents_for(
        self, model: LatentModel, where: Frame, masks: tuple[Tensor | None, ...]
    ) -> Tensor | None:
        """The latents, if they are still good for a pass of `model` on `where` under `masks`."""
        if self.latents is None or self.unfinished or self.canvas.frame != where:
            return None
        if self.model is not model:
            return None
        same = all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in zip(masks, self.masks, strict=True)
        )
        return self.latents if same else None


@dataclass(frozen=True)
class Setting:
    """What all passes of a run share.

    Attributes:
        model: the loaded model.
        plugins: what is installed.
        seeds: one per item.
        compat: compare with diffusers' own pipelines: one generator in their draw order, no crop,
            nearest binary masks, posterior samples, edits as listed.
        load: loads something heavy once per editor.
        position: which pass of how many this is, counted from 0.
        embeddings: prompts that were read before.
    """

    model: LatentModel
    plugins: Plugins
    seeds: tuple[int, ...]
    compat: bool = False
    load: Load = load_each_time
    position: tuple[int, int] = (0, 1)
    embeddings: Embeddings = field(default_factory=Embeddings)

    @property
    def streams(self) -> Streams:
        """Where the random numbers of this pass come from."""
        if not self.compat:
            return Streams(self.seeds, self.position[0])
        if len(self.seeds) != 1:
            raise InputError("compat mode compares one picture at a time: give one seed")
        return Streams(self.seeds, single=torch.Generator().manual_seed(self.seeds[0]))
