"""From records of single pictures to figures with intervals, gates and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.quality import intervals, measures, pictures
from bench.quality.cases import CATEGORIES, HINTS, Case
from bench.quality.intervals import Estimate
from bench.quality.judging import all_asked
from diffedit.training.styles import JUDGED
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.things import COLOURS, OBJECTS

Record = Mapping[str, Any]
Key = tuple[str, str]
"""A case's id and an engine's name."""

LOWER = frozenset(
    {
        "changed outside",
        "seam",
        "seam, own ground",
        "colour distance",
        "texture distance",
        "distance",
        "unasked colour",
        "unasked shape",
        "opposite relation",
    }
)
"""Measures of which less is better."""

IN_A_MASK = "in a mask"
ALL_MASKS = "every mask"
ALL_ASKED = "all that was asked"


def rows(found: Sequence[Case], records: Mapping[Key, Record]) -> list[dict[str, Any]]:
    """One row for each category, group and measure, with every engine's figure.

    Each category ends with the share of its pictures that show all that was asked: an object that
    has the colour but not the shape is not the object. Pooled rows follow: what was asked for in a
    mask (``replace`` and ``add``), and what holds of all masks.
    """
    made = []
    for category in CATEGORIES:
        groups = list(dict.fromkeys(c.group for c in found if c.category == category))
        for group in groups:
            part = [c for c in found if (c.category, c.group) == (category, group)]
            made += _rows(category, group, part, records)
        part = [c for c in found if c.category == category]
        whole = {key: {"values": _fulfilled(record)} for key, record in records.items()}
        made += _rows(category, "", part, whole)
    asked = [c for c in found if c.category in ("replace", "add")]
    keep: tuple[str, ...] = ("colour", "unasked colour", "shape", "unasked shape")
    made += [r for r in _rows(IN_A_MASK, "", asked, records) if r["measure"] in keep]
    masks = [c for c in found if c.places]
    keep = ("changed outside", "nothing outside", "seam", "seam, own ground", "edge steps")
    made += [r for r in _rows(ALL_MASKS, "", masks, records) if r["measure"] in keep]
    return made


def _fulfilled(record: Record) -> dict[str, Any]:
    told = all_asked(record.get("values", {}))
    return {} if told is None else {ALL_ASKED: told}


def _rows(
    category: str, group: str, part: Sequence[Case], records: Mapping[Key, Record]
) -> list[dict[str, Any]]:
    engines = list(dict.fromkeys(engine for _, engine in records))
    values: dict[str, dict[str, dict[str, Any]]] = {}
    for case in part:
        for engine in engines:
            record = records.get((case.id, engine))
            for measure, value in (record or {}).get("values", {}).items():
                values.setdefault(measure, {}).setdefault(engine, {})[case.id] = value
    made = []
    for measure, by_engine in values.items():
        row: dict[str, Any] = {"category": category, "group": group, "measure": measure}
        if (chance := _chance(measure, part)) is not None:
            row["chance"] = round(chance, 3)
        row["engines"] = {
            engine: estimate(list(got.values())).listed() for engine, got in by_engine.items()
        }
        for peer in ("diffusers", "diffusers, crop"):
            if {"diffedit", peer} <= by_engine.keys():
                ours, theirs = by_engine["diffedit"], by_engine[peer]
                both = [i for i in ours if i in theirs]
                if both:
                    gap = intervals.difference([ours[i] for i in both], [theirs[i] for i in both])
                    row.setdefault("ours minus theirs", {})[peer] = gap.listed()
        made.append(row)
    return made


def estimate(values: Sequence[Any]) -> Estimate:
    """A rate of truth values, or a mean of numbers."""
    if all(isinstance(value, bool) for value in values):
        return intervals.rate(values)
    return intervals.mean([float(value) for value in values])


def _chance(measure: str, part: Sequence[Case]) -> float | None:
    """What a picture gets that has nothing to do with what is asked."""
    if measure == "shape" and part and part[0].wanted:
        each = [
            math.prod(
                1 / len(SHAPES if one.noun in SHAPES else OBJECTS)
                for number, one in enumerate(case.wanted)
                if number not in pictures.hidden(case, 128)
            )
            for case in part
            if case.wanted
        ]
        return float(np.mean(each))
    fixed = {"relation": 0.5, "style": 1 / len(JUDGED), "background": 1 / len(COLOURS),
             "ground": 1 / len(COLOURS), "depth order": 0.5}  # fmt: skip
    return fixed.get(measure)


def distribution(
    found: Sequence[Case], records: Mapping[Key, Record], native: int
) -> list[dict[str, Any]]:
    """Fréchet distances of pictures from nothing to drawn ones of the same prompts.

    On the cases that all engines made, because the distance depends on how many there are.
    """
    wanted = [c for c in found if c.category == "nothing"]
    engines = [
        name
        for name in dict.fromkeys(engine for _, engine in records)
        if any("features" in records.get((c.id, name), {}) for c in wanted)
        and name in ("diffedit", "diffusers", "drawn answer")
    ]
    shared = [c for c in wanted if all("features" in records.get((c.id, e), {}) for e in engines)]
    if len(shared) < 4 or not engines:
        return []
    drawn = [pictures.answer(case, native) for case in shared]
    true = np.stack([measures.features(p) for p in drawn if p is not None])
    row: dict[str, Any] = {"category": "nothing", "group": "all", "measure": "Fréchet distance"}
    row["engines"] = {}
    for engine in engines:
        made = np.stack([np.array(records[c.id, engine]["features"]) for c in shared])
        far = intervals.jackknife(made, lambda some: measures.frechet(some, true))
        row["engines"][engine] = far.listed()
    return [row]


def repeated(records: Mapping[Key, Record]) -> dict[str, Any]:
    """How often the same case with the same seed gave the same bytes."""
    same = [
        record["digest"] == records[case, "diffedit"]["digest"]
        for (case, engine), record in records.items()
        if engine == "diffedit again" and (case, "diffedit") in records
    ]
    return {
        "category": "all",
        "group": "",
        "measure": "same bytes again",
        "engines": {"diffedit": intervals.rate(same).listed()},
    }


def seconds(records: Mapping[Key, Record], clock: str = "cpu") -> dict[str, float]:
    """Mean seconds a case by engine: of CPU time, or (``"seconds"``) by the clock."""
    spent: dict[str, list[float]] = {}
    for (_, engine), record in records.items():
        if clock in record:
            spent.setdefault(engine, []).append(record[clock])
    return {engine: round(float(np.mean(each)), 2) for engine, each in spent.items()}


# --- gates ----------------------------------------------------------------------------------------

Figures = Sequence[Mapping[str, Any]]


def _row(found: Figures, category: str, group: str, measure: str) -> Mapping[str, Any] | None:
    wanted = (category, group, measure)
    return next(
        (r for r in found if (r["category"], r["group"], r["measure"]) == wanted),
        None,
    )


def _at_least(category: str, group: str, measure: str, least: float) -> Callable[[Figures], Any]:
    def gate(found: Figures) -> tuple[Any, str, bool]:
        row = _row(found, category, group, measure)
        got = None if row is None else row["engines"].get("diffedit")
        reached = got is not None and got[0] is not None and got[0] >= least
        return got, f"≥ {least:g}", reached

    return gate


def _decibels(group: str, least: float) -> Callable[[Figures], Any]:
    def gate(found: Figures) -> tuple[Any, str, bool]:
        row = next(
            (r for r in found if r["category"] == "autoencoder" and group in r["group"]), None
        )
        got = None if row is None else row["engines"]["diffedit"]
        return got, f"≥ {least:g} dB", got is not None and got[0] >= least

    return gate


GATES: dict[str, Callable[[Figures], Any]] = {
    "autoencoder: held-out scenes": _decibels("scenes", 28),
    "autoencoder: held-out photographs": _decibels("photographs", 22),
    "the asked colour in the mask": _at_least(IN_A_MASK, "", "colour", 0.95),
    "the asked shape in the mask": _at_least(IN_A_MASK, "", "shape", 0.85),
    "one object from nothing: shape": _at_least("nothing", "one object", "shape", 0.95),
    "two objects from nothing: colours": _at_least("nothing", "two objects", "colour", 0.8),
    "two objects from nothing: shapes": _at_least("nothing", "two objects", "shape", 0.8),
    "two objects from nothing: relation": _at_least("nothing", "two objects", "relation", 0.8),
    "a style from nothing": _at_least("nothing", "a style", "style", 0.8),
    "nothing changed outside the mask": _at_least(ALL_MASKS, "", "nothing outside", 1.0),
    "the same bytes again": _at_least("all", "", "same bytes again", 1.0),
}
"""What is to be reached, by diffedit alone."""


def gates(found: Figures) -> list[dict[str, Any]]:
    """Each gate with its figure, what it should be, and whether it is."""
    made = []
    for name, gate in GATES.items():
        got, target, reached = gate(found)
        verdict = "not measured" if not got else "reached" if reached else "not reached"
        made.append({"gate": name, "figure": got, "target": target, "verdict": verdict})
    for hint in HINTS:
        made += _control_gates(found, hint)
    made += _few_gates(found)
    made += _against(found)
    return made


def _control_gates(found: Figures, hint: str) -> list[dict[str, Any]]:
    """Edges under control: near the autoencoder's ceiling, and clearly above no control."""
    row = _row(found, "restructure", hint, "edge F1")
    if row is None or "diffedit" not in row["engines"]:
        return []
    ours, made = row["engines"]["diffedit"], []
    if (top := row["engines"].get("drawn answer")) and top[0]:
        ok = ours[0] >= 0.8 * top[0]
        made.append((f"edge F1 under {hint}", f"≥ 0.8 of the autoencoder's {top[0]:.2f}", ok))
    if bare := row["engines"].get("without the edit"):
        ok = ours[0] >= 2 * bare[0]
        made.append((f"edge F1 under {hint}", f"≥ 2 × that without, {bare[0]:.2f}", ok))
        if ours[1] is not None and bare[2] is not None:
            clear = ours[1] > bare[2]
            made.append((f"edge F1 under {hint}", "clearly above that without", clear))
    return [
        {
            "gate": name,
            "figure": ours,
            "target": target,
            "verdict": "reached" if ok else "not reached",
        }
        for name, target, ok in made
    ]


