"""The pictures of a case: its source, its masks, its hint, and an answer that would be right."""

from __future__ import annotations

from functools import cache

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

from bench.quality.cases import Case, Place, Source
from diffedit.training import hints
from diffedit.training.judges import Mask
from diffedit.training.world.backdrops import KEPT_FOR_JUDGING, Pixels
from diffedit.training.world.forms import Floats, cover
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Background, Scene
from diffedit.training.world.things import PALETTE, Thing


def source(case: Case, native: int) -> Pixels:
    """What is edited, (side, side, 3) uint8; grey where a picture is made from nothing."""
    given, side = case.source, side_of(case, native)
    if given is None:
        return np.full((side, side, 3), 128, np.uint8)
    return render(given.scene, side).image if given.scene else photograph(given, side)


def side_of(case: Case, native: int) -> int:
    """The side of the case's picture in pixels, a multiple of 64."""
    return round(case.scale * native / 64) * 64 or 64


def photograph(given: Source, side: int) -> Pixels:
    """A square crop of a photograph, (side, side, 3) uint8."""
    picture = whole(given.photo)
    height, width, _ = picture.shape
    left, top, share = given.crop
    extent = round(share * min(height, width))
    x, y = round(left * (width - extent)), round(top * (height - extent))
    part = Image.fromarray(picture[y : y + extent, x : x + extent])
    return np.asarray(part.resize((side, side), Image.Resampling.LANCZOS))


@cache
def whole(name: str) -> Pixels:
    """A photograph out of scikit-image's wheel: (height, width, 3) uint8."""
    found = getattr(skimage.data, name)()
    picture = found[0] if isinstance(found, tuple) else found
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    return np.ascontiguousarray(picture[..., :3])


def mask(case: Case, number: int, native: int) -> Mask:
    """Mask `number` of a case, (side, side) bool, True where the picture may change."""
    return _mask(case, case.places[number], side_of(case, native))


def _mask(case: Case, place: Place, side: int) -> Mask:
    v, u = (np.mgrid[0:side, 0:side] + 0.5) / side
    if place.form == "disc":
        return np.asarray(np.hypot(u - place.x, v - place.y) < place.half)
    if place.form == "square":
        return np.asarray(np.maximum(abs(u - place.x), abs(v - place.y)) < place.half)
    assert case.source is not None
    assert case.source.scene is not None
    inside = _alone(case.source.scene.things[place.thing], side) > 0.5
    return np.asarray(distance_transform_edt(~inside) <= place.half * side)


def outline(case: Case, native: int) -> tuple[int, Mask] | None:
    """Where exactly an object is to stand, where that is known: its number and (side, side) bool.

    It is known where the mask was made from the object itself, and under a hint, of the object
    that stands before all others.
    """
    side = side_of(case, native)
    if case.hint is not None and case.answer is not None:
        number = len(case.answer.things) - 1
        return number, np.asarray(_alone(case.answer.things[number], side) > 0.5)
    if not case.places or case.places[0].form != "thing":
        return None
    assert case.source is not None
    assert case.source.scene is not None
    return 0, np.asarray(_alone(case.source.scene.things[case.places[0].thing], side) > 0.5)


def hidden(case: Case, native: int) -> set[int]:
    """The numbers of the wanted objects of which another one is to cover a part."""
    if case.hint is None or case.answer is None:
        return set()
    return {back for back, _, _ in overlaps(case.answer, side_of(case, native))}


def changed(case: Case, native: int) -> Mask:
    """Where the picture may change: all masks together."""
    every = [mask(case, i, native) for i in range(len(case.places))]
    return np.asarray(np.logical_or.reduce(every))


def _alone(thing: Thing, side: int) -> Floats:
    """What a thing covers, were it alone: (side, side) in [0, 1]."""
    full = (slice(0, side), slice(0, side))
    return np.asarray(np.maximum.reduce([cover(part, side, full) for part in thing.parts]))


def overlaps(scene: Scene, side: int) -> list[tuple[int, int, Mask]]:
    """Pairs of things that overlap: the one behind, the one before it, and where they do."""
    covered = [_alone(thing, side) > 0.5 for thing in scene.things]
    pairs = []
    for back in range(len(covered)):
        for front in range(back + 1, len(covered)):
            both = covered[back] & covered[front]
            if both.sum() >= 16:
                pairs.append((back, front, both))
    return pairs


def hint(case: Case, native: int) -> Pixels:
    """The hint of a restructuring case: (side, side, 3) uint8."""
    assert case.answer is not None
    drawing = render(case.answer, side_of(case, native))
    if case.hint == "canny":
        return hints.canny(drawing.image)
    return hints.depth(drawing) if case.hint == "depth" else hints.segments(drawing)


def look(number: int, side: int) -> Pixels:
    """A picture with a look of its own: patterned scenes, and two photographs kept for judging."""
    drawn = (
        ("striped", "orange", "brown", "outlined"),
        ("dotted", "pink", "purple", "flat"),
        ("checkered", "cyan", "blue", "flat"),
        ("striped", "green", "yellow", "watercolor"),
    )
    if number < len(drawn):
        kind, one, two, style = drawn[number]
        return render(Scene(Background(kind, one, two, number), (), style, None, ""), side).image
    name = ("chelsea", "coffee")[number - len(drawn)]
    assert name in KEPT_FOR_JUDGING
    return photograph(Source(photo=name, crop=(0.0, 0.0, 1.0)), side)


def answer(case: Case, native: int) -> Pixels | None:
    """A drawn picture that does what is asked; None where there is none to be drawn.

    Outside the masks it is the source. In a mask it shows the asked object, or the source without
    the object that was there.
    """
    side = side_of(case, native)
    if not case.places:
        return None if case.answer is None else render(case.answer, side).image
    picture = source(case, native)
    cleared = None if case.answer is None else render(case.answer, side).image
    for number, place in enumerate(case.places):
        where = _mask(case, place, side)[..., None]
        if cleared is not None:
            picture = np.where(where, cleared, picture)
        for one in case.wanted:
            if one.place == number and place.form != "thing":
                picture = np.where(where, _with(picture, one.colour, one.noun, place), picture)
    return np.asarray(picture)


def _with(picture: Pixels, colour: str, noun: str, place: Place) -> Pixels:
    """`picture` with an object in the middle of a place, on ground of another colour."""
    behind = PALETTE["white" if colour not in ("white", "yellow", "cyan", "gray") else "black"]
    canvas = np.broadcast_to(np.array(behind, np.float32), picture.shape).copy()
    side = len(picture)
    thing = Thing(noun, colour, PALETTE[colour], "plain", place.x, place.y, 0.72 * place.half)
    full = (slice(0, side), slice(0, side))
    for part in thing.parts:
        fill = np.array(part.rgb or thing.rgb, np.float32)
        canvas += cover(part, side, full)[..., None] * (fill - canvas)
    return canvas.round().astype(np.uint8)


def edges(picture: Pixels) -> NDArray[np.bool_]:
    """Canny's edges, by the same thresholds as the hints: (h, w) bool."""
    return np.asarray(hints.canny(picture)[..., 0] > 0)
