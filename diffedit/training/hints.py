"""ControlNet hints of training examples: edges, holes, depth, regions, or the data's own.

Edges are found in any picture, and holes made in it. Depth and regions are known of drawn scenes
only. For every kind but edges and holes, a 'hint' column of the data is taken as it is, so that
there can be a kind of any name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffedit.errors import InputError, nearest
from diffedit.training.data import Example, Pixels, Source, Subset, views_of
from diffedit.training.world.forms import Floats
from diffedit.training.world.paint import Drawing
from diffedit.training.world.source import Drawn
from diffedit.training.world.things import NOUNS

MADE = ("canny", "inpaint", "depth", "segments")
"""The kinds of hints that are made here."""

OF_ANY = ("canny", "inpaint")
"""Those that are made of any picture."""

OWN = "hint"
"""The kind of a 'hint' column that has no other name."""

LOW, HIGH = 100, 200
"""Canny's thresholds: those of the preprocessor that edits take their hints from."""


_HOLES = 20_261_122
"""The seed of holes."""

Bools: TypeAlias = npt.NDArray[np.bool_]
Places: TypeAlias = npt.NDArray[np.floating[Any]]


def canny(pixels: Pixels) -> Pixels:
    """Edges (Canny 1986), white on black, as diffedit's "canny" preprocessor finds them.

    Args:
        pixels: (h, w, 3) uint8 RGB.

    Returns:
        (h, w, 3) uint8, 0 or 255, the same in all channels.
    """
    edges = cv2.Canny(np.ascontiguousarray(pixels), LOW, HIGH)
    return np.repeat(edges[..., None], 3, axis=2).astype(np.uint8)


def depth(drawing: Drawing) -> Pixels:
    """The order of depth as grey, brighter is nearer, the background black: (h, w, 3) uint8."""
    return np.repeat(drawing.depth[..., None], 3, axis=2)


def segments(drawing: Drawing) -> Pixels:
    """What one sees of each thing in its noun's flat colour, all else black: (h, w, 3) uint8."""
    made = np.zeros_like(drawing.image)
    if drawing.masks:
        masks = np.stack(drawing.masks)
        colours = np.stack([colour_of(thing.noun) for thing in drawing.scene.things])
        shown = masks.max(axis=0) > 0.5
        made[shown] = colours[masks.argmax(axis=0)[shown]]
    return made


def colour_of(noun: str) -> Pixels:
    """The colour (3,) uint8 of a noun's regions; never black, and of every noun another.

    The colour map of PASCAL VOC 2012's segmentations (its development kit's ``VOClabelcolormap``),
    in the order of ``NOUNS`` from 1: the bits of the number, from the lowest, go to red, green and
    blue in turn, the highest bit of each first.
    """
    label = NOUNS.index(noun) + 1
    bits = [[label >> (3 * place + channel) & 1 for place in range(8)] for channel in range(3)]
    return np.array([sum(bit << (7 - k) for k, bit in enumerate(of)) for of in bits], np.uint8)


def hole(
    shape: tuple[int, int],
    rng: np.random.Generator,
    masks: Sequence[Floats] = (),
    others: Sequence[Floats] = (),
) -> Bools:
    """Where a picture is to be made anew, (h, w) bool: as people mask what they edit.

    Three in ten are the outline of a thing, a little grown; a quarter a square or disc around one;
    two in ten such an outline, square or disc where nothing stands, as if a thing had been there
    that is to go; most others a square or disc anywhere; and one in ten is the whole picture.

    Args:
        shape: (h, w).
        rng: what is drawn.
        masks: of the things that the caption names, (h, w) each; without any, holes are anywhere.
        others: of those that it does not.
    """
    pick, side = float(rng.random()), min(shape)
    found = [mask > 0.5 for mask in masks if (mask > 0.5).any()]
    if pick < 0.1:
        return np.ones(shape, bool)
    if found and pick < 0.85:
        outlined = bool(rng.random() < 0.55)
        thing = found[int(rng.integers(len(found)))]
        where = _grown(thing, rng, side) if outlined else _about(thing, rng)
        if pick < 0.65:
            return where
        taken = np.logical_or.reduce([*found, *(mask > 0.5 for mask in others)])
        if (free := _moved(where, taken, rng)) is not None:
            return free
    half = rng.uniform(0.12, 0.37) * side
    middle = rng.uniform(half / 2, np.array(shape) - half / 2)
    return _around(shape, middle, half, round_=bool(rng.random() < 0.5))


def _grown(thing: Bools, rng: np.random.Generator, side: int) -> Bools:
    """A thing's outline, and up to a twentieth of the side more."""
    reach = max(1, round(float(rng.uniform(0.005, 0.05)) * side))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(thing.astype(np.uint8), disc) > 0)


