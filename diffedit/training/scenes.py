"""The drawn world: seeded scenes whose truth (objects, colours, masks, words) is known.

A :class:`Scene` is a value, free of resolution; :func:`render` draws it at any side length.
``draw_scene(seed, index, mix)`` depends on nothing but its arguments, so that a training run can
be stopped and resumed anywhere and any scene can be looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffedit.training.backdrops import Pixels, backdrop
from diffedit.training.shapes import SHAPES, Floats, coverage

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 34),
    "green": (30, 150, 48),
    "blue": (28, 58, 214),
    "yellow": (250, 222, 36),
    "orange": (252, 132, 12),
    "purple": (132, 36, 172),
    "pink": (252, 146, 196),
    "cyan": (44, 208, 228),
    "white": (244, 244, 244),
    "black": (14, 14, 14),
    "brown": (118, 68, 28),
    "gray": (128, 128, 128),
}
"""sRGB colours, 0-255; the captions' colour words."""

COLOURS = tuple(PALETTE)
TEXTURES = ("plain", "striped", "dotted")
STYLES = ("flat", "outlined", "shaded", "watercolor")
PATTERNS = ("plain", "gradient", "striped", "checkered", "dotted")
RELATIONS = ("left of", "right of", "above", "below")

_JITTER = 10
"""Largest deviation of a drawn colour from its palette entry, per channel, 0-255."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. Positions and the radius are fractions of the frame's side, the angle radians."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def words(self) -> str:
        """``"red circle"`` or ``"striped red circle"``."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{texture}{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind the objects: a pattern of one or two colours, or a photograph's crop.

    ``kind`` is one of :data:`PATTERNS` or ``"photo"``; ``seed`` fixes all that is random in it.
    """

    kind: str
    colour: str
    second: str
    seed: int

    @property
    def words(self) -> str:
        """``"blue background"``, ``"striped blue and white background"`` or ``"photo"``."""
        if self.kind == "photo":
            return "photo"
        if self.kind == "plain":
            return f"{self.colour} background"
        return f"{self.kind} {self.colour} and {self.second} background"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's full description; ``relation`` is between the first and the second object."""

    background: Background
    things: tuple[Thing, ...]
    style: str
    relation: str | None
    caption: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A rendered scene.

    ``image`` is (side, side, 3) uint8; ``masks`` holds one (side, side) array in [0, 1] per
    object, 1 where the object covers the pixel.
    """

    scene: Scene
    image: Pixels
    masks: tuple[Floats, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of what is drawn, each a probability in [0, 1]."""

    photo: float = 0.35
    pattern: float = 0.15
    empty: float = 0.03
    pair: float = 0.05
    texture: float = 0.1
    style: float = 0.1
    radius: tuple[float, float] = field(default=(0.14, 0.42))


SIMPLE = Mix()
"""The first world: mostly one flat object, half of the time before a plain or gradient colour."""

PLAIN = Mix(photo=0.3, pattern=0.0, empty=0.0, pair=0.0, texture=0.0, style=0.0)
"""The clearest world: one flat object before a plain or gradient colour, or a photograph."""

RICH = Mix(photo=0.4, pattern=0.25, empty=0.03, pair=0.2, texture=0.25, style=0.25)
"""The second world: textures, patterns, styles, pairs and their relations."""


