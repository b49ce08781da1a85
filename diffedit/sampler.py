"""The one sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffedit.schedule import Schedule


class Denoise(Protocol):
    """One prediction for one call: raw output (epsilon, v, …) from unscaled latents."""

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        """Predict."""


@dataclass(frozen=True, eq=False)
class Step:
    """What one call of the scheduler left behind.

    Attributes:
        index: which call, counted from 0.
        total: how many calls this trip makes.
        latents: the latents after the call, ``(b, c, h, w)``. Shared: do not write into them.
        pass_index: which pass of the workflow, counted from 0.
        passes: how many passes the workflow has.
    """

    index: int
    total: int
    latents: Tensor
    pass_index: int = 0
    passes: int = 1
    _x0: Callable[[], Tensor] | None = field(default=None, repr=False)
    _look: Callable[[Tensor], Tensor] = field(default=lambda x: x, repr=False)

    @property
    def x0(self) -> Tensor:
        """The clean latents the denoiser expected at this call, computed when asked for.

        The noisy ones, where nobody says how noisy they are.
        """
        return self._x0() if self._x0 is not None else self.latents

    def preview(self) -> Tensor:
        """A rough look at what is coming, ``(b, 3, h, w)`` in [0, 1]."""
        return self._look(self.x0)


def sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: Schedule,
    *,
    rng: Sequence[torch.Generator],
    constrain: Callable[[Tensor, int], Tensor] | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Step]:
    """Take latents through a schedule.

    Args:
        denoise: the folded denoiser of the pass.
        latents: ``(b, c, h, w)`` at the schedule's first noise level.
        schedule: the calls to make; used up by this.
        rng: one generator per item, for samplers that draw noise.
        constrain: ``(latents, level) -> latents`` after each call; level is the index of the next
            call, ``len(schedule)`` after the last.
        noise: what the sampler draws at a call, where it is said from outside.

    Yields:
        One `Step` per call of the scheduler.
    """
    total = len(schedule)
    for call in range(total):
        output = denoise(latents, call)
        before = latents
        drawn = None if noise is None else noise(call)
        latents = schedule.step(output, call, before, rng, drawn)
        if constrain is not None:
            latents = constrain(latents, call + 1)

        def x0(output: Tensor = output, call: int = call, before: Tensor = before) -> Tensor:
            return schedule.to_x0(output, call, before) if schedule.tells_noise else before

        yield Step(call, total, latents, _x0=x0)
