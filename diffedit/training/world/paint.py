"""Scenes as pictures, with the truth beside them: masks, depth order, what covers what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffedit.training.world.backdrops import Pixels, backdrop
from diffedit.training.world.forms import Floats, Part, Window, cover, distance, window
from diffedit.training.world.scenes import Scene, Stage
from diffedit.training.world.things import PALETTE, RGB, Thing

_LINE = 0.02
"""Width of an outline, as a fraction of the picture's side."""

_PAPER = (24, 72, 148)
_RULED = (44, 98, 176)
_CHALK = (236, 243, 252)
"""Of a blueprint: paper, the grid on it, lines; sRGB, 0-255."""

_GRID = 8
"""Squares of a blueprint's grid to a side: 32 pixels at 256, four latent cells."""

_TILES = 16
"""Tiles to a side of a mosaic: 16 pixels at 256, two latent cells."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A rendered scene.

    ``image`` is (side, side, 3) uint8; ``masks`` holds one (side, side) array in [0, 1] per
    object of ``scene.things``, 1 where that object is what one sees; ``depth`` is (side, side)
    uint8, 0 the background, higher is nearer.
    """

    scene: Scene
    image: Pixels
    masks: tuple[Floats, ...]
    depth: Pixels


def render(scene: Scene, side: int) -> Drawing:
    """Draw ``scene`` on a square of ``side`` pixels; edges are antialiased by area coverage."""
    painter = _Painter(scene, side)
    layers: list[tuple[int, Stage | Thing]] = [(item.layer, item) for item in scene.stage]
    layers += [(thing.layer, thing) for thing in scene.things]
    layers.sort(key=lambda pair: pair[0])
    masks: dict[int, Floats] = {}
    for number, (_, item) in enumerate(layers):
        whole = np.zeros((side, side), np.float32)
        if isinstance(item, Stage):
            painter.band(item, whole, number)
        else:
            painter.thing(item, whole, number)
            masks = {key: mask * (1 - whole) for key, mask in masks.items()}
            masks[id(item)] = whole
        painter.depth[whole > 0.5] = 55 + 200 * (number + 1) // len(layers)
    image = np.clip(painter.finished().round(), 0, 255).astype(np.uint8)
    return Drawing(scene, image, tuple(masks[id(t)] for t in scene.things), painter.depth)


