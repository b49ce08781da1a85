"""One pass: planned, sampled and pasted back.

The phases stand in this order: regions, contribute, merge (`diffedit.plan`; conflicts raise there,
before any model runs), patches, embed, draws, prepare, loop, decode, finish, paste-back, undo.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffedit import prompts
from diffedit.canvas import Canvas
from diffedit.contribution import Branch, merge
from diffedit.denoiser import Denoiser
from diffedit.draws import Draws
from diffedit.edit import labels
from diffedit.errors import (
    DiffeditError,
    InputError,
    ParameterError,
    PluginError,
    SchedulerError,
)
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.handover import Handover, Setting
from diffedit.inversion import Inversion, ddim, edit_friendly
from diffedit.memory import exhausted, let_go, told
from diffedit.plan import Plan
from diffedit.sampler import Step, sample
from diffedit.untouched import Untouched
from diffedit.workflow import Pass

log = logging.getLogger(__name__)

NOT_FINITE = "gave values that are not finite: try dtype bfloat16 or float32"


class NotFinite(DiffeditError):
    """Latents came out as NaN or inf; checked once per pass, and examined only then."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a pass.

    Attributes:
        handover: for the next pass.
        latents: before decoding, ``(b, c, h, w)``; None when nothing was sampled.
        record: the order of the edits, the calls made, the region and the timings, JSON-ready.
        shown: the picture after the pass.
    """

    handover: Handover
    latents: Tensor | None
    record: dict[str, Any]
    shown: Canvas


def run_pass(pass_: Pass, given: Handover, setting: Setting) -> Generator[Step, None, Outcome]:
    """Run one pass, yielding its steps; closing the generator cancels and undoes everything.

    Raises:
        InputError: the pass cannot be run as it stands.
        PluginError: an edit breaks the contract.
        OutOfMemory: also when the model gave up what it could.
    """
    given_up: list[str] = []
    while True:
        try:
            return (yield from _shown(pass_, given, setting))
        except Exception as error:
            if not exhausted(error):
                raise
            let_go(error)
        saved = setting.model.save_memory()
        if saved is None:
            raise told(_place(setting), " and ".join(given_up))
        log.warning("out of memory %s: trying again with %s", _place(setting), saved)
        given_up.append(saved)


def _place(setting: Setting) -> str:
    index, passes = setting.position
    return "in this pass" if passes == 1 else f"in pass {index + 1} of {passes}"


def _shown(pass_: Pass, given: Handover, setting: Setting) -> Generator[Step, None, Outcome]:
    """Run a pass once; what is not finite in the end is looked into."""
    index, passes = setting.position
    with closing(_attempt(pass_, given, setting, Guard())) as steps:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            except NotFinite:
                for _ in _attempt(pass_, given, setting, Guard(diagnosing=True)):
                    pass  # raises with the culprit's name
                raise
            step = replace(step, _look=setting.model.preview, pass_index=index, passes=passes)
            setting.plugins.notify("step_done", step=step)
            yield step


def _attempt(
    pass_: Pass, given: Handover, setting: Setting, guard: Guard
) -> Generator[Step, None, Outcome]:
    """Plan and run a pass; whatever is left in the model is undone."""
    with ExitStack() as undo:
        undo.enter_context(setting.embeddings.of(setting.model))
        undo.callback(setting.model.forget)
        who = ", ".join(labels(pass_.edits)) or "the model"
        untouched = undo.enter_context(Untouched(setting.model.parts(), who))
        with untouched.watching():
            plan = Plan(pass_, given, setting, guard)
        if not guard.diagnosing:
            undo.enter_context(_announced(plan))
        trip = _Trip(plan)
        if plan.rests:
            return trip.finish(None)
        latents = yield from trip.sample(undo, untouched)
        return trip.finish(latents)


@contextmanager
def _announced(plan: Plan) -> Iterator[None]:
    """Tell the observers that the pass begins, and how it ended."""
    notify = plan.setting.plugins.notify
    error: BaseException | None = None
    try:
        notify("pass_started", pass_=plan.pass_, run=plan.run)
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            notify("pass_finished", pass_=plan.pass_, error=error)
        except PluginError as late:
            if error is None:
                raise
            log.warning("%s", late)  # the error under way says more


class _Trip:
    """The phases of a planned pass, and how long each took."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.run, self.merged, self.guard = (
            plan.model,
            plan.run,
            plan.merged,
            plan.guard,
        )
        self.clock = time.perf_counter()
        self.timings: dict[str, float] = {}
        self.noise: Tensor | None = None

    def sample(self, undo: ExitStack, untouched: Untouched) -> Generator[Step, None, Tensor]:
        """Patches, embed, draws, prepare, loop; returns the latents."""
        pass_, schedule = self.plan.pass_, self.plan.schedule
        for part in self.merged.patches:
            untouched = Untouched(self.model.parts(), part.owner, untouched)
            undo.enter_context(untouched)
            with untouched.watching():
                restore: object = self.guard.call(part.owner, "patch", part.value.apply, self.model)
            if not callable(restore):
                said = type(restore).__name__
                raise PluginError(part.owner, f"patch returned {said}, not what undoes it")
            undo.callback(self.guard.call, part.owner, "the undoing of a patch", restore)
        branches = self._embed(self.plan.predictions.values())
        self._lap("embed")
        draws = Draws(self.plan)
        channels, tokens = draws.channels(), draws.tokens()
        references = [draws.reference(part) for part in self.merged.rows]
        self._lap("encode")
        for one in self.merged.prepare:
            inverter = functools.partial(self._inverted, one.owner, draws, channels, tokens)
            run = replace(self.run, inverter=inverter)
            for step in self.guard.steps(one.owner, "prepare", one.value, run):
                if not isinstance(step, Step):
                    raise PluginError(one.owner, f"prepare yielded {type(step).__name__}, no Step")
                yield step
        latents, constrain = draws.begin()
        self.noise = draws.noise
        denoise = Denoiser(
            self.run,
            schedule,
            self.merged,
            branches,
            references=references,
            channels=channels,
            tokens=tokens,
            guidance=self.plan.guidance,
            rescale=pass_.rescale,
            embedded_guidance=self.plan.embedded_guidance,
            lead=self.plan.lead,
            guard=self.guard,
        )
        if self.merged.attention or self.merged.beside:
            undo.enter_context(self.model.attending(denoise.attend))
        if not self.run.compat:
            seeds = [self.run.streams.seed("tree", item) for item in range(self.run.items)]
            schedule.seed(seeds, latents)
        rng = [self.run.rng("step", item) for item in range(self.run.items)]
        noise = draws.step_noise if self.merged.noise else None
        for step in sample(denoise, latents, schedule, rng=rng, constrain=constrain, noise=noise):
            latents = step.latents
            yield step
        self._lap("sample")
        if not torch.isfinite(latents).all():
            raise NotFinite(
                "sampling gave values that are not finite: try dtype bfloat16 or float32"
            )
        return latents

    def _embed(self, predictions: Iterable[Branch]) -> list[Branch]:
        """Predictions, each with its conditioning."""
        return [
            replace(one, prompt=self.plan.embed(one.prompt, negative=one.negative))
            if isinstance(one.prompt, str)
            else one
            for one in predictions
        ]

    def _inverted(
        self,
        owner: str,
        draws: Draws,
        channels: Mapping[str, Tensor],
        tokens: Mapping[str, Sequence[Tensor]],
        prompt: str,
        kind: str,
        guidance: float,
        refinements: int,
    ) -> Generator[Step, None, Inversion]:
        """The canvas's inversion by the model alone: what edits contribute does not act."""
        if self.run.canvas.empty:
            raise InputError("an inversion needs a picture; this pass starts from nothing")
        prompts.check(owner, prompt, self.model.capabilities)
        branches = [Branch(POSITIVE, prompt)]
        if guidance > 1:
            branches.insert(0, Branch(NEGATIVE, self.run.negative, negative=True))
        schedule = self.plan.make_schedule(until=1.0)
        if kind == "ddim" and schedule.draws:
            raise SchedulerError(
                f"{type(schedule.scheduler).__name__} draws noise as it goes, of which the path of"
                " DDIM knows nothing: use ddim or euler, or the inversion edit_friendly"
            )
        denoise = Denoiser(
            self.run,
            schedule,
            merge([]),
            self._embed(branches),
            channels=channels,
            tokens=tokens,
            guidance=guidance,
            embedded_guidance=self.plan.embedded_guidance,
            lead=self.plan.lead,
            guard=self.guard,
        )
        predict = functools.partial(denoise, scaled=True)
        clean = draws.clean()
        if kind == "ddim":
            return ddim(predict, clean, schedule, refinements)
        if kind == "edit_friendly":
            rng = [self.run.rng("inversion", item) for item in range(self.run.items)]
            return edit_friendly(predict, clean, schedule, rng)
        raise ParameterError(f"no inversion {kind!r}: there are ddim and edit_friendly")

    def finish(self, latents: Tensor | None) -> Outcome:
        """Decode, finish, paste back."""
        canvas, stop = self.plan.canvas, self.plan.pass_.stop
        masks = (self.merged.mask, self.merged.alpha)
        going_on: Handover | None = None
        if latents is not None and stop < 1:
            schedule = self.plan.schedule
            end = schedule.coefficients(len(schedule))
            origin = self.plan.given.origin
            origin = schedule.origin if origin is None else origin
            going_on = Handover(canvas, latents, masks, stop, end, self.noise, origin, self.model)
            position, passes = self.plan.setting.position
            if position + 1 < passes:  # nobody looks at the noise
                return Outcome(going_on, latents, self.plan.record(self.timings), canvas)
        if latents is None:
            pixels = canvas.region_pixels
        else:
            decoded = self.model.decode(self.run.laid_out(latents)).cpu()
            if not torch.isfinite(decoded).all():
                raise DiffeditError(
                    "decoding gave values that are not finite: try dtype bfloat16 or float32"
                )
            pixels = canvas.to_region(decoded)
            mask, alpha = masks
            if mask is not None and alpha is not None and not going_on and not self.run.compat:
                pixels = canvas.toned(pixels, mask, alpha, self.model.cell)
            self._lap("decode")
        for part in self.merged.finish:
            pixels = self.guard.call(
                part.owner, "finish", part.value, pixels, lent=(pixels,), like=pixels
            )
        if self.merged.finish and not torch.isfinite(pixels).all():
            owners = ", ".join(part.owner for part in self.merged.finish)
            raise PluginError(owners, "finish returned values that are not finite (NaN or inf)")
        after = canvas.pasted(pixels, self.merged.alpha)
        self._lap("paste")
        kept = None if self.merged.finish else latents
        handover = going_on or Handover(after, kept, masks, model=self.model)
        return Outcome(handover, latents, self.plan.record(self.timings), after)

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.timings[phase] = round(now - self.clock, 4)
        self.clock = now
