"""From the JSON Schema of parameters to what a form shows, and back. Nothing here knows Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffedit_demo.stack import PASS_FIELDS

Kind = Literal["text", "number", "slider", "switch", "choice", "image", "mask"]

_SLIDER = 256
"""Steps up to which a slider is of use; beyond that one types the number."""


@dataclass(frozen=True)
class Field:
    """One parameter, as a form shows it.

    Attributes:
        name: of the parameter.
        title: what the form calls it.
        kind: of widget.
        default: what holds when nothing is set; None where the parameter is required.
        help: one line that says what it does.
        required: whether there is no default.
        nullable: whether it may be left empty.
        advanced: whether it is folded away at first.
        whole: whether a number is an integer.
        low, high, step: of a number; a slider has all three.
        longest: characters of a text.
        choices: of a choice; ``free`` says whether others may be typed.
        registry: names what fills the choices at run time, such as ``"preprocessors"``.
        random: whether the form offers a number drawn at random.
    """

    name: str
    title: str
    kind: Kind
    default: Any = None
    help: str = ""
    required: bool = False
    nullable: bool = False
    advanced: bool = False
    whole: bool = False
    low: float | None = None
    high: float | None = None
    step: float | None = None
    longest: int | None = None
    choices: tuple[str, ...] = ()
    free: bool = False
    registry: str = ""
    random: bool = False

    def to_page(self) -> dict[str, Any]:
        """As the browser's script reads it."""
        return asdict(self)


def fields(schema: Mapping[str, Any], registries: Mapping[str, Sequence[str]]) -> list[Field]:
    """The fields of a form, in the order of the schema, advanced ones behind the others.

    Args:
        schema: JSON Schema of an object, as pydantic writes it.
        registries: names by registry, for choices that the schema leaves to run time.
    """
    required = set(schema.get("required", ()))
    found = [
        _field(name, _resolved(said, schema), name in required, registries)
        for name, said in schema.get("properties", {}).items()
    ]
    return sorted((one for one in found if one is not None), key=lambda one: one.advanced)


def pass_fields(
    schema: Mapping[str, Any],
    registries: Mapping[str, Sequence[str]],
    plain: Sequence[str] = ("prompt",),
) -> list[Field]:
    """The fields of a pass, without its edits; all but the `plain` ones are folded away."""
    own = {k: v for k, v in schema["properties"].items() if k in PASS_FIELDS}
    for name in ("scheduler", "model"):
        own[name] = own[name] | {"registry": f"{name}s"}
    own = {name: {"advanced": name not in plain} | said for name, said in own.items()}
    return fields({**schema, "properties": own}, registries)


def _resolved(said: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A property with its references followed, and `nullable` in place of the null alternative."""
    made = dict(said)
    while "$ref" in made:
        made = {**schema.get("$defs", {})[made.pop("$ref").rpartition("/")[2]], **made}
    if len(made.get("allOf", ())) == 1:
        made = _resolved({**made.pop("allOf")[0], **made}, schema)
    options = made.pop("anyOf", None)
    if options is None:
        return made
    left = [one for one in options if one.get("type") != "null"]
    made["nullable"] = len(left) < len(options)
    if len(left) == 1:
        return {**_resolved(left[0], schema), **made}
    # One of several types: whoever writes such a parameter has to type it.
    return {"type": "string", **made}


def _field(
    name: str,
    said: Mapping[str, Any],
    required: bool,
    registries: Mapping[str, Sequence[str]],
) -> Field | None:
    kind = said.get("type")
    common: dict[str, Any] = {
        "name": name,
        "title": said.get("title", name),
        "default": said.get("default"),
        "help": said.get("description", ""),
        "required": required,
        "nullable": said.get("nullable", False),
        "advanced": said.get("advanced", False),
        "random": said.get("random", False),
    }
    if said.get("format") in ("image", "mask"):
        return Field(kind=said["format"], **common)
    choices = said.get("enum") or ([said["const"]] if "const" in said else None)
    registry = said.get("registry", "")
    if registry in registries:
        listed = tuple(registries[registry])
        free = said.get("free", True)
        return Field(kind="choice", choices=listed, free=free, registry=registry, **common)
    if choices is not None:
        return Field(kind="choice", choices=tuple(choices), **common)
    if kind == "boolean":
        return Field(kind="switch", **common)
    if kind in ("integer", "number"):
        return _number(said, common)
    if kind == "string":
        return Field(kind="text", longest=said.get("maxLength"), **common)
    return None  # lists and records: such an edit is set in a workflow file


def _number(said: Mapping[str, Any], common: dict[str, Any]) -> Field:
    whole = said["type"] == "integer"
    low, high = (
        said.get(f"{end}imum", said.get(f"exclusive{end.capitalize()}imum"))
        for end in ("min", "max")
    )
    step = said.get("step") or said.get("multipleOf") or (1 if whole else None)
    if low is None or high is None or common["nullable"]:
        return Field(kind="number", whole=whole, low=low, high=high, step=step, **common)
    step = step or (high - low) / 100
    # The end of an open range is no value of it.
    low += step if "exclusiveMinimum" in said else 0
    high -= step if "exclusiveMaximum" in said else 0
    kind: Kind = "slider" if (high - low) / step <= _SLIDER else "number"
    return Field(kind=kind, whole=whole, low=low, high=high, step=step, **common)
