"""What an edit is: a value, and the order in which the edits of a pass act.

An `Edit` is a frozen, typed set of parameters. `Edit.contribute` turns it into a `Contribution`, a
record of what it adds to the sampling of its pass (`diffedit.contribution`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffedit.errors import ConflictError, ParameterError, nearest

if TYPE_CHECKING:
    from diffedit.box import Box
    from diffedit.contribution import Contribution
    from diffedit.images import Picture
    from diffedit.run import Run

T = TypeVar("T")
Stage = Literal["early", "normal", "late"]
_STAGES: Mapping[Stage, int] = {"early": 0, "normal": 1, "late": 2}


class Edit(BaseModel):
    """A value that says how to change a picture; plugins subclass it.

    Subclasses set `name`, `version` and, where they must come first or last, `stage`, declare their
    parameters as pydantic fields, and implement `contribute`. What they cannot do without of a
    model's capabilities stands in `needs`, and is asked for before anything is loaded.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings"
    )

    name: ClassVar[str]
    version: ClassVar[str] = "0.0.0"
    stage: ClassVar[Stage] = "normal"
    needs: ClassVar[frozenset[str]] = frozenset()

    id: str | None = Field(
        None,
        description="A name for this edit within its pass",
        json_schema_extra={"advanced": True},
    )
    after: str | None = Field(
        None,
        description="The id of an edit of the same pass that acts before this one",
        json_schema_extra={"advanced": True},
    )

    def region(self, image: Picture) -> Box | None:
        """The part of the image this edit works on, context margin included; None: no wish.

        Pure geometry, asked before anything is encoded. The pass works on the union of these boxes
        and of the masks of edits without a wish; on the whole image if there are none.

        Args:
            image: the picture so far (the first of a batch).
        """
        return None

    def contribute(self, run: Run) -> Contribution:
        """What this edit adds to the pass. Draws no random numbers and calls no model."""
        raise NotImplementedError(f"{type(self).__name__} does not implement contribute()")

    @property
    def scope(self) -> str:
        """What the names of this edit's branches and rows begin with: its id, else its name."""
        return self.id or self.name

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the outcome: name, version and parameters, images by pixels."""
        return _digest(self)


class Windowed(Edit):
    """An edit that acts in a part of the steps; its contribution is to act `during` it."""

    start: float = Field(
        0.0,
        ge=0,
        le=1,
        description="From which fraction of the steps on",
        json_schema_extra={"advanced": True},
    )
    end: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Up to which fraction of the steps",
        json_schema_extra={"advanced": True},
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start {self.start:g} lies after end {self.end:g}")
        return self

    @property
    def during(self) -> tuple[float, float]:
        """The fractions as `Contribution.during` takes them."""
        return self.start, self.end


def _stable(value: object) -> object:
    """A JSON value that is equal just when the parameter is."""
    if hasattr(value, "digest"):
        return value.digest
    if isinstance(value, BaseModel):
        return {key: _stable(item) for key, item in value}
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_stable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _digest(edit: Edit, without: Sequence[str] = ()) -> str:
    left_out = ("id", "after", *without)
    said = {key: _stable(value) for key, value in edit if key not in left_out}
    text = json.dumps([edit.name, edit.version, said], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _rank(edit: Edit) -> tuple[str, list[str], str]:
    """What two edits of a name are ordered by: paths from their ends, and last where they lie."""
    values = sorted((key, value) for key, value in edit if isinstance(value, str))
    paths = {key: PurePath(value) for key, value in values if PurePath(value).is_absolute()}
    ends = ["/".join(reversed(path.parts)) for path in paths.values()]
    return _digest(edit, tuple(paths)), ends, edit.digest


def canonical(edits: Iterable[Edit]) -> list[Edit]:
    """The order in which the edits of a pass act: by stage, name and digest, `after` obeyed.

    Sums of floats depend on their order, so the order must not depend on how a user lists them, nor
    on where the folder lies that has the files they name.
    """
    ranked = sorted(edits, key=lambda e: (_STAGES[e.stage], e.name, *_rank(e), e.id or ""))
    ids = [edit.id for edit in ranked if edit.id is not None]
    for twice in {i for i in ids if ids.count(i) > 1}:
        raise ParameterError(f"two edits of one pass have the id {twice!r}")
    for edit in ranked:
        if edit.after is not None and edit.after not in ids:
            raise ParameterError(
                f"{edit.name}: after: {edit.after!r} is no edit's id in this pass"
                f"{nearest(edit.after, ids)}"
            )
    done: list[Edit] = []
    waiting = list(ranked)
    while waiting:
        placed = {edit.id for edit in done}
        free = (n for n, e in enumerate(waiting) if e.after is None or e.after in placed)
        ready = next(free, None)
        if ready is None:
            names = ", ".join(repr(e.id or e.name) for e in waiting)
            raise ConflictError(f"the 'after' of {names} form a circle")
        done.append(waiting.pop(ready))  # by its place: an edit may be listed twice
    return done


def labels(edits: Sequence[Edit]) -> list[str]:
    """What to call each edit of a pass: its id, else its name, numbered where a name repeats."""
    names = [edit.name for edit in edits]
    said: list[str] = []
    for position, edit in enumerate(edits):
        number = f".{names[:position].count(edit.name) + 1}" if names.count(edit.name) > 1 else ""
        said.append(edit.id or edit.name + number)
    return said
