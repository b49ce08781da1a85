"""Passes and workflows: values that are the same in scripts, YAML, JSON and on a command line.

Places are written as dotted paths, ``passes.0.edits.1.inpaint.feather``. What a user wrote and
diffedit cannot take is refused in one line: what, where, and what would be right (`explain`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from diffedit.edit import Edit
from diffedit.errors import (
    DiffeditError,
    InputError,
    OutputError,
    ParameterError,
    PluginError,
    WorkflowError,
    nearest,
)

if TYPE_CHECKING:
    from ruamel.yaml.events import Event

    from diffedit.plugins import Plugins

__all__ = ["Parameter", "Pass", "Workflow", "explain", "parameters", "parse_scalar", "refused"]

#: Where things were written, by their path: ``workflow.yaml:8:7``, or an option: ``--steps``.
Marks = Mapping[tuple[str | int, ...], str]
PathLike = str | os.PathLike[str]

MAX_SEED = 2**63 - 1
VERSION = 1


# -- edits, by name --------------------------------------------------------------------------------


def _registry(info: ValidationInfo | None) -> Plugins:
    given = info.context.get("plugins") if info and isinstance(info.context, Mapping) else None
    if given is not None:
        return given  # type: ignore[no-any-return]
    from diffedit import plugins

    return plugins.default()


@functools.cache
def _adapter(cls: type[Edit]) -> TypeAdapter[dict[str, Edit]]:
    return TypeAdapter(dict[str, cls])  # type: ignore[valid-type]  # places get the edit's name


def _read_edit(value: Any, info: ValidationInfo) -> Edit:
    """An edit from itself, its bare name, or its name with parameters."""
    if isinstance(value, Edit):
        return value
    name, given = _split_edit(value)
    cls = _registry(info).edit(name)
    try:
        return _adapter(cls).validate_python({name: given}, context=info.context)[name]
    except (ValueError, DiffeditError):  # pydantic's ValidationError is a ValueError
        raise
    except Exception as error:
        said = f"its parameters cannot be read ({type(error).__name__}: {error})"
        raise PluginError(name, said) from error


def _split_edit(value: Any) -> tuple[str, dict[str, Any]]:
    right = "should be an edit's name, or one name with its parameters: {inpaint: {mask: m.png}}"
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping):
        raise ParameterError(f"{_shown(value)} is no edit, {right}")
    beside = {key: value[key] for key in ("id", "after") if key in value}
    names = [key for key in value if key not in beside]
    if len(names) != 1 or not isinstance(names[0], str):
        said = ", ".join(map(_shown, names)) or "none"
        if names and isinstance(names[0], str) and value[names[0]] is None:
            right = f"should be one: indent the parameters more than '{names[0]}:'"
        raise ParameterError(f"an edit with the names {said}, {right}")
    given = value[names[0]]
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ParameterError(f"{names[0]}: {_shown(given)} are no parameters, {right}")
    for key in beside.keys() & given.keys():
        raise ParameterError(f"{names[0]}: {key!r} stands beside the name and in the parameters")
    return names[0], {**given, **beside}


def _write_edit(edit: Edit, info: SerializationInfo) -> dict[str, Any] | str:
    context = info.context if isinstance(info.context, Mapping) else {}
    skip = {key for key in ("id", "after") if getattr(edit, key) is None}
    if context.get("brief"):
        skip |= _unsaid(edit)
    said = edit.model_dump(
        mode=info.mode, context=info.context, by_alias=True, round_trip=True, exclude=skip
    )
    return {edit.name: said} if said else edit.name


def _unsaid(value: BaseModel) -> set[str]:
    """The fields that nobody set and that have their defaults."""
    return {
        name
        for name, field in type(value).model_fields.items()
        if name not in value.model_fields_set
        and getattr(value, name) == field.get_default(call_default_factory=True, validated_data={})
    }


AnyEdit = Annotated[
    Edit,
    PlainValidator(_read_edit),
    PlainSerializer(_write_edit),
    WithJsonSchema(
        {
            "title": "Edit",
            "description": "an edit's name, or its name with parameters",
            "anyOf": [{"type": "string"}, {"type": "object"}],
        }
    ),
]


# -- the values ------------------------------------------------------------------------------------


def _parse_size(value: Any) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", value)):
        return int(match[1]), int(match[2])
    return value


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = Annotated[int, Field(ge=1, le=16384)]


class Pass(BaseModel, frozen=True, extra="forbid"):
    """One trip through the sampler: a prompt, how to sample, and edits that act together."""

    prompt: str | None = Field(None, description="What the picture is to show")
    negative: str = Field("", description="What it is not to show")
    steps: int = Field(20, ge=1, le=1000, description="Sampling steps, before a strength cuts them")
    guidance: float = Field(
        5.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Classifier-free guidance scale; 1 or less leaves the negative prompt out",
    )
    rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="How far guidance keeps the contrast of the unguided prediction",
    )
    scheduler: str | None = Field(
        None, min_length=1, description="Name of the sampler; empty: the model's own"
    )
    edits: tuple[AnyEdit, ...] = Field(
        (), description="The edits that act in this pass, in any order"
    )


class Workflow(BaseModel, frozen=True, extra="forbid"):
    """An ordered list of passes with a model and a seed."""

    diffedit: Literal[1] = Field(1, description="Version of this format")
    model: str = Field(
        "tiny", min_length=1, description="The embedded model 'tiny', a folder, a file or a hub id"
    )
    seed: Seed | Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        0, description="Seed of all random numbers; a list makes one picture for each"
    )
    size: Annotated[tuple[Side, Side] | None, BeforeValidator(_parse_size)] = Field(
        None, description="Width and height of a picture made from nothing, in pixels"
    )
    passes: tuple[Pass, ...] = Field(
        description="What is done, one after another", json_schema_extra={"minItems": 1}
    )

    @model_validator(mode="before")
    @classmethod
    def _version(cls, data: Any) -> Any:
        version = data.get("diffedit") if isinstance(data, Mapping) else None
        if isinstance(version, int) and version > VERSION:
            raise WorkflowError(
                f"this file needs a newer diffedit: it says 'diffedit: {version}', "
                f"this one reads 'diffedit: {VERSION}'"
            )
        return data

    @field_validator("passes")  # Field(min_length=1) would also count passes that are wrong
    @classmethod
    def _some(cls, value: tuple[Pass, ...]) -> tuple[Pass, ...]:
        if not value:
            raise PydanticCustomError("no_passes", "no passes, should be at least one")
        return value

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds as a tuple, one picture each."""
        return (self.seed,) if isinstance(self.seed, int) else self.seed

    # -- reading -------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: PathLike, *, overrides: Sequence[str] = (), plugins: Plugins | None = None
    ) -> Self:
        """Read a workflow file, YAML 1.2 or JSON. Its relative image paths count from its folder.

        Args:
            overrides: ``place=value``, applied before anything is checked (`with_overrides`).
            plugins: where edits are looked up; default: all that are installed.

        Raises:
            WorkflowError: no such file, not YAML, or not a workflow. Names line and column.
            ParameterError: an unknown edit or parameter, or a value out of its range.
        """
        file = Path(path)
        return cls._from_text(_read_text(file), file.parent, str(file), overrides, plugins)

    @classmethod
    def from_yaml(
        cls,
        text: str,
        *,
        base: PathLike | None = None,
        where: str = "workflow",
        plugins: Plugins | None = None,
    ) -> Self:
        """Read a workflow from YAML or JSON text.

        Args:
            base: the folder that relative image paths count from; default: the working directory.
            where: what errors call the text.
            plugins: where edits are looked up; default: all that are installed.
        """
        return cls._from_text(text, base, where, (), plugins)

    @classmethod
    def _from_text(
        cls,
        text: str,
        base: PathLike | None,
        where: str,
        overrides: Sequence[str],
        plugins: Plugins | None,
    ) -> Self:
        data, marks = read_yaml(text, where)
        data, marks = _override(data, overrides, marks, plugins)
        return cls.from_data(data, base=base, where=where, plugins=plugins, marks=marks)

    @classmethod
    def from_data(
        cls,
        data: Any,
        *,
        base: PathLike | None = None,
        where: str = "workflow",
        plugins: Plugins | None = None,
        marks: Marks | None = None,
    ) -> Self:
        """Make a workflow of plain data, as YAML and JSON hold it.

        Args:
            base: the folder that relative image paths count from; default: the working directory.
            where: what errors call the data.
            plugins: where edits are looked up; default: all that are installed.
            marks: where each part of the data was written, for errors.

        Raises:
            InputError: not a workflow; one line says what, where and what would be right.
        """
        if not isinstance(data, Mapping):
            said = "is empty" if data is None else f"holds {_shown(data)}"
            raise WorkflowError(f"{where} {said}, should be a workflow with 'passes:'")
        try:
            return cls.model_validate(data, context={"base": base, "plugins": plugins})
        except ValidationError as error:
            raise refused(error, where, plugins=plugins, marks=marks) from None

    def with_overrides(
        self,
        overrides: Sequence[str],
        *,
        base: PathLike | None = None,
        plugins: Plugins | None = None,
    ) -> Self:
        """A workflow with some values replaced: ``passes.0.prompt=a red circle``.

        Values are YAML scalars (``no`` is a word, ``7`` a number, ``null`` nothing) or JSON. Image
        paths count from `base`, by default the working directory.

        Raises:
            WorkflowError: no such place; the message says what there is.
            ParameterError: a value that does not fit.
        """
        data, marks = _override(self.model_dump(round_trip=True), overrides, {}, plugins, base)
        return self.from_data(data, base=base, plugins=plugins, marks=marks)

    # -- writing -------------------------------------------------------------------------------

    def to_yaml(self, *, base: PathLike | None = None, store: PathLike | None = None) -> str:
        """The workflow as YAML, without parameters that nobody set and that have their defaults.

        Args:
            base: image paths below this folder are written relative to it.
            store: a folder that takes pictures in memory; None: they become data URIs.
        """
        from ruamel.yaml import YAML

        context = {"base": base, "store": store, "brief": True}
        data = self.model_dump(mode="json", context=context)
        for one, said in zip(self.passes, data["passes"], strict=True):
            for name in _unsaid(one):
                del said[name]
            said["edits"] = [
                edit if isinstance(edit, str) else {name: _Flow(p) for name, p in edit.items()}
                for edit in said.get("edits", ())
            ]
            if not said["edits"]:
                del said["edits"]
        for name in ("seed", "size"):
            if isinstance(data[name], list):
                data[name] = _Row(data[name])
        if data["size"] is None:
            del data["size"]
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.allow_unicode = True
        yaml.width = 2**16
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.Representer = _representer()
        text = io.StringIO()
        yaml.dump(data, text)
        return text.getvalue()

    def save(self, path: PathLike) -> Path:
        """Write a workflow file, whole or not at all; ``.json`` is written as JSON, else YAML.

        Pictures in memory are written beside it as PNG files; paths below its folder become
        relative to it.

        Raises:
            OutputError: the folder does not exist, or the file is one of the workflow's images.
        """
        file = Path(path)
        folder = file.parent
        if not folder.is_dir():
            raise OutputError(f"{file}: the folder {folder} does not exist, create it first")
        if file.is_dir():
            raise OutputError(f"{file} is a folder, should be a file such as {file / 'edit.yaml'}")
        for used in self.files():
            if file.exists() and used.exists() and file.samefile(used):
                raise OutputError(f"{file} is an image of this workflow: name another output")
        try:
            if file.suffix == ".json":
                context = {"base": folder, "store": folder}
                data = self.model_dump(mode="json", context=context)
                # JSON allows these characters and YAML, which reads the file, does not.
                text = re.sub(
                    r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]",
                    lambda match: f"\\u{ord(match[0]):04x}",
                    json.dumps(data, indent=2, ensure_ascii=False) + "\n",
                )
            else:
                text = self.to_yaml(base=folder, store=folder)
            with _replacing(file) as temporary:
                temporary.write(text.encode())
        except OSError as error:
            raise OutputError(f"{file}: cannot write ({error.strerror or error})") from error
        return file

    def files(self) -> list[Path]:
        """The files that the edits' parameters name; none of them is ever written to."""
        return [
            path
            for one in self.passes
            for edit in one.edits
            for _, value in edit
            for path in _paths(value)
        ]


