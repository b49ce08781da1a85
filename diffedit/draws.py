"""What a pass encodes and draws before its loop: start, what is kept, channels, references."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffedit.canvas import Canvas
from diffedit.contribution import Owned, Pixels, Row
from diffedit.denoiser import Reference
from diffedit.fitting import HOLES
from diffedit.handover import Handover
from diffedit.plan import Plan
from diffedit.schedule import Call


class Draws:
    """Encodes and draws for one pass.

    The order of constructor and `channels` is diffusers' draw order, which matters in compat mode
    only: posterior of the source, noise, posterior of the masked picture. Elsewhere each draw has a
    stream of its own.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.run, self.canvas = plan.model, plan.run, plan.canvas
        self.fitting = plan.fitting
        start, mask = plan.merged.start, plan.merged.mask
        #: Whether the mask is kept by holding latents to the source; inpainting models see it.
        self.holds = mask is not None and "mask_channels" not in self.model.capabilities
        #: Whether a control network sees it as latents, which in diffusers then keeps it alone.
        self.told = mask is not None and bool(plan.merged.sees - {"hole"})
        if self.run.compat and self.told:
            self.holds = False
        self.keeps = self.holds or bool(plan.merged.keep)
        self.source: Tensor | None = None
        if self.keeps or (start and isinstance(start.value.latents, Canvas)):
            if not self.run.compat:
                masks = (mask, plan.merged.alpha)
                self.source = plan.given.latents_for(self.model, self.canvas.frame, masks)
            if self.source is None:
                self.source = self.encode(self.canvas.pixels)
        kind = torch.float32
        if self.run.compat:
            known = self.source is not None
            kind = self.model.compat_source_dtype if known else self.model.compat_dtype
        noise = plan.given.noise  # of a pass that goes on where this one begins
        if noise is None:
            noise = self.run.streams.normal("noise", self.fitting.latent_shape)
        self.noise = noise.to(self.model.device, kind)
        if self.source is not None:
            self.source = self.source.to(self.noise)
        self.cells = self._cells(mask)

    def begin(self) -> tuple[Tensor, Callable[[Tensor, int], Tensor] | None]:
        """Where sampling begins, and what keeps the rest of the picture in place."""
        start, schedule = self.plan.merged.start, self.plan.schedule
        latents = self.noise * schedule.initial_noise_scale
        if self.plan.given.unfinished:
            latents = self._going_on(self.plan.given)
        if start is not None:
            given = self._start(start).to(self.noise)
            known = start.value.noised
            noised = given if known else schedule.add_noise(given, self.noise, 0)
            if known or start.value.at < 1 or self.cells is None:
                latents = noised
            elif not self.run.compat:  # pure noise where the picture changes freely
                latents = torch.where(self.cells > 0, latents, noised)
        return latents, self._constraint() if self.keeps else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels for every item: the mean, or in compat mode a sample, as diffusers does."""
        generator = self.run.rng("posterior") if self.run.compat else None
        latents = self.model.encode(self.run.laid_out(pixels), generator)
        return latents.expand(self.run.items, -1, -1, -1)

    def _going_on(self, given: Handover) -> Tensor:
        """Latents that a pass before left unfinished, as this pass's sampler holds them."""
        assert given.latents is not None
        latents = given.latents.to(self.noise)
        (a, s), (own_a, own_s) = given.level, self.plan.schedule.coefficients(0)
        if (a == 1) == (own_a == 1):
            return latents
        # Of samplers that hold the picture's size and such that hold the noise's.
        return latents * (math.hypot(own_a, own_s) / math.hypot(a, s))

    def clean(self) -> Tensor:
        """The canvas as latents, ``(items, c, h, w)``."""
        if self.source is None:
            self.source = self.encode(self.canvas.pixels).to(self.noise)
        return self.source

    def step_noise(self, index: int) -> Tensor:
        """What the sampler is to draw at a call, where an edit says it."""
        part = self.plan.merged.noise
        assert part is not None
        made = self.plan.guard.call(part.owner, "noise", part.value, self.plan.schedule.call(index))
        made = self.fitting.tensor(part.owner, "noise", made, self.fitting.latent_shape)
        return made.to(self.noise).expand(self.run.items, -1, -1, -1)

    def _start(self, start: Owned[Any]) -> Tensor:
        given = start.value.latents
        if isinstance(given, Canvas):
            assert self.source is not None
            return self.source
        if isinstance(given, Pixels):
            clean: Tensor = self.encode(self.fitting.pixels(start.owner, given))
        elif callable(given):
            clean = self.plan.guard.call(start.owner, "start", given)
        else:
            clean = given
        clean = self.fitting.tensor(start.owner, "start", clean, self.fitting.latent_shape)
        if self.plan.guard.diagnosing:
            self.plan.guard.check_finite(start.owner, "start", clean)
        return clean.expand(self.run.items, -1, -1, -1)

    def _cells(self, mask: Tensor | None) -> Tensor | None:
        """The mask over the latent grid, in [0, 1]: how freely each cell may change."""
        if mask is None:
            return None
        if self.run.compat:
            binary = (mask >= 0.5).float()
            cells = F.interpolate(binary, scale_factor=1 / self.model.cell)
        else:
            cells = self.canvas.mask_to_latent(mask, self.model.cell)
        return cells.to(self.model.device)

    def _constraint(self) -> Callable[[Tensor, int], Tensor]:
        """Keep what must stay at the source, at the noise level that the next call sees.

        A soft mask says how early a cell is let go: with value m it changes in the last share m of
        the calls (Levin & Fried 2023, "Differential Diffusion", arXiv:2306.00950). Cells are never
        blended fractionally: a mean of two noisy latents has too little noise.
        """
        source, noise, schedule = self.source, self.noise, self.plan.schedule
        assert source is not None
        cells = self.cells if self.holds else None
        origin = self.plan.given.origin
        shape = (1, *source.shape[2:])
        keeps: list[Tensor | Callable[[Call], Tensor]] = []
        for part in self.plan.merged.keep:
            if callable(part.value):
                keeps.append(
                    functools.partial(self.plan.guard.call, part.owner, "keep", part.value)
                )
            else:
                keeps.append(self.fitting.tensor(part.owner, "keep", part.value, shape) >= 0.5)
        owners = [part.owner for part in self.plan.merged.keep]

        def constrain(latents: Tensor, level: int) -> Tensor:
            kept = torch.zeros_like(latents[:, :1], dtype=torch.bool)
            if cells is not None:
                kept = kept | (cells <= 1 - schedule.progress(level, origin))
            for owner, keep in zip(owners, keeps, strict=True):
                if callable(keep):
                    made = keep(schedule.call(level - 1))
                    keep = self.fitting.tensor(owner, "keep", made, shape) >= 0.5
                kept = kept | keep
            return torch.where(kept, schedule.add_noise(source, noise, level), latents)

        return constrain

    def channels(self) -> dict[str, Tensor]:
        """Further channels of the denoiser, ``(items, c, h, w)`` each."""
        made: dict[str, Tensor] = {}
        mask = self.plan.merged.mask
        own = "mask_channels" in self.model.capabilities
        if own or self.told:
            pixels, hole = self.canvas.pixels, self._hole()
            if self.cells is None:  # everything may change, and nothing is known
                made["mask"] = torch.ones(1, 1, *self.fitting.latent_shape[1:])
            else:
                made["mask"] = (self.cells > 0).float()
            if own and self.model.roles["mask"] > 1:  # its pixels, as the channels of a cell
                made["mask"] = F.pixel_unshuffle(hole, self.model.cell)
            for role, fill in HOLES.items():
                holed = torch.where(hole > 0, torch.full_like(pixels, fill), pixels)
                if own and role == "masked":
                    made[role] = self.encode(holed)
                elif role in self.plan.merged.sees:
                    # A control network gets the posterior's mode, as it does of its hint.
                    made[role] = self.model.encode(self.run.laid_out(holed))
        elif self.run.compat and mask is not None:
            # diffusers samples the masked picture's posterior even where no channel takes it.
            self.run.streams.normal("posterior", self.fitting.latent_shape)
        if mask is not None and "hole" in self.plan.merged.sees:
            made["hole"] = self._hole()
        for role, part in self.plan.merged.channels.items():
            value = part.value
            if isinstance(value, Pixels):
                # What a picture is drawn after is one picture: the posterior's mode, as elsewhere.
                value = self.model.encode(self.fitting.pixels(part.owner, value), role=role)
            made[role] = value
        device, items = self.model.device, self.run.items
        return {k: v.to(device).expand(items, -1, -1, -1) for k, v in made.items()}

    def _hole(self) -> Tensor:
        """Where the picture is to change, ``(1, 1, H, W)`` in working pixels, 0 or 1."""
        mask = self.plan.merged.mask
        if mask is None:
            return torch.ones_like(self.canvas.pixels[:1, :1])
        work = self.canvas.mask_to_work(mask)
        return (work >= 0.5 if self.run.compat else work > 0).float()

    def tokens(self) -> dict[str, list[Tensor]]:
        """Pictures that become part of the denoiser's sequence, ``(items, c, h, w)`` each."""
        made: dict[str, list[Tensor]] = {}
        for part, pixels in zip(self.plan.merged.tokens, self.plan.beside, strict=True):
            value = part.value.latents if pixels is None else self.model.encode(pixels)
            value = self.fitting.token_latents(part.owner, value).to(self.noise)
            made.setdefault(part.value.role, []).append(value.expand(self.run.items, -1, -1, -1))
        return made

    def reference(self, part: Owned[Row]) -> Reference:
        """A row, ready for the loop."""
        row = part.value
        conditioning = self.plan.embed(row.prompt)
        if isinstance(row.latents, Pixels):
            clean = self.encode(self.fitting.pixels(part.owner, row.latents)).to(
                self.model.device, torch.float32
            )
            # A stream of its own, named by the row: another edit's references shift nothing here.
            noise = self.run.streams.normal(part.stream, tuple(clean.shape[1:])).to(clean)

            def noised(call: Call) -> Tensor:
                return self.plan.schedule.add_noise(clean, noise, call.index)

            return Reference(row.name, noised, clean, conditioning)
        function = row.latents

        def given(call: Call) -> Tensor:
            made = self.plan.guard.call(part.owner, "row", function, call)
            made = self.fitting.tensor(part.owner, "row", made, self.fitting.latent_shape)
            return made.expand(self.run.items, -1, -1, -1)

        return Reference(row.name, given, None, conditioning)
