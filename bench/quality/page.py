"""The tables, and a page of pictures that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

from bench.quality import pictures
from bench.quality.cases import CATEGORIES, Case
from bench.quality.figures import LOWER, Key, Record
from bench.quality.judging import OF_ASKED, Values, all_asked
from diffedit.training.card import shown
from diffedit.training.world.backdrops import Pixels

THUMBNAIL = 96
"""Side of a picture on the page, in pixels."""

SHOWN = (
    *("diffedit", "diffedit, few steps", "diffusers", "diffusers, crop", "without the edit"),
    *("drawn answer", "source"),
)
"""Engines in the order of the tables' columns."""

MARKS = "<!-- results -->", "<!-- /results -->"


def _opening(about: Mapping[str, Any]) -> str:
    return (
        f"{about['date']}, commit {about['commit']}: model {about['model']} ({about['digest']}),"
        f" {about['native']} px native, {about['steps']} steps, guidance {about['guidance']:g};"
        f" {about['made']} of {about['cases']} cases (set {about['set']}),"
        f" {about['minutes']:.0f} minutes of {about['workers']} processes on {about['cores']} cores"
        f" ({about['cpu']}); torch {about['torch']}, diffusers {about['diffusers']},"
        f" Python {about['python']}. In brackets: 95 % intervals. ↓: less is better."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The tables: gates, figures by category, what was not asked and why."""
    about = results["about"]
    lines = [
        _opening(about),
        "",
        "### Gates",
        "",
        "| gate | figure | to reach | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {g['gate']} | {shown(g['figure'])} | {g['target']} | {g['verdict']} |"
        for g in results["gates"]
        if " minus " not in g["gate"]
    ]
    lines += ["", *_comparison(results["gates"], results["rows"]), "", "### Figures", ""]
    engines = [e for e in SHOWN if any(e in row["engines"] for row in results["rows"])]
    lines += [
        f"| what | n | {' | '.join(engines)} | chance |",
        "|---|---|" + "---|" * (len(engines) + 1),
    ]
    last = ""
    for row in results["rows"]:
        where = ": ".join(part for part in (row["category"], row["group"]) if part)
        if where != last:
            lines.append(f"| **{where}** | | {' | '.join('' for _ in engines)} | |")
            last = where
        figures = [shown(row["engines"].get(engine)) for engine in engines]
        n = max(figure[3] for figure in row["engines"].values())
        arrow = " ↓" if row["measure"] in LOWER else ""
        chance = f"{row['chance']:.3g}" if "chance" in row else ""
        lines.append(f"| {row['measure']}{arrow} | {n} | {' | '.join(figures)} | {chance} |")
    spent = ", ".join(f"{name} {value:g}" for name, value in results["seconds"].items())
    lines += ["", f"Seconds of CPU a case, on average: {spent or 'not measured'}."]
    if results["declined"]:
        lines += [
            "",
            "### Not asked",
            "",
            "| category | engine | cases | why |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {d['category']} | {d['engine']} | {d['cases']} | {d['why']} |"
            for d in results["declined"]
        ]
    return "\n".join(lines) + "\n"


def _comparison(gates: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """diffedit less diffusers on the same cases: by category, then what that is made of."""
    gaps = [g for g in gates if " minus " in g["gate"]]
    if not gaps:
        return []
    lines = [
        "### diffedit beside diffusers' pipelines",
        "",
        "The mean difference over the cases that both made, by a paired bootstrap.",
        "",
        "| difference | figure | to reach | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {g['gate']} | {shown(g['figure'])} | {g['target']} | {g['verdict']} |" for g in gaps
    ]
    peers = ("diffusers", "diffusers, crop")
    lines += ["", "By group, of single measures:", ""]
    lines += [f"| minus | {' | '.join(peers)} |", "|---|---|---|"]
    for row in rows:
        gap = row.get("ours minus theirs", {})
        if gap and row["measure"] in OF_ASKED:
            where = ", ".join(part for part in (row["category"], row["group"]) if part)
            told = " | ".join(shown(gap.get(peer)) for peer in peers)
            lines.append(f"| {where}: {row['measure']} | {told} |")
    return lines


def put_into(readme: Path, text: str) -> None:
    """Replace what stands between the marks."""
    before, _, rest = readme.read_text("utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", "utf-8")


# --- pictures -------------------------------------------------------------------------------------


def thumbnail(picture: Pixels) -> bytes:
    """A small WebP."""
    small = Image.fromarray(picture).resize((THUMBNAIL,) * 2, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=82)
    return file.getvalue()


def given(case: Case, native: int) -> Pixels | None:
    """What a case starts from, its masks outlined; a hint; None: nothing."""
    if case.hint is not None:
        return pictures.hint(case, native)
    if case.source is None:
        return None
    picture = pictures.source(case, native).copy()
    for number in range(len(case.places)):
        inside = pictures.mask(case, number, native)
        width = max(1, native // 96)
        picture[binary_dilation(inside, iterations=width) & ~inside] = (255, 0, 160)
    return picture


def spilled(values: Values) -> bool:
    """Whether pixels changed that the edit was not to touch."""
    return not values.get("nothing outside", True)


def page(
    results: Mapping[str, Any],
    found: Sequence[Case],
    records: Mapping[Key, Record],
    thumbs: Path,
) -> str:
    """All pictures by category, each with its verdict, as one HTML file."""
    engines = [e for e in SHOWN if any(name == e for _, name in records) and e != "source"]
    parts = [_HEAD, "<h1>Edits, judged</h1>", f"<pre>{escape(markdown(results))}</pre>"]
    for category in CATEGORIES:
        part = [c for c in found if c.category == category and (c.id, "diffedit") in records]
        if not part:
            continue
        parts.append(f"<h2>{category}</h2><table><tr><th>asked<th>given")
        parts += [f"<th>{escape(engine)}" for engine in engines]
        for case in part:
            asked = "<br>".join(escape(p) for p in case.prompts)
            parts.append(f"<tr><td>{asked}<small>{case.id}, {escape(case.group)}</small>")
            parts.append(_cell(thumbs / f"{case.id}-given.webp", None))
            for engine in engines:
                record = records.get((case.id, engine))
                parts.append(_cell(thumbs / f"{case.id}-{engine}.webp", record))
        parts.append("</table>")
    return "\n".join(parts)


def _cell(file: Path, record: Record | None) -> str:
    if not file.exists():
        return "<td>"
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    values = record["values"] if record else {}
    good = all_asked(values)
    kinds = ["" if good is None else "right" if good else "wrong"]
    kinds += ["spilled"] if spilled(values) else []
    said = escape(", ".join(f"{k}: {_brief(v)}" for k, v in values.items()))
    kind = " ".join(kinds).strip()
    return f'<td class="{kind}"><img title="{said}" src="data:image/webp;base64,{data}">'


def _brief(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


_LEGEND = (
    "frame: green: all that was asked, red: not; purple corner: pixels changed outside the mask"
)


def grid(
    found: Sequence[Case], records: Mapping[Key, Record], thumbs: Path, each: int = 8
) -> Image.Image:
    """The first pictures of every category side by side: given, diffedit, diffusers, both ways."""
    engines = ("given", "diffedit", "diffusers", "diffusers, crop", "without the edit")
    cell, head, left = THUMBNAIL + 4, 28, 100
    blocks: list[tuple[str, list[Case], list[str]]] = []
    for category in CATEGORIES:
        part = [c for c in found if c.category == category and (c.id, "diffedit") in records][:each]
        there = [e for e in engines if any((thumbs / f"{c.id}-{e}.webp").exists() for c in part)]
        if part:
            blocks.append((category, part, there))
    height = 20 + sum(head + cell * len(there) for _, _, there in blocks)
    sheet = Image.new("RGB", (left + each * cell, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 4), _LEGEND, fill="gray")
    y = 20
    for category, part, there in blocks:
        pen.text((2, y + 4), category, fill="black")
        for column, case in enumerate(part):
            lines = "\n".join(textwrap.wrap(case.prompts[-1], 16)[:2])
            pen.multiline_text((left + column * cell, y), lines, fill="black", spacing=1)
        y += head
        for engine in there:
            pen.text((2, y + cell // 3), engine, fill="gray")
            for column, case in enumerate(part):
                file = thumbs / f"{case.id}-{engine}.webp"
                if file.exists():
                    at = left + column * cell, y
                    _put(sheet, pen, file, at, records.get((case.id, engine)))
            y += cell
    return sheet


def _put(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    file: Path,
    at: tuple[int, int],
    record: Record | None,
) -> None:
    """A picture in its place, framed by its verdict."""
    (x, y), end = at, THUMBNAIL
    with Image.open(file) as picture:
        sheet.paste(picture.convert("RGB"), at)
    if record is None:
        return
    if (good := all_asked(record["values"])) is not None:
        pen.rectangle((x - 1, y - 1, x + end, y + end), outline="green" if good else "red", width=2)
    if spilled(record["values"]):
        pen.polygon([(x + end, y), (x + end - 14, y), (x + end, y + 14)], fill=(170, 0, 200))


_HEAD = """<!doctype html><meta charset="utf-8"><title>Edits, judged</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; color: #222; background: #fff }
pre { overflow-x: auto; font-size: 12px; background: #f4f4f4; padding: 1em }
td { padding: 2px; vertical-align: top; max-width: 16em }
th { text-align: left; font-weight: normal; color: #666 }
img { display: block; width: 96px; height: 96px; border: 3px solid #ddd }
.right img { border-color: #2a9d4a } .wrong img { border-color: #d33 }
.spilled img { border-top-color: #a0c; border-style: solid dashed solid dashed }
small { display: block; color: #888 }
</style>
<p>Green: shows all that was asked; red: does not; purple and dashed: pixels changed outside the
mask. Point at a picture to see its measures.</p>
"""
