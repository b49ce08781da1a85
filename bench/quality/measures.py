"""What is measured on pixels: locality, seams, structure, depth order, style, distribution.

Pictures are (h, w, 3) uint8 RGB. Nothing here knows who made a picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.ndimage import distance_transform_edt
from skimage.color import rgb2lab

from bench.quality.pictures import edges, overlaps
from diffedit.training.judges import Mask, colour_map
from diffedit.training.world.backdrops import Pixels
from diffedit.training.world.scenes import Scene
from diffedit.training.world.things import COLOURS

Matrix = NDArray[np.float64]


def digest(picture: Pixels) -> str:
    """A short name for a picture's bytes: equal pictures have equal ones."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()[:16]


# --- locality -------------------------------------------------------------------------------------


def changed_outside(before: Pixels, after: Pixels, mask: Mask, feather: int) -> int:
    """How many pixels further than `feather` from the mask changed, by however little."""
    outside = distance_transform_edt(~mask) > feather
    return int((outside & (before != after).any(axis=-1)).sum())


# --- seams ----------------------------------------------------------------------------------------

_AWAY = range(4, 9)
"""Pixels beyond the feather at which the source says how rough it is by itself."""

_JUST_NOTICEABLE = 1.0
"""Distance in Lab that one just sees; keeps the ratio finite on flat ground."""


class Seam(NamedTuple):
    """What a paste leaves along a mask's edge; see `seam_energy`. NaN: nothing lies outside.

    Attributes:
        relative: what it adds to the source's steps, relative to the source's own roughness.
        own: the same, relative to the result's on either side.
        steps: all steps there, the source's own among them, relative to the source's roughness.
    """

    relative: float
    own: float
    steps: float


def seam_energy(before: Pixels, after: Pixels, mask: Mask, feather: int) -> Seam:
    """The steps along the mask's edge that the source does not have.

    Across each contour of the mask's distance, from its edge out to `feather` pixels, take pairs of
    neighbouring pixels a | b, and of each the part of the step that the slopes on either side do
    not explain, ``|| (x_b - x_a) - ((x_a - x_a') + (x_b' - x_b)) / 2 ||`` in Lab, where a' and b'
    are the next pixels on either side. That is the mean (not squared) difference of slope of Minami
    and Zakhor 1995, "An optimization approach for removing blocking effects in transform coding",
    applied to a mask's edge instead of to block borders: a gradient that goes on counts nothing, a
    step counts in full. Of each contour counts by how much its mean is more than in the source,
    where it is: the picture is to stay there what it is, so that an untouched one has no seam
    however rough it is. The contour with the largest difference is the seam. (A picture that is
    blurred everywhere has none on rough ground either; what it lost there, this does not say.)

    It is divided by one just noticeable difference plus the mean of all steps over contours a few
    pixels away: those 4-8 pixels beyond the feather in the source; and, for `Seam.own`, those and
    the ones 4-8 pixels inside the mask in the result. `Seam.steps` is the first with nothing taken
    off, which favours what blurs.
    """
    signed = np.where(mask, 1 - distance_transform_edt(mask), distance_transform_edt(~mask))
    made, own = _bends(after), _bends(before)
    levels = [level + 0.5 for level in range(feather + 1)]
    steps = np.array([_across(made, signed, level) for level in levels])
    added = np.maximum(steps - [_across(own, signed, level) for level in levels], 0)
    if not np.isfinite(added).any():
        return Seam(math.nan, math.nan, math.nan)
    rough = [_across(own, signed, feather + level + 0.5) for level in _AWAY]
    sides = [_across(made, signed, at + 0.5) for k in _AWAY for at in (feather + k, -k)]
    usual, here = _JUST_NOTICEABLE + _mean(rough), _JUST_NOTICEABLE + _mean(sides)
    most = float(np.nanmax(added))
    return Seam(most / usual, most / here, float(np.nanmax(steps)) / usual)


def _mean(values: Sequence[float]) -> float:
    found = [v for v in values if np.isfinite(v)]
    return float(np.mean(found)) if found else 0.0


def _bends(picture: Pixels) -> tuple[Matrix, Matrix]:
    """What the slopes on either side do not explain of each step, down and across the picture."""
    lab, found = rgb2lab(picture), []
    for axis in (0, 1):
        step = np.diff(np.moveaxis(lab, axis, 0), axis=0)
        slopes = (step[:-2] + step[2:]) / 2
        found.append(np.linalg.norm(step[1:-1] - slopes, axis=-1))
    return found[0], found[1]


def _across(bends: Sequence[Matrix], signed: Matrix, level: float) -> float:
    """Mean difference of slope over all pairs that a contour of the signed distance parts."""
    inside, found = signed < level, []
    for axis, bend in enumerate(bends):
        near = np.moveaxis(inside, axis, 0)
        found.append(bend[near[1:-2] != near[2:-1]])
    every = np.concatenate(found)
    return float(every.mean()) if len(every) else float("nan")


# --- structure ------------------------------------------------------------------------------------


