"""Passes and workflows: values that are the same in scripts, YAML, JSON and on a command line.

Places are written as dotted paths, ``passes.0.edits.1.inpaint.feather``.
"""

from __future__ import annotations

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
    FiniteFloat,
    ValidationError,
)

from diffedit import yaml
from diffedit.errors import OutputError, WorkflowError
from diffedit.explain import explained
from diffedit.fields import ImageField, ModelField
from diffedit.named import AnyEdit
from diffedit.overrides import override

if TYPE_CHECKING:
    from diffedit.plugins import Plugins

__all__ = ["Pass", "Workflow"]

PathLike = str | os.PathLike[str]


LARGEST = 16384
"""The largest side of a picture from nothing, in pixels."""


def _parse_size(value: Any) -> Any:
    said = value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", value)):
        value = int(match[1]), int(match[2])
    sides = value if isinstance(value, tuple | list) else ()
    if isinstance(said, str | int) and not (sides and all(1 <= one <= LARGEST for one in sides)):
        raise ValueError(
            f"{said!r} should be WIDTHxHEIGHT in pixels, each from 1 to {LARGEST}, such as 256x256"
        )
    return value


Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Side = Annotated[int, Field(ge=1, le=LARGEST)]


class Pass(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    """One trip through the sampler: a prompt, how to sample, and edits that act together."""

    prompt: str | None = Field(None, description="What the picture is to show")
    negative: str = Field("", description="What it is not to show")
    steps: int = Field(20, ge=1, le=1000, description="Sampling steps, before a strength cuts them")
    guidance: FiniteFloat = Field(
        5.0, ge=0, le=100, description="Guidance scale; 1 or less leaves the negative prompt out"
    )
    rescale: FiniteFloat = Field(
        0.0, ge=0, le=1, description="How far guidance keeps the unguided prediction's contrast"
    )
    true_guidance: FiniteFloat | None = Field(
        None,
        ge=0,
        le=100,
        description="Guidance away from the negative prompt, for models that take the guidance"
        " scale as an input (Flux); empty, or 1 or less: none",
    )
    scheduler: str | None = Field(
        None, min_length=1, description="Name of the sampler; empty: the model's own"
    )
    eta: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of noise that ddim or tcd draws at each step; empty: the usual one",
    )
    model: ModelField | None = Field(
        None,
        description="Another model for this pass, such as a refiner; empty: the workflow's",
    )
    stop: FiniteFloat = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of the way after which the next pass goes on from the latents as"
        " they are",
    )
    edits: tuple[AnyEdit, ...] = Field((), description="What acts in this pass, in any order")


