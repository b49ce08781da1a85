"""The eight shapes as signed distance functions, in the frame of the shape (y points down).

Distances follow Inigo Quilez, "2D distance functions" (https://iquilezles.org/articles/distfunctions2d/).
Every shape fits the unit circle roughly; negative is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

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


def coverage(
    shape: str,
    u: Floats,
    v: Floats,
    x: float,
    y: float,
    radius: float,
    angle: float,
    side: int,
    grow: float = 0.0,
) -> Floats:
    """How much of each pixel the shape covers, in [0, 1].

    ``u``, ``v`` are pixel centres as fractions of the frame, ``x``, ``y``, ``radius`` and ``grow``
    (extra border) too; ``angle`` is in radians, clockwise as seen.
    """
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = (u - np.float32(x)) / np.float32(radius), (v - np.float32(y)) / np.float32(radius)
    distance = _DISTANCE[shape](cos * dx + sin * dy, cos * dy - sin * dx)
    covered: Floats = np.clip(0.5 - (distance * radius - grow) * side, 0, 1).astype(np.float32)
    return covered
