"""Forms as signed distance functions, in the frame of the form (y points down).

The eight :data:`SHAPES` have words of their own; the other forms are what things are built from.

Distances follow Inigo Quilez, "2D distance functions" (https://iquilezles.org/articles/distfunctions2d/).
Every shape fits the unit circle roughly; negative is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(0.92)


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)


def _triangle(x: Floats, y: Floats) -> Floats:
    # Three half-planes; the centroid stands a little above the frame's middle.
    down = y - np.float32(0.68)
    side = np.abs(x) * np.float32(0.8575) - (y + np.float32(0.95)) * np.float32(0.5145)
    distance: Floats = np.maximum(down, side)
    return distance


def _star(x: Floats, y: Floats) -> Floats:
    # Fold into one tenth of the five-pointed star, then the distance to the edge's line.
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
    r = np.hypot(x, y)
    px, py = r * np.sin(folded), r * np.cos(folded)
    inner = np.float32(0.44)
    ax, ay = inner * np.sin(sector / 2), inner * np.cos(sector / 2) - np.float32(1.02)
    length = np.hypot(ax, ay)
    distance: Floats = ((py - np.float32(1.02)) * ax - px * ay) / length
    return distance


def _heart(x: Floats, y: Floats) -> Floats:
    # Quilez' sdHeart, scaled from its unit height to the frame.
    scale = np.float32(1.72)
    px, py = np.abs(x) / scale, (np.float32(0.88) - y) / scale
    upper = np.hypot(px - np.float32(0.25), py - np.float32(0.75)) - np.float32(np.sqrt(2) / 4)
    half = np.maximum(px + py, 0) / 2
    lower = np.sqrt(
        np.minimum(px**2 + (py - 1) ** 2, (px - half) ** 2 + (py - half) ** 2)
    ) * np.sign(px - py)
    return np.where(px + py > 1, upper, lower) * scale


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.24)


def _cross(x: Floats, y: Floats) -> Floats:
    ax, ay = np.abs(x), np.abs(y)
    long, wide = np.float32(0.94), np.float32(0.3)
    return np.minimum(np.maximum(ax - long, ay - wide), np.maximum(ax - wide, ay - long))


def _diamond(x: Floats, y: Floats) -> Floats:
    # A narrow rhombus: a square stood on its corner would be a square turned too far.
    wide, high = np.float32(0.66), np.float32(1.0)
    distance: Floats = (np.abs(x) * high + np.abs(y) * wide - wide * high) / np.hypot(wide, high)
    return distance


def _box(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(1)


def _disc(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(1)


def _pad(x: Floats, y: Floats) -> Floats:
    # A box with round corners, as a superellipse of power 4.
    return (x**4 + y**4) ** np.float32(0.25) - np.float32(1)


def _wedge(x: Floats, y: Floats) -> Floats:
    # The triangle that fills the box, apex up.
    side = (np.abs(x) - (y + 1) / 2) * np.float32(0.894)
    distance: Floats = np.maximum(y - 1, side)
    return distance


def _dome(x: Floats, y: Floats) -> Floats:
    # The upper half of an ellipse twice as high as the box.
    distance: Floats = np.maximum(np.hypot(x, (y - 1) / 2) - 1, y - 1)
    return distance


def _bowl(x: Floats, y: Floats) -> Floats:
    return _dome(x, -y)


def _trunk(x: Floats, y: Floats) -> Floats:
    # A trapezoid, narrow at the bottom, as cups and hulls are.
    distance: Floats = np.maximum(
        np.abs(y) - 1, np.abs(x) - (np.float32(0.8) - y * np.float32(0.2))
    )
    return distance


def _smile(x: Floats, y: Floats) -> Floats:
    # The lower arc of a ring.
    ring = np.abs(np.hypot(x, y + np.float32(0.6)) - np.float32(1.2)) - np.float32(0.22)
    distance: Floats = np.maximum(ring, np.float32(0.1) - y)
    return distance


def _moon(x: Floats, y: Floats) -> Floats:
    # A disc without another one beside it.
    disc, other = np.hypot(x, y), np.hypot(x - np.float32(0.5), y)
    distance: Floats = np.maximum(disc - np.float32(1), np.float32(0.8) - other)
    return distance


_DISTANCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
}

SHAPES = tuple(_DISTANCE)

_DISTANCE |= {
    "box": _box,
    "disc": _disc,
    "pad": _pad,
    "wedge": _wedge,
    "dome": _dome,
    "bowl": _bowl,
    "trunk": _trunk,
    "smile": _smile,
    "moon": _moon,
}

_REACH = 1.15
"""No form reaches further from its middle, in units of its half width or height."""


@dataclass(frozen=True, slots=True)
class Part:
    """One form in a frame: centre, half width and half height in units of that frame.

    ``angle`` is in radians, clockwise as seen. ``rgb`` is ``None`` where the part has the colour of
    the thing it belongs to.
    """

    form: str
    x: float
    y: float
    w: float
    h: float
    angle: float = 0.0
    rgb: tuple[int, int, int] | None = None

    def within(self, x: float, y: float, size: float, angle: float) -> Part:
        """This part, when its frame stands at (x, y) of another, ``size`` large and turned."""
        cos, sin = np.cos(angle), np.sin(angle)
        return Part(
            self.form,
            x + size * float(cos * self.x - sin * self.y),
            y + size * float(sin * self.x + cos * self.y),
            size * self.w,
            size * self.h,
            self.angle + angle,
            self.rgb,
        )


Window: TypeAlias = tuple[slice, slice]


def window(part: Part, side: int, grow: float = 0.0) -> Window:
    """The rows and columns of a (side, side) picture that ``part`` can touch."""
    turned = abs(part.angle) > 1e-6
    w, h = (max(part.w, part.h),) * 2 if turned else (part.w, part.h)
    reach = _REACH * (1.415 if turned and part.form in ("box", "pad", "wedge", "trunk") else 1.0)
    spans = []
    for centre, half in ((part.y, h), (part.x, w)):
        low = int(np.floor((centre - reach * half - grow) * side)) - 1
        high = int(np.ceil((centre + reach * half + grow) * side)) + 1
        spans.append(slice(min(max(low, 0), side), min(max(high, 0), side)))
    return spans[0], spans[1]


@cache
def _centres(side: int) -> Floats:
    return ((np.arange(side) + 0.5) / side).astype(np.float32)


def cover(part: Part, side: int, where: Window, grow: float = 0.0) -> Floats:
    """How much of each pixel of a window ``part`` covers, in [0, 1].

    The part's frame is the picture: fractions of its side. ``grow`` adds a border of that width.
    """
    u, v = _centres(side)[None, where[1]], _centres(side)[where[0], None]
    dx, dy = u - np.float32(part.x), v - np.float32(part.y)
    cos, sin = np.float32(np.cos(part.angle)), np.float32(np.sin(part.angle))
    x: Floats = ((cos * dx + sin * dy) / np.float32(part.w)).astype(np.float32, copy=False)
    y: Floats = ((cos * dy - sin * dx) / np.float32(part.h)).astype(np.float32, copy=False)
    distance = _DISTANCE[part.form](x, y) * np.float32(min(part.w, part.h))
    covered: Floats = np.clip(0.5 - (distance - grow) * side, 0, 1).astype(np.float32)
    return covered


def distance(parts: Sequence[Part], side: int) -> Floats:
    """Signed distance of each pixel to the edge of what ``parts`` cover together, in sides.

    (side, side), negative inside. Measured on a grid twice as fine, so that a line drawn with it is
    of one width all around, which the forms' own functions are not once a form is flattened.
    """
    fine = 2 * side
    whole = (slice(0, fine),) * 2
    inside = np.maximum.reduce([cover(part, fine, whole) for part in parts]) > 0.5
    away = np.full(inside.shape, np.float32(2 * fine))
    for there, sign in ((~inside, 1), (inside, -1)):
        if not there.all():  # else there is no edge to measure from
            steps = cv2.distanceTransform(there.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
            away = np.where(there, sign * (steps - 0.5), away)
    pooled: Floats = away.reshape(side, 2, side, 2).mean(axis=(1, 3), dtype=np.float32) / fine
    return pooled


def coverage(shape: str, radius: float, angle: float, side: int) -> Floats:
    """How much of each pixel ``shape`` covers amid a (side, side) picture, in [0, 1]."""
    return cover(Part(shape, 0.5, 0.5, radius, radius, angle), side, (slice(0, side),) * 2)
