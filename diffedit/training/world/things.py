"""Things and what they are built from: shapes, and simple objects of a few forms each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from diffedit.training.world.forms import SHAPES, Part

RGB: TypeAlias = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
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

SKIN: tuple[RGB, ...] = ((250, 214, 184), (232, 184, 144), (176, 118, 78), (110, 70, 46))


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. Positions and the radius are fractions of the frame's side, the angle radians.

    ``noun`` is one of :data:`NOUNS`; ``layer`` says how near it is: things are painted from the
    lowest to the highest, and equal ones in order.
    """

    noun: str
    colour: str
    rgb: RGB
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    layer: int = 2

    @property
    def words(self) -> str:
        """``"red circle"`` or ``"striped red circle"``."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{texture}{self.colour} {self.noun}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is drawn, in the frame of the picture, from back to front."""
        return tuple(
            part.within(self.x, self.y, self.radius, self.angle)
            for part in _BUILD[self.noun](self.rgb)
        )


def darker(rgb: RGB, by: float = 0.35) -> RGB:
    """``rgb``, ``by`` of the way to black (to a lighter tone where it is black already)."""
    if sum(rgb) < 120:
        return lighter(rgb, by)
    r, g, b = (round(v * (1 - by)) for v in rgb)
    return r, g, b


def lighter(rgb: RGB, by: float = 0.4) -> RGB:
    """``rgb``, ``by`` of the way to white."""
    r, g, b = (round(v + (255 - v) * by) for v in rgb)
    return r, g, b


_WOOD, _LEAF, _INK, _PANE = (104, 62, 30), (44, 130, 50), (24, 20, 28), (250, 236, 160)


def _shape(name: str) -> Callable[[RGB], tuple[Part, ...]]:
    return lambda rgb: (Part(name, 0, 0, 1, 1),)


def _house(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, 0.35, 0.78, 0.6),
        Part("wedge", 0, -0.58, 1, 0.4, rgb=darker(rgb, 0.45)),
        Part("box", -0.36, 0.2, 0.17, 0.17, rgb=_PANE),
        Part("box", 0.3, 0.55, 0.2, 0.4, rgb=_WOOD if sum(rgb) > 250 else (190, 150, 100)),
    )


def _tree(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, 0.6, 0.13, 0.38, rgb=_WOOD),
        Part("disc", 0, -0.28, 0.62, 0.66),
    )


def _pine(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, 0.78, 0.12, 0.2, rgb=_WOOD),
        Part("wedge", 0, 0.2, 0.62, 0.45),
        Part("wedge", 0, -0.4, 0.46, 0.55),
    )


def _car(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("dome", -0.05, -0.22, 0.55, 0.26, rgb=lighter(rgb, 0.55)),
        Part("pad", 0, 0.2, 1, 0.3),
        Part("disc", -0.52, 0.48, 0.22, 0.22, rgb=_INK),
        Part("disc", 0.52, 0.48, 0.22, 0.22, rgb=_INK),
    )


def _boat(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0.04, -0.2, 0.05, 0.7, rgb=_WOOD),
        Part("wedge", 0.4, -0.25, 0.34, 0.55, rgb=(246, 244, 236)),
        Part("trunk", 0, 0.62, 0.95, 0.26),
    )


def _flower(rgb: RGB) -> tuple[Part, ...]:
    petals = tuple(
        Part("disc", 0.36 * x, -0.35 + 0.36 * y, 0.3, 0.3)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))
    )
    middle = (252, 214, 40) if rgb[0] < 240 or rgb[2] > 60 else (118, 68, 28)
    return (
        Part("box", 0, 0.5, 0.06, 0.5, rgb=_LEAF),
        *petals,
        Part("disc", 0, -0.35, 0.2, 0.2, rgb=middle),
    )


def _sun(rgb: RGB) -> tuple[Part, ...]:
    return (Part("disc", 0, 0, 1, 1),)


def _moon(rgb: RGB) -> tuple[Part, ...]:
    return (Part("moon", 0, 0, 1, 1),)


def _cloud(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("disc", -0.5, 0.1, 0.42, 0.32),
        Part("disc", 0.5, 0.1, 0.45, 0.34),
        Part("disc", 0, -0.08, 0.52, 0.44),
    )


