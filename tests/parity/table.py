"""The parity table of the docs, measured: ``python -m tests.parity.table docs/parity.md``."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data

from diffedit import Edit, Pass
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_instruct import Instruct
from diffedit_style import Style
from tests.families import FAMILIES, Tiny
from tests.parity.comparisons import COMPARISONS, Row, rows

EDITS = ("img2img", "inpaint", "controlnet", "style", "instruct")
#: Sets of edits that diffusers has pipelines for, by the task of `Tiny.theirs`.
THEIRS: Mapping[frozenset[str], str] = {
    frozenset(): "text2img",
    frozenset({"img2img"}): "img2img",
    frozenset({"inpaint"}): "inpaint",
    frozenset({"inpaint", "img2img"}): "inpaint",
    frozenset({"controlnet"}): "control",
    frozenset({"controlnet", "img2img"}): "control img2img",
    frozenset({"controlnet", "inpaint"}): "control inpaint",
    frozenset({"controlnet", "inpaint", "img2img"}): "control inpaint",
    frozenset({"instruct"}): "instruct",
    frozenset({"instruct", "inpaint"}): "instruct inpaint",
    frozenset({"instruct", "inpaint", "img2img"}): "instruct inpaint",
}
#: The same of control networks that see the mask themselves, in pipelines that take no strength.
THEIRS_TOLD = {frozenset({"controlnet", "inpaint"}): "control inpaint model"}
SETS = [
    frozenset(some)
    for count in range(len(EDITS) + 1)
    for some in itertools.combinations(EDITS, count)
]

HEAD = """# Beside diffusers

In compat mode the latents of a pass equal those of diffusers' own pipeline for the same components,
bit for bit. What follows is measured, not claimed: `python -m tests.parity.table docs/parity.md`
runs every row on tiny random models (real autoencoders, text encoders and tokenizers; 64 px, 6
steps) on a CPU, and the tests hold each of them at 0. Figures are max|d| over all latents.