def _paths(value: Any) -> Iterator[Path]:
    path = getattr(value, "path", None)
    if isinstance(path, Path):
        yield path
    elif isinstance(value, BaseModel):
        for _, inner in value:
            yield from _paths(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            yield from _paths(inner)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedWriter]:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # same folder: a rename is atomic
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -- errors in one line ----------------------------------------------------------------------------


def refused(
    error: ValidationError,
    where: str,
    *,
    plugins: Plugins | None = None,
    marks: Marks | None = None,
) -> InputError:
    """The error to raise in place of pydantic's; its message is that of `explain`."""
    text = explain(error, where, plugins=plugins, marks=marks)
    first = _errors(error)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        with contextlib.suppress(TypeError):  # a class that takes more than its message
            return type(cause)(text)
    deep = len(first["loc"]) > 2 or error.title != "Workflow"
    return ParameterError(text) if deep else WorkflowError(text)


def explain(
    error: ValidationError,
    where: str,
    *,
    plugins: Plugins | None = None,
    marks: Marks | None = None,
) -> str:
    """Say in one line what is wrong, where, and what would be right.

    Args:
        error: from a `Workflow`, a `Pass` or an edit.
        where: what to call the place as a whole: a file's name, "command line", ….
        plugins: where edits are looked up; default: all that are installed.
        marks: where parts were written; the longest path that leads to the error counts.
    """
    all_errors = _errors(error)
    first = all_errors[0]
    owner, depth, name = _owner(error.title, first["loc"], plugins)
    place = (*first["loc"][:depth], *_without_branches(first["loc"][depth:]))
    said = _said(first, owner, name, place, depth)
    more = {e["loc"][: len(place)] for e in all_errors} - {first["loc"][: len(place)]}
    after = f" (and {len(more)} more)" if more else ""

    path = place[:-1] if first["type"] in ("extra_forbidden", "missing") else place
    found = max((mark for mark in marks or {} if mark == place[: len(mark)]), key=len, default=None)
    label = marks[found] if marks and found is not None else where
    if label.startswith("-") and found is not None:  # an option says more than a path
        rest = ".".join(map(str, path[len(found) :]))
        spot = f"{label} {rest}".rstrip()
        return _line(f"{spot}{said}{after}")
    dotted = ".".join(map(str, path))
    return _line(f"{label}: {dotted}{said}{after}" if dotted else f"{label}{said}{after}")


