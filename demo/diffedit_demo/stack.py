"""What the page shows as a stack of passes and edits, as a value; and the workflow it stands for.

The browser changes it (`composer`); here it is read, checked and made a workflow of. Nothing here
knows Gradio.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import StringConstraints, TypeAdapter, ValidationError

from diffedit import Pass, Workflow
from diffedit.errors import WorkflowError

PASS_FIELDS = tuple(name for name in Pass.model_fields if name != "edits")

MOST_PASSES = 32
MOST_EDITS = 32
"""In a pass."""

Values = Mapping[str, Any]
"""Parameters by name, as JSON holds them."""

Uid = Annotated[str, StringConstraints(pattern=r"^[\w-]{1,32}$")]

Picks = Callable[[str, str], Any]
"""What stands for a picture: takes where it is said (``"A mask"``, say) and the pick."""


def new_uid() -> str:
    """A name that no other item has."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class EditItem:
    """An edit on the page; `values` holds what was set, not the defaults.

    A parameter that is a picture holds a pick: ``"layer:A"`` (a painted mask), ``"source"`` (the
    picture being edited), ``"result:ID"`` (an earlier one), ``"own:NAME"`` (a file from the
    browser).
    """

    name: str
    values: Values = field(default_factory=dict)
    enabled: bool = True
    uid: Uid = field(default_factory=new_uid)


@dataclass(frozen=True)
class PassItem:
    """A pass on the page."""

    values: Values = field(default_factory=dict)
    edits: tuple[EditItem, ...] = ()
    enabled: bool = True
    uid: Uid = field(default_factory=new_uid)


Item = PassItem | EditItem


@dataclass(frozen=True)
class Stack:
    """The passes of the page, in order."""

    passes: tuple[PassItem, ...] = ()

    def items(self) -> Iterator[Item]:
        """All passes and edits, as they stand on the page."""
        for one in self.passes:
            yield one
            yield from one.edits

    def find(self, uid: str) -> Item | None:
        """The pass or edit of that name; None where it has been removed meanwhile."""
        return next((item for item in self.items() if item.uid == uid), None)

    # --- to and from the page ---------------------------------------------------------------------

    def to_page(self) -> list[dict[str, Any]]:
        """As the browser holds it."""
        return [
            {
                "uid": one.uid,
                "enabled": one.enabled,
                "values": dict(one.values),
                "edits": [
                    {
                        "uid": edit.uid,
                        "name": edit.name,
                        "enabled": edit.enabled,
                        "values": dict(edit.values),
                    }
                    for edit in one.edits
                ],
            }
            for one in self.passes
        ]

    @classmethod
    def from_page(cls, passes: Any) -> Self:
        """What a browser sent; parameters are checked when a workflow is made of them.

        Raises:
            WorkflowError: it is no stack, or a larger one than pages make.
        """
        try:
            made = cls(_PASSES.validate_python(passes))
        except ValidationError as error:
            one = error.errors()[0]
            where = ".".join(str(part) for part in one["loc"])
            raise WorkflowError(f"no stack of passes: {where}: {one['msg']}") from None
        if len(made.passes) > MOST_PASSES:
            raise WorkflowError(f"more than {MOST_PASSES} passes")
        if any(len(one.edits) > MOST_EDITS for one in made.passes):
            raise WorkflowError(f"more than {MOST_EDITS} edits in a pass")
        uids = [item.uid for item in made.items()]
        if len(set(uids)) < len(uids):
            raise WorkflowError("no stack of passes: two items have the same uid")
        return made

    # --- the workflow it stands for ---------------------------------------------------------------

    def data(self, pictures: Mapping[str, frozenset[str]], picks: Picks) -> dict[str, Any]:
        """The passes that act, as `Workflow.from_data` reads them.

        A parameter that is None or whose pick stands for nothing is left out.

        Args:
            pictures: the parameters of each edit that are pictures, see `picture_parameters`.
            picks: what a pick stands for, given the place and the pick; None leaves it out.
        """
        acting = [one for one in self.passes if one.enabled]
        passes = []
        for number, one in enumerate(acting):
            edits = []
            for place, edit in enumerate(e for e in one.edits if e.enabled):
                where = f"passes.{number}.edits.{place}.{edit.name}"
                values = {
                    name: picks(f"{where}.{name}", value)
                    if name in pictures.get(edit.name, ()) and value is not None
                    else value
                    for name, value in edit.values.items()
                }
                edits.append({edit.name: _said(values)})
            passes.append({**_said(one.values), "edits": edits})
        return {"diffedit": 1, "passes": passes}

    def at(self, place: str) -> tuple[str, str] | None:
        """The uid and the field that a place of an error names: ``passes.0.edits.1.paint.size``."""
        parts = place.split(".")
        acting = [one for one in self.passes if one.enabled]
        try:
            one = acting[int(parts[1])] if parts[0] == "passes" else None
            if one is None:
                return None
            if parts[2:3] != ["edits"]:
                return one.uid, ".".join(parts[2:])
            edit = [e for e in one.edits if e.enabled][int(parts[3])]
        except (IndexError, ValueError):
            return None
        return edit.uid, ".".join(parts[5:])

    @classmethod
    def of(cls, workflow: Workflow, keep: Callable[[str], str]) -> Self:
        """The stack that shows a workflow.

        Args:
            keep: takes a picture as the workflow says it (a data URI) and gives a pick for it.
        """
        said = workflow.model_dump(mode="json", exclude_unset=True)
        passes = []
        for written, one in zip(said["passes"], workflow.passes, strict=True):
            edits = []
            for edit in one.edits:
                pictures = picture_parameters(type(edit).model_json_schema())
                values = edit.model_dump(mode="json", exclude_unset=True)
                picked = {
                    name: keep(value) if name in pictures and value else value
                    for name, value in values.items()
                }
                edits.append(EditItem(edit.name, picked))
            values = {name: written[name] for name in PASS_FIELDS if name in written}
            passes.append(PassItem(values, tuple(edits)))
        return cls(tuple(passes))


_PASSES: TypeAdapter[tuple[PassItem, ...]] = TypeAdapter(tuple[PassItem, ...])


def _said(values: Values) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def picture_parameters(schema: Mapping[str, Any]) -> frozenset[str]:
    """The parameters of an edit that are pictures or masks, by its JSON Schema."""
    return parameters_of(schema, ("image", "mask"))


def parameters_of(schema: Mapping[str, Any], formats: tuple[str, ...]) -> frozenset[str]:
    """The parameters whose schema has one of those formats."""
    return frozenset(
        name
        for name, said in schema.get("properties", {}).items()
        if any(one.get("format") in formats for one in (said, *said.get("anyOf", ())))
    )