class _Painter:
    """A canvas, and the style's way of putting forms on it."""

    def __init__(self, scene: Scene, side: int) -> None:
        behind = scene.background
        self.style, self.side, self.seed = scene.style, side, behind.seed
        first, second = PALETTE[behind.colour], PALETTE[behind.second]
        self.canvas: Floats = backdrop(behind.kind, first, second, behind.seed, side)
        self.depth = np.zeros((side, side), np.uint8)
        if self.style == "neon":
            self.canvas *= 0.16
        if self.style == "blueprint":
            self.paper = _paper(side)
            self.canvas = self.paper.copy()
        self.wash: Floats | None = None
        if self.style == "watercolor":
            clouds = backdrop("clouds", first, first, behind.seed + 1, side).mean(axis=2)
            self.wash = ((clouds - 128) / 128)[..., None]
            self.canvas += 0.3 * (255 - self.canvas) + 40 * self.wash

    def thing(self, thing: Thing, whole: Floats, number: int) -> None:
        """Paint ``thing``; ``whole`` becomes what it covers."""
        parts = thing.parts
        if self.style == "blueprint":
            # Parts of one colour are one form, with one line around them.
            for _, group in groupby(parts, key=lambda part: part.rgb):
                covered = self._line(distance(list(group), self.side))
                np.maximum(whole, covered, out=whole)
            return
        if self.style in ("outlined", "neon"):
            self._contour(parts, thing.rgb)
        for part in parts:
            where = window(part, self.side)
            if where[0].start >= where[0].stop or where[1].start >= where[1].stop:
                continue
            mask = cover(part, self.side, where)
            fill = self._fill(thing, part, where)
            self.canvas[where] += mask[..., None] * (fill - self.canvas[where])
            whole[where] = np.maximum(whole[where], mask)

    def band(self, band: Stage, whole: Floats, number: int) -> None:
        """Paint a band that reaches down to the frame."""
        u = (np.arange(self.side) + 0.5) / self.side
        top = band.top + band.swing * np.sin(2 * np.pi * (band.waves * u + band.phase))
        v = u[:, None]
        if self.style == "blueprint":
            away = np.broadcast_to((top - v).astype(np.float32), whole.shape)
            whole[:] = self._line(away)
            return
        whole[:] = np.clip(0.5 + (v - top) * self.side, 0, 1)
        fill: Any = np.broadcast_to(np.array(band.rgb, np.float32), self.canvas.shape)
        if self.style == "shaded":
            fill = fill * (1.12 - 0.45 * np.clip(v - band.top, 0, 1))[..., None]
        elif self.style == "neon":
            fill = fill * 0.14
        elif self.wash is not None:
            fill = fill + 0.3 * (255 - fill) + 45 * self.wash
        self.canvas += whole[..., None] * (fill - self.canvas)
        if self.style in ("outlined", "neon"):
            width = _LINE / 2 if self.style == "outlined" else _LINE / 1.6
            line = np.clip(0.5 + (width - np.abs(v - top)) * self.side, 0, 1)[..., None]
            ink = np.array(_bright(band.rgb) if self.style == "neon" else (0, 0, 0), np.float32)
            self.canvas += line * (ink - self.canvas)

    def _line(self, away: Floats) -> Floats:
        """Draw a line where ``away`` is 0, on paper where it is negative; what that covers."""
        inside: Floats = np.clip(0.5 - away * self.side, 0, 1).astype(np.float32, copy=False)
        line = np.clip(0.5 + (_LINE / 2 - np.abs(away)) * self.side, 0, 1)[..., None]
        self.canvas += inside[..., None] * (self.paper - self.canvas)
        self.canvas += line * (np.array(_CHALK, np.float32) - self.canvas)
        return inside

    def _contour(self, parts: tuple[Part, ...], rgb: RGB) -> None:
        """A dark outline around the parts, or a glowing one."""
        for part in parts:
            if self.style == "outlined":
                where = window(part, self.side, _LINE)
                ink = 255.0 if max(rgb) < 80 else 0.0
                grown = cover(part, self.side, where, _LINE)[..., None]
                self.canvas[where] += grown * (ink - self.canvas[where])
                continue
            light = np.array(_bright(part.rgb or rgb), np.float32)
            for reach, strength in ((0.05, 0.35), (_LINE, 1.0)):
                where = window(part, self.side, reach)
                grown = strength * cover(part, self.side, where, reach)[..., None]
                self.canvas[where] += grown * (light - self.canvas[where])

    def _fill(self, thing: Thing, part: Part, where: Window) -> Floats:
        """A part's own colours in a window: (rows, columns, 3) float, 0-255."""
        rows, columns = where
        base = np.array(part.rgb or thing.rgb, np.float32)
        size = (rows.stop - rows.start, columns.stop - columns.start, 3)
        fill: Floats = np.broadcast_to(base, size).copy()
        u = ((np.arange(columns.start, columns.stop) + 0.5) / self.side).astype(np.float32)
        v = ((np.arange(rows.start, rows.stop) + 0.5) / self.side).astype(np.float32)
        x, y = (u[None] - thing.x) / thing.radius, (v[:, None] - thing.y) / thing.radius
        if thing.texture != "plain":
            _texture(fill, thing, x, y, self.side)
        if self.style == "shaded":
            px, py = (u[None] - part.x) / part.w, (v[:, None] - part.y) / part.h
            light = (1.0 - 0.4 * np.clip((px + py) * 0.6, -1, 1))[..., None]
            lit = np.where(light > 1, fill + (light - 1) * (255 - fill), fill * light)
            fill = lit.astype(np.float32)
        elif self.style == "neon":
            fill *= 0.22
        elif self.wash is not None:
            fill = fill + 0.25 * (255 - fill) + 55 * self.wash[where]
        clipped: Floats = np.clip(fill, 0, 255).astype(np.float32)
        return clipped

    def finished(self) -> NDArray[np.floating]:
        """The canvas with what a style does to the whole picture."""
        canvas = np.clip(self.canvas, 0, 255)
        if self.style == "sepia":
            grey = canvas @ np.array([0.299, 0.587, 0.114], np.float32) / 255
            dark, light = np.array([44, 26, 12]), np.array([255, 240, 206])
            return np.asarray(dark + grey[..., None] ** 0.9 * (light - dark))
        if self.style == "mosaic" and self.side % _TILES == 0:
            pitch = self.side // _TILES
            tiles = canvas.reshape(_TILES, pitch, _TILES, pitch, 3).mean(axis=(1, 3))
            return np.asarray(tiles.repeat(pitch, axis=0).repeat(pitch, axis=1))
        return canvas


def _paper(side: int) -> Floats:
    """Blue paper with a faint grid: (side, side, 3), 0-255."""
    across = (np.arange(side) + 0.5) / side * _GRID
    ruled = np.clip(0.5 + (_LINE / 4 - np.abs(across - np.round(across)) / _GRID) * side, 0, 1)
    there = np.maximum(ruled[:, None], ruled[None])[..., None]
    paper, grid = np.array(_PAPER, np.float32), np.array(_RULED, np.float32)
    made: Floats = (paper + there * (grid - paper)).astype(np.float32)
    return made


def _bright(rgb: RGB) -> RGB:
    """``rgb`` as a light shows it: its brightest channel at full strength."""
    most = max(rgb)
    if most < 60:
        return 150, 150, 170
    r, g, b = (min(255, round(40 + 215 * v / most)) for v in rgb)
    return r, g, b


def _texture(fill: Floats, thing: Thing, x: Floats, y: Floats, side: int) -> None:
    """Stripes or dots, in the frame of the thing, in a tone of its own colour."""
    base = np.array(thing.rgb, np.float32)
    # Darker than a light colour and lighter than a dark one, by enough to see and not so much
    # that another palette colour is nearer.
    other = base * 0.62 if base.mean() > 90 else base + (255 - base) * 0.42
    if thing.texture == "striped":
        along = x * np.cos(0.8 + thing.angle) + y * np.sin(0.8 + thing.angle)
        there = np.clip(0.5 + np.sin(along * 7.5) * side * thing.radius / 15, 0, 1)
    else:
        pitch = 0.56
        dx = np.mod(x + 9 * pitch, pitch) - pitch / 2
        dy = np.mod(y + 9 * pitch, pitch) - pitch / 2
        there = np.clip(0.5 + (0.17 - np.hypot(dx, dy)) * side * thing.radius, 0, 1)
    fill += there[..., None] * (other - fill)
