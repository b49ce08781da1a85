"""Values replaced in a workflow's plain data: ``passes.0.prompt=a red circle``."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit.errors import WorkflowError
from diffedit.fields import located
from diffedit.named import registry
from diffedit.parameters import parameters
from diffedit.yaml import Marks, parse_scalar

if TYPE_CHECKING:
    from diffedit.plugins import Plugins

Place = tuple[str | int, ...]


def override(
    data: Any, marks: Marks, overrides: Sequence[str], plugins: Plugins | None = None
) -> tuple[Any, Marks]:
    """Plain data with values replaced, and where each was written; what is given stays as it is.

    Values are YAML scalars (``no`` is a word, ``7`` a number, ``null`` nothing) or JSON. Paths
    count from the working directory.

    Raises:
        WorkflowError: no such place; the message says what there is.
    """
    for text in overrides:
        place, equals, value = text.partition("=")
        parts = place.strip().split(".")
        if not equals or not all(parts):
            right = "should be place=value: passes.0.prompt=a red circle"
            raise WorkflowError(f"--set {text!r} {right}")
        option = f"--set {place}"
        data, at = _put(data, (), parts, parse_scalar(value), option, plugins)
        marks = {path: said for path, said in marks.items() if path[: len(at)] != at}
        marks[at] = option
    return data, marks


def _put(
    holder: Any, at: Place, parts: Sequence[str], value: Any, option: str, plugins: Plugins | None
) -> tuple[Any, Place]:
    """A copy of `holder` with the value at `parts` in it; aliases share what they repeat."""
    if not parts:
        return _from_here(value, at, plugins), at
    if isinstance(holder, str) and len(at) == 4 and at[2] == "edits":  # an edit's bare name
        holder = {holder: {}}
    changed: Any = {} if holder is None else copy.copy(holder)
    key = _key(changed, parts, option, at)
    inner = changed.get(key) if isinstance(changed, dict) else changed[key]
    changed[key], at = _put(inner, (*at, key), parts[1:], value, option, plugins)
    return changed, at


def _key(holder: Any, parts: Sequence[str], option: str, at: Place) -> str | int:
    part, here = parts[0], ".".join(map(str, at)) or "a workflow"
    if isinstance(holder, list):
        if part.isdecimal() and int(part) < len(holder):
            return int(part)
        holder = range(len(holder))
    elif isinstance(holder, dict):
        # What does not stand there may still be a parameter with a default: reading will tell.
        if len(parts) == 1 or part in holder:
            return part
    else:
        raise WorkflowError(f"{option}: {here} is {reprlib.repr(holder)}, which has no parts")
    there = ", ".join(map(str, holder)) or "nothing"
    raise WorkflowError(f"{option}: no {part!r} in {here}, which has {there}")


def _from_here(value: Any, at: Place, plugins: Plugins | None) -> Any:
    """The value; where an image or a model is named, with its path made absolute."""
    if not isinstance(value, str):
        return value
    match at:
        case ("model",) | ("passes", _, "model"):
            return located(value, None)
        case ("passes", _, "edits", _, str(name), str(key)):
            cls = registry(plugins).edits.get(name)
            known = parameters(cls).get(key) if cls else None
            kinds = set(known.type.split(" or ")) if known else set()
            if "model" in kinds:
                return located(value, None)
            if {"image", "mask"} & kinds and value[:5].lower() != "data:":
                return str(Path(value).expanduser().absolute())
    return value
