"""One pass: what its edits contribute, merged, sampled and pasted back.

The phases stand in `run_pass` in their order: regions, contribute, merge (conflicts raise here,
before any model runs), patches, embed, draws, prepare, loop, decode, finish, paste-back, undo.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffedit.box import Box
from diffedit.canvas import Canvas, Frame, exact_frame, frame
from diffedit.denoiser import Denoiser, Reference
from diffedit.edit import Contribution, Edit, Owned, Pixels, Row, canonical, labels, merge
from diffedit.errors import CapabilityError, DiffeditError, InputError, MaskError, PluginError
from diffedit.guard import Guard, Untouched
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.models.protocol import Conditioning, LatentModel
from diffedit.plugins import Plugins
from diffedit.run import Run, Streams
from diffedit.sampler import Step, sample
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
    """

    model: LatentModel
    plugins: Plugins
    seeds: tuple[int, ...]
    compat: bool = False
    load: Callable[[str, Callable[[], Any]], Any] = field(default=lambda key, loader: loader())


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


def run_pass(
    pass_: Pass, given: Handover, setting: Setting, diagnosing: bool = False
) -> Generator[Step, None, Outcome]:
    """Run one pass, yielding its steps; closing the generator cancels and undoes everything.

    Raises:
        InputError: the pass cannot be run as it stands.
        PluginError: an edit breaks the contract.
    """
    plan = _Plan(pass_, given, setting, Guard(diagnosing))
    notify = setting.plugins.notify
    error: BaseException | None = None
    try:
        notify("pass_started", pass_=pass_, run=plan.run)
        outcome: Outcome | None = None
        if plan.rests:
            outcome = plan.finish(None)
        else:
            with ExitStack() as undo:
                untouched = Untouched(setting.model.parts(), ", ".join(plan.labels))
                undo.enter_context(untouched)
                latents = yield from plan.sample(undo, untouched)
                if latents is not None:
                    outcome = plan.finish(latents)
        if outcome is None:
            return (yield from _diagnose(pass_, given, setting, diagnosing))
        return outcome
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            notify("pass_finished", pass_=pass_, error=error)
        except PluginError as late:
            if error is None:
                raise
            log.warning("%s", late)  # the error under way says more


def _diagnose(
    pass_: Pass, given: Handover, setting: Setting, diagnosing: bool
) -> Generator[Step, None, Outcome]:
    """Latents came out not finite: run again and look at every part, to name the culprit."""
    if not diagnosing:
        yield from run_pass(pass_, given, setting, diagnosing=True)
    raise DiffeditError("sampling gave values that are not finite: try dtype float32")


