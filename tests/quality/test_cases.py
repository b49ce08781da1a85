"""The benchmark's cases: many, balanced, the same everywhere; the judges right about them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench.quality import pictures
from bench.quality.cases import (
    CATEGORIES,
    PHOTOGRAPHS,
    Case,
    Wanted,
    balanced,
    cases,
    digest,
)
from bench.quality.judging import Values, judge
from diffedit.training.world.backdrops import KEPT_FOR_JUDGING, Pixels
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.scenes import STYLES
from diffedit.training.world.things import COLOURS, OBJECTS

ROOT = Path(__file__).resolve().parent.parent.parent
EVERY = cases()
SIDE = 128

ASKED = ("colour", "shape", "relation", "background", "ground", "removed", "depth order",
         "style")  # fmt: skip


def test_there_are_enough_of_every_kind() -> None:
    assert len(EVERY) >= 500
    counts = Counter(case.category for case in EVERY)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 12
    assert len({case.id for case in EVERY}) == len({case.seed for case in EVERY}) == len(EVERY)
    assert {len(case.prompts) for case in EVERY if case.category == "chain"} == {5}
    assert {case.hint for case in EVERY if case.hint} == {"canny", "depth", "segments"}
    assert {case.style for case in EVERY if case.style} == set(STYLES[1:])


def test_ten_photographs_are_edited_the_kept_ones_as_often_as_all_others() -> None:
    photographed = [case for case in EVERY if case.source and case.source.photo]
    names = {case.source.photo for case in photographed if case.source}
    assert names == set(PHOTOGRAPHS)
    assert len(names) >= 10
    assert names > set(KEPT_FOR_JUDGING)
    added = [case for case in photographed if case.category == "add"]
    kept = [c for c in added if c.source and c.source.photo in KEPT_FOR_JUDGING]
    assert len(kept) == len(added) / 2
    assert all((case.group == "held-out photographs") == (case in kept) for case in added)


def test_they_are_the_same_in_every_process() -> None:
    command = "from bench.quality import cases; print(cases.digest(cases.cases()))"
    said = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == digest(EVERY) == digest(cases())
    other = [replace(EVERY[0], seed=EVERY[0].seed + 1), *EVERY[1:]]
    assert digest(other) != digest(EVERY)


def test_what_is_asked_is_asked_evenly() -> None:
    for where in (("nothing", "one object"), ("replace", "drawn"), ("recolour", "drawn")):
        part = [case.wanted[0] for case in EVERY if (case.category, case.group) == where]
        for words, key in ((COLOURS, "colour"), (SHAPES, "noun")):
            found = Counter(getattr(one, key) for one in part)
            mean = len(part) / len(words)
            assert set(found) == set(words), (where, key)
            assert max(found.values()) <= 2.2 * mean + 1, (where, key, found)
    assert {w.noun for case in EVERY for w in case.wanted} == {*SHAPES, *OBJECTS}


def test_the_control_colour_is_asked_by_nobody_and_stands_nowhere() -> None:
    for case in EVERY:
        for one in case.wanted:
            if one.other:
                assert one.other not in {w.colour for w in case.wanted}, case.id
                assert one.other not in case.words, case.id


def test_a_smaller_part_is_a_part_of_the_larger_and_has_every_category() -> None:
    few, more = balanced(EVERY, 40), balanced(EVERY, 200)
    assert len(few) == 40
    assert few == more[:40]
    assert set(Counter(case.category for case in few)) == set(CATEGORIES)
    assert sorted(balanced(EVERY, None), key=lambda c: c.id) == sorted(EVERY, key=lambda c: c.id)


@pytest.mark.parametrize("native", [128, 256])
def test_masks_hints_and_answers_have_the_picture_s_size(native: int) -> None:
    for case in balanced(EVERY, 24):
        side = pictures.side_of(case, native)
        assert pictures.source(case, native).shape == (side, side, 3)
        for number in range(len(case.places)):
            mask = pictures.mask(case, number, native)
            assert mask.shape == (side, side)
            assert 0 < mask.mean() < 0.7
        if (answer := pictures.answer(case, native)) is not None:
            assert answer.shape == (side, side, 3)
            if case.places:
                outside = ~pictures.changed(case, native)
                assert (answer[outside] == pictures.source(case, native)[outside]).all()
        if case.hint:
            assert pictures.hint(case, native).shape == (side, side, 3)


# --- the judges on pictures whose truth is known --------------------------------------------------


def some() -> list[Case]:
    """Two of every group that can be drawn."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in EVERY:
        if pictures.answer(case, 64) is not None:
            groups.setdefault((case.category, case.group), []).append(case)
    return [case for group in groups.values() for case in (group[0], group[len(group) // 2])]


@cache
def drawn(case: Case) -> Pixels:
    made = pictures.answer(case, SIDE)
    assert made is not None
    return made


def verdicts(case: Case, picture: Pixels) -> Values:
    values = judge(case, picture, SIDE, 4)
    return {key: values[key] for key in ASKED if key in values}


@pytest.mark.parametrize("case", some(), ids=lambda case: case.id)
def test_the_right_picture_is_right(case: Case) -> None:
    values = judge(case, drawn(case), SIDE, 4)
    assert all(verdicts(case, drawn(case)).values()), values
    assert values.get("nothing outside", True)
    assert not values.get("unasked shape", False)
    if case.hint:
        assert values["edge F1"] == 1


@pytest.mark.parametrize("case", some(), ids=lambda case: case.id)
def test_a_wrong_picture_is_wrong(case: Case) -> None:
    """The untouched source, or a picture of something else, shows nothing of what is asked."""
    if case.style is not None:
        assert case.answer is not None
        flat = pictures.answer(replace(case, answer=replace(case.answer, style="flat")), SIDE)
        assert flat is not None
        assert not verdicts(case, flat).get("style", False)
        return
    if case.source is None:
        other = tuple(
            replace(one, colour=one.other, noun=_another(one)) for one in reversed(case.wanted)
        )
        wrong = judge(replace(case, wanted=other), drawn(case), SIDE, 4)
        assert not wrong["shape"], wrong
        assert not wrong["colour"], wrong
        assert not wrong.get("relation", False), wrong
        return
    values = verdicts(case, pictures.source(case, SIDE))
    if case.category == "chain":
        values.pop("removed", None)  # at the start it is as empty as at the end
    if case.source.photo:
        values.pop("colour")  # it may have any
    assert not any(values.values()), values


def _another(one: Wanted) -> str:
    nouns = SHAPES if one.noun in SHAPES else OBJECTS
    return nouns[(nouns.index(one.noun) + 1) % len(nouns)]


def test_one_changed_pixel_outside_is_seen() -> None:
    case = next(case for case in EVERY if case.category == "replace")
    picture = drawn(case).copy()
    rows, columns = np.nonzero(~pictures.mask(case, 0, SIDE))
    picture[rows[0], columns[0]] ^= 1
    values = judge(case, picture, SIDE, 0)
    assert values["changed outside"] == 1
    assert not values["nothing outside"]


def test_half_a_recolouring_is_none() -> None:
    case = next(case for case in EVERY if case.category == "recolour")
    half = drawn(case).copy()
    half[:, : SIDE // 2] = pictures.source(case, SIDE)[:, : SIDE // 2]
    left = pictures.mask(case, 0, SIDE)[:, : SIDE // 2].sum()
    share = left / pictures.mask(case, 0, SIDE).sum()
    assert judge(case, half, SIDE, 4)["colour"] == (share < 0.4)


def test_what_is_covered_is_not_judged_by_its_shape() -> None:
    covered = [case for case in EVERY if pictures.hidden(case, SIDE)]
    assert len(covered) >= 10
    assert all(judge(case, drawn(case), SIDE, 4)["shape"] for case in covered)


def test_covering_in_the_wrong_order_is_seen() -> None:
    case = next(c for c in EVERY if c.hint and pictures.hidden(c, SIDE))
    assert case.answer is not None
    turned = replace(case.answer, things=case.answer.things[::-1])
    picture = pictures.answer(replace(case, answer=turned), SIDE)
    assert picture is not None
    assert judge(case, drawn(case), SIDE, 4)["depth order"]
    assert not judge(case, picture, SIDE, 4)["depth order"]
