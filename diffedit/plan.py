"""What a pass is going to do, made out before any model runs: everything that can be refused is.

The phases regions, contribute and merge; the sampling itself is in `diffedit.passes`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffedit import prompts
from diffedit.box import Box
from diffedit.canvas import Canvas, Frame, exact_frame, frame
from diffedit.contribution import Branch, Contribution, Pixels, merge
from diffedit.edit import canonical, labels
from diffedit.embeddings import told
from diffedit.errors import (
    CapabilityError,
    ConflictError,
    InputError,
    MaskError,
    ParameterError,
    PluginError,
    SchedulerError,
    lacking,
    nearest,
)
from diffedit.fitting import Fitting
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.handover import Handover, Setting
from diffedit.models.protocol import Conditioning
from diffedit.prompts import WEIGHTS, parse
from diffedit.run import Lead, Run
from diffedit.schedule import Schedule
from diffedit.workflow import Pass

log = logging.getLogger(__name__)

#: By what factor the noise that a pass leaves may differ from what the next one takes it for.
SAME_LEVEL = 1.3


class Plan:
    """A pass whose edits have contributed: everything that can be refused has been."""

    def __init__(self, pass_: Pass, given: Handover, setting: Setting, guard: Guard) -> None:
        self.pass_, self.given, self.setting, self.guard = pass_, given, setting, guard
        self.model = setting.model
        self.edits = list(pass_.edits) if setting.compat else canonical(pass_.edits)
        self.labels = labels(self.edits)
        self.canvas = given.canvas
        self._check_needs()
        #: Scales of classifier-free guidance, and of the one that the denoiser takes as an input.
        self.guidance, self.embedded_guidance = self._guidance()
        boxes = self._boxes()
        made = self._contributions(boxes)
        beyond = self._beyond(made, boxes)
        if beyond:  # a mask without a wish lies outside: start again with a region that holds it
            boxes |= beyond
            made = self._contributions(boxes)
        self.merged = merge(list(zip(self.edits, made, strict=True)))
        #: Edits that change the model, and so maybe what it makes of a prompt, by their digests.
        self.patched = tuple(
            edit.digest for edit, one in zip(self.edits, made, strict=True) if one.patches
        )
        self.rests = pass_.prompt is None and self.merged.rests
        #: The model's own control network for inpainting, where it leads.
        self.lead: Lead | None = None
        if self.rests and given.unfinished:
            raise InputError(
                f"the pass before stopped at {given.done:g} of the way: one that samples goes on"
                " from there, and this one only finishes"
            )
        if self.rests and pass_.stop < 1:
            raise InputError("stop: this pass only finishes, so there is no way to stop on")
        if self.rests:  # nothing is sampled, so nothing need fit the model: work at full resolution
            box = self.canvas.frame.region
            self.canvas = self.canvas.focused(Frame(box, box.size, box.size))
            return
        if given.unfinished and self.merged.mask is None:  # what was kept stays kept
            self.merged = replace(self.merged, mask=given.masks[0], alpha=given.masks[1])
        self._check_prompts()
        self._check_capabilities()
        self._check_picture()
        self._check_handover()
        self.lead = self._own_lead()
        self.predictions = self._predictions()
        self.schedule = self.make_schedule()
        self._check_level()

    def _check_needs(self) -> None:
        for edit, label in zip(self.edits, self.labels, strict=True):
            if missing := edit.needs - self.model.capabilities:
                raise lacking(label, missing, self.model.capabilities)

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
        if self.given.unfinished:
            where = given.frame
        elif self.setting.compat:
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
            guidance=self.guidance,
            streams=self.setting.streams,
            compat=self.setting.compat,
            preprocessors=self.setting.plugins.preprocessors,
            load=self.setting.load,
        )
        self.fitting = Fitting(self.canvas, model, self.run.items, self.guard)
        lent = (self.canvas.composite,)
        made = []
        for edit, label in zip(self.edits, self.labels, strict=True):
            one = self.guard.call(label, "contribute", edit.contribute, self.run, lent=lent)
            self.fitting.check(label, one)
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
            if self.given.unfinished:
                raise InputError(
                    f"{label}: its mask reaches beyond the region of the pass before, which stopped"
                    " early: this one goes on in the same region"
                )
            if label in boxes:
                raise PluginError(label, "its mask reaches beyond the region it asked for")
            found[label] = box
        return found

    @functools.cached_property
    def beside(self) -> list[Tensor | None]:
        """The pictures of `merged.tokens`, in their order; None for those that are latents."""
        return [
            self.fitting.pixels(part.owner, part.value.latents, any_size=True)
            if isinstance(part.value.latents, Pixels)
            else None
            for part in self.merged.tokens
        ]

    def embed(self, prompt: str, *, negative: bool = False) -> Conditioning:
        """A prompt's conditioning: one row, or one per item where they show unequal pictures."""
        pictures = [
            pixels
            for part, pixels in zip(self.merged.tokens, self.beside, strict=True)
            if pixels is not None and part.value.role == "reference"
        ]
        same = all(torch.equal(one[:1].expand_as(one), one) for one in pictures)
        made = [
            self._read(prompt, negative, [one[item % len(one)][None] for one in pictures])
            for item in range(1 if same else self.run.items)
        ]
        return Conditioning.stack(made)  # a copy: what is kept is lent to nobody

    def _read(self, prompt: str, negative: bool, pictures: Sequence[Tensor]) -> Conditioning:
        """What the model makes of a prompt, now or before."""
        model, size = self.model, self.canvas.size
        text = prompt if WEIGHTS in model.capabilities else parse(prompt).text
        about = (size if model.sized else None, told(pictures), self.patched)
        made: Conditioning = self.setting.embeddings.get(
            model,
            (text, negative, *about),
            lambda: model.embed([text], size, negative=negative, pictures=pictures),
        )
        return made

    # --- what can be refused before any model runs ------------------------------------------------

    def _check_prompts(self) -> None:
        said: list[tuple[str, object]] = [
            ("prompt", self.run.prompt),
            ("negative", self.run.negative),
        ]
        said += [(part.owner, part.value.prompt) for part in self.merged.branches]
        said += [(part.owner, part.value.prompt) for part in self.merged.rows]
        for where, prompt in said:
            if isinstance(prompt, str):
                prompts.check(where, prompt, self.model.capabilities)

    def _check_capabilities(self) -> None:
        needs = {
            "control": [part.owner for part in self.merged.residuals],
            "shared_attention": [p.owner for p in self.merged.attention]
            + [p.owner for p in self.merged.beside]
            + [p.owner for p in self.merged.rows],
        }
        for part in self.merged.tokens:
            needs.setdefault(f"{part.value.role}_tokens", []).append(part.owner)
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
                shape = (roles[role], *self.fitting.latent_shape[1:])
                self.fitting.tensor(part.owner, f"channel {role!r}", part.value, shape, move=False)
        for role in roles:
            if role not in ("mask", "masked") and role not in self.merged.channels:
                raise CapabilityError(
                    f"this model draws after a picture in the role {role!r}, which no edit of this"
                    " pass gives (instruct gives an image, controlnet a hint)"
                )

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
        shown = merged.residuals or merged.channels or merged.tokens
        looks = reads or merged.mask is not None or shown or merged.start or self.given.unfinished
        if not self.canvas.empty and not looks:
            log.warning(
                "no edit of this pass looks at the picture, so nothing of it is kept:"
                " img2img starts from it, inpaint keeps what its mask leaves out"
            )

    def _check_handover(self) -> None:
        """Refuse what cannot go on from latents that a pass before left unfinished."""
        given, pass_ = self.given, self.pass_
        position, passes = self.setting.position
        if pass_.stop < 1 and position + 1 < passes and self.merged.finish:
            raise ConflictError(
                f"{self.merged.finish[0].owner}: finishes pixels, and this pass stops before there"
                " are any: put it into the pass that goes on"
            )
        if not given.unfinished:
            return
        assert given.latents is not None
        if self.merged.start is not None:
            raise ConflictError(
                f"{self.merged.start.owner}: says where sampling begins, and the pass before"
                f" stopped at {given.done:g} of the way: this one goes on from there"
            )
        if pass_.stop <= given.done:
            raise InputError(
                f"stop is {pass_.stop:g}, and the pass before has gone {given.done:g} of the way"
            )
        assert given.model is not None
        if given.model.space != self.model.space:
            raise InputError(
                "the pass before stopped early, and its model's latents are of another kind than"
                " this one's, which cannot go on from them"
            )
        shape = (self.run.items, *self.fitting.latent_shape)
        fits = all(side % self.model.grid == 0 for side in self.canvas.size)
        if tuple(given.latents.shape) != shape or not fits:
            raise InputError(
                "the pass before stopped early, so that this one goes on from its latents: they"
                " must be of one size and one number of pictures"
            )

    def _own_lead(self) -> Lead | None:
        """The model's own control network for inpainting leads wherever the pass has a mask.

        Once, however many edits have masks, and not where one of them brings such a network itself.
        """
        able = "inpaint_control" in self.model.capabilities and not self.setting.compat
        if not able or self.merged.mask is None or "hole" in self.merged.sees:
            return None
        net = self.run.control_net(None, "inpaint")
        self.merged = replace(self.merged, sees=self.merged.sees | self.model.control_roles(net))
        return self.run.led_by(net, lambda: self.canvas.pixels)

    def _guidance(self) -> tuple[float, float | None]:
        pass_ = self.pass_
        if "embedded_guidance" in self.model.capabilities:
            scale = 1.0 if pass_.true_guidance is None else pass_.true_guidance
            if pass_.negative and scale <= 1:
                log.warning(
                    "the negative prompt is not looked at: this model takes the guidance scale as"
                    " an input, so that it acts with true_guidance above 1"
                )
            return scale, pass_.guidance
        if pass_.true_guidance is not None:
            raise InputError(
                "true_guidance is for models that take the guidance scale as an input; of this one"
                " it is 'guidance'"
            )
        return pass_.guidance, None

    def _predictions(self) -> dict[str, Branch]:
        """The predictions of the pass by name, in batch order: the negative first."""
        own = [Branch(POSITIVE, self.run.prompt)]
        if self.guidance > 1:
            own.insert(0, Branch(NEGATIVE, self.run.negative, negative=True))
        named = {one.name: one for one in own}
        for part in self.merged.branches:
            for role in part.value.without:
                if role not in self.model.roles:
                    raise CapabilityError(
                        f"{part.owner}: a branch goes without the channel {role!r}, which this"
                        " model does not take"
                    )
            named[part.value.name] = part.value
        for term in self.merged.terms:
            for name in (term.value.toward, term.value.away):
                if name not in named:
                    raise ParameterError(
                        f"{term.owner}: a guidance term names the prediction {name!r}, which this"
                        f" pass does not make{nearest(name, named)}"
                    )
        return named

    def _check_level(self) -> None:
        """Refuse to go on from latents that hold more noise than the next step takes out."""
        given = self.given
        if not given.unfinished or not self.schedule.tells_noise or self.setting.compat:
            return
        (a, s), (own_a, own_s) = given.level, self.schedule.coefficients(0)
        if not 1 / SAME_LEVEL < (s * own_a) / (a * own_s) < SAME_LEVEL:
            raise InputError(
                f"the pass before left noise of {s / a:.3g}, and {self.pass_.steps} steps of this"
                f" one go on at {own_s / own_a:.3g}: give both the same number of steps"
            )

    def make_schedule(self, until: float | None = None) -> Schedule:
        """The calls of this pass, or until another share of the way; used up by a trip."""
        start = self.merged.start
        at = start.value.at if start else 1.0
        if not 0 < at <= 1:
            raise InputError(f"strength must lie in (0, 1], got {at:g}")
        schedule = self.model.schedule(
            self.pass_.scheduler,
            self.pass_.steps,
            at,
            shape=self.fitting.latent_shape,
            eta=self.pass_.eta,
            since=self.given.done if self.given.unfinished else 0.0,
            until=self.pass_.stop if until is None else until,
            compat=self.setting.compat,
        )
        if self.merged.noise and not schedule.takes_noise:
            raise SchedulerError(
                f"{self.merged.noise.owner}: says what the sampler draws, and"
                f" {type(schedule.scheduler).__name__} takes no noise from outside: use the"
                " scheduler ddim with eta 1, or dpmpp_2m_sde"
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

    def record(self, timings: dict[str, float]) -> dict[str, Any]:
        """What was done, JSON-ready."""
        where = self.canvas.frame
        return {
            "model": self.model.info["source"],
            "order": [
                {"edit": e.name, "label": label, "version": e.version, "digest": e.digest}
                for e, label in zip(self.edits, self.labels, strict=True)
            ],
            "steps": self.pass_.steps,
            "calls": 0 if self.rests else len(self.schedule),
            "scheduler": None if self.rests else type(self.schedule.scheduler).__name__,
            "region": list(where.region),
            "working_size": list(where.size),
            "one_by_one": self.model.one_by_one,
            "led": self.lead is not None,
            "timings": timings,
        }
