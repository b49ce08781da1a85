"""Real photographs in every mode that a picture can have, and masks on them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt
from skimage import data

Pixels = npt.NDArray[Any]

MODES = ("rgb8", "rgba8", "grey8", "greya8", "rgb16", "rgba16", "grey16")
#: (width, height): odd, narrow, smaller than the tiny model, and its own size.
SIZES = ((511, 387), (77, 501), (40, 30), (64, 64))


@functools.cache
def photograph(
    mode: str = "rgb8", size: tuple[int, int] = (120, 96), which: str = "chelsea"
) -> Pixels:
    """A photograph, cut or tiled by reflection to a size; 16-bit ones have real low bits."""
    width, height = size
    rgb = getattr(data, which)()[..., :3]
    missing = max(0, height - rgb.shape[0]), max(0, width - rgb.shape[1])
    rgb = np.pad(rgb, ((0, missing[0]), (0, missing[1]), (0, 0)), "reflect")[:height, :width]
    draw = np.random.default_rng(3)
    if mode.endswith("16"):
        rgb = rgb.astype(np.uint16) * 257 + draw.integers(0, 257, rgb.shape).astype(np.uint16)
        rgb = np.minimum(rgb, 65535).astype(np.uint16)
    if "grey" in mode:
        rgb = rgb[..., 1]
    if "rgba" in mode or "greya" in mode:
        alpha = draw.integers(0, int(np.iinfo(rgb.dtype).max) + 1, rgb.shape[:2]).astype(rgb.dtype)
        alpha[: height // 3] = 0  # colours under full transparency are values too
        rgb = np.concatenate([np.atleast_3d(rgb), alpha[..., None]], axis=2)
    rgb = np.ascontiguousarray(rgb)
    rgb.flags.writeable = False
    return rgb


def mask(size: tuple[int, int], *boxes: tuple[int, int, int, int], value: int = 255) -> Pixels:
    """A mask that is white in boxes (left, top, right, bottom)."""
    made = np.zeros((size[1], size[0]), np.uint8)
    for left, top, right, bottom in boxes:
        made[top:bottom, left:right] = value
    return made


def colours(pixels: Pixels) -> Pixels:
    """``(h, w, c)`` without alpha."""
    deep = np.atleast_3d(pixels)
    return deep[..., : {2: 1, 4: 3}.get(deep.shape[2], deep.shape[2])]


def alpha(pixels: Pixels) -> Pixels:
    """``(h, w, 0 or 1)``."""
    deep = np.atleast_3d(pixels)
    return deep[..., deep.shape[2] - (deep.shape[2] in (2, 4)) :]


def changed(before: Pixels, after: Pixels) -> npt.NDArray[np.bool_]:
    """``(h, w)``: where any value differs."""
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    different: npt.NDArray[np.bool_] = (np.atleast_3d(before) != np.atleast_3d(after)).any(axis=2)
    return different


def distance(white: Pixels) -> npt.NDArray[np.float64]:
    """Euclidean distance of every pixel to the nearest masked one, in pixels."""
    return np.asarray(distance_transform_edt(white == 0))
