"""Judges that need no weights: which colour stands in a region, which shape a region has.

Their own accuracy is measured on held-out drawn scenes (``evaluate.judge_accuracy``); a figure of
the model means nothing beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2lab
from skimage.measure import label

from diffedit.training.world.backdrops import Pixels
from diffedit.training.world.forms import SHAPES, Floats, coverage
from diffedit.training.world.things import COLOURS, PALETTE

Mask = NDArray[np.bool_]

_NEAR = 30.0
"""Largest CIE76 distance in Lab at which a pixel still counts as its nearest palette colour."""

_GRID = 40
"""Side of the grid on which shapes are compared."""


def colour_map(image: Pixels) -> NDArray[np.int64]:
    """The index in ``COLOURS`` of each pixel's nearest colour, -1 where none is near: (h, w)."""
    lab = rgb2lab(image)
    palette = rgb2lab(np.array([PALETTE[c] for c in COLOURS], np.uint8)[None])[0]
    distance = np.linalg.norm(lab[:, :, None, :] - palette, axis=-1)
    nearest = distance.argmin(axis=-1)
    return np.where(distance.min(axis=-1) < _NEAR, nearest, -1)


def colour_share(image: Pixels, colour: str, region: Mask | None = None) -> float:
    """The share of the region's pixels (of all, without one) that show ``colour``, in [0, 1]."""
    found = colour_map(image) == COLOURS.index(colour)
    return float(found[region].mean() if region is not None else found.mean())


def segment(image: Pixels, colour: str, region: Mask | None = None) -> Mask:
    """The largest connected piece of ``colour`` (within the region): (h, w) bool, maybe empty."""
    found = colour_map(image) == COLOURS.index(colour)
    if region is not None:
        found = found & region
    pieces, count = label(found, return_num=True, connectivity=1)
    if count == 0:
        return np.zeros(found.shape, np.bool_)
    return np.asarray(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best-fitting shape of a region and its intersection over union with it, in [0, 1]."""

    shape: str
    overlap: float


def judge_shape(piece: Mask) -> Verdict | None:
    """Which shape ``piece`` is: the best overlap over the angles that scenes are drawn with.

    Pieces and templates are brought to one centre of mass and one area, so that place and size do
    not matter; a piece is compared as it is: a ring's hole counts. ``None`` for under 24 pixels.
    """
    if piece.sum() < 24:
        return None
    templates, names = _templates()
    grid = _normalise(piece).ravel()
    both = np.minimum(templates, grid).sum(axis=1)
    either = np.maximum(templates, grid).sum(axis=1)
    overlap = both / either
    best = int(overlap.argmax())
    return Verdict(names[best], float(overlap[best]))


def _normalise(piece: Mask, shift: tuple[float, float] = (0.0, 0.0), zoom: float = 1.0) -> Floats:
    """``piece`` with its centre of mass in the middle and its area a fixed share of the grid."""
    rows, columns = np.nonzero(piece)
    # The radius of the disc of the same area, times a margin that the star's tips need.
    reach = zoom * 2.2 * np.sqrt(len(rows) / np.pi)
    x, y = columns.mean() + 0.5 + shift[0] * reach, rows.mean() + 0.5 + shift[1] * reach
    box = (x - reach, y - reach, x + reach, y + reach)
    grey = Image.fromarray(piece.astype(np.float32))
    # EXTENT samples outside the picture as 0, which resize(box=...) would refuse.
    grown = grey.transform(
        (4 * _GRID, 4 * _GRID), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    )
    return np.asarray(grown.resize((_GRID, _GRID), Image.Resampling.BOX), np.float32)


@cache
def _templates() -> tuple[Floats, tuple[str, ...]]:
    """Every shape at nine angles and small errors of area and centre: (n, grid²) and n names."""
    side = 128
    grids: list[Floats] = []
    names: list[str] = []
    for shape in SHAPES:
        for angle in np.linspace(-0.24, 0.24, 9):
            piece = coverage(shape, 0.36, float(angle), side) > 0.5
            for zoom in (0.94, 1.0, 1.06):
                for shift in ((0.0, 0.0), (0.0, 0.04), (0.0, -0.04), (0.04, 0.0), (-0.04, 0.0)):
                    grids.append(_normalise(piece, shift, zoom).ravel())
                    names.append(shape)
    return np.stack(grids), tuple(names)
