"""The parameters of edits, passes and workflows, as forms, tables and messages show them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

Schema = Mapping[str, Any]


class Parameter(BaseModel, frozen=True):
    """A parameter as people see it.

    Attributes:
        type: "whole number", "image", "choice", …; several are joined by "or".
        allowed: what it may be, as the end of "should be …".
        advanced: not needed for ordinary work.
    """

    name: str
    type: str
    allowed: str
    required: bool
    default: Any = None
    help: str = ""
    advanced: bool = False


@functools.cache
def parameters(cls: type[BaseModel]) -> Mapping[str, Parameter]:
    """The parameters of an edit, a pass or a workflow, by name."""
    schema = cls.model_json_schema(schema_generator=_Lenient)
    found = {}
    for name, prop in schema.get("properties", {}).items():
        kinds = list(_kinds(prop, schema.get("$defs", {})))
        found[name] = Parameter(
            name=name,
            type=_joined(_words(kind)[0] for kind in kinds if kind.get("type") != "null"),
            allowed=_joined(map(_allowed, kinds)),
            required=name in schema.get("required", ()),
            default=prop.get("default"),
            help=prop.get("description", ""),
            advanced=prop.get("advanced", False),
        )
    return found


class _Lenient(GenerateJsonSchema):
    """Says nothing of types that JSON Schema cannot describe."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def _kinds(prop: Schema, definitions: Schema) -> Iterator[Schema]:
    """The alternatives, each with its items' alternatives in "each"."""
    if "$ref" in prop:
        prop = definitions[prop["$ref"].rpartition("/")[2]]
    if "anyOf" in prop:
        for one in prop["anyOf"]:
            yield from _kinds(one, definitions)
    else:
        items = prop.get("prefixItems") or [prop[key] for key in ("items",) if prop.get(key)]
        yield {**prop, "each": [kind for item in items for kind in _kinds(item, definitions)]}


def _joined(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


_WORDS = {
    "integer": ("whole number", "a whole number"),
    "number": ("number", "a number"),
    "boolean": ("true or false", "true or false"),
    "null": ("nothing", "empty"),
    "string": ("text", "text"),
    "image": ("image", "an image"),
    "model": ("model", "text"),
    "mask": ("mask", "a mask (an image, white = change)"),
    "array": ("list", "a list"),
    "object": ("mapping", "a mapping"),
}
_BOUNDS = {
    "minItems": "of at least",
    "minLength": "with a length of at least",
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def _words(kind: Schema) -> tuple[str, str]:
    if choices := kind.get("enum", [kind["const"]] if "const" in kind else []):
        return "choice", "one of " * (len(choices) > 1) + ", ".join(map(str, choices))
    if "title" in kind and "properties" in kind:
        return "mapping", f"a {kind['title'].lower()}"
    for key in (kind.get("format"), kind.get("type")):
        if isinstance(key, str) and key in _WORDS:
            return _WORDS[key]
    return "value", kind.get("description", "another value")


def _allowed(kind: Schema) -> str:
    """What a value may be, as the end of "should be …"."""
    if "prefixItems" in kind:
        said = f"{len(kind['prefixItems'])} values"
    elif "minimum" in kind and "maximum" in kind:
        said = f"{_words(kind)[1]} from {kind['minimum']} to {kind['maximum']}"
    else:
        bounds = (f" {word} {kind[key]}" for key, word in _BOUNDS.items() if key in kind)
        said = _words(kind)[1] + " and".join(bounds)
    return said + (f", each {_joined(map(_allowed, kind['each']))}" if kind["each"] else "")