def _about(thing: Bools, rng: np.random.Generator) -> Bools:
    """A square or disc around a thing."""
    places = np.argwhere(thing)
    low, high = places.min(axis=0), places.max(axis=0) + 1
    half = float((high - low).max()) / 2 * rng.uniform(1.05, 1.5)
    middle = (low + high) / 2 + rng.uniform(-0.1, 0.1, 2) * half
    return _around(thing.shape, middle, half, round_=bool(rng.random() < 0.5))


def _moved(where: Bools, taken: Bools, rng: np.random.Generator) -> Bools | None:
    """A hole somewhere else, off all that is taken; None if no such place is soon found.

    It may be smaller there. Rather at its own height than above or below: what stands on the
    ground stays on it.
    """
    height, width = where.shape
    places = np.argwhere(where)
    foot = places.max(axis=0)
    for _ in range(20):
        less = rng.uniform(0.4, 1)
        down = rng.uniform(-0.5, 0.5) ** 3 * 4 * height
        along = rng.uniform(-1, 1) * width
        there = foot + less * (places - foot) + (down, along)
        rows, columns = np.rint(there).astype(int).T
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        if inside.mean() > 0.7 and not taken[rows[inside], columns[inside]].any():
            moved = np.zeros_like(where)
            moved[rows[inside], columns[inside]] = True
            return moved
    return None


def _around(shape: tuple[int, int], middle: Places, half: float, *, round_: bool) -> Bools:
    away = np.abs(np.indices(shape).transpose(1, 2, 0) + 0.5 - middle)
    far = np.hypot(away[..., 0], away[..., 1]) if round_ else away.max(axis=2)
    return np.asarray(far <= half)


class Hinted:
    """A source whose examples have hints, of one kind or each of one of several in turn.

    What hints look like says of which kind they are: one network can learn to follow several.
    One for inpainting is the picture with a fourth channel, 255 in the hole, which also is what an
    example's error counts by.

    Args:
        source: the examples.
        kinds: of "canny", "inpaint", "depth", "segments"; or, where the data has a 'hint' column,
            any other name. Holes go with no other kind, as they are hints of four channels.

    Raises:
        InputError: hints of this kind cannot be had from this source.
    """

    def __init__(self, source: Source, *kinds: str) -> None:
        self.source, self.kinds = source, kinds
        self.name, self.views = source.name, views_of(source)
        world = _unwrapped(source, 0)[0]
        self.world = isinstance(world, Drawn)
        has = not self.world and not {*kinds} <= {*OF_ANY} and source[0].hint is not None
        self.own = frozenset(kind for kind in kinds if has and kind not in OF_ANY)
        for kind in kinds:
            self._check(kind)
        if "inpaint" in kinds and len(kinds) > 1:
            raise InputError("holes (kind inpaint) are hints that go with no others: train twice")
        told = " ".join("own" if kind in self.own else kind for kind in kinds)
        said = f"hinted 2 {told} {LOW} {HIGH} {NOUNS} {source.digest}"
        self.digest = hashlib.sha256(said.encode()).hexdigest()

    def _check(self, kind: str) -> None:
        if kind in self.own or kind in OF_ANY:
            return
        if kind not in MADE:
            lack = f"no hints of kind {kind!r}{nearest(kind, MADE)} and "
            raise InputError(
                f"{self.name} has {'' if kind == OWN else lack}no 'hint' column, take"
                f" {', '.join(MADE)} or give the data one"
            )
        if not self.world:
            raise InputError(
                f"{self.name}: {kind} hints need the drawn world (data: world) or a 'hint' column"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        world, number = _unwrapped(self.source, index)
        # By the example and not by its place in a choice, so that a cache of it stays true.
        kind = self.kinds[number % len(self.kinds)]
        if kind in self.own:
            return self.source[index]
        if kind == "canny":
            example = self.source[index]
            return replace(example, hint=canny(example.image))
        if not isinstance(world, Drawn):
            return _holed(self.source[index], index)
        example, drawing = world.drawn(number)
        if kind == "inpaint":
            told, masks = drawing.scene.told, drawing.masks
            named = [mask for at, mask in enumerate(masks) if told in (None, at)]
            others = [mask for at, mask in enumerate(masks) if told not in (None, at)]
            return _holed(example, world.first + number, named, others)
        return replace(example, hint={"depth": depth, "segments": segments}[kind](drawing))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def _holed(
    example: Example, number: int, masks: Sequence[Floats] = (), others: Sequence[Floats] = ()
) -> Example:
    where = hole(example.image.shape[:2], np.random.default_rng((_HOLES, number)), masks, others)
    hint = np.dstack([example.image, np.uint8(255) * where.astype(np.uint8)])
    return replace(example, hint=hint, weight=where.astype(np.float32))


def _unwrapped(source: Source, index: int) -> tuple[Source, int]:
    """The source below all choices from it, and the number that ``index`` has there."""
    while isinstance(source, Subset):
        index, source = int(source.rows[index]), source.source
    return source, index
