"""95 % intervals for everything that is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
"""Of a normal distribution, 2.5 % lies above this many standard deviations."""

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure, its 95 % interval, and how many cases it is from."""

    value: float
    low: float
    high: float
    n: int

    def listed(self) -> list[float | int | None]:
        """Value, bounds and count as JSON has them: four places, None for what is not known."""
        shown = [None if math.isnan(v) else round(float(v), 4) for v in self[:3]]
        return [*shown, self.n]

    def __str__(self) -> str:
        digits = 2 if abs(self.value) < 10 else 1
        low, high = (f"{v:.{digits}f}" for v in (self.low, self.high))
        return f"{self.value:.{digits}f} ({low}–{high})"


def wilson(hits: int, n: int) -> Estimate:
    """A rate with the score interval of Wilson 1927, "Probable inference, the law of succession".

    It keeps within [0, 1] and does not shrink to nothing at 0 or 1, as Wald's does.
    """
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, z2 = hits / n, Z * Z / n
    middle = (p + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    # At the ends the bound is the rate itself; rounding must not put it on the other side.
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), n)


def rate(hits: Sequence[bool]) -> Estimate:
    """The share of hits."""
    return wilson(sum(map(bool, hits)), len(hits))


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """A mean with the percentile bootstrap's interval (Efron 1979), seeded.

    One value has no interval: its bounds are NaN.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else math.nan, math.nan, math.nan, len(x))
    rng = np.random.default_rng(seed)
    means = x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """The mean difference over the same cases (ours - theirs), by a paired bootstrap."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return mean((a - b).tolist(), seed)


def jackknife(
    rows: npt.NDArray[np.float64],
    figure: Callable[[npt.NDArray[np.float64]], float],
    groups: int = 10,
) -> Estimate:
    """A figure of a whole set, its interval from leaving out one of `groups` parts at a time.

    For figures that a bootstrap biases because it repeats rows, as a Fréchet distance is. Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", equation 11.5, with groups as the units.
    """
    n = len(rows)
    value = figure(rows)
    if n < 2 * groups:
        return Estimate(value, math.nan, math.nan, n)
    parts = np.arange(n) % groups
    left = np.array([figure(rows[parts != part]) for part in range(groups)])
    error = math.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum())
    return Estimate(value, max(0.0, value - Z * error), value + Z * error, n)