diffusers draws some things unseeded, or a ControlNet's hint from its posterior; there the hint's
mode is meant on both sides, and PIL's pixels are made contiguous, whose layout moves bits. Its
pipelines for Chroma add a mask of ones and zeros to the scores (its issue 12116); there a mask is
meant. Those for Qwen-Image-Edit do not tell the text encoder which tokens are a picture's, and the
one that inpaints draws its reference from the posterior, where the other takes the mode; there it
is told, the mode is meant, and both work at the size that is asked for (`mended` in
`tests/families/`).
"""

LEGEND = """'equal': compared above. 'runs': diffusers has no such pipeline; the set is run, and
where it has a mask the pixels that changed outside are counted. The laws (order, identity,
independence, restoration) are held on every family by the same tests. '–': the family cannot carry
it, and says so before anything is loaded.
"""


def differences(every: Iterable[Row]) -> dict[Row, float]:
    """max|d| of each row."""
    found = {}
    for row in every:
        ours, theirs = row.latents()
        found[row] = (ours.double() - theirs.double()).abs().max().item()
        sys.stderr.write(f"{row}: {found[row]}\n")
    return found


def carried(family: Tiny, some: frozenset[str]) -> int | None:
    """Run a set of edits: how many pixels changed outside the mask; None: there is none."""
    editor: Any = family.editor(**family.options("instructed") if "instruct" in some else {})
    editor._resources["control:net:"] = family.control_net(editor.model.pipe)
    picture = data.coffee()[:64, :96]
    mask = np.zeros(picture.shape[:2], bool)
    mask[16:40, 24:60] = True
    every: dict[str, Edit] = {
        "img2img": Img2Img(strength=0.6),
        "inpaint": Inpaint(mask=mask, feather=0),
        "controlnet": ControlNet(model="net"),
        "style": Style(image=data.rocket()),
        "instruct": Instruct(),
    }
    edits = [every[name] for name in EDITS if name in some]
    made = editor.run(picture, Pass(prompt="a cup", steps=3, edits=edits)).pixels
    assert (made != picture)[mask].any()
    return int((made != picture)[~mask].any(axis=-1).sum()) if "inpaint" in some else None


def carries(family: Tiny, some: frozenset[str]) -> bool:
    """Whether a family carries a set of edits."""
    lacks = {
        "controlnet": family.nets is None,
        "style": not family.styled,
        "instruct": family.instructed is None,
    }
    return not any(lacks.get(name) for name in some)


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in every) + "\n"


def figure(values: Sequence[float]) -> str:
    """The largest, and of how many."""
    return f"{max(values):.2g}" if max(values) else "0.0"


def by_task(found: Mapping[Row, float]) -> str:
    """Family by family: the task, the pipeline it is compared with, and both columns."""
    lines = []
    for family, one in itertools.product(FAMILIES, COMPARISONS):
        mine = {row: d for row, d in found.items() if (row.family, row.comparison) == (family, one)}
        if not mine:
            continue
        fine = [d for row, d in mine.items() if row.dtype == torch.float32]
        coarse = [d for row, d in mine.items() if row.dtype == torch.bfloat16]
        pipeline = f"`{family.theirs[one.task]}`"
        lines.append((family.name, one.what, pipeline, len(fine), figure(fine), figure(coarse)))
    head = ("family", "task", "pipeline of diffusers", "schedulers", "float32", "bfloat16")
    return table(head, lines)


def by_scheduler(found: Mapping[Row, float]) -> str:
    """Scheduler by scheduler: the largest difference over all tasks of a family, and how many."""
    names = list(dict.fromkeys(row.scheduler for row in found))
    lines = []
    for name in names:
        cells = []
        for family in FAMILIES:
            mine = [
                d
                for row, d in found.items()
                if (row.family, row.scheduler, row.dtype) == (family, name, torch.float32)
            ]
            cells.append(f"{figure(mine)} ({len(mine)})" if mine else "–")
        lines.append((f"`{name}`" if name else "the model's own", *cells))
    return table(("scheduler", *(family.name for family in FAMILIES)), lines)


def theirs(family: Tiny, some: frozenset[str]) -> str | None:
    """The pipeline of diffusers for a set of edits, if it has one."""
    tasks = (THEIRS.get(some, ""), THEIRS_TOLD.get(some, ""))
    return next((family.theirs[task] for task in tasks if task in family.theirs), None)


def by_set(outside: Mapping[tuple[str, frozenset[str]], int | None]) -> str:
    """Sets of edits by family: which diffusers has no pipeline for, and what was checked."""
    lines = []
    for some in SETS:
        cells = []
        for family in FAMILIES:
            if not carries(family, some):
                cells.append("–")
                continue
            changed = outside[family.name, some]
            checked = "" if changed is None else f", {changed} outside"
            cells.append("equal" if theirs(family, some) else f"runs{checked}")
        lines.append((" + ".join(name for name in EDITS if name in some) or "none", *cells))
    return table(("edits", *(family.name for family in FAMILIES)), lines)


def counts() -> str:
    """How many combinations of family and set of edits there are, here and in diffusers."""
    there = sum(theirs(family, some) is not None for family in FAMILIES for some in SETS)
    here = sum(carries(family, some) for family in FAMILIES for some in SETS)
    return (
        f"{here} combinations of a family and a set of edits run in one pass;"
        f" for {there} of them diffusers has a pipeline."
    )


def page(found: Mapping[Row, float], outside: Mapping[Any, int | None]) -> str:
    """The whole page."""
    return "\n".join(
        (
            HEAD,
            "## By task\n",
            "'schedulers' counts those compared in float32; bfloat16 is compared with one.\n",
            by_task(found),
            "## By scheduler\n",
            "Over all tasks, float32; in brackets how many comparisons.\n",
            by_scheduler(found),
            "## Sets of edits\n",
            counts() + "\n",
            LEGEND,
            by_set(outside),
        )
    )


def main(to: str) -> None:
    """Measure everything, and write the page."""
    warnings.simplefilter("ignore")
    outside = {
        (family.name, some): carried(family, some)
        for family in FAMILIES
        for some in SETS
        if carries(family, some)
    }
    Path(to).write_text(page(differences(rows()), outside), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