def edge_f1(picture: Pixels, like: Pixels, tolerance: int = 1) -> float:
    """How well the edges (Canny) of two pictures agree, 1 = each lies within `tolerance` pixels.

    F1 of precision (made edges that have a true one near) and recall (true edges that have a made
    one near), as boundaries are judged in Martin, Fowlkes and Malik 2004, with distance alone in
    place of their matching. 1 if neither picture has an edge, 0 if only one has.
    """
    made, true = edges(picture), edges(like)
    if not made.any() or not true.any():
        return float(made.any() == true.any())
    precision = (distance_transform_edt(~true)[made] <= tolerance).mean()
    recall = (distance_transform_edt(~made)[true] <= tolerance).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def depth_order(picture: Pixels, scene: Scene) -> bool | None:
    """Whether overlapping things cover each other as in the scene; None if nothing overlaps.

    Where two of them overlap, the colour of the nearer has to be seen more often than that of the
    one behind. Chance is a half where both are there, and 0 where neither is.
    """
    found = colour_map(picture)
    verdicts = []
    for back, front, both in overlaps(scene, len(picture)):
        behind, before = (COLOURS.index(scene.things[i].colour) for i in (back, front))
        seen = found[both]
        verdicts.append(bool((seen == before).sum() > (seen == behind).sum()))
    return all(verdicts) if verdicts else None


# --- style ----------------------------------------------------------------------------------------


@cache
def _filters(count: int, seed: int) -> torch.Tensor:
    """Random filters without a mean, so that they see texture and not colour: (count, 3, 7, 7)."""
    bank = torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) / 12
    return bank - bank.mean(dim=(2, 3), keepdim=True)


def _responses(picture: Pixels, count: int, seed: int) -> list[torch.Tensor]:
    """Rectified responses of the filters at three scales, each (count, pixels)."""
    x = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]
    seen = []
    for _ in range(3):
        response = torch.nn.functional.conv2d(x, _filters(count, seed)).relu()
        seen.append(response[0].flatten(1))
        x = torch.nn.functional.avg_pool2d(x, 2)
    return seen


def gram(picture: Pixels) -> torch.Tensor:
    """Gram matrices of a shallow bank of random filters at three scales, as one vector.

    Ustyuzhaninov et al. 2017, "What does it take to generate natural textures?": one layer of many
    random filters describes texture about as well as a trained network does.
    """
    return torch.cat([(s @ s.T / s.shape[1]).flatten() for s in _responses(picture, 96, 0)])


def gram_distance(a: Pixels, b: Pixels) -> float:
    """How far two textures are apart, relative to the second's size."""
    one, two = gram(a), gram(b)
    return float((one - two).norm() / two.norm())


def colour_statistics(picture: Pixels) -> Matrix:
    """Mean and standard deviation of each Lab channel: (6,)."""
    lab = rgb2lab(picture).reshape(-1, 3)
    return np.concatenate([lab.mean(axis=0), lab.std(axis=0)])


def colour_distance(a: Pixels, b: Pixels) -> float:
    """Distance of the means and standard deviations of two pictures' colours, in Lab."""
    return float(np.linalg.norm(colour_statistics(a) - colour_statistics(b)))


def pixel_adain(picture: Pixels, reference: Pixels) -> Pixels:
    """The baseline: give each RGB channel the reference's mean and standard deviation."""
    x, like = picture.reshape(-1, 3).astype(float), reference.reshape(-1, 3).astype(float)
    made = (x - x.mean(0)) / (x.std(0) + 1e-6) * like.std(0) + like.mean(0)
    rounded: Pixels = made.round().clip(0, 255).astype(np.uint8).reshape(picture.shape)
    return rounded


def mean_distance(a: Pixels, b: Pixels) -> float:
    """Mean distance of two pictures' pixels (CIE76, in Lab)."""
    return float(np.linalg.norm(rgb2lab(a) - rgb2lab(b), axis=-1).mean())


def rising(values: Sequence[float]) -> bool:
    """Whether each value is larger than the one before."""
    return all(a < b for a, b in pairwise(values))


# --- distribution ---------------------------------------------------------------------------------

FEATURES = "mean responses of 16 random 7x7 filters (seed 1) at 3 scales, and Lab mean and spread"
"""What the Fréchet distance compares: 16 x 3 + 6 = 54 numbers a picture; no trained weights."""


def features(picture: Pixels) -> Matrix:
    """The numbers that `frechet` compares pictures by: (54,), see `FEATURES`."""
    texture = torch.cat([s.mean(dim=1) for s in _responses(picture, 16, 1)]).double().numpy()
    # Lab in units of a hundred, so that both parts are of a size.
    return np.concatenate([10 * texture, colour_statistics(picture) / 100])


def frechet(a: Matrix, b: Matrix) -> float:
    """The Fréchet distance of two sets of features, each (n, d), taken as Gaussians.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule", equation 6, on other
    features than theirs: compare figures from this benchmark with each other only.
    """
    mu, nu = a.mean(axis=0), b.mean(axis=0)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(s @ t))
    return float(max(0.0, ((mu - nu) ** 2).sum() + np.trace(s + t - 2 * root)))
