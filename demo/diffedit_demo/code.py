"""A workflow in the languages that people carry it away in."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from diffedit import Workflow


def as_python(workflow: Workflow, source: str | None) -> str:
    """A script that does the same; pictures stand in it as data URIs.

    Args:
        source: the name of the picture that it edits; None: it makes one from nothing.
    """
    said = workflow.model_dump(mode="json", exclude_unset=True)
    classes = {type(edit) for one in workflow.passes for edit in one.edits}
    lines = [
        "from diffedit import Editor, Pass",
        *sorted(f"from {cls.__module__} import {cls.__name__}" for cls in classes),
        "",
        f"editor = Editor.load({workflow.model!r})",
        "result = editor.run(",
        f"    {source!r},",
        "    [",
    ]
    for written, one in zip(said["passes"], workflow.passes, strict=True):
        lines.append("        Pass(")
        lines += _arguments({k: v for k, v in written.items() if k != "edits"}, " " * 12)
        if one.edits:
            lines.append("            edits=[")
            for edit in one.edits:
                values = edit.model_dump(mode="json", exclude_unset=True)
                lines.append(f"                {type(edit).__name__}(")
                lines += [*_arguments(values, " " * 20), "                ),"]
            lines.append("            ],")
        lines.append("        ),")
    lines.append("    ],")
    whole: dict[str, Any] = {"seed": workflow.seed}
    if workflow.size is not None:
        whole["size"] = tuple(workflow.size)
    lines += [*_arguments(whole, "    "), ")", 'result.save("edited.png")', ""]
    return "\n".join(lines)


def as_command(workflow: Workflow, source: str | None) -> str:
    """A line for a shell, beside the workflow as a file."""
    parts = ["diffedit", "run", "workflow.yaml", *([source] if source else [])]
    return shlex.join([*parts, "--output", "edited.png"]) + "\n"


def as_yaml(workflow: Workflow, source: str | None) -> str:
    """The workflow file."""
    return workflow.to_yaml()


LANGUAGES: Mapping[str, Callable[[Workflow, str | None], str]] = {
    "YAML": as_yaml,
    "Python": as_python,
    "CLI": as_command,
}


def _arguments(values: Mapping[str, Any], indent: str) -> list[str]:
    return [f"{indent}{name}={value!r}," for name, value in values.items()]