def _few_gates(found: Figures) -> list[dict[str, Any]]:
    """A few steps: at least nine tenths of what many give, wherever there is a gate."""
    made = []
    for category, group, measure in (
        (IN_A_MASK, "", "colour"),
        (IN_A_MASK, "", "shape"),
        ("nothing", "one object", "shape"),
        ("nothing", "two objects", "colour"),
        ("nothing", "two objects", "shape"),
        ("nothing", "two objects", "relation"),
        ("nothing", "a style", "style"),
    ):
        engines = (_row(found, category, group, measure) or {"engines": {}})["engines"]
        many, few = (engines.get(name) for name in ("diffedit", "diffedit, few steps"))
        if not many or not few:
            continue
        made.append(
            {
                "gate": f"in a few steps, {group or category}: {measure}",
                "figure": few,
                "target": f"≥ 0.9 of {many[0]:.2f}",
                "verdict": "reached" if few[0] >= 0.9 * many[0] else "not reached",
            }
        )
    return made


def _against(found: Figures) -> list[dict[str, Any]]:
    """Beside diffusers' pipelines: seams lower, and no asked-object rate lower in any category."""
    made = []
    for peer in ("diffusers", "diffusers, crop"):
        for measure in ("seam", "seam, own ground"):
            # Not "edge steps": less of them than the source has is not better.
            row = _row(found, ALL_MASKS, "", measure)
            if row and (gap := row.get("ours minus theirs", {}).get(peer)):
                made.append(_compared(f"{measure} minus {peer}'s", gap, lower=True))
        for category in CATEGORIES:
            row = _row(found, category, "", ALL_ASKED)
            if row and (gap := row.get("ours minus theirs", {}).get(peer)):
                made.append(_compared(f"{category}: {ALL_ASKED} minus {peer}'s", gap, lower=False))
    return made


