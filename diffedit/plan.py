"""What a pass is going to do, made out before any model runs: everything that can be refused is.

The phases regions, contribute and merge; the sampling itself is in `diffedit.passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffedit.box import Box
from diffedit.canvas import Canvas, Frame, exact_frame, frame
from diffedit.edit import Contribution, Edit, canonical, labels, merge
from diffedit.errors import (
    CapabilityError,
    InputError,
    MaskError,
    ParameterError,
    PluginError,
    nearest,
)
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.models.protocol import Conditioning, LatentModel
from diffedit.plugins import Plugins
from diffedit.run import Run, Streams
from diffedit.schedulers import Schedule
from diffedit.workflow import Pass


@dataclass(frozen=True, eq=False)
class Handover:
    """What a pass leaves to the next one.

    Latents stay latents where region and mask stay the same and nothing was done to the pixels;
    otherwise the composite is encoded again.

    Attributes:
        canvas: the picture so far.
        latents: of the working region, ``(b, c, h, w)``; None when the pixels say more.
        mask: the pass's mask over the full image.
    """

    canvas: Canvas
    latents: Tensor | None = None
    mask: Tensor | None = None

    def latents_for(self, where: Frame, mask: Tensor | None) -> Tensor | None:
        """The latents, if they are still good for a pass on `where` under `mask`."""
        if self.latents is None or self.canvas.frame != where:
            return None
        same = mask is self.mask or (
            mask is not None and self.mask is not None and torch.equal(mask, self.mask)
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
    """

    model: LatentModel
    plugins: Plugins
    seeds: tuple[int, ...]
    compat: bool = False
    load: Callable[[str, Callable[[], Any]], Any] = field(default=lambda key, loader: loader())
    position: tuple[int, int] = (0, 1)