def draw_scene(seed: int, index: int, mix: Mix = SIMPLE) -> Scene:
    """The scene number ``index`` of the world ``seed``: a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    style = str(rng.choice(STYLES[1:])) if rng.random() < mix.style else "flat"
    background = _draw_background(rng, mix)
    taken = {background.colour, background.second} if background.kind != "photo" else set()
    if rng.random() < mix.empty:
        return Scene(background, (), "flat", None, _empty_caption(rng, background))
    if rng.random() < mix.pair:
        things, relation = _draw_pair(rng, mix, taken)
    else:
        low, high = mix.radius
        radius = float(rng.uniform(low, high))
        reach = max(0.0, 0.48 - radius)
        # Two draws averaged: centred more often than not, as the object of an edit is.
        x, y = 0.5 + reach * rng.uniform(-1, 1, (2, 2)).mean(axis=0)
        things, relation = (_draw_thing(rng, mix, taken, x, y, radius),), None
    return Scene(
        background, things, style, relation, _caption(rng, background, things, style, relation)
    )


def render(scene: Scene, side: int) -> Drawing:
    """Draw ``scene`` on a square of ``side`` pixels; edges are antialiased by area coverage."""
    background = scene.background
    canvas: Floats = backdrop(
        background.kind, _rgb(background.colour), _rgb(background.second), background.seed, side
    )
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    u, v = (columns + 0.5) / side, (rows + 0.5) / side
    masks: list[Floats] = []
    for number, thing in enumerate(scene.things):
        mask = coverage(thing.shape, u, v, thing.x, thing.y, thing.radius, thing.angle, side)
        fill = _fill(thing, scene.style, u, v, background.seed + number + 1, side)
        if scene.style == "outlined":
            grown = coverage(
                thing.shape, u, v, thing.x, thing.y, thing.radius, thing.angle, side, grow=0.022
            )
            line = 255.0 if max(thing.rgb) < 80 else 0.0
            canvas += grown[..., None] * (line - canvas)
        canvas += mask[..., None] * (fill - canvas)
        masks = [earlier * (1 - mask) for earlier in masks] + [mask]
    return Drawing(scene, np.clip(canvas.round(), 0, 255).astype(np.uint8), tuple(masks))


def _rgb(colour: str) -> tuple[int, int, int]:
    return PALETTE[colour]


def _draw_background(rng: np.random.Generator, mix: Mix) -> Background:
    pick = rng.random()
    if pick < mix.photo:
        kind = "photo"
    elif pick < mix.photo + mix.pattern:
        kind = str(rng.choice(PATTERNS[2:]))
    else:
        kind = "plain" if rng.random() < 0.7 else "gradient"
    first, second = rng.choice(COLOURS, 2, replace=False)
    return Background(kind, str(first), str(second), int(rng.integers(2**31)))


def _draw_thing(
    rng: np.random.Generator, mix: Mix, taken: set[str], x: float, y: float, radius: float
) -> Thing:
    colour = str(rng.choice([c for c in COLOURS if c not in taken]))
    jitter = rng.integers(-_JITTER, _JITTER + 1, 3)
    r, g, b = (int(v) for v in np.clip(np.array(PALETTE[colour]) + jitter, 0, 255))
    texture = str(rng.choice(TEXTURES[1:])) if rng.random() < mix.texture else "plain"
    angle = float(rng.uniform(-0.2, 0.2))
    shape = str(rng.choice(SHAPES))
    return Thing(shape, colour, (r, g, b), texture, float(x), float(y), radius, angle)


def _draw_pair(
    rng: np.random.Generator, mix: Mix, taken: set[str]
) -> tuple[tuple[Thing, ...], str | None]:
    along = rng.uniform(0.22, 0.3, 2)
    across = 0.5 + rng.uniform(-0.12, 0.12, 2)
    radii = rng.uniform(0.13, 0.21, 2)
    first_low, upright = rng.random(2) < 0.5
    places = [(along[0], across[0]), (1 - along[1], across[1])]
    if not first_low:
        places.reverse()
    if upright:
        places = [(y, x) for x, y in places]
    first = _draw_thing(rng, mix, taken, *places[0], float(radii[0]))
    second = _draw_thing(rng, mix, taken | {first.colour}, *places[1], float(radii[1]))
    relation = RELATIONS[2 * int(upright) + int(not first_low)]
    return (first, second), (relation if rng.random() < 0.75 else None)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _empty_caption(rng: np.random.Generator, background: Background) -> str:
    if background.kind == "photo":
        return str(rng.choice(["a photo", "photo", "a photo of something"]))
    return str(rng.choice([_article(background.words), background.words]))


def _caption(
    rng: np.random.Generator,
    background: Background,
    things: tuple[Thing, ...],
    style: str,
    relation: str | None,
) -> str:
    nouns = [thing.words if rng.random() < 0.8 else _spelled_out(thing) for thing in things]
    first = nouns[0]
    if style != "flat":
        first = f"{style} {first}"
    if len(things) == 1 and rng.random() < 0.12:
        radius = things[0].radius
        size = "big" if radius > 0.32 else "small" if radius < 0.2 else ""
        first = f"{size} {first}".strip()
    words = _article(first)
    if len(things) == 2:
        words = f"{words} {relation or 'and'} {_article(nouns[1])}"
    if rng.random() < 0.3:
        words = words.replace("gray", "grey")
    opening = rng.random()
    if opening < 0.1:
        medium = "a photo" if background.kind == "photo" else "a drawing"
        words = f"{rng.choice(['a picture', 'an image', medium])} of {words}"
    elif opening < 0.16:
        words = words.removeprefix("an ").removeprefix("a ")
    if background.kind == "photo":
        return f"{words} in a photo" if opening > 0.9 else words
    if rng.random() < 0.45:
        return words
    if rng.random() < 0.15 and background.kind == "plain":
        return f"{words} on {background.colour}"
    return f"{words} on {_article(background.words)}"


def _spelled_out(thing: Thing) -> str:
    if thing.texture == "plain":
        return thing.words
    return (
        f"{thing.colour} {thing.shape} with {'stripes' if thing.texture == 'striped' else 'dots'}"
    )


def _fill(thing: Thing, style: str, u: Floats, v: Floats, seed: int, side: int) -> Floats:
    """The object's own colours: (side, side, 3) float, 0-255."""
    base = np.array(thing.rgb, np.float32)
    fill = np.broadcast_to(base, (*u.shape, 3)).copy()
    # Textures darken a light colour and lighten a dark one, by enough to see and not so much that
    # another palette colour is nearer.
    other = base * 0.62 if base.mean() > 90 else base + (255 - base) * 0.42
    x, y = (u - thing.x) / thing.radius, (v - thing.y) / thing.radius
    if thing.texture == "striped":
        along = x * np.cos(0.8 + thing.angle) + y * np.sin(0.8 + thing.angle)
        wave = np.clip(0.5 + np.sin(along * 7.5) * side * thing.radius / 15, 0, 1)
        fill += wave[..., None] * (other - fill)
    elif thing.texture == "dotted":
        pitch = 0.56
        dx, dy = (
            (np.mod(x + 9 * pitch, pitch) - pitch / 2),
            (np.mod(y + 9 * pitch, pitch) - pitch / 2),
        )
        inside = np.clip(0.5 + (0.17 - np.hypot(dx, dy)) * side * thing.radius, 0, 1)
        fill += inside[..., None] * (other - fill)
    if style == "shaded":
        light = 1.0 + 0.35 * np.clip(-(x + y) * 0.6, -1, 1)
        fill = np.where(
            light[..., None] > 1,
            fill + (light[..., None] - 1) * (255 - fill),
            fill * light[..., None],
        )
    elif style == "watercolor":
        wash: NDArray[np.float32] = backdrop("clouds", (0, 0, 0), (0, 0, 0), seed, side)
        tone = (wash.mean(axis=2, keepdims=True) - 128) / 128
        fill = fill + 0.25 * (255 - fill) + 55 * tone
    return np.clip(fill, 0, 255)
