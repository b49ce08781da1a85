"""What is said of one picture: every measure that its case asks for, as plain values.

Truth values become rates, numbers become means; a measure that a picture cannot be given (an order
of depth where nothing overlaps) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from skimage.color import rgb2lab

from bench.quality import measures, pictures
from bench.quality.cases import Case, Wanted
from diffedit.training.judges import (
    FRAME_SHARE,
    MASK_SHARE,
    Mask,
    border_colour,
    colour_map,
    colour_share,
    commonest,
    is_noun,
    judge_pair,
    largest_piece,
)
from diffedit.training.styles import WEIGHTS, style_of
from diffedit.training.world.backdrops import Pixels
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.paint import render
from diffedit.training.world.things import COLOURS, OBJECTS

Values = dict[str, Any]

CLOSE = 30.0
"""Distance in Lab within which a cleared pixel counts as the background: the judges' own."""

CLEARED = 0.8
"""The share of a mask that has to be so, for the object to be gone."""

RECOLOURED = 0.6
"""How much of what the right picture shows of the new colour has to have it."""

OF_ASKED = ("colour", "shape", "relation", "background", "ground", "removed", "style",
            "depth order", "closer in colour")  # fmt: skip
"""Measures that say whether something is there that was asked for."""


def all_asked(values: Values) -> bool | None:
    """Whether a picture shows all that was asked; None where nothing is asked that can be told."""
    told = [bool(values[key]) for key in OF_ASKED if key in values]
    return all(told) if told else None


def judge(case: Case, picture: Pixels, native: int, feather: int) -> Values:
    """All measures of a case's picture.

    Args:
        case: what was asked.
        picture: what was made, of the size of the case's picture.
        native: the model's native side in pixels.
        feather: over how many pixels outside a mask an edit may fade.
    """
    values: Values = {}
    if case.wanted and case.relation is not None:
        values |= _pair(case, picture)
    elif case.wanted:
        values |= _objects(case, picture, native)
    if case.background is not None:
        values["background"] = border_colour(picture) == case.background
    if case.ground is not None:
        bottom = picture[-max(4, len(picture) // 12) :]
        values["ground"] = commonest(colour_map(bottom).ravel()) == case.ground
    if case.cleared is not None:
        values["removed"] = _cleared(case, picture, native)
    if case.style is not None and (known := style_judge()) is not None:
        values["style"] = known(picture) == case.style
    if case.places:
        values |= _mask_measures(case, picture, native, feather)
    if case.look is not None:
        values |= _likeness(case, picture, native)
    if case.source is not None and not case.places:
        values |= _kept(case, picture, native)
    if case.hint is not None:
        assert case.answer is not None
        drawn = pictures.answer(case, native)
        assert drawn is not None
        values["edge F1"] = measures.edge_f1(picture, drawn)
        if (order := measures.depth_order(picture, case.answer)) is not None:
            values["depth order"] = order
    return values


def style_judge() -> Callable[[Pixels], str] | None:
    """The style classifier's verdict; None where its weights are missing."""
    return style_of if WEIGHTS.exists() else None


def _pair(case: Case, picture: Pixels) -> Values:
    """Two objects from nothing, and how they stand."""
    first, second = ((one.colour, one.noun) for one in case.wanted)
    verdict = judge_pair(picture, first, second, case.relation, FRAME_SHARE)
    unasked = (colour_map(picture) == COLOURS.index(case.wanted[0].other)).mean()
    return {
        "colour": verdict.colours,
        "unasked colour": bool(unasked >= FRAME_SHARE),
        "shape": verdict.shapes,
        "relation": verdict.relation,
        "opposite relation": verdict.opposite,
    }


def _objects(case: Case, picture: Pixels, native: int) -> Values:
    """Every wanted object: its colour and its shape, and the same of what nobody asked for."""
    found = colour_map(picture)
    if case.look is not None:
        # A reference's colours may take the place of the asked one: any colour will do.
        return {"shape": _any_colour(found, case.wanted[0].noun)}
    rows = []
    for one in case.wanted:
        if one.place is None:
            region, least = np.ones(found.shape, np.bool_), FRAME_SHARE
        else:
            region, least = pictures.mask(case, one.place, native), MASK_SHARE
        if case.category == "recolour":
            # The object is to have the new colour where it had the old, not on a tenth of it.
            drawn = pictures.answer(case, native)
            assert drawn is not None
            least = RECOLOURED * colour_share(drawn, one.colour, region)
        rows.append(_object(one, found, region, least))
    values: Values = {"colour": all(row["colour"] for row in rows)}
    # What something stands before shows but a part of its shape.
    hidden = pictures.hidden(case, native)
    whole = [row for number, row in enumerate(rows) if number not in hidden]
    values["shape"] = all(row["shape"] for row in whole)
    values["unasked shape"] = any(row["unasked shape"] for row in whole)
    if case.wanted[0].other:
        values["unasked colour"] = any(row["unasked colour"] for row in rows)
    if (outline := pictures.outline(case, native)) is not None:
        number, own = outline
        piece = largest_piece(found == COLOURS.index(case.wanted[number].colour))
        values["outline overlap"] = float((piece & own).sum() / max(1, (piece | own).sum()))
    return values


def _object(
    one: Wanted, found: np.ndarray[Any, Any], region: Mask, least: float
) -> dict[str, bool]:
    seen = (found == COLOURS.index(one.colour)) & region
    piece = largest_piece(seen)
    nouns = SHAPES if one.noun in SHAPES else OBJECTS
    # The next in the list: every noun is unasked as often as it is asked.
    another = nouns[(nouns.index(one.noun) + 1) % len(nouns)]
    area = region.sum()
    other = (found == COLOURS.index(one.other)) & region if one.other else np.zeros_like(region)
    return {
        "colour": bool(seen.sum() >= least * area),
        "unasked colour": bool(other.sum() >= least * area and area),
        "shape": is_noun(piece, one.noun, one.colour),
        "unasked shape": is_noun(piece, another, one.colour),
    }


def _any_colour(found: np.ndarray[Any, Any], noun: str) -> bool:
    """Whether a piece of any one colour has the shape."""
    for index, colour in enumerate(COLOURS):
        piece = largest_piece(found == index)
        if 0.02 < piece.mean() < 0.6 and is_noun(piece, noun, colour):
            return True
    return False


def _cleared(case: Case, picture: Pixels, native: int) -> bool:
    """Whether the mask shows the background as it would be without the object."""
    assert case.cleared is not None
    assert case.answer is not None
    bare = render(case.answer, len(picture)).image
    where = pictures.mask(case, case.cleared, native)
    far = np.linalg.norm(rgb2lab(picture) - rgb2lab(bare), axis=-1)
    return bool((far[where] < CLOSE).mean() >= CLEARED)


def _mask_measures(case: Case, picture: Pixels, native: int, feather: int) -> Values:
    before, where = pictures.source(case, native), pictures.changed(case, native)
    outside = measures.changed_outside(before, picture, where, feather)
    values: Values = {"changed outside": outside, "nothing outside": outside == 0}
    if case.category == "recolour":
        return values  # the mask's edge is the object's own, and is to be seen
    seam = measures.seam_energy(before, picture, where, feather)
    if np.isfinite(seam.relative):
        values |= {"seam": seam.relative, "seam, own ground": seam.own, "edge steps": seam.steps}
    return values


def _likeness(case: Case, picture: Pixels, native: int) -> Values:
    """How near a picture is to its reference in colour, and in texture at equal colours."""
    assert case.look is not None
    like = pictures.look(case.look, len(picture))
    before = pictures.source(case, native)
    colour, was = (measures.colour_distance(one, like) for one in (picture, before))
    texture, base = (
        measures.gram_distance(measures.pixel_adain(one, like), like) for one in (picture, before)
    )
    return {
        "colour distance": colour,
        "closer in colour": colour < was,
        "texture distance": texture,
        "closer in texture": texture < base,
    }


def _kept(case: Case, picture: Pixels, native: int) -> Values:
    """How much of the source is left where the whole picture was changed."""
    before = pictures.source(case, native)
    return {
        "edge F1": measures.edge_f1(picture, before),
        "distance": measures.mean_distance(picture, before),
    }
