"""What a measurement found, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Target:
    """A line of the issue, and whether this run reached it."""

    says: str
    found: str
    reached: bool

    def __str__(self) -> str:
        return f"{self.says}: **{self.found}**, {'reached' if self.reached else 'NOT REACHED'}"


@dataclass
class Report:
    """What one measurement found.

    Attributes:
        title: what was measured, on what.
        head: names of the table's columns.
        rows: its rows, as text.
        targets: what was to be reached.
        notes: what else is to be said.
        data: everything in numbers.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    targets: list[Target]
    notes: list[str]
    data: dict[str, Any]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        said = "\n".join(f"- {line}" for line in [*self.targets, *self.notes])
        return f"### {self.title}\n\n{table}\n\n{said}\n"


def opening(said: dict[str, Any]) -> str:
    on = said["machine"]
    return (
        f"{said['date']}, commit {said['commit']}: {on['cores']} cores ({on['cpu']}, load"
        f" {on['load']} at the start), {on['threads']} threads, {on['dtype']}, torch {on['torch']},"
        f" diffusers {on['diffusers']}, Python {on['python']}; seed {said['seed']},"
        f" {said['rounds']} rounds, medians. Ratios are medians of the rounds' own ratios"
        " (least–most). text to rest: CPU seconds by part.\n"
    )


def record(report: Report) -> dict[str, Any]:
    targets = [{"says": t.says, "found": t.found, "reached": t.reached} for t in report.targets]
    return {"title": report.title, "targets": targets, "notes": report.notes, **report.data}


def into_readme(text: str) -> None:
    """Between the marks, and nothing else."""
    begin, end = "<!-- results -->\n", "<!-- /results -->\n"
    head, rest = README.read_text("utf-8").split(begin)
    README.write_text(head + begin + "\n" + text + "\n" + end + rest.split(end)[1], "utf-8")