class Plan:
    """A pass whose edits have contributed: everything that can be refused has been."""

    def __init__(self, pass_: Pass, given: Handover, setting: Setting, guard: Guard) -> None:
        self.pass_, self.given, self.setting, self.guard = pass_, given, setting, guard
        self.model = setting.model
        self.edits = list(pass_.edits) if setting.compat else canonical(pass_.edits)
        self.labels = labels(self.edits)
        self.canvas = given.canvas.focused(self._frame())
        self.run = Run(
            canvas=self.canvas,
            model=self.model,
            prompt=pass_.prompt or "",
            negative=pass_.negative,
            steps=pass_.steps,
            streams=_streams(setting),
            compat=setting.compat,
            preprocessors=setting.plugins.preprocessors,
            load=setting.load,
        )
        self.merged = merge(
            [
                (e, self._contribution(e, label))
                for e, label in zip(self.edits, self.labels, strict=True)
            ]
        )
        self.rests = pass_.prompt is None and self.merged.only_finishes
        if self.rests:  # nothing is sampled, so nothing need fit the model: work at full resolution
            box = self.canvas.frame.region
            self.canvas = self.canvas.focused(Frame(box, box.size, box.size))
        else:
            self._check_capabilities()
            self.predictions = self._predictions()
            self.schedule = self._schedule()

    def _frame(self) -> Frame:
        canvas, model = self.given.canvas, self.model
        if self.setting.compat:
            return exact_frame(canvas.image_size, model.grid)
        shown = canvas.source or canvas.picture(0)
        whole = Box(0, 0, *canvas.image_size)
        boxes = []
        for edit, label in zip(self.edits, self.labels, strict=True):
            box: object = self.guard.call(label, "region", edit.region, shown)
            if box is None:
                continue
            if not isinstance(box, Box) or min(box.clip(whole).size) < 1:
                raise PluginError(label, f"region {box!r} is no Box that holds pixels of the image")
            boxes.append(box)
        return frame(canvas.image_size, boxes, model.sides, model.grid)

    def _contribution(self, edit: Edit, label: str) -> Contribution:
        lent = (self.canvas.composite, self.canvas.pixels)
        made = self.guard.call(label, "contribute", edit.contribute, self.run, lent=lent)
        if not isinstance(made, Contribution):
            raise PluginError(
                label, f"contribute returned {type(made).__name__}, not a Contribution"
            )
        mask = made.mask
        width, height = self.canvas.image_size
        if mask is not None:
            mask = self.fitting(label, "mask", mask, (1, height, width), move=False)
            if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise PluginError(label, "mask must hold floating-point values in [0, 1]")
            outside = mask.clone()
            box = self.canvas.frame.region
            outside[..., box.top : box.bottom, box.left : box.right] = 0
            if outside.any():
                raise PluginError(label, "its mask reaches beyond the region it asked for")
        for part in (made.keep, *(term.weight for term in made.terms)):
            if isinstance(part, Tensor):
                self.fitting(label, "keep or weight", part, (1, *self.latent_shape[1:]), move=False)
        start, end = made.during
        if not 0 <= start <= end <= 1:
            raise InputError(f"{label}: needs 0 <= start <= end <= 1, got {start:g} and {end:g}")
        return made

    def fitting(
        self, owner: str, what: str, value: Any, shape: tuple[int, ...], move: bool = True
    ) -> Tensor:
        """Check what a plugin gave: one for all items, or one per item; bring it to the model."""
        if not isinstance(value, Tensor):
            raise PluginError(owner, f"{what} is {type(value).__name__}, not a tensor")
        items = self.run.items
        if value.ndim != 4 or value.shape[1:] != shape or len(value) not in (1, items):
            raise PluginError(
                owner,
                f"{what} is {tuple(value.shape)}, not ({'1 or ' * (items > 1)}{items},"
                f" {', '.join(map(str, shape))})",
            )
        return value.to(self.model.device) if move else value

    def _check_capabilities(self) -> None:
        needs = {
            "control": [part.owner for part in self.merged.residuals],
            "shared_attention": [p.owner for p in self.merged.attention]
            + [p.owner for p in self.merged.rows],
            "tokens": [part.owner for part in self.merged.tokens],
        }
        needs |= {
            f"channel {role!r}": [part.owner]
            for role, part in self.merged.channels.items()
            if f"{role}_channels" not in self.model.capabilities
        }
        needs |= {f"condition {k!r}": [p.owner] for k, p in self.merged.conditioning.items()}
        for capability, owners in needs.items():
            if owners and capability not in self.model.capabilities:
                raise CapabilityError(
                    f"{', '.join(dict.fromkeys(owners))}: this model cannot carry it, it has no"
                    f" {capability} (it has: {', '.join(sorted(self.model.capabilities)) or '-'})"
                )
        if self.canvas.source is None and not self.canvas.touched.any():
            asks = [
                p.owner for p in (self.merged.start,) if p and isinstance(p.value.latents, Canvas)
            ]
            asks += [part.owner for part in self.merged.keep]
            if asks or self.merged.mask is not None:
                who = asks[0] if asks else ", ".join(self.labels)
                raise InputError(f"{who}: needs a picture to edit; this pass starts from nothing")
        if self.merged.mask is not None and not self.merged.mask.any():
            raise MaskError("the mask selects nothing: white (1) is where the picture is to change")

    def _predictions(self) -> dict[str, str | Conditioning]:
        """What each prediction is conditioned on, in batch order: the negative first."""
        named: dict[str, str | Conditioning] = {}
        if self.pass_.guidance > 1 and "embedded_guidance" not in self.model.capabilities:
            named[NEGATIVE] = self.run.negative
        named[POSITIVE] = self.run.prompt
        named |= {part.value.name: part.value.prompt for part in self.merged.branches}
        for term in self.merged.terms:
            for name in (term.value.toward, term.value.away):
                if name not in named:
                    raise ParameterError(
                        f"{term.owner}: a guidance term names the prediction {name!r}, which this"
                        f" pass does not make{nearest(name, named)}"
                    )
        return named

    def _schedule(self) -> Schedule:
        start = self.merged.start
        at = start.value.at if start else 1.0
        if not 0 < at <= 1:
            raise InputError(f"strength must lie in (0, 1], got {at:g}")
        return self.model.schedule(
            self.pass_.scheduler, self.pass_.steps, at, compat=self.setting.compat
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one item's latents."""
        width, height = (side // self.model.grid for side in self.canvas.size)
        return self.model.channels, height, width

    def record(self, timings: dict[str, float]) -> dict[str, Any]:
        """What was done, JSON-ready."""
        where = self.canvas.frame
        return {
            "order": [
                {"edit": e.name, "label": label, "version": e.version, "digest": e.digest}
                for e, label in zip(self.edits, self.labels, strict=True)
            ],
            "steps": self.pass_.steps,
            "calls": 0 if self.rests else len(self.schedule),
            "scheduler": None if self.rests else type(self.schedule.scheduler).__name__,
            "region": list(where.region),
            "working_size": list(where.size),
            "timings": timings,
        }


def _streams(setting: Setting) -> Streams:
    if not setting.compat:
        return Streams(setting.seeds)
    if len(setting.seeds) != 1:
        raise InputError("compat mode compares one picture at a time: give one seed")
    return Streams(setting.seeds, torch.Generator().manual_seed(setting.seeds[0]))
