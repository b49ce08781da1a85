"""What a pass encodes and draws before its loop: start, what is kept, channels, references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffedit.canvas import Canvas
from diffedit.denoiser import Reference
from diffedit.edit import Owned, Pixels, Row
from diffedit.plan import Plan


class Draws:
    """Encodes and draws for one pass.

    The order of `begin` and `channels` is diffusers' draw order, which matters in compat mode only:
    posterior of the source, noise, posterior of the masked picture. Elsewhere each draw has a
    stream of its own.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.run, self.canvas = plan.model, plan.run, plan.canvas

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels for every item: the mean, or in compat mode a sample, as diffusers does."""
        generator = self.run.rng("posterior") if self.run.compat else None
        latents = self.model.encode(pixels, generator)
        return latents.expand(self.run.items, -1, -1, -1)

    def begin(self) -> tuple[Tensor, Callable[[Tensor, int], Tensor] | None]:
        """Where sampling begins, and what keeps the rest of the picture in place."""
        start, mask = self.plan.merged.start, self.plan.merged.mask
        own_mask = "mask_channels" in self.model.capabilities
        keeps = bool(self.plan.merged.keep) or (mask is not None and not own_mask)
        source: Tensor | None = None
        if keeps or (start and isinstance(start.value.latents, Canvas)):
            if not self.run.compat:
                source = self.plan.given.latents_for(self.canvas.frame, mask)
            if source is None:
                source = self.encode(self.canvas.pixels)
        noise = self.run.streams.normal("noise", self.plan.latent_shape)
        kind = self.model.dtype if self.run.compat else torch.float32
        noise = noise.to(self.model.device, kind)
        source = None if source is None else source.to(noise)

        cells = self._cells(mask)
        latents = noise * self.plan.schedule.initial_noise_scale
        if start is not None:
            clean = self._start(start, source).to(noise)
            noised = self.plan.schedule.add_noise(clean, noise, 0)
            if start.value.at < 1 or cells is None:
                latents = noised
            elif not self.run.compat:  # pure noise where the picture changes freely
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
        clean = self.encode(given.pixels) if isinstance(given, Pixels) else given
        clean = self.plan.fitting(start.owner, "start", clean, self.plan.latent_shape)
        if self.plan.guard.diagnosing:
            self.plan.guard.check_finite(start.owner, "start", clean)
        return clean.expand(self.run.items, -1, -1, -1)

    def _cells(self, mask: Tensor | None) -> Tensor | None:
        """The mask over the latent grid, in [0, 1]: how freely each cell may change."""
        if mask is None:
            return None
        if self.run.compat:
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
        total = len(self.plan.schedule)

        def constrain(latents: Tensor, level: int) -> Tensor:
            kept = torch.zeros_like(latents[:, :1], dtype=torch.bool)
            if cells is not None:
                kept = kept | (cells <= 1 - level / total)
            for part in self.plan.merged.keep:
                keep = part.value
                if callable(keep):
                    keep = self.plan.guard.call(part.owner, "keep", keep, level - 1)
                keep = self.plan.fitting(part.owner, "keep", keep, (1, *latents.shape[2:]))
                kept = kept | (keep >= 0.5)
            return torch.where(kept, self.plan.schedule.add_noise(source, noise, level), latents)

        return constrain

    def channels(self) -> dict[str, Tensor]:
        """Further inputs of the denoiser, ``(items, c, h, w)`` each."""
        made: dict[str, Tensor] = {}
        mask = self.plan.merged.mask
        if "mask_channels" in self.model.capabilities:
            pixels = self.canvas.pixels
            if mask is None:  # everything may change, and nothing is known
                made["mask"] = torch.ones(1, 1, *self.plan.latent_shape[1:])
                hole = torch.ones_like(pixels[:1, :1])
            else:
                cells = self._cells(mask)
                assert cells is not None
                made["mask"] = (cells > 0).float()
                work = self.canvas.mask_to_work(mask)
                hole = (work >= 0.5 if self.run.compat else work > 0).float()
            # Mid-grey is 0 once the model has mapped [0, 1] to [-1, 1].
            made["masked"] = self.encode(
                torch.where(hole > 0, torch.full_like(pixels, 0.5), pixels)
            )
        elif self.run.compat and mask is not None:
            # diffusers samples the masked picture's posterior even where no channel takes it.
            self.run.streams.normal("posterior", self.plan.latent_shape)
        for role, part in self.plan.merged.channels.items():
            value = part.value
            made[role] = self.encode(value.pixels) if isinstance(value, Pixels) else value
        device, items = self.model.device, self.run.items
        return {k: v.to(device).expand(items, -1, -1, -1) for k, v in made.items()}

    def reference(self, part: Owned[Row]) -> Reference:
        """A row, ready for the loop."""
        row = part.value
        conditioning = self.model.embed([row.prompt], self.canvas.size)
        if isinstance(row.latents, Pixels):
            clean = self.encode(row.latents.pixels).to(self.model.device, torch.float32)
            # A stream of its own, named by the row: another edit's references shift nothing here.
            noise = self.run.streams.normal(part.stream, tuple(clean.shape[1:])).to(clean)

            def noised(call: int) -> Tensor:
                return self.plan.schedule.add_noise(clean, noise, call)

            return Reference(row.name, noised, clean, conditioning)
        function = row.latents

        def given(call: int) -> Tensor:
            made = self.plan.guard.call(part.owner, "row", function, call)
            made = self.plan.fitting(part.owner, "row", made, self.plan.latent_shape)
            return made.expand(self.run.items, -1, -1, -1)

        return Reference(row.name, given, None, conditioning)
