"""Which noise levels a batch is trained at, as shares ``u`` of the way to noise.

Each function gives (count,) float64 in [0, 1], 0 the picture and 1 noise, for ``Process.at``: the
same sampler serves integer timesteps and continuous flows. Where a loss has weights, drawing a
level more often and weighing it less is the same loss with less noise in the gradient.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from diffedit.errors import InputError


def uniform(count: int, generator: Generator) -> Tensor:
    """Independent and uniform (Ho et al. 2020, arXiv:2006.11239, algorithm 1), in [0, 1)."""
    return _rand(count, generator)


def stratified(count: int, generator: Generator, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """One in each of ``count`` equal cells of ``span``, ascending.

    Each is uniform over its cell, all together over the span. Covering the range in every batch
    steadies the gradient (Kingma et al. 2021, arXiv:2107.00630, appendix I, do it with one
    common offset).
    """
    low, high = _checked(span)
    cells = (torch.arange(count, device=generator.device) + _rand(count, generator)) / max(1, count)
    return low + cells * (high - low)


def logit_normal(count: int, generator: Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The logistic function of N(mean, std²) (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Favours the middle of the way, where a straight path is hardest to predict; ``mean > 0`` leans
    towards noise, ``mean < 0`` towards the picture.
    """
    normal = torch.randn(count, generator=generator, device=generator.device)
    return (mean + std * normal.double()).sigmoid()


def focused(count: int, generator: Generator, span: tuple[float, float], share: float) -> Tensor:
    """A mixture: ``share`` of them (rounded) stratified in ``span``, then the rest everywhere.

    For levels that decide something the user sees, say the outline of what the words ask for.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share of focused timesteps is {share:g}; it must be in [0, 1]")
    there = round(share * count)
    return torch.cat([stratified(there, generator, span), stratified(count - there, generator)])


def _rand(count: int, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device).double()


def _checked(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= span[0] < span[1] <= 1:
        raise InputError(f"span of timesteps {span} must be (low, high) with 0 <= low < high <= 1")
    return span
