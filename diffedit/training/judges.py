"""Judges that need no weights: which colours stand where, what has which shape, how two relate.

Their own accuracy is measured on drawn pictures that are right (``bench.quality``'s "drawn
answer"); a figure of the model means nothing beyond it.
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
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Background, Scene
from diffedit.training.world.things import COLOURS, OBJECTS, PALETTE, Thing

Mask = NDArray[np.bool_]

_NEAR = 30.0
"""Largest CIE76 distance in Lab at which a pixel still counts as its nearest palette colour."""

FRAME_SHARE = 0.02
"""A colour is "there" if it covers this much of a picture made from nothing."""

MASK_SHARE = 0.1
"""A colour is "in the mask" if it covers this much of it."""

_GRID = 40
"""Side of the grid on which shapes are compared."""


def colour_map(image: Pixels) -> NDArray[np.int64]:
    """The index in ``COLOURS`` of each pixel's nearest colour, -1 where none is near: (h, w)."""
    lab, palette = rgb2lab(image), _palette()
    # |a - b|² = |a|² - 2 a·b + |b|², with the part that is the same for all colours left out.
    nearness = (palette**2).sum(axis=1) - 2 * (lab @ palette.T)
    nearest = nearness.argmin(axis=-1)
    squared = np.take_along_axis(nearness, nearest[..., None], axis=-1)[..., 0]
    return np.where(squared + (lab**2).sum(axis=-1) < _NEAR**2, nearest, -1)


@cache
def _palette() -> NDArray[np.float64]:
    """The palette in Lab: (colours, 3)."""
    return np.asarray(rgb2lab(np.array([PALETTE[c] for c in COLOURS], np.uint8)[None])[0])


def colour_share(image: Pixels, colour: str, region: Mask | None = None) -> float:
    """The share of the region's pixels (of all, without one) that show ``colour``, in [0, 1]."""
    found = colour_map(image) == COLOURS.index(colour)
    return float(found[region].mean() if region is not None else found.mean())


def segment(image: Pixels, colour: str, region: Mask | None = None) -> Mask:
    """The largest connected piece of ``colour`` (within the region): (h, w) bool, maybe empty."""
    found = colour_map(image) == COLOURS.index(colour)
    return largest_piece(found if region is None else found & region)


def largest_piece(found: Mask) -> Mask:
    """The largest 4-connected piece of a mask, (h, w) bool; empty if the mask is."""
    pieces, count = label(found, return_num=True, connectivity=1)
    if count == 0:
        return np.zeros(found.shape, np.bool_)
    return np.asarray(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())


def border_colour(image: Pixels) -> str:
    """The commonest palette colour of the outermost four pixels; "" if none is near."""
    inside = np.zeros(image.shape[:2], np.bool_)
    inside[4:-4, 4:-4] = True
    return commonest(colour_map(image)[~inside])


def commonest(found: NDArray[np.int64]) -> str:
    """The colour that most of ``found``, entries of a :func:`colour_map`, name; "" if none does."""
    found = found[found >= 0]
    return COLOURS[int(np.bincount(found).argmax())] if len(found) else ""


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
    return _best(piece, *_templates())


def judge_thing(piece: Mask, colour: str) -> Verdict | None:
    """Which of ``things.OBJECTS`` a piece of ``colour`` belongs to, as :func:`judge_shape` does.

    The templates are what :func:`segment` finds of drawn things of that colour, so a part that
    has a colour of its own (a roof, a stalk) need not be seen.
    """
    return _best(piece, *_thing_templates(colour))


def _best(piece: Mask, templates: Floats, names: tuple[str, ...]) -> Verdict | None:
    if piece.sum() < 24:
        return None
    grid = _normalise(piece).ravel()
    both = np.minimum(templates, grid).sum(axis=1)
    either = np.maximum(templates, grid).sum(axis=1)
    overlap = both / either
    best = int(overlap.argmax())
    return Verdict(names[best], float(overlap[best]))


def is_noun(piece: Mask, noun: str, colour: str) -> bool:
    """Whether a piece of ``colour`` is taken for ``noun``, a shape or an object.

    Shapes compete with shapes only, and objects with objects: chance is one in
    ``len(SHAPES)`` or ``len(OBJECTS)``.
    """
    verdict = judge_shape(piece) if noun in SHAPES else judge_thing(piece, colour)
    return verdict is not None and verdict.shape == noun


def holds(relation: str, first: Mask, second: Mask) -> bool:
    """Whether ``first`` stands in ``relation`` ("left of", …) to ``second``.

    By the centres of mass, which have to be further apart along the relation's axis than across
    it; never for an empty piece.
    """
    if not first.any() or not second.any():
        return False
    y, x = (
        np.mean(a) - np.mean(b) for a, b in zip(np.nonzero(first), np.nonzero(second), strict=True)
    )
    along, across = (x, y) if relation in ("left of", "right of") else (y, x)
    sign = -1 if relation in ("left of", "above") else 1
    return bool(sign * along > abs(across))


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What a picture shows of two asked objects.

    Attributes:
        colours: both colours cover enough of the picture.
        shapes: the largest piece of either colour has the asked form.
        relation: they stand to each other as asked.
        opposite: they stand the other way round: a control that nobody asked for.
    """

    colours: bool
    shapes: bool
    relation: bool
    opposite: bool


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def judge_pair(
    image: Pixels,
    first: tuple[str, str],
    second: tuple[str, str],
    relation: str | None,
    share: float = FRAME_SHARE,
) -> PairVerdict:
    """Judge a picture of two objects, each a (colour, noun) of its own colour.

    ``share`` is how much of the picture a colour has to cover to be there. The relation counts
    only where both colours are there; without one, both its entries are false.
    """
    found = colour_map(image)
    seen = [found == COLOURS.index(colour) for colour, _ in (first, second)]
    there = all(bool(one.mean() >= share) for one in seen)
    pieces = [largest_piece(one) for one in seen]
    shapes = all(is_noun(p, n, c) for p, (c, n) in zip(pieces, (first, second), strict=True))
    if relation is None or not there:
        return PairVerdict(there, shapes, False, False)
    asked, other = holds(relation, *pieces), holds(OPPOSITE[relation], *pieces)
    return PairVerdict(there, shapes, asked, other)


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


@cache
def _thing_templates(colour: str) -> tuple[Floats, tuple[str, ...]]:
    """Every object of one colour as a judge sees it: (n, grid²) and n names."""
    behind = "white" if colour not in ("white", "gray", "cyan") else "black"
    background = Background("plain", behind, behind, 1)
    grids: list[Floats] = []
    names: list[str] = []
    for noun in OBJECTS:
        # Where a thing is drawn small, a part of another colour cuts it in two (a bottle's label).
        for angle, side in ((-0.05, 128), (0.0, 128), (0.05, 128), (0.0, 56)):
            thing = Thing(noun, colour, PALETTE[colour], "plain", 0.5, 0.5, 0.34, angle)
            image = render(Scene(background, (thing,), "flat", None, ""), side).image
            piece = segment(image, colour)
            if not piece.any():
                continue
            for zoom in (0.94, 1.0, 1.06):
                for shift in ((0.0, 0.0), (0.0, 0.04), (0.0, -0.04), (0.04, 0.0), (-0.04, 0.0)):
                    grids.append(_normalise(piece, shift, zoom).ravel())
                    names.append(noun)
    return np.stack(grids), tuple(names)
