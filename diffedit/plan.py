"""What a pass is going to do, made out before any model runs: everything that can be refused is.

The phases regions, contribute and merge; the sampling itself is in `diffedit.passes`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffedit.box import Box
from diffedit.canvas import Canvas, Frame, exact_frame, frame
from diffedit.edit import Contribution, Pixels, Start, canonical, labels, merge
from diffedit.errors import (
    CapabilityError,
    ConflictError,
    InputError,
    MaskError,
    ParameterError,
    PluginError,
    SchedulerError,
    nearest,
)
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.models.protocol import Conditioning, LatentModel
from diffedit.plugins import Plugins
from diffedit.run import Run, Streams
from diffedit.schedulers import Schedule
from diffedit.workflow import Pass

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Handover:
    """What a pass leaves to the next one.

    Latents stay latents where region and mask stay the same and nothing was done to the pixels;
    otherwise the composite is encoded again.

    Attributes:
        canvas: the picture so far.
        latents: of the working region, ``(b, c, h, w)``; None when the pixels say more.
        masks: the pass's mask and alpha over the full image.
    """

    canvas: Canvas
    latents: Tensor | None = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)

    def latents_for(self, where: Frame, masks: tuple[Tensor | None, ...]) -> Tensor | None:
        """The latents, if they are still good for a pass on `where` under these `masks`."""
        if self.latents is None or self.canvas.frame != where:
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
        self.canvas = given.canvas
        boxes = self._boxes()
        made = self._contributions(boxes)
        beyond = self._beyond(made, boxes)
        if beyond:  # a mask without a wish lies outside: start again with a region that holds it
            boxes |= beyond
            made = self._contributions(boxes)
        self.merged = merge(list(zip(self.edits, made, strict=True)))
        self.rests = pass_.prompt is None and self.merged.rests
        if self.rests:  # nothing is sampled, so nothing need fit the model: work at full resolution
            box = self.canvas.frame.region
            self.canvas = self.canvas.focused(Frame(box, box.size, box.size))
            return
        self._check_capabilities()
        self._check_picture()
        self.predictions = self._predictions()
        self.schedule = self._schedule()

    # --- regions, contribute ----------------------------------------------------------------------

    def _boxes(self) -> dict[str, Box]:
        """The boxes that edits ask for, by label."""
        shown = self.given.canvas.so_far
        whole = Box(0, 0, *self.given.canvas.image_size)
        boxes: dict[str, Box] = {}
        for edit, label in zip(self.edits, self.labels, strict=True):
            box: object = self.guard.call(label, "region", edit.region, shown)
            if box is None:
                continue
            if not isinstance(box, Box) or min(box.clip(whole).size) < 1:
                raise PluginError(label, f"region {box!r} is no Box that holds pixels of the image")
            boxes[label] = box
        return boxes

    def _contributions(self, boxes: Mapping[str, Box]) -> list[Contribution]:
        """Ask every edit, on a canvas whose region holds the boxes."""
        given, model = self.given.canvas, self.model
        if self.setting.compat:
            where = exact_frame(given.image_size, model.grid)
        else:
            # A whole picture that is there already has its composition; a larger size than the
            # model draws at keeps its detail.
            sides = model.sides if boxes or given.empty else (model.sides[0], model.whole)
            where = frame(given.image_size, list(boxes.values()), sides, model.grid)
        self.canvas = given.focused(where)
        self.run = Run(
            canvas=self.canvas,
            model=model,
            prompt=self.pass_.prompt or "",
            negative=self.pass_.negative,
            steps=self.pass_.steps,
            streams=_streams(self.setting),
            compat=self.setting.compat,
            preprocessors=self.setting.plugins.preprocessors,
            load=self.setting.load,
        )
        lent = (self.canvas.composite,)
        made = []
        for edit, label in zip(self.edits, self.labels, strict=True):
            one = self.guard.call(label, "contribute", edit.contribute, self.run, lent=lent)
            self._check(label, one)
            made.append(one)
        return made

    def _beyond(self, made: Sequence[Contribution], boxes: Mapping[str, Box]) -> dict[str, Box]:
        """The boxes of masks that reach beyond the region, by label."""
        found: dict[str, Box] = {}
        region = self.canvas.frame.region
        for label, one in zip(self.labels, made, strict=True):
            if one.pasted is None or not bool(one.pasted.any()):
                continue
            ys, xs = one.pasted.amax(dim=(0, 1)).nonzero(as_tuple=True)
            box = Box(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            if region.contains(box):
                continue
            if label in boxes:
                raise PluginError(label, "its mask reaches beyond the region it asked for")
            found[label] = box
        return found

    def _check(self, label: str, made: object) -> None:
        """Refuse what cannot be a contribution, and name whose it is."""
        if not isinstance(made, Contribution):
            raise PluginError(
                label, f"contribute returned {type(made).__name__}, not a Contribution"
            )
        width, height = self.canvas.image_size
        for name, given in (("mask", made.mask), ("alpha", made.alpha)):
            if given is None:
                continue
            mask = self.fitting(label, name, given, (1, height, width), move=False)
            if mask.device.type != "cpu":
                raise PluginError(label, f"{name} must be on the CPU, where the canvas is")
            if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise PluginError(label, f"{name} must hold floating-point values in [0, 1]")
        for part in (made.keep, *(term.weight for term in made.terms)):
            if isinstance(part, Tensor):
                self.fitting(label, "keep or weight", part, (1, *self.latent_shape[1:]), move=False)
        start: object = made.start
        if start is not None and not isinstance(start, Start):
            raise PluginError(label, f"start is {type(start).__name__}, not a Start")
        for row in made.rows:
            if isinstance(row.latents, Pixels):
                self._check_pixels(label, row.latents)
        for value in made.channels.values():
            if isinstance(value, Pixels):
                self._check_pixels(label, value)
        for branch in made.branches:
            prompt: object = branch.prompt
            if not isinstance(prompt, str | Conditioning):
                said = type(prompt).__name__
                raise PluginError(label, f"a branch's prompt is {said}, not a text or Conditioning")
        try:
            first, last = (float(edge) for edge in made.during)
        except (TypeError, ValueError):
            raise PluginError(label, f"during is {made.during!r}, not (start, end)") from None
        if not 0 <= first <= last <= 1:
            raise InputError(f"{label}: needs 0 <= start <= end <= 1, got {first:g} and {last:g}")

    def _check_pixels(self, label: str, value: Pixels) -> None:
        width, height = self.canvas.size
        self.fitting(label, "a picture to encode", value.pixels, (3, height, width), move=False)

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

    # --- what can be refused before any model runs ------------------------------------------------

    def _check_capabilities(self) -> None:
        needs = {
            "control": [part.owner for part in self.merged.residuals],
            "shared_attention": [p.owner for p in self.merged.attention]
            + [p.owner for p in self.merged.rows],
            "tokens": [part.owner for part in self.merged.tokens],
        }
        needs |= {f"condition {k!r}": [p.owner] for k, p in self.merged.conditioning.items()}
        for capability, owners in needs.items():
            if owners and capability not in self.model.capabilities:
                raise CapabilityError(
                    f"{', '.join(dict.fromkeys(owners))}: this model cannot carry it, it has no"
                    f" {capability} (it has: {', '.join(sorted(self.model.capabilities)) or '-'})"
                )
        roles = self.model.roles
        for role, part in self.merged.channels.items():
            if role not in roles:
                raise CapabilityError(
                    f"{part.owner}: this model takes no channel {role!r}"
                    f" (it takes: {', '.join(roles) or 'none'})"
                )
            if self.merged.mask is not None and role in ("mask", "masked"):
                raise ConflictError(
                    f"{part.owner!r} sets the channel {role!r}, which the masks of this pass"
                    " decide: put them into two passes"
                )
            if isinstance(part.value, Tensor):
                shape = (roles[role], *self.latent_shape[1:])
                self.fitting(part.owner, f"channel {role!r}", part.value, shape, move=False)

    def _check_picture(self) -> None:
        """Refuse edits of a picture that is not there, and say when one is not looked at."""
        merged, start = self.merged, self.merged.start
        reads = [start.owner] if start and isinstance(start.value.latents, Canvas) else []
        reads += [part.owner for part in merged.keep]
        if self.canvas.empty and (reads or merged.mask is not None):
            who = reads[0] if reads else ", ".join(self.labels)
            raise InputError(f"{who}: needs a picture to edit; this pass starts from nothing")
        if merged.mask is not None and not merged.mask.any():
            raise MaskError("the mask selects nothing: white (1) is where the picture is to change")
        looks = reads or merged.mask is not None or merged.residuals or merged.start
        if not self.canvas.empty and not looks:
            log.warning(
                "no edit of this pass looks at the picture, so nothing of it is kept:"
                " img2img starts from it, inpaint keeps what its mask leaves out"
            )

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
        schedule = self.model.schedule(
            self.pass_.scheduler, self.pass_.steps, at, compat=self.setting.compat
        )
        noised = [start.owner] if start else [part.owner for part in self.merged.keep]
        noised += [p.owner for p in self.merged.rows if isinstance(p.value.latents, Pixels)]
        noised += [] if self.merged.mask is None else ["a mask"]
        if noised and not schedule.tells_noise:
            raise SchedulerError(
                f"{noised[0]} needs a picture at every noise level, and"
                f" {type(schedule.scheduler).__name__} has no add_noise: use another scheduler"
            )
        return schedule

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
        return Streams(setting.seeds, setting.position[0])
    if len(setting.seeds) != 1:
        raise InputError("compat mode compares one picture at a time: give one seed")
    return Streams(setting.seeds, single=torch.Generator().manual_seed(setting.seeds[0]))