class Workflow(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    """An ordered list of passes with a model and a seed."""

    diffedit: Literal[1] = Field(1, description="Version of this format")
    model: ModelField = Field(
        "tiny", description="The embedded model 'tiny', a folder, a file or a hub id"
    )
    seed: Seed | Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        0, description="Seed of all random numbers; a list makes one picture for each"
    )
    size: Annotated[tuple[Side, Side] | None, BeforeValidator(_parse_size)] = Field(
        None, description="Width and height of a picture made from nothing, in pixels"
    )
    passes: tuple[Pass, ...] = Field(min_length=1, description="What is done, one after another")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds as a tuple, one picture each."""
        return (self.seed,) if isinstance(self.seed, int) else self.seed

    def files(self) -> list[Path]:
        """The files that the edits' parameters name; none of them is ever written to."""
        return [handle.path for handle in _handles(self.model_dump()) if handle.path is not None]

    # -- reading -------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: PathLike, *, overrides: Sequence[str] = (), plugins: Plugins | None = None
    ) -> Self:
        """Read a workflow file, YAML 1.2 or JSON. Its relative paths count from its folder.

        Args:
            overrides: ``place=value``, applied before anything is checked: `passes.0.steps=7`.
                Their paths count from the working directory.
            plugins: where edits are looked up; default: all that are installed.

        Raises:
            WorkflowError: no such file, not YAML, or not a workflow. Names line and column.
            ParameterError: an unknown edit or parameter, or a value out of its range.
        """
        file = Path(path)
        try:
            text = file.read_text("utf-8-sig")
        except (OSError, ValueError) as error:  # not there, or not UTF-8
            said = f"cannot be read as a workflow ({getattr(error, 'strerror', None) or error})"
            raise WorkflowError(f"{file} {said}") from None
        return cls.from_yaml(
            text, base=file.parent, where=str(file), overrides=overrides, plugins=plugins
        )

    @classmethod
    def from_yaml(
        cls,
        text: str,
        *,
        base: PathLike | None = None,
        where: str = "workflow",
        overrides: Sequence[str] = (),
        plugins: Plugins | None = None,
        files: bool = True,
    ) -> Self:
        """Read a workflow from YAML or JSON text; arguments as for `load` and `from_data`."""
        data, marks = override(*yaml.parse(text, where), overrides, plugins)
        return cls.from_data(
            data, base=base, where=where, plugins=plugins, marks=marks, files=files
        )

    @classmethod
    def from_data(
        cls,
        data: Any,
        *,
        base: PathLike | None = None,
        where: str = "workflow",
        plugins: Plugins | None = None,
        marks: yaml.Marks | None = None,
        files: bool = True,
    ) -> Self:
        """Make a workflow of plain data, as YAML and JSON hold it.

        Args:
            base: the folder that relative paths count from; default: the working directory.
            where: what errors call the data.
            plugins: where edits are looked up; default: all that are installed.
            marks: where each part of the data was written, for errors.
            files: whether its pictures may be files; if not, they stand in it as data URIs. Models
                are named either way: who reads workflows of strangers checks these.

        Raises:
            InputError: not a workflow; one line says what, where and what would be right.
        """
        if not isinstance(data, Mapping):
            said = "is empty" if data is None else f"holds {reprlib.repr(data)}"
            raise WorkflowError(f"{where} {said}, should be a workflow with 'passes:'")
        try:
            return cls.model_validate(
                data, context={"base": base, "plugins": plugins, "files": files}
            )
        except ValidationError as error:
            raise explained(error, (cls, Pass), where, marks or {}, plugins) from None

    # -- writing -------------------------------------------------------------------------------

    def to_yaml(self, *, base: PathLike | None = None, store: PathLike | None = None) -> str:
        """The workflow as YAML, without parameters that nobody set.

        Args:
            base: paths below this folder are written relative to it.
            store: a folder that takes pictures in memory; None: they become data URIs.
        """
        context = {"base": base, "store": store}
        said = self.model_dump(mode="json", context=context, exclude_unset=True)
        return yaml.dump({"diffedit": 1, "model": self.model, "seed": self.seed} | said)

    def save(self, path: PathLike) -> Path:
        """Write a workflow file as YAML, whole or not at all.

        Pictures in memory are written beside it as PNG files; paths below its folder become
        relative to it.

        Raises:
            OutputError: the folder does not exist, or the file is one of the workflow's images.
        """
        file = Path(path)
        if not file.parent.is_dir():
            raise OutputError(f"{file}: the folder {file.parent} does not exist, create it first")
        if file.is_dir() or file.suffix == ".json":
            raise OutputError(f"{file}: should be a YAML file such as {file.with_suffix('.yaml')}")
        for used in self.files():
            if file.exists() and used.exists() and file.samefile(used):
                raise OutputError(f"{file} is an image of this workflow: name another output")
        try:
            _replace(file, self.to_yaml(base=file.parent, store=file.parent).encode())
        except OSError as error:
            raise OutputError(f"{file}: cannot write ({error.strerror or error})") from error
        return file


def _handles(value: Any) -> Iterator[ImageField]:
    if isinstance(value, ImageField):
        yield value
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _handles(inner)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # same folder: a rename is atomic
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
