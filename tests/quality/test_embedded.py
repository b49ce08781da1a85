"""The embedded model, through diffedit's own Editor, does what its card says.

The card's figures come from the whole benchmark (`python -m bench.quality --card`). Here a part of
the same cases is made again, with the same seeds: its figures may not lie below the lower ends of
the card's intervals by more than a part of this size can by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bench.quality import figures, measures, pictures
from bench.quality.__main__ import _digest
from bench.quality.cases import Case, balanced, cases
from bench.quality.engines import Bench, Few, Ours
from bench.quality.figures import ALL_MASKS, IN_A_MASK, LOWER
from bench.quality.judging import judge
from diffedit import Editor, Pass
from diffedit.models.loading import EMBEDDED
from diffedit.models.lora import own_loras
from diffedit.training import card
from diffedit_img2img import Img2Img

pytestmark = pytest.mark.slow

CASES = 48
"""Pictures that are made; a minute or two on two cores."""

FEW = 4
"""Rows of fewer cases than this say too little to be compared."""

SHIPPED: Mapping[str, Any] = card.read(EMBEDDED)["benchmark"]

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def bench() -> Bench:
    about = SHIPPED["about"]
    return Bench(
        Editor.load(device="cpu", dtype="float32"),
        steps=about["steps"],
        guidance=about["guidance"],
        few=own_loras(str(EMBEDDED))["few"],
    )


@pytest.fixture(scope="module")
def some(bench: Bench) -> list[Case]:
    """Cases of every category but the chains, which take five times as long."""
    able = [c for c in cases() if c.category != "chain" and not bench.refuses(c)]
    return balanced(able, CASES)


@pytest.fixture(scope="module")
def rows(bench: Bench, some: list[Case]) -> Rows:
    records = {}
    for engine in (Ours(bench), Few(bench)):
        for case in some:
            picture = engine.make(case)
            values = judge(case, picture, bench.native, bench.feather)
            records[case.id, engine.name] = {"values": values, "digest": measures.digest(picture)}
    return figures.rows(some, records)


def found(rows: Rows, category: str, group: str, measure: str) -> list[float]:
    wanted = (category, group, measure)
    engines = next(
        r["engines"] for r in rows if (r["category"], r["group"], r["measure"]) == wanted
    )
    return list(engines["diffedit"])


def test_the_card_s_figures_are_of_these_weights(bench: Bench) -> None:
    about = SHIPPED["about"]
    assert about["digest"] == _digest(bench)
    assert about["native"] == bench.native
    assert about["lora"] is None
    assert about["few"] == "few"


def test_the_card_s_verdicts_follow_from_its_figures() -> None:
    assert figures.gates(SHIPPED["rows"]) == SHIPPED["gates"]


@pytest.mark.parametrize("engine", [Ours.name, Few.name])
def test_the_model_does_what_the_card_says(rows: Rows, engine: str) -> None:
    shipped = {(r["category"], r["group"], r["measure"]): r["engines"] for r in SHIPPED["rows"]}
    compared, worse = 0, []
    for row in rows:
        where = row["category"], row["group"], row["measure"]
        value, low, high, n = row["engines"].get(engine, (0, 0, 0, 0))
        claimed = shipped.get(where, {}).get(engine)
        if n < FEW or not claimed or None in (low, *claimed):
            continue
        compared += 1
        less = where[2] in LOWER
        if (low > claimed[2]) if less else (high < claimed[1]):
            worse.append((where, (value, low, high, n), claimed))
    assert not worse
    assert compared >= 12


def test_it_does_far_more_than_chance_would(rows: Rows) -> None:
    for where, least in (
        ((IN_A_MASK, "", "colour"), 0.6),  # chance 1 in 12
        ((IN_A_MASK, "", "shape"), 0.3),  # chance 1 in 8
        (("recolour", "drawn", "colour"), 0.3),
    ):
        value, low, *_ = found(rows, *where)
        assert low >= least, (where, value, low)
    unasked = found(rows, IN_A_MASK, "", "unasked shape")
    assert unasked[0] <= 0.2, unasked


def test_nothing_outside_a_mask_is_ever_touched(rows: Rows) -> None:
    assert found(rows, ALL_MASKS, "", "changed outside")[0] == 0
    assert found(rows, ALL_MASKS, "", "nothing outside")[0] == 1


def test_the_same_seed_gives_the_same_bytes(bench: Bench, some: list[Case]) -> None:
    ours = Ours(bench)
    for case in some[:2]:
        assert measures.digest(ours.make(case)) == measures.digest(ours.make(case))


def test_the_stronger_the_further_from_the_source(bench: Bench) -> None:
    photographs = [c for c in cases() if c.category == "restyle" and c.source and c.source.photo]
    far: list[list[float]] = []
    for case in photographs[:4]:
        source = pictures.source(case, bench.native)
        far.append([])
        for strength in (0.25, 0.5, 0.75, 1.0):
            step = Pass(prompt="a photo", steps=12, edits=(Img2Img(strength=strength),))
            made = np.asarray(bench.editor.run(source, step, seed=case.seed).image.convert("RGB"))
            far[-1].append(measures.mean_distance(made, source))
    assert all(a < b for a, b in pairwise(np.mean(far, axis=0)))