def _apple(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0.05, -0.82, 0.07, 0.2, 0.2, rgb=_WOOD),
        Part("disc", -0.26, 0.1, 0.62, 0.72),
        Part("disc", 0.26, 0.1, 0.62, 0.72),
    )


def _pear(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0.03, -0.86, 0.06, 0.16, 0.2, rgb=_WOOD),
        Part("disc", 0, -0.32, 0.4, 0.48),
        Part("disc", 0, 0.36, 0.66, 0.56),
    )


def _cup(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("ring", 0.62, 0.1, 0.4, 0.42),
        Part("trunk", -0.12, 0.1, 0.7, 0.68),
        Part("disc", -0.12, -0.56, 0.68, 0.14, rgb=darker(rgb)),
    )


def _bottle(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, -0.66, 0.14, 0.36),
        Part("pad", 0, 0.3, 0.42, 0.7),
        Part("box", 0, 0.36, 0.38, 0.22, rgb=lighter(rgb, 0.7)),
    )


def _vase(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("trunk", 0, -0.66, 0.36, 0.2),
        Part("disc", 0, 0.24, 0.62, 0.7),
    )


def _sofa(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("pad", 0, -0.12, 0.88, 0.42, rgb=darker(rgb, 0.25)),
        Part("box", 0, 0.26, 0.9, 0.24),
        Part("pad", -0.86, 0.14, 0.16, 0.36),
        Part("pad", 0.86, 0.14, 0.16, 0.36),
    )


def _lamp(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, 0.25, 0.05, 0.7, rgb=_INK),
        Part("box", 0, 0.94, 0.3, 0.06, rgb=_INK),
        Part("wedge", 0, -0.55, 0.52, 0.42),
    )


def _window(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("box", 0, 0, 0.8, 0.9, rgb=(240, 236, 226)),
        Part("box", -0.37, -0.42, 0.31, 0.36),
        Part("box", 0.37, -0.42, 0.31, 0.36),
        Part("box", -0.37, 0.42, 0.31, 0.36),
        Part("box", 0.37, 0.42, 0.31, 0.36),
    )


def _hair(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("disc", 0, -0.22, 0.82, 0.86),
        Part("box", -0.66, 0.3, 0.16, 0.5),
        Part("box", 0.66, 0.3, 0.16, 0.5),
    )


def _head(rgb: RGB) -> tuple[Part, ...]:
    return (Part("disc", 0, 0.08, 0.66, 0.82),)


def _eyes(rgb: RGB) -> tuple[Part, ...]:
    whites = tuple(Part("disc", x, -0.08, 0.17, 0.13, rgb=(250, 250, 250)) for x in (-0.27, 0.27))
    return (*whites, *(Part("disc", x, -0.08, 0.1, 0.11) for x in (-0.27, 0.27)))


def _mouth(rgb: RGB) -> tuple[Part, ...]:
    return (Part("smile", 0, 0.4, 0.28, 0.2),)


def _frown(rgb: RGB) -> tuple[Part, ...]:
    return (Part("smile", 0, 0.56, 0.28, 0.2, 3.14159265),)


def _hat(rgb: RGB) -> tuple[Part, ...]:
    return (
        Part("pad", 0, -0.98, 0.56, 0.36),
        Part("box", 0, -0.66, 0.92, 0.1, rgb=darker(rgb)),
    )


_BUILD: dict[str, Callable[[RGB], tuple[Part, ...]]] = {name: _shape(name) for name in SHAPES} | {
    "house": _house,
    "tree": _tree,
    "pine": _pine,
    "car": _car,
    "boat": _boat,
    "flower": _flower,
    "sun": _sun,
    "moon": _moon,
    "cloud": _cloud,
    "apple": _apple,
    "pear": _pear,
    "cup": _cup,
    "bottle": _bottle,
    "vase": _vase,
    "sofa": _sofa,
    "lamp": _lamp,
    "window": _window,
    "hair": _hair,
    "head": _head,
    "eyes": _eyes,
    "smile": _mouth,
    "frown": _frown,
    "hat": _hat,
}

NOUNS = tuple(_BUILD)

OBJECTS = (
    *("house", "tree", "car", "boat", "flower"),
    *("apple", "pear", "cup", "bottle", "lamp", "hat"),
)
"""Nouns of composed things that may stand alone before a background, as the shapes do."""
