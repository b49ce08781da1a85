"""Measures and intervals against closed forms and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2lab

from bench.quality import intervals, measures
from diffedit.training.world.backdrops import Pixels


def grey(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Pixels:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def square(side: int, low: int, high: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mask = np.zeros((side, side), np.bool_)
    mask[low:high, low:high] = True
    return mask


# --- locality -------------------------------------------------------------------------------------


def test_pixels_count_from_the_feather_on() -> None:
    before = grey(np.full((40, 40), 100))
    after, mask = before.copy(), square(40, 15, 25)
    after[mask] = 7
    assert measures.changed_outside(before, after, mask, 0) == 0
    after[20, 25], after[20, 28], after[0, 0, 2] = 101, 101, 101  # 1, 4 and many pixels away
    assert measures.changed_outside(before, after, mask, 0) == 3
    assert measures.changed_outside(before, after, mask, 3) == 2
    assert measures.changed_outside(before, after, mask, 4) == 1


# --- seams ----------------------------------------------------------------------------------------


def test_a_step_on_flat_ground_is_its_height_in_lab() -> None:
    before, mask = grey(np.full((64, 64), 120)), square(64, 20, 44)
    after = before.copy()
    after[mask] = 160
    height = float(np.linalg.norm(rgb2lab(after)[30, 30] - rgb2lab(before)[0, 0]))
    seam = measures.seam_energy(before, after, mask, 0)
    # Flat: divided by one noticeable difference, and the source has no step of its own.
    assert seam == pytest.approx((height, height, height), rel=1e-6)


def test_a_slope_that_goes_on_is_no_seam() -> None:
    ramp = grey(np.broadcast_to(np.arange(64) * 3 + 20, (64, 64)))
    mask = square(64, 20, 44)
    assert measures.seam_energy(ramp, ramp, mask, 2).steps < 0.3
    shifted = ramp.copy()
    shifted[mask] += 12
    assert measures.seam_energy(ramp, shifted, mask, 2).relative > 2


def test_rough_ground_left_as_it_is_or_blurred_is_no_seam() -> None:
    rng = np.random.default_rng(0)
    rough, mask = grey(rng.integers(60, 200, (64, 64))), square(64, 20, 44)
    untouched = measures.seam_energy(rough, rough, mask, 4)
    assert untouched[:2] == (0, 0)
    assert untouched.steps > 0.9  # all of it the source's own
    blurred = gaussian_filter(rough, (1.5, 1.5, 0))
    away = measures.seam_energy(rough, blurred, mask, 4)
    assert away.steps < untouched.steps / 3  # which is why there is no gate on these
    assert away.relative < 0.1
    blurred[mask] = 255 - blurred[mask] // 3
    assert measures.seam_energy(rough, blurred, mask, 4).relative > 5 * away.relative


def test_a_blurred_edge_is_less_of_a_seam_and_rough_ground_hides_one() -> None:
    rng = np.random.default_rng(0)
    flat, mask = np.full((64, 64), 120.0), square(64, 20, 44)
    hard = np.where(mask, 180.0, flat)
    away = np.abs(np.indices((64, 64)) - 31.5).max(axis=0) - 12
    soft = 120 + 60 * np.clip(0.5 - away / 8, 0, 1)
    sharp = measures.seam_energy(grey(flat), grey(hard), mask, 4).relative
    assert measures.seam_energy(grey(flat), grey(soft), mask, 4).relative < sharp / 4
    noise = rng.integers(-40, 41, (64, 64))
    rough = measures.seam_energy(grey(flat + noise), grey(hard + noise), mask, 4).relative
    assert rough < sharp / 4


def test_a_mask_over_everything_has_no_seam() -> None:
    picture = grey(np.zeros((32, 32)))
    everything = np.ones((32, 32), np.bool_)
    assert all(map(math.isnan, measures.seam_energy(picture, picture, everything, 2)))


# --- structure ------------------------------------------------------------------------------------


def test_edges_agree_within_a_pixel() -> None:
    def bar(shift: int) -> Pixels:
        where = np.arange(64) - shift
        return grey(np.broadcast_to(((where >= 16) & (where < 32)) * 255, (64, 64)))

    blank = grey(np.zeros((64, 64)))
    assert measures.edge_f1(bar(0), bar(0)) == 1
    assert measures.edge_f1(bar(1), bar(0)) == 1
    assert measures.edge_f1(bar(4), bar(0)) == 0
    assert measures.edge_f1(blank, bar(0)) == measures.edge_f1(bar(0), blank) == 0
    assert measures.edge_f1(blank, blank) == 1
    # One of the bar's two edges: all that is made is true, half of what is true is made.
    half = bar(0).copy()
    half[:, 32:] = 255
    assert measures.edge_f1(half, bar(0)) == pytest.approx(2 / 3, abs=0.01)


# --- style and distribution -----------------------------------------------------------------------


def test_texture_knows_stripes_from_dots_and_not_where_they_begin() -> None:
    rows = np.arange(64)
    stripes = grey(np.broadcast_to(120 + 80 * np.sin(rows / 2), (64, 64)).round())
    moved = grey(np.broadcast_to(120 + 80 * np.sin(rows / 2 + 1.5), (64, 64)).round())
    turned = np.ascontiguousarray(stripes.transpose(1, 0, 2))
    assert measures.gram_distance(stripes, stripes) == 0
    assert measures.gram_distance(moved, stripes) < measures.gram_distance(turned, stripes) / 2
    darker = (stripes // 2).astype(np.uint8)
    matched = measures.pixel_adain(darker, stripes)
    assert measures.colour_distance(matched, stripes) < 1
    assert measures.gram_distance(matched, stripes) < 0.1
    flat = grey(np.full((64, 64), 90))
    assert measures.mean_distance(flat, flat) == 0


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(0, 1, (40_000, 3)) * [1, 2, 3]
    b = rng.normal(0, 1, (40_000, 3)) * [2, 2, 1] + [1, 0, -2]
    # Of diagonal covariances: |mu - nu|² + the sum of (s - t)².
    assert measures.frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=0.03)
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_features_are_as_many_as_they_say() -> None:
    made = measures.features(grey(np.random.default_rng(0).integers(0, 256, (64, 64))))
    assert made.shape == (54,)
    assert np.isfinite(made).all()


def test_a_digest_is_of_all_bytes() -> None:
    picture = grey(np.zeros((8, 8)))
    other = picture.copy()
    other[7, 7, 2] = 1
    assert measures.digest(picture) == measures.digest(picture.copy()) != measures.digest(other)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 8), (190, 200), (1, 1)])
def test_wilson_s_interval_is_scipy_s(hits: int, n: int) -> None:
    made = intervals.wilson(hits, n)
    true = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert made.value == hits / n
    assert (made.low, made.high) == pytest.approx((true.low, true.high), abs=1e-9)
    assert 0 <= made.low <= made.value <= made.high <= 1


def test_nothing_has_no_rate() -> None:
    assert math.isnan(intervals.wilson(0, 0).value)
    assert intervals.rate([]).listed() == [None, None, None, 0]
    assert intervals.mean([3.0]).listed() == [3.0, None, None, 1]


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    x = np.random.default_rng(1).normal(5, 2, 400)
    made = intervals.mean(x.tolist())
    half = intervals.Z * x.std(ddof=1) / math.sqrt(len(x))
    assert made.value == pytest.approx(x.mean())
    assert made.low == pytest.approx(x.mean() - half, abs=0.03)
    assert made.high == pytest.approx(x.mean() + half, abs=0.03)
    assert intervals.mean(x.tolist()) == made


def test_a_difference_is_paired() -> None:
    hard = np.random.default_rng(2).normal(0, 50, 60)  # cases differ far more than engines do
    gap = intervals.difference((hard + 1).tolist(), hard.tolist())
    assert gap.low == pytest.approx(1)
    assert gap.high == pytest.approx(1)


def test_the_jackknife_of_a_mean_is_the_standard_error_of_its_parts() -> None:
    rows = np.random.default_rng(4).normal(10, 3, (200, 1))
    made = intervals.jackknife(rows, lambda some: float(some.mean()), groups=20)
    parts = rows.reshape(10, 20).mean(axis=0)
    error = parts.std(ddof=1) / math.sqrt(20)
    assert made.value == pytest.approx(rows.mean())
    assert made.high - made.value == pytest.approx(intervals.Z * error, rel=1e-6)
    assert math.isnan(intervals.jackknife(rows[:5], lambda some: float(some.mean())).low)
