"""One pass: planned, sampled and pasted back.

The phases stand in this order: regions, contribute, merge (`diffedit.plan`; conflicts raise there,
before any model runs), patches, embed, draws, prepare, loop, decode, finish, paste-back, undo.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffedit.denoiser import Denoiser
from diffedit.draws import Draws
from diffedit.edit import labels
from diffedit.errors import DiffeditError, PluginError
from diffedit.guard import Guard
from diffedit.models.protocol import Conditioning
from diffedit.plan import Handover, Plan, Setting
from diffedit.sampler import Step, sample
from diffedit.untouched import Untouched
from diffedit.workflow import Pass

log = logging.getLogger(__name__)


class NotFinite(DiffeditError):
    """Latents came out as NaN or inf; checked once per pass, and examined only then."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a pass.

    Attributes:
        handover: for the next pass.
        latents: before decoding, ``(b, c, h, w)``; None when nothing was sampled.
        record: the order of the edits, the calls made, the region and the timings, JSON-ready.
    """

    handover: Handover
    latents: Tensor | None
    record: dict[str, Any]


def run_pass(pass_: Pass, given: Handover, setting: Setting) -> Generator[Step, None, Outcome]:
    """Run one pass, yielding its steps; closing the generator cancels and undoes everything.

    Raises:
        InputError: the pass cannot be run as it stands.
        PluginError: an edit breaks the contract.
    """
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
        branches = self._embed()
        self._lap("embed")
        draws = Draws(self.plan)
        channels = draws.channels()
        references = [draws.reference(part) for part in self.merged.rows]
        self._lap("encode")
        for one in self.merged.prepare:
            for step in self.guard.steps(one.owner, "prepare", one.value, self.run):
                if not isinstance(step, Step):
                    raise PluginError(one.owner, f"prepare yielded {type(step).__name__}, no Step")
                yield step
        latents, constrain = draws.begin()
        denoise = Denoiser(
            self.run,
            schedule,
            self.merged,
            branches,
            references=references,
            channels=channels,
            guidance=pass_.guidance,
            rescale=pass_.rescale,
            embedded_guidance=(
                pass_.guidance if "embedded_guidance" in self.model.capabilities else None
            ),
            guard=self.guard,
        )
        if self.merged.attention:
            undo.enter_context(self.model.attending(denoise.attend))
        if not self.run.compat:
            seeds = [self.run.streams.seed("tree", item) for item in range(self.run.items)]
            schedule.seed(seeds, latents)
        noise = [self.run.rng("step", item) for item in range(self.run.items)]
        for step in sample(denoise, latents, schedule, rng=noise, constrain=constrain):
            latents = step.latents
            yield step
        self._lap("sample")
        if not torch.isfinite(latents).all():
            raise NotFinite("sampling gave values that are not finite: try dtype float32")
        return latents

    def _embed(self) -> dict[str, Conditioning]:
        """One row of conditioning per prediction."""
        size = self.run.canvas.size
        return {
            name: self.model.embed([said], size) if isinstance(said, str) else said
            for name, said in self.plan.predictions.items()
        }

    def finish(self, latents: Tensor | None) -> Outcome:
        """Decode, finish, paste back."""
        canvas = self.plan.canvas
        if latents is None:
            pixels = canvas.region_pixels
        else:
            decoded = self.model.decode(self.run.laid_out(latents)).cpu()
            if not torch.isfinite(decoded).all():
                raise DiffeditError("decoding gave values that are not finite: try dtype float32")
            pixels = canvas.to_region(decoded)
            self._lap("decode")
        for part in self.merged.finish:
            pixels = self.guard.call(
                part.owner, "finish", part.value, pixels, lent=(pixels,), like=pixels
            )
        if self.merged.finish and not torch.isfinite(pixels).all():
            owners = ", ".join(part.owner for part in self.merged.finish)
            raise PluginError(owners, "finish returned values that are not finite (NaN or inf)")
        masks = (self.merged.mask, self.merged.alpha)
        after = canvas.pasted(pixels, self.merged.alpha)
        self._lap("paste")
        kept = None if self.merged.finish else latents
        return Outcome(Handover(after, kept, masks), latents, self.plan.record(self.timings))

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.timings[phase] = round(now - self.clock, 4)
        self.clock = now
