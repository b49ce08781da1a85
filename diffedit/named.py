"""Edits by name: as one is written in a workflow, and found among the plugins."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
)

from diffedit.edit import Edit
from diffedit.errors import DiffeditError, ParameterError, PluginError

if TYPE_CHECKING:
    from diffedit.plugins import Plugins

_RIGHT = "an edit's name, or its name with parameters"


def registry(given: Plugins | None = None) -> Plugins:
    """Where edits are looked up: the given plugins, or all that are installed."""
    from diffedit import plugins

    return plugins.default() if given is None else given


@functools.cache
def _adapter(cls: type[Edit]) -> TypeAdapter[dict[str, Edit]]:
    return TypeAdapter(dict[str, cls])  # type: ignore[valid-type]  # places get the edit's name


def _read(value: Any, info: ValidationInfo) -> Edit:
    """An edit from itself, its bare name, or its name with parameters."""
    if isinstance(value, Edit):
        return value
    name, given = _split(value)
    context = info.context if isinstance(info.context, Mapping) else {}
    cls = registry(context.get("plugins")).edit(name)
    try:
        return _adapter(cls).validate_python({name: given}, context=info.context)[name]
    except (ValueError, DiffeditError):  # pydantic's ValidationError is a ValueError
        raise
    except Exception as error:
        said = f"its parameters cannot be read ({type(error).__name__}: {error})"
        raise PluginError(name, said) from error


def _split(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and parameters; `id` and `after` may stand beside the name."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping):
        beside = {key: value[key] for key in ("id", "after") if key in value}
        match [(key, value[key]) for key in value if key not in beside]:
            case [(str(name), None)]:
                return name, beside
            case [(str(name), Mapping() as given)] if not beside.keys() & given.keys():
                return name, {**given, **beside}
    raise ParameterError(
        f"{reprlib.repr(value)} is no edit, should be {_RIGHT} inside: {{inpaint: {{mask: m.png}}}}"
    )


def _write(edit: Edit, info: SerializationInfo) -> dict[str, Any] | str:
    said = edit.model_dump(
        mode=info.mode,
        context=info.context,
        by_alias=True,
        exclude_unset=info.exclude_unset,
        round_trip=True,
    )
    return {edit.name: said} if said else edit.name


AnyEdit = Annotated[
    Edit,
    PlainValidator(_read),
    PlainSerializer(_write),
    WithJsonSchema({"title": "Edit", "description": _RIGHT, "type": ["string", "object"]}),
]
