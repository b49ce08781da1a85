"""What a user wrote and diffedit cannot take, in one line: what, where, and what would be right."""

from __future__ import annotations

import itertools
import reprlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from diffedit.errors import InputError, ParameterError, WorkflowError, nearest
from diffedit.named import registry
from diffedit.parameters import parameters
from diffedit.yaml import Marks

if TYPE_CHECKING:
    from diffedit.plugins import Plugins

Place = tuple[str | int, ...]


def explained(
    error: ValidationError,
    owners: tuple[type[BaseModel], type[BaseModel]],
    where: str,
    marks: Marks,
    plugins: Plugins | None,
) -> InputError:
    """The error to raise in place of pydantic's.

    Args:
        error: what pydantic says of a workflow.
        owners: the classes of a workflow and of its passes.
        where: what to call the workflow as a whole: a file's name, "command line", ….
        marks: where parts were written; the longest path that leads to the error counts.
        plugins: where edits are looked up; default: all that are installed.
    """
    first: Any = min(error.errors(include_url=False), key=_rank)
    owner, depth = _owner(first["loc"], owners, plugins)
    # The field and positions in it; what follows may be pydantic's names for a union's branches.
    rest = itertools.takewhile(lambda part: isinstance(part, int), first["loc"][depth + 1 :])
    place = (*first["loc"][: depth + 1], *rest)
    path = place[:-1] if first["type"] in ("extra_forbidden", "missing") else place
    text = _spot(path, place, where, marks) + _said(first, owner, place, depth)
    cause = first.get("ctx", {}).get("error")
    deep = ParameterError if len(first["loc"]) > 2 else WorkflowError
    return (type(cause) if isinstance(cause, InputError) else deep)(" ".join(text.split()))


def _rank(one: Any) -> tuple[bool, bool]:
    """The format's version first, then misspelt names, which often make another one missing."""
    return one["loc"] != ("diffedit",), one["type"] != "extra_forbidden"


def _owner(
    loc: Place, owners: tuple[type[BaseModel], type[BaseModel]], plugins: Plugins | None
) -> tuple[type[BaseModel] | None, int]:
    """The class whose field an error is about, and where in its place the field stands."""
    match loc:
        case ("passes", _, "edits", _, str(name), *_):
            return registry(plugins).edits.get(name), 5
        case ("passes", _, _, *_):
            return owners[1], 2
    return owners[0], 0


def _spot(path: Place, place: Place, where: str, marks: Marks) -> str:
    found = max((mark for mark in marks if mark == place[: len(mark)]), key=len, default=None)
    label = where if found is None else marks[found]
    if found is not None and label.startswith("-"):  # an option says more than a path
        return f"{label} {'.'.join(map(str, path[len(found) :]))}".rstrip()
    return f"{label}: {'.'.join(map(str, path))}" if path else label


def _said(one: Any, owner: type[BaseModel] | None, place: Place, depth: int) -> str:
    kind, loc, cause = one["type"], one["loc"], one.get("ctx", {}).get("error")
    fields = parameters(owner) if owner else {}
    name = getattr(owner, "name", f"a {owner.__name__.lower()}" if owner else "this")
    known = fields.get(str(place[-1])) if len(place) == depth + 1 else None
    inside = len(loc) > depth + 1 and not (known and " or " in known.type)
    if kind == "extra_forbidden":
        return f": {name} has no parameter {loc[-1]!r}{nearest(str(loc[-1]), fields)}"
    if kind == "missing":
        right = f", {known.allowed}" if known and not inside else ""
        return f"{' lacks' if len(place) > 1 else f': {name} lacks'} {loc[-1]!r}{right}"
    if cause is not None:
        return f": {cause}"
    value = "empty" if one["input"] is None else reprlib.repr(one["input"])
    if known is None or inside:
        return f" is {value}, {one['msg'].removeprefix('Input ')}"
    quotes = known.type in ("text", "model") and isinstance(one["input"], int | float)
    return f" is {value}, should be {known.allowed}{' (put it in quotes)' if quotes else ''}"
