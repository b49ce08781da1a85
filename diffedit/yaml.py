"""YAML 1.2 text and plain data: text, numbers, true, false, null, lists and mappings.

ruamel.yaml composes and emits; what a plain scalar means is decided here, by the core schema of
YAML 1.2, whatever a %YAML directive says. Its own tables also know dates, and 1_000 as a number.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from diffedit.errors import WorkflowError

if TYPE_CHECKING:
    from ruamel.yaml import YAML

#: Where things were written, by their path: ``workflow.yaml:8:7``, or an option: ``--steps``.
Marks = Mapping[tuple[str | int, ...], str]

_TAG = "tag:yaml.org,2002:"
_SCHEMA: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (
        r"[-+]?[0-9]{1,400}|0o[0-7]+|0x[0-9a-fA-F]+",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    ),
    "str": (r"(?s:.*)", str),
}


#: Text that needs no quotes, whoever reads it.
_PLAIN = re.compile(r"[A-Za-z_./][\w ,./+-]*(?<! )", re.ASCII)


def _kind(text: str) -> str:
    return next(kind for kind, (pattern, _) in _SCHEMA.items() if re.fullmatch(pattern, text))


def parse_scalar(text: str) -> Any:
    """A value given in an option: JSON (lists, mappings, quoted text) or a YAML scalar."""
    bare = text.strip()
    if bare[:1] in ("[", "{", '"'):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(bare)
    kind = _kind(bare)
    return text if kind == "str" else _SCHEMA[kind][1](bare)


def parse(text: str, where: str) -> tuple[Any, Marks]:
    """Plain data from YAML 1.2 text, and where each part of it stands. Tags never make objects.

    Raises:
        WorkflowError: names line and column.
    """
    from ruamel.yaml.error import YAMLError

    try:
        pictures = _Pictures(text)
        reader = _Reader(where, pictures)
        root = _yaml().compose(pictures.taken_out(text))
        return None if root is None else reader.read(root, ()), reader.marks
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        spot = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        raise WorkflowError(f"{spot}: not YAML: {said}") from None
    except RecursionError:
        raise WorkflowError(f"{where}: not a workflow: nested too deeply") from None


class _Pictures:
    """Takes pictures (``data:…;base64,…``) out of a text and puts them back.

    ruamel.yaml looks at each character several times in Python: seconds for a megabyte.
    """

    _long = re.compile(r"(?<=;base64,)[A-Za-z0-9+/=]{64,}")

    def __init__(self, text: str) -> None:
        self.held: list[str] = []
        self.sign = "@"
        while f";base64,{self.sign}" in text:
            self.sign += "@"
        self._back = re.compile(rf"(?<=;base64,){self.sign}([0-9]+)")

    def taken_out(self, text: str) -> str:
        def hold(found: re.Match[str]) -> str:
            self.held.append(found[0])
            return f"{self.sign}{len(self.held) - 1}"

        return self._long.sub(hold, text)

    def taken_out_of(self, data: Any) -> Any:
        match data:
            case str():
                return self.taken_out(data)
            case dict():
                return {key: self.taken_out_of(value) for key, value in data.items()}
            case list():
                return [self.taken_out_of(value) for value in data]
        return data

    def put_back(self, text: str) -> str:
        return self._back.sub(lambda found: self.held[int(found[1])], text) if self.held else text


class _Reader:
    """Builds plain data from composed nodes; what an alias repeats is built once."""

    def __init__(self, where: str, pictures: _Pictures) -> None:
        self.where = where
        self.pictures = pictures
        self.marks: dict[tuple[str | int, ...], str] = {}
        self.built: dict[int, Any] = {}

    def spot(self, node: Any) -> str:
        return f"{self.where}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def read(self, node: Any, path: tuple[str | int, ...]) -> Any:
        self.marks.setdefault(path, self.spot(node))
        if id(node) not in self.built:
            self.built[id(node)] = self.build(node, path)
        return self.built[id(node)]

    def build(self, node: Any, path: tuple[str | int, ...]) -> Any:
        match node.id, str(node.tag).removeprefix(_TAG):
            case "sequence", "seq":
                return [self.read(item, (*path, at)) for at, item in enumerate(node.value)]
            case "mapping", "map":
                found: dict[str, Any] = {}
                for key, value in node.value:
                    if key.tag != _TAG + "str":
                        raise WorkflowError(f"{self.spot(key)}: a key should be a word")
                    if key.value in found:
                        raise WorkflowError(f"{self.spot(key)}: {key.value!r} stands here twice")
                    self.marks[*path, key.value] = self.spot(key)
                    found[key.value] = self.read(value, (*path, key.value))
                return found
            case "scalar", kind if kind in _SCHEMA:
                with contextlib.suppress(ValueError):
                    return _SCHEMA[kind][1](self.pictures.put_back(node.value))
        raise WorkflowError(f"{self.spot(node)}: no workflow has the tag {str(node.tag)!r}")


def dump(data: Any) -> str:
    """YAML text; what holds nothing but plain values stands in one line."""
    pictures = _Pictures(json.dumps(data, default=str))
    text = io.StringIO()
    _yaml().dump(pictures.taken_out_of(data), text)
    return pictures.put_back(text.getvalue())


@functools.cache
def _classes() -> tuple[type[Any], type[Any]]:
    """How plain scalars are understood, and how text is written."""
    from ruamel.yaml.nodes import ScalarNode
    from ruamel.yaml.representer import SafeRepresenter
    from ruamel.yaml.resolver import VersionedResolver
    from ruamel.yaml.tag import Tag

    class Resolver(VersionedResolver):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            if kind is ScalarNode and implicit[0]:
                return Tag(suffix=_TAG + _kind(value))
            return super().resolve(kind, value, implicit)

    class Representer(SafeRepresenter):
        def text(self, data: str) -> Any:  # left to itself, ruamel.yaml loses some line separators
            style = None if _PLAIN.fullmatch(data) else '"'
            return self.represent_scalar(_TAG + "str", data, style)

    Representer.add_representer(str, Representer.text)
    return Resolver, Representer


def _yaml() -> YAML:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer = _classes()
    yaml.default_flow_style = None
    yaml.allow_unicode = True
    yaml.width = 2**16
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml
