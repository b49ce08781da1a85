"""The judges are right about scenes whose truth is known, and wrong pictures do not get by."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import deltaE_cie76, rgb2lab

from diffedit.training.judges import (
    OPPOSITE,
    border_colour,
    colour_map,
    colour_share,
    holds,
    is_noun,
    judge_pair,
    judge_shape,
    segment,
)
from diffedit.training.world.backdrops import Pixels
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import RELATIONS, Background, Mix, Scene, draw_scene
from diffedit.training.world.things import COLOURS, OBJECTS, PALETTE, Thing


def thing(
    colour: str, noun: str, x: float = 0.5, y: float = 0.5, radius: float = 0.3, angle: float = 0.1
) -> Thing:
    angle = angle if noun in SHAPES else 0.03
    return Thing(noun, colour, PALETTE[colour], "plain", x, y, radius, angle)


def draw(*things: Thing, behind: str = "white", side: int = 96) -> Pixels:
    background = Background("plain", behind, behind, 1)
    return render(Scene(background, things, "flat", None, ""), side).image


def test_colours_are_the_nearest_of_the_palette() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    lab = rgb2lab(picture)
    palette = rgb2lab(np.array([PALETTE[c] for c in COLOURS], np.uint8)[None])[0]
    away = np.stack([deltaE_cie76(lab, one) for one in palette], axis=-1)
    expected = np.where(away.min(axis=-1) < 30, away.argmin(axis=-1), -1)
    assert (colour_map(picture) == expected).all()
    assert (expected == -1).any()


def test_shapes_and_colours_of_drawn_objects() -> None:
    mix = Mix(photo=0.2, pair=0, empty=0, texture=0, style=0)
    right = seen = false = 0
    for index in range(60):
        drawing = render(draw_scene(21, index, mix), 96)
        one = drawing.scene.things[0]
        background = drawing.scene.background
        absent = next(
            c for c in COLOURS if c not in (one.colour, background.colour, background.second)
        )
        right += is_noun(segment(drawing.image, one.colour), one.noun, one.colour)
        seen += colour_share(drawing.image, one.colour) > 0.01
        false += background.kind == "plain" and colour_share(drawing.image, absent) > 0.02
    assert right >= 55
    assert seen >= 59
    assert false == 0


@pytest.mark.parametrize("noun", [*SHAPES, *OBJECTS])
def test_every_noun_is_told_from_the_others(noun: str) -> None:
    nouns = SHAPES if noun in SHAPES else OBJECTS
    for number in range(3):
        colour = ("red", "blue", "yellow")[number]
        piece = segment(draw(thing(colour, noun, 0.45 + 0.05 * number, radius=0.25)), colour)
        assert [name for name in nouns if is_noun(piece, name, colour)] == [noun]


def test_nothing_is_no_shape() -> None:
    nothing = np.zeros((64, 64), np.bool_)
    assert judge_shape(nothing) is None
    assert not any(is_noun(nothing, noun, "red") for noun in (*SHAPES, *OBJECTS))


def test_the_border_has_the_background_s_colour() -> None:
    assert border_colour(draw(thing("red", "square"), behind="cyan")) == "cyan"
    between = np.full((32, 32, 3), (80, 60, 120), np.uint8)  # far from all of the palette
    assert border_colour(between) == ""


_PLACES = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_pair_is_judged_by_what_stands_where(relation: str) -> None:
    (x, y), (u, v) = _PLACES[relation]
    asked = ("red", "star"), ("blue", "ring")
    right = draw(thing("red", "star", x, y, 0.18), thing("blue", "ring", u, v, 0.18))
    verdict = judge_pair(right, *asked, relation)
    assert verdict.colours
    assert verdict.shapes
    assert verdict.relation
    assert not verdict.opposite
    turned = draw(thing("red", "star", u, v, 0.18), thing("blue", "ring", x, y, 0.18))
    verdict = judge_pair(turned, *asked, relation)
    assert verdict.shapes
    assert not verdict.relation
    assert verdict.opposite
    swapped = draw(thing("blue", "star", x, y, 0.18), thing("red", "ring", u, v, 0.18))
    assert not judge_pair(swapped, *asked, relation).shapes
    alone = judge_pair(draw(thing("red", "star", x, y, 0.18)), *asked, relation)
    assert not any((alone.colours, alone.shapes, alone.relation, alone.opposite))


def test_across_is_no_relation() -> None:
    low, high = np.zeros((20, 20), np.bool_), np.zeros((20, 20), np.bool_)
    low[2:4, 1:3], high[17:19, 8:10] = True, True  # further apart down than across
    assert [relation for relation in RELATIONS if holds(relation, low, high)] == ["above"]
    assert not any(holds(relation, low, np.zeros_like(low)) for relation in RELATIONS)
    assert {OPPOSITE[OPPOSITE[relation]] for relation in RELATIONS} == set(RELATIONS)
