"""Averages of weights against their closed integrals, and post-hoc against direct averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from diffedit.errors import InputError
from diffedit.training.ema import Constant, Ema, Power, mixture, post_hoc


class _Weight(nn.Module):
    """One weight, one half-precision weight and one counter."""

    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=dtype))
        self.register_buffer("count", torch.tensor(0))
        self.count: torch.Tensor

    def put(self, value: float, step: int) -> None:
        self.w.data.fill_(value)
        self.count.fill_(step)


def _curve(step: int) -> float:
    """Weights as in a training: quick at first, then slow and noisy."""
    rng = np.random.default_rng(step)
    return float(np.log1p(step) + 0.3 * np.sin(step / 17) + 0.1 * rng.normal())


def _run(emas: list[Ema], module: _Weight, steps: int) -> None:
    for step in range(steps):
        module.put(_curve(step), step)
        for ema in emas:
            ema.update({"m": module}, step)


def _value(ema: Ema) -> float:
    return float(ema.shadow["m"]["w"])


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97])
def test_the_power_profile_is_its_integral(gamma: float) -> None:
    """Weights constant within each step, so the integral of the paper is a sum of exact pieces."""
    module = _Weight(5.0)
    ema = Ema({"m": module}, Power(gamma))
    steps = 60
    _run([ema], module, steps)
    expected = sum(
        integrate.quad(lambda tau: (gamma + 1) * tau**gamma / steps ** (gamma + 1), k, k + 1)[0]
        * _curve(k)
        for k in range(steps)
    )
    assert _value(ema) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.10, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma = Power.of_width(sigma_rel).gamma
    moments = [
        integrate.quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), 0, 1)[0] for k in range(3)
    ]
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel, rel=1e-5)


def test_the_exponents_of_the_paper() -> None:
    assert Power.of_width(0.05).gamma == pytest.approx(16.97, abs=0.01)
    assert Power.of_width(0.10).gamma == pytest.approx(6.94, abs=0.01)
    for width in (0.0, 0.3):
        with pytest.raises(InputError, match="sigma_rel"):
            Power.of_width(width)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.10, 0.12])
def test_post_hoc_is_near_the_direct_average(sigma_rel: float) -> None:
    module, steps = _Weight(), 800
    stored = [Ema({"m": module}, Power.of_width(width)) for width in (0.05, 0.10)]
    direct = Ema({"m": module}, Power.of_width(sigma_rel))
    snapshots = []
    for step in range(steps):
        module.put(_curve(step), step)
        for ema in (*stored, direct):
            ema.update({"m": module}, step)
        if (step + 1) % 50 == 0:
            snapshots += [ema.snapshot(step) for ema in stored]
    weights = post_hoc(snapshots, Power.of_width(sigma_rel))["m"]
    assert float(weights["w"]) == pytest.approx(_value(direct), abs=2e-3)
    # Not merely because everything is near: the stored widths are further off.
    if sigma_rel == 0.08:
        assert min(abs(_value(ema) - _value(direct)) for ema in stored) > 5e-3
    assert weights["count"] == steps - 1


def test_post_hoc_of_a_stored_average_is_that_average() -> None:
    module = _Weight()
    emas = [Ema({"m": module}, Power.of_width(width)) for width in (0.05, 0.10)]
    _run(emas, module, 100)
    middle = [ema.snapshot(99) for ema in emas]
    again = post_hoc(middle, Power.of_width(0.05), step=99)
    assert float(again["m"]["w"]) == pytest.approx(_value(emas[0]), rel=1e-9)


def test_the_mixture_is_the_least_squares_fit_of_the_profiles() -> None:
    times, gammas = [40.0, 40.0, 80.0, 80.0, 100.0, 100.0], [16.97, 6.94] * 3
    grid = (np.arange(100_000) + 0.5) / 1000

    def profile(time: float, gamma: float) -> np.ndarray:
        values = (gamma + 1) * (np.minimum(grid, time) / time) ** gamma / time
        return np.asarray(np.where(grid <= time, values, 0.0))

    basis = np.stack([profile(t, g) for t, g in zip(times, gammas, strict=True)], 1)
    shares = np.linalg.lstsq(basis, profile(100.0, 10.0), rcond=None)[0]
    assert mixture(times, gammas, 100.0, 10.0) == pytest.approx(
        list(shares / shares.sum()), abs=1e-3
    )
    assert sum(mixture(times, gammas, 90.0, 3.0)) == pytest.approx(1)


def test_the_constant_decay_warms_up() -> None:
    decay = Constant(0.9)
    assert decay(0) == 0.1
    assert decay(10) == 0.55
    assert decay(1000) == 0.9
    module = _Weight(2.0)
    ema = Ema({"m": module}, 0.9)
    module.put(4.0, 7)
    ema.update({"m": module}, 0)
    assert _value(ema) == pytest.approx(0.1 * 2 + 0.9 * 4)
    assert ema.shadow["m"]["count"] == 7
    assert module.w.item() == 4


def test_applied_puts_the_averages_in_and_takes_them_out_also_after_an_error() -> None:
    module = _Weight(2.0)
    ema = Ema({"m": module}, 0.9)
    module.put(4.0, 1)

    def look() -> None:
        with ema.applied({"m": module}):
            assert module.w.item() == 2
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        look()
    assert module.w.item() == 4
    assert module.count == 1


def test_small_changes_of_half_precision_weights_are_not_lost() -> None:
    module = _Weight(1.0, torch.float16)
    ema = Ema({"m": module}, lambda step: 0.9999)
    module.put(2.0, 1)
    for step in range(100):
        ema.update({"m": module}, step)
    assert _value(ema) == pytest.approx(2 - 0.9999**100, rel=1e-4)
    with ema.applied({"m": module}):
        assert module.w.dtype == torch.float16


def test_only_power_profiles_combine() -> None:
    with pytest.raises(InputError, match="Power"):
        Ema({"m": _Weight()}, 0.9).snapshot(3)
    with pytest.raises(InputError, match="at least one"):
        post_hoc([], Power(3.0))