class _Plan:
    """A pass whose edits have contributed: everything that can be refused has been."""

    def __init__(self, pass_: Pass, given: Handover, setting: Setting, guard: Guard) -> None:
        self.pass_, self.given, self.setting, self.guard = pass_, given, setting, guard
        self.model = setting.model
        self.clock = time.perf_counter()
        self.timings: dict[str, float] = {}
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
            self.schedule = self._schedule()

    # --- before any model runs --------------------------------------------------------------------

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
            mask = self._fitting(label, "mask", mask, (1, height, width), move=False)
            if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise PluginError(label, "mask must hold floating-point values in [0, 1]")
            outside = mask.clone()
            box = self.canvas.frame.region
            outside[..., box.top : box.bottom, box.left : box.right] = 0
            if outside.any():
                raise PluginError(label, "its mask reaches beyond the region it asked for")
        for part in (made.keep, *(term.weight for term in made.terms)):
            if isinstance(part, Tensor):
                cells = (1, *(side // self.model.grid for side in reversed(self.canvas.size)))
                self._fitting(label, "keep or weight", part, cells, move=False)
        start, end = made.during
        if not 0 <= start <= end <= 1:
            raise InputError(f"{label}: needs 0 <= start <= end <= 1, got {start:g} and {end:g}")
        return made

    def _fitting(
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

    def _schedule(self) -> Schedule:
        start = self.merged.start
        at = start.value.at if start else 1.0
        if not 0 < at <= 1:
            raise InputError(f"strength must lie in (0, 1], got {at:g}")
        return self.model.schedule(
            self.pass_.scheduler, self.pass_.steps, at, compat=self.setting.compat
        )

    # --- sampling ---------------------------------------------------------------------------------

    def sample(self, undo: ExitStack, untouched: Untouched) -> Generator[Step, None, Tensor | None]:
        """Patches, embed, draws, prepare, loop. Returns None when the latents are not finite."""
        for part in self.merged.patches:
            own = undo.enter_context(Untouched(self.model.parts(), part.owner, untouched))
            with own.watching():
                restore: object = self.guard.call(part.owner, "patch", part.value.apply, self.model)
            if not callable(restore):
                said = type(restore).__name__
                raise PluginError(part.owner, f"patch returned {said}, not what undoes it")
            undo.callback(self.guard.call, part.owner, "the undoing of a patch", restore)
        branches = self._embed()
        self._lap("embed")
        latents, constrain = self._draws()
        channels = self._channels()
        references = [self._reference(part) for part in self.merged.rows]
        self._lap("encode")
        for one in self.merged.prepare:
            for step in self.guard.steps(one.owner, "prepare", one.value, self.run):
                if not isinstance(step, Step):
                    raise PluginError(one.owner, f"prepare yielded {type(step).__name__}, no Step")
                yield step
        denoise = Denoiser(
            self.model,
            self.schedule,
            self.merged,
            branches,
            references=references,
            channels=channels,
            items=self.run.items,
            guidance=self.pass_.guidance,
            rescale=self.pass_.rescale,
            embedded_guidance=(
                self.pass_.guidance if "embedded_guidance" in self.model.capabilities else None
            ),
            guard=self.guard,
        )
        if self.merged.attention:
            undo.enter_context(self.model.attending(denoise.attend))
        if not self.setting.compat:
            seeds = [self.run.streams.seed("tree", item) for item in range(self.run.items)]
            self.schedule.seed(seeds, latents)
        noise = [self.run.rng("step", item) for item in range(self.run.items)]
        for step in sample(denoise, latents, self.schedule, rng=noise, constrain=constrain):
            latents = step.latents
            step = replace(step, _look=self.model.preview)
            self.setting.plugins.notify("step_done", step=step)
            yield step
        self._lap("sample")
        return latents if bool(torch.isfinite(latents).all()) else None

    def _embed(self) -> dict[str, Conditioning]:
        """One row of conditioning per prediction, in batch order: the negative first."""
        texts: dict[str, str] = {}
        if self.pass_.guidance > 1 and "embedded_guidance" not in self.model.capabilities:
            texts[NEGATIVE] = self.run.negative
        texts[POSITIVE] = self.run.prompt
        made = {name: self.model.embed([text], self.canvas.size) for name, text in texts.items()}
        for part in self.merged.branches:
            prompt = part.value.prompt
            made[part.value.name] = (
                self.model.embed([prompt], self.canvas.size) if isinstance(prompt, str) else prompt
            )
        return made

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        width, height = (side // self.model.grid for side in self.canvas.size)
        return self.model.channels, height, width

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels for every item: the mean, or in compat mode a sample, as diffusers does."""
        generator = self.run.rng("posterior") if self.setting.compat else None
        latents = self.model.encode(pixels, generator)
        return latents.expand(self.run.items, -1, -1, -1)

    def _draws(self) -> tuple[Tensor, Callable[[Tensor, int], Tensor] | None]:
        """Where sampling begins, and what keeps the rest of the picture in place."""
        start, mask = self.merged.start, self.merged.mask
        own_mask = "mask_channels" in self.model.capabilities
        keeps = bool(self.merged.keep) or (mask is not None and not own_mask)
        source: Tensor | None = None
        if keeps or (start and isinstance(start.value.latents, Canvas)):
            if not self.setting.compat:
                source = self.given.latents_for(self.canvas.frame, mask)
            if source is None:
                source = self._encode(self.canvas.pixels)
        width, height = (side // self.model.grid for side in self.canvas.size)
        noise = self.run.streams.normal("noise", (self.model.channels, height, width))
        kind = self.model.dtype if self.setting.compat else torch.float32
        noise = noise.to(self.model.device, kind)
        source = None if source is None else source.to(noise)

        cells = self._cells(mask)
        latents = noise * self.schedule.initial_noise_scale
        if start is not None:
            clean = self._start(start, source).to(noise)
            noised = self.schedule.add_noise(clean, noise, 0)
            if start.value.at < 1 or cells is None:
                latents = noised
            elif not self.setting.compat:  # pure noise where the picture changes freely
                latents = torch.where(cells > 0, latents, noised)
        if not keeps:
            return latents, None
        assert source is not None
        return latents, self._constraint(source, noise, None if own_mask else cells)

    def _start(self, start: Owned[Any], source: Tensor | None) -> Tensor:
        given = start.value.latents
        if isinstance(given, Canvas):
            assert source is not None
            return source
        clean = self._encode(given.pixels) if isinstance(given, Pixels) else given
        clean = self._fitting(start.owner, "start", clean, self._latent_shape)
        if self.guard.diagnosing:
            self.guard.check_finite(start.owner, "start", clean)
        return clean.expand(self.run.items, -1, -1, -1)

    def _cells(self, mask: Tensor | None) -> Tensor | None:
        """The mask over the latent grid, in [0, 1]: how freely each cell may change."""
        if mask is None:
            return None
        if self.setting.compat:
            binary = (mask >= 0.5).float()
            cells = torch.nn.functional.interpolate(binary, scale_factor=1 / self.model.grid)
        else:
            cells = self.canvas.mask_to_latent(mask, self.model.grid)
        return cells.to(self.model.device)

    def _constraint(
        self, source: Tensor, noise: Tensor, cells: Tensor | None
    ) -> Callable[[Tensor, int], Tensor]:
        """Keep what must stay at the source, at the noise level that the next call sees.

        A soft mask says how early a cell is let go: with value m it changes in the last share m of
        the calls (Levin & Fried 2023, "Differential Diffusion", arXiv:2306.00950). Cells are never
        blended fractionally: a mean of two noisy latents has too little noise.
        """
        total = len(self.schedule)

        def constrain(latents: Tensor, level: int) -> Tensor:
            kept = torch.zeros_like(latents[:, :1], dtype=torch.bool)
            if cells is not None:
                kept = kept | (cells <= 1 - level / total)
            for part in self.merged.keep:
                keep = part.value
                if callable(keep):
                    keep = self.guard.call(part.owner, "keep", keep, level - 1)
                keep = self._fitting(part.owner, "keep", keep, (1, *latents.shape[2:]))
                kept = kept | (keep >= 0.5)
            return torch.where(kept, self.schedule.add_noise(source, noise, level), latents)

        return constrain

    def _channels(self) -> dict[str, Tensor]:
        """Further inputs of the denoiser, ``(items, c, h, w)`` each."""
        made: dict[str, Tensor] = {}
        mask = self.merged.mask
        if "mask_channels" in self.model.capabilities:
            pixels = self.canvas.pixels
            if mask is None:  # everything may change, and nothing is known
                width, height = (side // self.model.grid for side in self.canvas.size)
                made["mask"] = torch.ones(1, 1, height, width)
                hole = torch.ones_like(pixels[:1, :1])
            else:
                cells = self._cells(mask)
                assert cells is not None
                made["mask"] = (cells > 0).float()
                work = self.canvas.mask_to_work(mask)
                hole = (work >= 0.5 if self.setting.compat else work > 0).float()
            # Mid-grey is 0 once the model has mapped [0, 1] to [-1, 1].
            made["masked"] = self._encode(
                torch.where(hole > 0, torch.full_like(pixels, 0.5), pixels)
            )
        elif self.setting.compat and mask is not None:
            # diffusers samples the masked picture's posterior even where no channel takes it.
            width, height = (side // self.model.grid for side in self.canvas.size)
            self.run.streams.normal("posterior", (self.model.channels, height, width))
        for role, part in self.merged.channels.items():
            value = part.value
            made[role] = self._encode(value.pixels) if isinstance(value, Pixels) else value
        device, items = self.model.device, self.run.items
        return {k: v.to(device).expand(items, -1, -1, -1) for k, v in made.items()}

    def _reference(self, part: Owned[Row]) -> Reference:
        row = part.value
        conditioning = self.model.embed([row.prompt], self.canvas.size)
        if isinstance(row.latents, Pixels):
            clean = self._encode(row.latents.pixels).to(self.model.device, torch.float32)
            # A stream of its own, named by the row: another edit's references shift nothing here.
            noise = self.run.streams.normal(part.stream, tuple(clean.shape[1:])).to(clean)

            def noised(call: int) -> Tensor:
                return self.schedule.add_noise(clean, noise, call)

            return Reference(row.name, noised, clean, conditioning)
        function = row.latents

        def given(call: int) -> Tensor:
            made = self.guard.call(part.owner, "row", function, call)
            made = self._fitting(part.owner, "row", made, self._latent_shape)
            return made.expand(self.run.items, -1, -1, -1)

        return Reference(row.name, given, None, conditioning)

    # --- afterwards -------------------------------------------------------------------------------

    def finish(self, latents: Tensor | None) -> Outcome:
        """Decode, finish, paste back."""
        canvas = self.canvas
        if latents is None:
            pixels = canvas.region_pixels
        else:
            decoded = self.model.decode(latents).cpu()
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
        mask = self.merged.mask
        after = canvas.pasted(pixels, mask)
        self._lap("paste")
        kept = None if self.merged.finish else latents
        return Outcome(Handover(after, kept, mask), latents, self._record())

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.timings[phase] = round(now - self.clock, 4)
        self.clock = now

    def _record(self) -> dict[str, Any]:
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
            "timings": self.timings,
        }


def _streams(setting: Setting) -> Streams:
    if not setting.compat:
        return Streams(setting.seeds)
    if len(setting.seeds) != 1:
        raise InputError("compat mode compares one picture at a time: give one seed")
    return Streams(setting.seeds, torch.Generator().manual_seed(setting.seeds[0]))