def _errors(error: ValidationError) -> list[Any]:
    """All errors; a misspelt name first, for it often makes another one missing."""
    return sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")


def _owner(
    title: str, loc: tuple[str | int, ...], plugins: Plugins | None
) -> tuple[type[BaseModel] | None, int, str]:
    """The class whose field an error is about, where in `loc` the field stands, what to call it."""
    depth = 0
    if title == "Workflow":
        if loc[:1] != ("passes",) or len(loc) < 3:
            return Workflow, 0, "a workflow"
        title, depth = "Pass", 2
    if title == "Pass":
        if loc[depth : depth + 1] != ("edits",) or len(loc) < depth + 4:
            return Pass, depth, "a pass"
        name = str(loc[depth + 2])
        return _edits(plugins).get(name), depth + 3, name
    edits = _edits(plugins)
    found = next((cls for cls in edits.values() if cls.__name__ == title), None)
    return found, 0, found.name if found else title


def _edits(plugins: Plugins | None) -> Mapping[str, type[Edit]]:
    if plugins is None:
        from diffedit import plugins as installed

        plugins = installed.default()
    return plugins.edits


def _without_branches(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Without pydantic's names for the branches of a union."""
    tags = {"int", "float", "str", "bool", "none", "bytes"}
    return tuple(
        part
        for at, part in enumerate(loc)
        if at == 0 or isinstance(part, int) or (part.isidentifier() and part not in tags)
    )


def _said(
    one: Any,
    owner: type[BaseModel] | None,
    name: str,
    place: tuple[str | int, ...],
    depth: int,
) -> str:
    kind, value, cause = one["type"], one["input"], one.get("ctx", {}).get("error")
    fields = parameters(owner) if owner else {}
    inner = place[depth:]
    known = fields.get(str(inner[0])) if inner else None
    nested = any(isinstance(part, str) for part in inner[1:])
    allowed = (known.each if inner[1:] else known.allowed) if known and not nested else ""
    right = f", should be {allowed}" if allowed else ""
    if kind == "extra_forbidden":
        hint = "" if nested else nearest(str(place[-1]), fields)
        return f": {'this' if nested else name} has no parameter {place[-1]!r}{hint}"
    if kind == "missing":
        subject = " lacks" if len(place) > 1 else f": {name} lacks"
        return f"{subject} {place[-1]!r}{', ' + allowed if allowed else ''}"
    if cause is not None or kind == "no_passes":
        said = str(cause or one["msg"])
        return f": {said}"
    if not right:
        return f" is {_shown(value)}: {one['msg']}"
    quotes = ""
    if known and known.type == "text" and isinstance(value, bool | int | float):
        quotes = " (put it in quotes)"
    return f" is {_shown(value)}{right}{quotes}"


def _line(text: str) -> str:
    return " ".join(text.split())


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3


def _shown(value: Any) -> str:
    """A value as a user would write it, short."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return _short.repr(value)


# -- parameters, for people ------------------------------------------------------------------------


class Parameter(BaseModel, frozen=True):
    """A parameter as forms and messages show it."""

    name: str
    type: str
    allowed: str
    each: str = ""
    required: bool
    default: Any = None
    help: str = ""
    advanced: bool = False


@functools.cache
def parameters(cls: type[BaseModel]) -> Mapping[str, Parameter]:
    """The parameters of an edit, a pass or a workflow, by name."""
    try:
        schema = cls.model_json_schema()
    except Exception:  # a type of a plugin's that has no JSON schema: say less
        return {
            name: Parameter(
                name=name, type="", allowed="", required=field.is_required(),
                help=field.description or "",
            )
            for name, field in cls.model_fields.items()
        }  # fmt: skip
    definitions = schema.get("$defs", {})
    required = schema.get("required", ())
    return {
        name: Parameter(
            name=name,
            type=_type(prop, definitions),
            allowed=_allowed(prop, definitions),
            each=_each(prop, definitions),
            required=name in required,
            default=prop.get("default"),
            help=prop.get("description", ""),
            advanced=bool(prop.get("advanced")),
        )
        for name, prop in schema.get("properties", {}).items()
    }


def _resolved(prop: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in prop:
        target = definitions.get(prop["$ref"].rpartition("/")[2], {})
        return {**target, **{k: v for k, v in prop.items() if k != "$ref"}}
    return prop


def _type(prop: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    prop = _resolved(prop, definitions)
    if "anyOf" in prop:
        kinds = [_type(one, definitions) for one in prop["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "nothing"))
    if "enum" in prop or "const" in prop:
        return "choice"
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "array": "list",
        "object": "mapping",
        "null": "nothing",
    }
    if prop.get("type") == "string":
        return prop["format"] if prop.get("format") in ("image", "mask") else "text"
    return names.get(prop.get("type", ""), "value")


def _allowed(prop: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a parameter may be, as the end of "should be …"."""
    named = "$ref" in prop
    prop = _resolved(prop, definitions)
    if prop.get("title") == "Edit" and "anyOf" in prop:
        return "an edit's name, or its name with parameters"
    if "anyOf" in prop:
        return " or ".join(dict.fromkeys(_allowed(one, definitions) for one in prop["anyOf"]))
    if "enum" in prop:
        return "one of " + ", ".join(str(choice) for choice in prop["enum"])
    if "const" in prop:
        return str(prop["const"])
    match prop.get("type"):
        case "integer":
            return "a whole number" + _range(prop)
        case "number":
            return "a number" + _range(prop)
        case "boolean":
            return "true or false"
        case "null":
            return "empty"
        case "string" if prop.get("format") in ("image", "mask"):
            return "an image" if prop["format"] == "image" else "a mask (an image, white = change)"
        case "string":
            return "text"
        case "array" if prop.get("prefixItems"):
            items = [_allowed(one, definitions) for one in prop["prefixItems"]]
            if len(set(items)) == 1:
                return f"{len(items)} values, each {items[0]}"
            return "a list of " + ", ".join(items)
        case "array":
            items_of = prop.get("items")
            return "a list" + (f", each {_allowed(items_of, definitions)}" if items_of else "")
        case "object":
            return f"a {prop['title'].lower()}" if named and "title" in prop else "a mapping"
    return str(prop.get("description", "another value"))


def _each(prop: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What one item of a list may be."""
    for one in prop.get("anyOf", (prop,)):
        items = one.get("items") or next(iter(one.get("prefixItems", ())), None)
        if isinstance(items, Mapping):
            return _allowed(items, definitions)
    return ""


def _range(prop: Mapping[str, Any]) -> str:
    low, above = prop.get("minimum"), prop.get("exclusiveMinimum")
    high, below = prop.get("maximum"), prop.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if high < 1e9 else f" from {low:g} to {high}"
    parts = []
    if low is not None:
        parts.append(f"at least {low:g}")
    if above is not None:
        parts.append(f"above {above:g}")
    if high is not None:
        parts.append(f"at most {high:g}")
    if below is not None:
        parts.append(f"below {below:g}")
    return " " + " and ".join(parts) if parts else ""


# -- overrides -------------------------------------------------------------------------------------


def _override(
    data: Any,
    overrides: Sequence[str],
    marks: Marks,
    plugins: Plugins | None,
    base: PathLike | None = None,
) -> tuple[Any, Marks]:
    """Plain data with values replaced, and where each was written."""
    if not overrides:
        return data, marks
    data, marks = _copied(data), dict(marks)
    for text in overrides:
        place, equals, value = text.partition("=")
        option = f"--set {place}"
        parts = place.strip().split(".")
        if not equals or not all(parts):
            raise WorkflowError(
                f"--set {text!r} should be place=value: passes.0.prompt=a red circle"
            )
        holder, at = data, list[str | int]()
        for position, part in enumerate(parts):
            key = _key(holder, part, option, at, leaf=position == len(parts) - 1)
            at.append(key)
            if position < len(parts) - 1:
                if len(at) == 4 and at[0] == "passes" and at[2] == "edits":
                    holder[key] = _spelt(holder[key])
                holder = holder[key]
        holder[at[-1]] = _rebased(parse_scalar(value), at, base, plugins)
        marks = {mark: said for mark, said in marks.items() if mark[: len(at)] != tuple(at)}
        marks[tuple(at)] = option
    return data, marks


def _copied(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copied(value) for key, value in data.items()}
    return [_copied(value) for value in data] if isinstance(data, list | tuple) else data


def _spelt(edit: Any) -> Any:
    """An edit as a mapping of its name to a mapping of its parameters."""
    if isinstance(edit, str):
        return {edit: {}}
    if isinstance(edit, dict):
        return {key: {} if value is None else value for key, value in edit.items()}
    return edit


def _key(holder: Any, part: str, option: str, at: Sequence[str | int], *, leaf: bool) -> str | int:
    here = ".".join(map(str, at)) or "a workflow"
    if isinstance(holder, list):
        if part.isdecimal() and int(part) < len(holder):
            return int(part)
        there = ", ".join(map(str, range(len(holder)))) or "nothing"
    elif isinstance(holder, dict):
        # What does not stand there may still be a parameter with a default: reading will tell.
        if leaf or part in holder:
            return part
        there = ", ".join(map(str, holder)) or "nothing"
    else:
        raise WorkflowError(f"{option}: {here} is {_shown(holder)}, which has no parts")
    raise WorkflowError(f"{option}: no {part!r} in {here}, which has {there}")


def _rebased(
    value: Any, at: Sequence[str | int], base: PathLike | None, plugins: Plugins | None
) -> Any:
    """Make an image path absolute: it counts from where the override is given."""
    if not isinstance(value, str) or len(at) != 6 or value[:5].lower() == "data:":
        return value
    cls = _edits(plugins).get(str(at[4]))
    known = parameters(cls).get(str(at[5])) if cls else None
    if known is None or not {"image", "mask"} & set(known.type.split(" or ")):
        return value
    return str(Path(base or ".").absolute() / Path(value).expanduser())


# -- YAML ------------------------------------------------------------------------------------------
#
# ruamel.yaml parses and emits; what a plain scalar means is decided here, by the core schema of
# YAML 1.2, whatever a %YAML directive says. Its own tables also know dates, and 1_000 as a number.

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_INT = re.compile(r"[-+]?[0-9]{1,400}")
_OCTAL, _HEX = re.compile(r"0o[0-7]+"), re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF, _NAN = re.compile(r"([-+]?)\.(inf|Inf|INF)"), re.compile(r"\.(nan|NaN|NAN)")
_DEEPEST = 64
_TAG = "tag:yaml.org,2002:"
_CORE = ("bool", "float", "int", "map", "null", "seq", "str")
_TAGS = {"", "!", *(_TAG + name for name in _CORE)}


def _scalar(text: str) -> Any:
    """What a plain scalar means in YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INF.fullmatch(text):
        return float(f"{match[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text


def parse_scalar(text: str) -> Any:
    """A value given in an option: JSON (lists, mappings, quoted text) or a YAML scalar."""
    if text.strip()[:1] in ("[", "{", '"'):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return _scalar(text.strip()) if _scalar(text.strip()) != text.strip() else text


def _read_text(path: Path) -> str:
    right = "should be a workflow file (YAML)"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise WorkflowError(f"{path} does not exist, {right}") from None
    except IsADirectoryError:
        raise WorkflowError(f"{path} is a folder, {right}") from None
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{path} cannot be read ({error})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise WorkflowError(f"{path} is not text in UTF-8, {right}") from None


def read_yaml(text: str, where: str) -> tuple[Any, Marks]:
    """Plain data from YAML 1.2 text, and where each part of it stands.

    Only text, numbers, true, false, null, lists and mappings: tags never make objects.

    Raises:
        WorkflowError: names line and column.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        reader = _Reader(YAML(typ="safe", pure=True).parse(io.StringIO(text)), where)
        return reader.document(), reader.marks
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        said = error.problem or error.context or "cannot be read"
        raise WorkflowError(_line(f"{spot}: not YAML: {said}")) from None
    except ReaderError as error:
        before = text[: error.position]
        spot = f"{where}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise WorkflowError(f"{spot}: not YAML: a control character") from None
    except (YAMLError, ValueError) as error:
        if isinstance(error, WorkflowError):
            raise
        raise WorkflowError(_line(f"{where}: not YAML: {error}")) from None
    except RecursionError:
        raise WorkflowError(f"{where}: not a workflow: nested too deeply") from None


class _Reader:
    """Builds plain data from a parser's events."""

    def __init__(self, events: Iterator[Event], where: str) -> None:
        self.events = iter(events)
        self.where = where
        self.marks: dict[tuple[str | int, ...], str] = {}
        self.anchors: dict[str, Any] = {}

    def document(self) -> Any:
        found: list[Any] = []
        for event in self.events:
            if type(event).__name__ == "DocumentStartEvent":
                if found:
                    raise WorkflowError(f"{self.spot(event)}: a second document ('---')")
                found.append(self.node(next(self.events), ()))
        return found[0] if found else None

    def spot(self, event: Event) -> str:
        mark = event.start_mark
        return f"{self.where}:{mark.line + 1}:{mark.column + 1}"

    def node(self, event: Any, path: tuple[str | int, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise RecursionError
        self.marks.setdefault(path, self.spot(event))
        kind = type(event).__name__
        if kind == "AliasEvent":
            if event.anchor not in self.anchors:
                raise WorkflowError(f"{self.spot(event)}: no &{event.anchor} stands before this")
            return self.anchors[event.anchor]
        tag = str(event.tag or "")
        if tag not in _TAGS:
            raise WorkflowError(
                f"{self.spot(event)}: {_shown(tag)} is a tag, which no workflow has"
            )
        value: Any
        if kind == "ScalarEvent":
            plain = event.style is None and tag not in ("!", _TAG + "str")
            value = _scalar(event.value) if plain else event.value
        elif kind == "SequenceStartEvent":
            value = []
            while type(item := next(self.events)).__name__ != "SequenceEndEvent":
                value.append(self.node(item, (*path, len(value))))
        else:
            value = {}
            while type(key := next(self.events)).__name__ != "MappingEndEvent":
                self.entry(key, path, value)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def entry(self, event: Any, path: tuple[str | int, ...], into: dict[str, Any]) -> None:
        key = self.node(event, (*path, "?")) if type(event).__name__ != "AliasEvent" else None
        self.marks.pop((*path, "?"), None)
        if not isinstance(key, str):
            said = "" if key is None else f"{_shown(key)} "
            raise WorkflowError(f"{self.spot(event)}: the key {said}should be a word")
        if key in into:
            raise WorkflowError(f"{self.spot(event)}: {key!r} stands here a second time")
        self.marks[*path, key] = self.spot(event)
        into[key] = self.node(next(self.events), (*path, key))


class _Flow(dict[str, Any]):
    """A mapping written in one line."""


class _Row(list[Any]):
    """A list written in one line."""


#: Text that needs no quotes, whoever reads it.
_PLAIN = re.compile(r"[A-Za-z_./][\w ./+-]*(?<! )", re.ASCII)


@functools.cache
def _representer() -> type[Any]:
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """Safe; quotes every text that could be read as something else."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def text(self, data: str) -> Any:
            style = None if _PLAIN.fullmatch(data) and _scalar(data) == data else '"'
            return self.represent_scalar(_TAG + "str", data, style=style)

        def number(self, data: float) -> Any:
            return self.represent_scalar(_TAG + "float", _spell(data))

        def flow(self, data: _Flow) -> Any:
            return self.represent_mapping(_TAG + "map", data, flow_style=True)

        def row(self, data: _Row) -> Any:
            return self.represent_sequence(_TAG + "seq", data, flow_style=True)

    Representer.add_representer(str, Representer.text)
    Representer.add_representer(float, Representer.number)
    Representer.add_representer(_Flow, Representer.flow)
    Representer.add_representer(_Row, Representer.row)
    return Representer


def _spell(number: float) -> str:
    if number != number:
        return ".nan"
    return repr(number).replace("inf", ".inf")
