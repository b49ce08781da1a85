"""From single pictures to rows, gates and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.quality import figures, judging, page
from bench.quality.__main__ import _json
from bench.quality.cases import Case, balanced, cases
from bench.quality.figures import Key
from diffedit.training.card import shown

EVERY = cases()


def of(category: str, group: str = "") -> list[Case]:
    return [c for c in EVERY if c.category == category and group in ("", c.group)]


def recorded(engine: str, found: list[Case], measure: str, values: list[Any]) -> dict[Key, Any]:
    return {
        (case.id, engine): {"values": {measure: value}, "seconds": 1.0, "digest": case.id}
        for case, value in zip(found, values, strict=True)
    }


def row(rows: list[dict[str, Any]], *where: str) -> dict[str, Any]:
    found = [r for r in rows if (r["category"], r["group"], r["measure"]) == where]
    assert len(found) == 1, (where, len(found))
    return found[0]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {gate["gate"]: gate["verdict"] for gate in figures.gates(rows)}


def test_a_rate_is_of_the_cases_that_were_made() -> None:
    part = of("replace", "drawn")[:20]
    records = recorded("diffedit", part[:10], "shape", [True] * 9 + [False])
    made = row(figures.rows(part, records), "replace", "drawn", "shape")
    value, low, high, n = made["engines"]["diffedit"]
    assert (value, n) == (0.9, 10)
    assert 0.5 < low < 0.9 < high < 1
    assert made["chance"] == 0.125


def test_gates_are_reached_from_their_figure_on() -> None:
    part = of("replace", "drawn")[:20]
    name = "the asked shape in the mask"
    for hits, verdict in ((17, "reached"), (16, "not reached")):
        records = recorded("diffedit", part, "shape", [True] * hits + [False] * (20 - hits))
        assert verdicts(figures.rows(part, records))[name] == verdict
    assert verdicts([])[name] == "not measured"


def test_peers_are_compared_on_the_cases_of_both() -> None:
    part = of("add", "drawn")[:30]
    ours = recorded("diffedit", part, "shape", [True] * 20 + [False] * 10)
    theirs = recorded("diffusers", part[:20], "shape", [True] * 10 + [False] * 10)
    rows = figures.rows(part, ours | theirs)
    gap = row(rows, "add", "drawn", "shape")["ours minus theirs"]["diffusers"]
    assert gap[0] == 0.5  # on the twenty, not 20/30 - 10/20
    assert gap[3] == 20
    gate = "add: all that was asked minus diffusers's"
    assert verdicts(rows)[gate] == "reached"
    worse = recorded("diffedit", part, "shape", [False] * 30)
    assert verdicts(figures.rows(part, worse | theirs))[gate] == "not reached"
    near = recorded("diffedit", part, "shape", [True] * 9 + [False] * 21)
    assert verdicts(figures.rows(part, near | theirs))[gate] == "no difference within the interval"


def test_half_of_what_was_asked_is_not_what_was_asked() -> None:
    part = of("recolour", "in a view")[:20]
    said = {
        "diffedit": [(True, True), (False, False)],
        "diffusers": [(True, False), (False, True)],
    }
    records: dict[Key, Any] = {}
    for engine, values in said.items():
        for case, (colour, shape) in zip(part, values * 10, strict=True):
            records[case.id, engine] = {"values": {"colour": colour, "shape": shape, "seam": 1.0}}
    rows = figures.rows(part, records)
    for measure in ("colour", "shape"):
        gap = row(rows, "recolour", "in a view", measure)["ours minus theirs"]["diffusers"]
        assert gap[0] == 0
    made = row(rows, "recolour", "", "all that was asked")
    assert [made["engines"][engine][0] for engine in said] == [0.5, 0.0]
    name = "recolour: all that was asked minus diffusers's"
    assert next(g["figure"] for g in figures.gates(rows) if g["gate"] == name)[0] == 0.5
    swapped = {(case, "diffusers" if engine == "diffedit" else "diffedit"): record
               for (case, engine), record in records.items()}  # fmt: skip
    assert verdicts(figures.rows(part, swapped))[name] == "not reached"


def test_a_seam_is_better_where_it_is_less() -> None:
    part = of("replace", "drawn")[:30]
    rng = np.random.default_rng(0)
    low, high = rng.uniform(1, 2, 30).tolist(), rng.uniform(4, 5, 30).tolist()
    for ours, theirs, verdict in ((low, high, "reached"), (high, low, "not reached")):
        records = recorded("diffedit", part, "seam", ours)
        records |= recorded("diffusers", part, "seam", theirs)
        assert verdicts(figures.rows(part, records))["seam minus diffusers's"] == verdict


def test_control_has_to_near_the_ceiling_and_to_clear_no_control() -> None:
    part = of("restructure", "canny")
    count = len(part)
    records = recorded("drawn answer", part, "edge F1", [0.9] * count)
    records |= recorded("without the edit", part, "edge F1", [0.2, 0.3] * (count // 2))
    good = records | recorded("diffedit", part, "edge F1", [0.8, 0.75] * (count // 2))
    poor = records | recorded("diffedit", part, "edge F1", [0.3, 0.4] * (count // 2))
    for found, expected in ((good, ["reached"] * 3), (poor, ["not reached"] * 2 + ["reached"])):
        gates = figures.gates(figures.rows(part, found))
        assert [g["verdict"] for g in gates if g["gate"] == "edge F1 under canny"] == expected


def test_a_few_steps_have_to_give_nine_tenths() -> None:
    part = of("replace", "drawn")[:50]
    many = recorded("diffedit", part, "shape", [True] * 50)
    for hits, verdict in ((45, "reached"), (44, "not reached")):
        few = recorded("diffedit, few steps", part, "shape", [True] * hits + [False] * (50 - hits))
        found = verdicts(figures.rows(part, many | few))
        assert found["in a few steps, in a mask: shape"] == verdict


def test_one_other_byte_is_not_the_same_again() -> None:
    part = of("replace", "drawn")[:10]
    records = recorded("diffedit", part, "shape", [True] * 10)
    again = recorded("diffedit again", part, "shape", [True] * 10)
    name = "the same bytes again"
    assert verdicts([figures.repeated(records | again)])[name] == "reached"
    again[part[3].id, "diffedit again"]["digest"] = "another"
    assert verdicts([figures.repeated(records | again)])[name] == "not reached"


def test_kept_columns_hold_every_single_value() -> None:
    part = of("add")[:6]
    records = recorded("diffedit", part[:5], "seam", [1.23456, 2.0, 3.0, 4.0, 5.0])
    records |= recorded("diffusers", part, "shape", [True, False] * 3)
    made = figures.columns(part, records)["add"]
    assert made["cases"] == [case.number for case in part]
    assert made["diffedit"]["seam"] == [1.23, 2.0, 3.0, 4.0, 5.0, None]
    assert made["diffusers"]["shape"] == [1, 0] * 3


def test_results_are_json_without_nan() -> None:
    text = _json(
        {"rows": [{"a": float("nan")}, {"a": [1.0, None]}], "values": {"x": [1]}, "b": "–"}
    )
    assert json.loads(text) == {
        "rows": [{"a": None}, {"a": [1.0, None]}],
        "values": {"x": [1]},
        "b": "–",
    }


# --- the page -------------------------------------------------------------------------------------


def test_a_verdict_needs_all_that_was_asked() -> None:
    assert judging.all_asked({"colour": True, "shape": True, "unasked colour": True}) is True
    assert judging.all_asked({"colour": True, "shape": False}) is False
    assert judging.all_asked({"edge F1": 0.3}) is None
    assert page.spilled({"nothing outside": False})
    assert not page.spilled({"colour": False})


def test_every_picture_is_on_the_page_and_the_first_on_the_sheet(tmp_path: Path) -> None:
    part = balanced(EVERY, 8)
    records: dict[Key, Any] = {}
    for number, case in enumerate(part):
        picture = np.full((32, 32, 3), 20 * number, np.uint8)
        (tmp_path / f"{case.id}-diffedit.webp").write_bytes(page.thumbnail(picture))
        values = {"colour": number % 2 == 0, "nothing outside": number != 3}
        records[case.id, "diffedit"] = {"values": values, "seconds": 1.0, "digest": ""}
    names = "date commit model digest native steps made cases set workers cores cpu torch"
    names = f"{names} diffusers python"
    results = {
        "about": dict.fromkeys(names.split(), "?") | {"guidance": 5.0, "minutes": 1.0},
        "rows": figures.rows(part, records),
        "gates": figures.gates(figures.rows(part, records)),
        "seconds": figures.seconds(records),
        "declined": [{"category": "add", "engine": "diffedit", "cases": 3, "why": "no net"}],
    }
    html = page.page(results, part, records, tmp_path)
    assert html.count("data:image/webp;base64,") == 8
    assert len(re.findall(r'class="right[ "]', html)) == 4
    assert html.count("spilled") == 2  # one picture, and the style sheet
    assert "| add | diffedit | 3 | no net |" in html
    sheet = page.grid(part, records, tmp_path)
    assert isinstance(sheet, Image.Image)
    shown = np.asarray(sheet)
    assert (shown == (0, 128, 0)).all(axis=-1).any()
    assert (shown == (255, 0, 0)).all(axis=-1).any()
    assert (shown == (170, 0, 200)).all(axis=-1).any()


def test_tables_take_their_place_in_a_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n", "utf-8")
    page.put_into(readme, "new\n")
    assert readme.read_text("utf-8") == ("a\n<!-- results -->\n\nnew\n\n<!-- /results -->\nb\n")


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ([0.5, 0.25, 0.75, 8], "0.50 (0.25–0.75)"),
        ([123.4, 100.0, 150.0, 8], "123.4 (100.0–150.0)"),
        ([0.5, None, None, 1], "0.50"),
        ([None, None, None, 0], "–"),
        (None, "–"),
    ],
)
def test_figures_are_told_with_their_intervals(figure: Any, said: str) -> None:
    assert shown(figure) == said
