"""Averages of the weights over the training, which draw better than the weights themselves.

:class:`Constant` is the usual exponential average, with a warm-up. :class:`Power` forgets in
proportion to the length of the training, so that its width is a share of the training and not a
number of steps; averages of two such widths, stored now and then, give the average of any other
width afterwards (:func:`post_hoc`).

Source: Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from diffedit.errors import InputError
from diffedit.training.threads import in_parallel, shares

Weights = dict[str, dict[str, Tensor]]
"""Module name to key to tensor."""


@dataclass(frozen=True)
class Constant:
    """Decay min(decay, (1 + step) / (10 + step)): short at first, then constant."""

    decay: float

    def __call__(self, step: int) -> float:
        """The decay of update number ``step``, from 0."""
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Power:
    """Weights of time τ in proportion to τ^γ (EDM2, eq. 2); the first update takes all."""

    gamma: float

    @classmethod
    def of_width(cls, sigma_rel: float) -> Power:
        """The profile whose standard deviation is ``sigma_rel`` of the training, in (0, 0.28].

        Inverts σ_rel² = (γ + 1) (γ + 2)⁻² (γ + 3)⁻¹ (EDM2, section 3.1 and algorithm 2).
        EDM2 stores 0.05 and 0.10.
        """
        if not 0 < sigma_rel <= 12**-0.5:  # γ = 0, the plain mean, is the widest
            raise InputError(f"EMA width sigma_rel is {sigma_rel:g}; it must be in (0, 0.288]")
        inverse = sigma_rel**-2
        roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
        return cls(max(0.0, float(roots.real.max())))

    def __call__(self, step: int) -> float:
        """β_γ(t) = (1 - 1/t)^(γ + 1) with t = step + 1 (EDM2, eqs. 3 and 127)."""
        kept: float = (1 - 1 / (step + 1)) ** (self.gamma + 1)
        return kept


class Ema:
    """Running averages of the modules' weights.

    ``decay`` is the decay of :class:`Constant`, or any function of the step. Averages of half
    precision weights are kept in float32, where small changes are not rounded away.

    Attributes:
        shadow: module name to key to average; what is not a float is copied.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decay: float | Callable[[int], float]
    ) -> None:
        self.decay = decay if callable(decay) else Constant(decay)
        self.shadow: Weights = {
            name: {key: _wide(value).clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        """Move towards the present weights; ``step`` counts from 0."""
        rest = 1 - self.decay(step)
        for name, module in modules.items():
            shadow = self.shadow[name]
            pairs = [(shadow[key], value) for key, value in module.state_dict().items()]
            if all(value.device.type == "cpu" for _, value in pairs):
                in_parallel(partial(_move, rest=rest), shares(pairs, lambda pair: pair[1].numel()))
            else:
                _move(pairs, rest)

    @contextmanager
    def applied(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The averaged weights stand in the modules for the time of the ``with`` block."""
        present = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }
        try:
            for name, module in modules.items():
                module.load_state_dict(self.shadow[name])
            yield
        finally:
            for name, module in modules.items():
                module.load_state_dict(present[name])

    def snapshot(self, step: int) -> Snapshot:
        """The averages after update number ``step``, for :func:`post_hoc`."""
        if not isinstance(self.decay, Power):
            raise InputError("only averages with a power profile can be combined: Ema(…, Power(γ))")
        copies = {n: {k: v.cpu().clone() for k, v in s.items()} for n, s in self.shadow.items()}
        return Snapshot(step, self.decay.gamma, copies)


@torch.no_grad()  # of each thread its own
def _move(pairs: Sequence[tuple[Tensor, Tensor]], rest: float) -> None:
    """Move averages by ``rest`` of the way to the values beside them."""
    for average, value in pairs:
        if value.is_floating_point():
            average.lerp_(value.to(average), rest)
        else:
            average.copy_(value)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An average with profile τ^``gamma`` as it stood after update number ``step`` (from 0)."""

    step: int
    gamma: float
    weights: Weights


def _wide(value: Tensor) -> Tensor:
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.detach().float() if half else value.detach()


def post_hoc(snapshots: Sequence[Snapshot], profile: Power, step: int | None = None) -> Weights:
    """The average that ``profile`` would have given after update ``step`` (default: the latest).

    The least-squares mixture of the stored averages, in function space (EDM2, appendix C.2); what
    is not a float comes from the latest snapshot. Good where ``profile`` lies within or near the
    stored widths, and better the more snapshots there are.
    """
    if not snapshots:
        raise InputError("post-hoc averages need at least one stored snapshot; got none")
    latest = max(snapshots, key=lambda snapshot: snapshot.step)
    wanted = latest.step if step is None else step
    times = [snapshot.step + 1 for snapshot in snapshots]
    gammas = [snapshot.gamma for snapshot in snapshots]
    shares = mixture(times, gammas, wanted + 1, profile.gamma)

    def mixed(name: str, key: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like.clone()
        parts = [
            share * snapshot.weights[name][key].double()
            for share, snapshot in zip(shares, snapshots, strict=True)
        ]
        return torch.stack(parts).sum(0).to(like.dtype)

    return {n: {k: mixed(n, k, v) for k, v in s.items()} for n, s in latest.weights.items()}


def mixture(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> list[float]:
    """Shares, of sum 1, of the profiles that come nearest to another (EDM2, algorithm 3)."""
    t, g = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (times, gammas))
    sought = _overlap(t, g, torch.tensor(float(time)).double(), torch.tensor(gamma).double())
    shares = torch.linalg.lstsq(_overlap(t, g, t.T, g.T), sought, driver="gelsd").solution
    return [float(share) for share in (shares / shares.sum()).flatten()]


def _overlap(t_a: Tensor, g_a: Tensor, t_b: Tensor, g_b: Tensor) -> Tensor:
    """∫ p_a p_b dτ of profiles p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t] (EDM2, eq. 151)."""
    least, most = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    ends = (least / t_a) ** g_a * (least / t_b) ** g_b / most
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * ends
