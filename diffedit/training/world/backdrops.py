"""What stands behind the objects: patterns, photographs, and noise with a photograph's spectrum.

The photographs are those that scikit-image carries in its wheel. ``astronaut``, ``chelsea`` (also
called ``cat``), ``coffee`` and ``rocket`` are kept for judging: nothing here may open them.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffedit.training.world.forms import Floats

Pixels: TypeAlias = NDArray[np.uint8]

KEPT_FOR_JUDGING = ("astronaut", "chelsea", "coffee", "rocket")

_COLOUR_PHOTOS = ("hubble_deep_field", "immunohistochemistry", "retina")
_GREY_PHOTOS = (
    "brick",
    "camera",
    "cell",
    "clock",
    "coins",
    "grass",
    "gravel",
    "moon",
    "page",
    "text",
)


@cache
def photographs() -> tuple[tuple[Pixels, bool], ...]:
    """The training photographs as (height, width, 3) uint8, each with "it is a colour picture"."""
    left, right, _ = skimage.data.stereo_motorcycle()
    pictures = [(left, True), (right, True)]
    pictures += [(getattr(skimage.data, name)(), True) for name in _COLOUR_PHOTOS]
    for name in _GREY_PHOTOS:
        grey = getattr(skimage.data, name)()
        pictures.append((np.repeat(grey[..., None], 3, axis=2), False))
    return tuple((np.ascontiguousarray(p[..., :3]), colour) for p, colour in pictures)


def backdrop(
    kind: str,
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    seed: int,
    side: int,
) -> Floats:
    """A (side, side, 3) float array, 0-255, of the named kind.

    ``plain``, ``gradient``, ``sky``, ``striped``, ``checkered`` and ``dotted`` use the two colours;
    ``photo`` (a photograph, or something with its statistics), ``clouds`` and ``leaves`` do not.
    Depends on nothing but the arguments; the same seed gives the same picture at any ``side``
    (noise apart, which is drawn on the pixel grid).
    """
    rng = np.random.default_rng(seed)
    if kind == "photo":
        pick = rng.random()
        kind = "crop" if pick < 0.55 else "leaves" if pick < 0.8 else "clouds"
    if kind == "crop":
        return _crop(rng, side)
    if kind == "leaves":
        return _leaves(rng, side)
    if kind == "clouds":
        return _clouds(rng, side)
    a, b = np.array(first, np.float32), np.array(second, np.float32)
    jitter = rng.uniform(-8, 8, (2, 3)).astype(np.float32)
    a, b = a + jitter[0], b + jitter[1]
    share = _pattern(kind, rng, side)
    return _float32(np.clip(a + share[..., None] * (b - a), 0, 255))


def _float32(values: NDArray[np.float64]) -> Floats:
    return values.astype(np.float32)


def _pattern(kind: str, rng: np.random.Generator, side: int) -> Floats:
    """The second colour's share of each pixel, in [0, 1]."""
    if kind == "plain":
        return np.zeros((side, side), np.float32)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    u, v = (columns + 0.5) / side - 0.5, (rows + 0.5) / side - 0.5
    angle = rng.uniform(0, np.pi)
    along = (u * np.cos(angle) + v * np.sin(angle)).astype(np.float32)
    if kind == "sky":
        # From the zenith down to a horizon a little below the middle.
        return _float32(np.clip((v + 0.5) / 0.62, 0, 1))
    if kind == "gradient":
        return _float32(np.clip(0.5 + along * rng.choice([-1.1, 1.1]), 0, 1))
    period = rng.uniform(0.16, 0.36)
    phase = rng.uniform(0, 1, 2)
    if kind == "striped":
        wave = np.sin(2 * np.pi * (along / period + phase[0]))
        return _float32(np.clip(0.5 + wave * side * period / (2 * np.pi), 0, 1))
    if kind == "checkered":
        waves = [
            np.sin(2 * np.pi * (w / (1.3 * period) + p)) for w, p in zip((u, v), phase, strict=True)
        ]
        return _float32(np.clip(0.5 + waves[0] * waves[1] * side * period / 4, 0, 1))
    if kind == "dotted":
        cells = [np.mod(w / period + p, 1) - 0.5 for w, p in zip((u, v), phase, strict=True)]
        return _float32(np.clip(0.5 + (0.3 - np.hypot(*cells)) * side * period, 0, 1))
    raise ValueError(f"unknown backdrop {kind!r}")


def _crop(rng: np.random.Generator, side: int) -> Floats:
    pictures = photographs()
    weights = np.array([3.0 if colour else 1.0 for _, colour in pictures])
    picture, colour = pictures[rng.choice(len(pictures), p=weights / weights.sum())]
    height, width, _ = picture.shape
    # Log-uniform, so that both fine detail and whole compositions are seen.
    extent = int(np.exp(rng.uniform(np.log(0.2), 0.0)) * min(height, width))
    extent = max(extent, min(96, height, width))
    top, left = rng.integers(height - extent + 1), rng.integers(width - extent + 1)
    part = Image.fromarray(picture[top : top + extent, left : left + extent])
    pixels: NDArray[np.float64] = np.asarray(
        part.resize((side, side), Image.Resampling.LANCZOS), np.float64
    )
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    if not colour and rng.random() < 0.8:
        # A grey photograph is mapped to a line between two colours, dark to light.
        dark, light = rng.uniform(0, 110, 3), rng.uniform(120, 255, 3)
        pixels = dark + pixels / 255 * (light - dark)
    elif colour and rng.random() < 0.6:
        pixels = pixels[..., rng.permutation(3)] * rng.uniform(0.7, 1.25, 3)
    gain, lift = rng.uniform(0.7, 1.25), rng.uniform(-25, 35)
    return _float32(np.clip(pixels * gain + lift, 0, 255))


def _clouds(rng: np.random.Generator, side: int) -> Floats:
    """Noise whose amplitude falls as 1/frequency, as in photographs (Field 1987)."""
    total = np.zeros((side, side, 3), np.float32)
    steepness = rng.uniform(0.8, 1.6)
    correlation = rng.uniform(0.5, 0.95)
    for octave in range(1, 7):
        cells = 2**octave
        grey = rng.standard_normal((cells, cells, 1))
        own = rng.standard_normal((cells, cells, 3))
        noise = (correlation * grey + (1 - correlation) * own).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel])
            total[..., channel] += 2 ** (-steepness * (octave - 1)) * np.asarray(
                layer.resize((side, side), Image.Resampling.BICUBIC)
            )
    mean, spread = rng.uniform(50, 205, 3), rng.uniform(25, 70)
    return np.clip(mean + spread * total, 0, 255).astype(np.float32)


def _leaves(rng: np.random.Generator, side: int) -> Floats:
    """Dead leaves (Lee, Mumford and Huang 2001): occluding blobs with a power law of sizes."""
    shift = rng.uniform(0, 255, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), tuple(int(c) for c in shift))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(12, 60))):
        radius = 0.03 * (1 - rng.random() * 0.985) ** -0.65
        x, y = rng.uniform(0, 2 * side, 2)
        colour = tuple(int(c) for c in np.clip(shift + rng.normal(0, 70, 3), 0, 255))
        corners = int(rng.integers(3, 14))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        reach = 2 * side * radius * rng.uniform(0.6, 1.2, corners)
        points = [
            (x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(reach, angles, strict=True)
        ]
        pen.polygon([(float(px), float(py)) for px, py in points], fill=colour)
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32)
    return np.clip(0.75 * pixels + 0.25 * _clouds(rng, side), 0, 255).astype(np.float32)
