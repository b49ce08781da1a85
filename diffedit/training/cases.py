"""Seeded test cases: prompts for pictures from nothing, and pictures with a mask to paint into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import skimage.data
from PIL import Image

from diffedit.training.world.backdrops import KEPT_FOR_JUDGING, Pixels
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Background, Mix, Scene, draw_scene
from diffedit.training.world.source import HELD_OUT
from diffedit.training.world.things import COLOURS

_EMPTY = Mix(photo=0.0, pattern=0.4, empty=1.0)
"""Held-out drawn backgrounds without an object."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt for one object; ``other`` is a colour that nobody asked for, as a control."""

    prompt: str
    shape: str
    colour: str
    background: str | None
    other: str
    seed: int


@dataclass(frozen=True, slots=True)
class InpaintCase:
    """A square picture, (side, side, 3) uint8, and a mask, (side, side) bool, True = repaint."""

    case: Case
    image: Pixels
    mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def single_objects(count: int, seed: int = 0) -> list[Case]:
    """``count`` prompts; every colour and shape equally often, half of them with a background."""
    rng = np.random.default_rng((seed, 11))
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(count // len(pairs) + 1)])
    cases = []
    for number, pick in enumerate(order[:count]):
        colour, shape = pairs[pick]
        other, behind = rng.choice([c for c in COLOURS if c != colour], 2, replace=False)
        background = str(behind) if number % 2 else None
        prompt = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
        if background:
            article = "an" if background == "orange" else "a"
            prompt = f"{prompt} on {article} {background} background"
        cases.append(Case(prompt, shape, colour, background, str(other), 1000 * seed + number))
    return cases


def inpaintings(
    count: int, source: Literal["drawn", "photos"], side: int = 128, seed: int = 0
) -> list[InpaintCase]:
    """``count`` bare prompts ("a red circle"), each with a picture and a mask to put it in.

    ``drawn``: held-out plain, gradient and patterned backgrounds, none of the asked colour.
    ``photos``: crops of the photographs kept for judging. Masks are squares and discs of 45-75 % of
    the side, anywhere in the frame.
    """
    rng = np.random.default_rng((seed, 12, len(source)))
    made = []
    for number, case in enumerate(single_objects(2 * count, seed)[::2]):
        if source == "drawn":
            image = render(_background_without(case.colour, seed, number), side).image
        else:
            image = _kept_crop(rng, number, side)
        half = rng.uniform(0.225, 0.375)
        x, y = rng.uniform(half, 1 - half, 2)
        v, u = (np.mgrid[0:side, 0:side] + 0.5) / side
        if number % 2:
            mask = np.hypot(u - x, v - y) < half
        else:
            mask = np.maximum(abs(u - x), abs(v - y)) < half
        made.append(InpaintCase(case, image, mask))
    return made


def _background_without(colour: str, seed: int, number: int) -> Scene:
    for attempt in range(100):
        scene = draw_scene(seed + HELD_OUT, 100 * number + attempt, _EMPTY)
        if colour not in (scene.background.colour, scene.background.second):
            return scene
    return Scene(Background("plain", "white", "white", number), (), "flat", None, "")


def _kept_crop(rng: np.random.Generator, number: int, side: int) -> Pixels:
    picture = getattr(skimage.data, KEPT_FOR_JUDGING[number % len(KEPT_FOR_JUDGING)])()[..., :3]
    height, width, _ = picture.shape
    extent = int(rng.uniform(0.35, 1.0) * min(height, width))
    top, left = rng.integers(height - extent + 1), rng.integers(width - extent + 1)
    part = Image.fromarray(picture[top : top + extent, left : left + extent])
    return np.asarray(part.resize((side, side), Image.Resampling.LANCZOS))


def kept_photographs(side: int) -> list[Pixels]:
    """The photographs kept for judging, whole, squeezed to (side, side, 3)."""
    pictures = [getattr(skimage.data, name)()[..., :3] for name in KEPT_FOR_JUDGING]
    size, how = (side, side), Image.Resampling.LANCZOS
    return [np.asarray(Image.fromarray(picture).resize(size, how)) for picture in pictures]