def _compared(name: str, gap: Sequence[Any], *, lower: bool) -> dict[str, Any]:
    """A difference is held against us only as far as its interval says that there is one."""
    sign = -1 if lower else 1
    value, low, high, _ = gap
    if value is None:
        verdict = "not measured"
    elif sign * value > 0 or (value == 0 and not lower):
        verdict = "reached"
    elif low is None or high is None or low <= 0 <= high:
        verdict = "no difference within the interval"
    else:
        verdict = "not reached"
    return {
        "gate": name,
        "figure": list(gap),
        "target": "< 0" if lower else "≥ 0",
        "verdict": verdict,
    }


# --- compact, for the file that is kept -----------------------------------------------------------


def columns(found: Iterable[Case], records: Mapping[Key, Record]) -> dict[str, Any]:
    """Every single value, as columns by category, engine and measure, in the order of the cases.

    Truth values are 1 and 0; numbers have three figures; null where there is none.
    """
    made: dict[str, Any] = {}
    by_category: dict[str, list[Case]] = {}
    for case in found:
        by_category.setdefault(case.category, []).append(case)
    for category, part in by_category.items():
        engines = dict.fromkeys(e for c, e in records if c.rsplit("-", 1)[0] == category)
        of = made.setdefault(category, {"cases": [c.number for c in part]})
        for engine in engines:
            names: dict[str, None] = {}
            for case in part:
                names |= dict.fromkeys(records.get((case.id, engine), {}).get("values", {}))
            of[engine] = {
                name: [
                    _short(records.get((c.id, engine), {}).get("values", {}).get(name))
                    for c in part
                ]
                for name in names
            }
    return made


def _short(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return float(f"{value:.3g}") if isinstance(value, float) else value
