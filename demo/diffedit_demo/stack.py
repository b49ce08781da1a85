"""What the page shows as a stack of passes and edits, as a value; and the workflow it stands for.

The widgets of the page hold what is being typed; every event brings their values here before
anything else happens, so that nothing typed is lost. Nothing here knows Gradio.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from diffedit import Pass, Workflow

PASS_FIELDS = tuple(name for name in Pass.model_fields if name != "edits")

Values = Mapping[str, Any]
"""Parameters by name, as JSON holds them; a picture or mask is a `Pick`."""


class Pick(str):
    """Which picture a parameter takes.

    ``"layer:A"`` (a painted mask), ``"source"`` (the picture being edited), ``"result:ID"`` (an
    earlier result), ``"file:PATH"`` or the picture itself, ``"data:image/…"``.
    """

    __slots__ = ()


Picks = Callable[[Pick], Any]
"""What a pick stands for: a picture in any form that `ImageField` takes; None leaves it out."""


def _uid() -> str:
    return secrets.token_hex(4)


def _known(values: Values) -> frozenset[tuple[str, str]]:
    """Parameters as something that can be hashed, which Gradio asks of a state."""
    return frozenset((name, repr(value)) for name, value in values.items())


@dataclass(frozen=True)
class EditItem:
    """An edit on the page; `values` holds what was set, not the defaults."""

    name: str
    values: Values = field(default_factory=dict)
    enabled: bool = True
    uid: str = field(default_factory=_uid)

    def __hash__(self) -> int:
        return hash((self.name, _known(self.values), self.enabled, self.uid))


@dataclass(frozen=True)
class PassItem:
    """A pass on the page."""

    values: Values = field(default_factory=dict)
    edits: tuple[EditItem, ...] = ()
    enabled: bool = True
    uid: str = field(default_factory=_uid)

    def __hash__(self) -> int:
        return hash((_known(self.values), self.edits, self.enabled, self.uid))


Item = PassItem | EditItem


@dataclass(frozen=True)
class Stack:
    """The passes of the page, in order. Every change gives a new stack."""

    passes: tuple[PassItem, ...] = ()

    def items(self) -> Iterator[Item]:
        """All passes and edits, as they stand on the page."""
        for one in self.passes:
            yield one
            yield from one.edits

    def find(self, uid: str) -> Item | None:
        """The pass or edit of that name; None where it has been removed meanwhile."""
        return next((item for item in self.items() if item.uid == uid), None)

    def with_values(self, values: Mapping[str, Values]) -> Self:
        """Take over what stands in the widgets, by uid; uids that are gone are passed over."""
        return self._each(
            lambda item: (
                replace(item, values={**item.values, **values[item.uid]})
                if item.uid in values
                else item
            )
        )

    def enabled(self, uid: str, on: bool) -> Self:
        """Let a pass or edit act, or not; its parameters stay."""
        return self._each(lambda item: replace(item, enabled=on) if item.uid == uid else item)

    def add_pass(self, values: Values | None = None, *edits: EditItem) -> Self:
        """One more pass, at the end."""
        return replace(self, passes=(*self.passes, PassItem(dict(values or {}), edits)))

    def add_edit(self, pass_uid: str, name: str, values: Values | None = None) -> Self:
        """One more edit at the end of a pass."""
        return self._passes(
            lambda one: (
                replace(one, edits=(*one.edits, EditItem(name, dict(values or {}))))
                if one.uid == pass_uid
                else one
            )
        )

    def removed(self, uid: str) -> Self:
        """Without that pass or edit."""
        left = tuple(
            replace(one, edits=tuple(edit for edit in one.edits if edit.uid != uid))
            for one in self.passes
            if one.uid != uid
        )
        return replace(self, passes=left)

    def duplicated(self, uid: str) -> Self:
        """A copy of a pass or edit, behind it; an edit's `id`, which is its own, is left out."""
        passes: list[PassItem] = []
        for one in self.passes:
            edits = []
            for edit in one.edits:
                edits.append(edit)
                if edit.uid == uid:
                    values = {k: v for k, v in edit.values.items() if k != "id"}
                    edits.append(replace(edit, values=values, uid=_uid()))
            passes.append(replace(one, edits=tuple(edits)))
            if one.uid == uid:
                copies = tuple(replace(edit, uid=_uid()) for edit in one.edits)
                passes.append(replace(one, edits=copies, uid=_uid()))
        return replace(self, passes=tuple(passes))

    def moved(self, uid: str, by: int) -> Self:
        """A pass or edit moved by so many places; an edit that leaves its pass enters the next."""
        whole = [one.uid for one in self.passes]
        if uid in whole:
            return replace(self, passes=_shifted(self.passes, whole.index(uid), by))
        for at, one in enumerate(self.passes):
            names = [edit.uid for edit in one.edits]
            if uid not in names:
                continue
            place = names.index(uid)
            if 0 <= place + by < len(names):
                return self._replaced(at, replace(one, edits=_shifted(one.edits, place, by)))
            other = at + (1 if by > 0 else -1)
            if not 0 <= other < len(self.passes):
                return self
            edit = one.edits[place]
            rest = tuple(e for e in one.edits if e.uid != uid)
            there = self.passes[other].edits
            joined = (edit, *there) if by > 0 else (*there, edit)
            left = self._replaced(at, replace(one, edits=rest))
            return left._replaced(other, replace(self.passes[other], edits=joined))
        return self

    # --- the workflow it stands for ---------------------------------------------------------------

    def data(self, picks: Picks) -> dict[str, Any]:
        """The passes that act, as `Workflow.from_data` reads them.

        A parameter that is None or whose pick stands for nothing is left out.
        """
        return {
            "diffedit": 1,
            "passes": [
                {
                    **_said(one.values, picks),
                    "edits": [{e.name: _said(e.values, picks)} for e in one.edits if e.enabled],
                }
                for one in self.passes
                if one.enabled
            ],
        }

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
    def of(cls, workflow: Workflow) -> Self:
        """The stack that shows a workflow; its pictures become picks."""
        said = workflow.model_dump(mode="json", exclude_unset=True)
        passes = []
        for written, one in zip(said["passes"], workflow.passes, strict=True):
            edits = []
            for edit in one.edits:
                values = edit.model_dump(mode="json", exclude_unset=True)
                pictures = _pictures(type(edit).model_json_schema())
                edits.append(
                    EditItem(
                        edit.name,
                        {
                            name: _pick(value) if name in pictures and value else value
                            for name, value in values.items()
                        },
                    )
                )
            values = {name: written[name] for name in PASS_FIELDS if name in written}
            passes.append(PassItem(values, tuple(edits)))
        return cls(tuple(passes))

    # --- helpers ----------------------------------------------------------------------------------

    def _passes(self, change: Callable[[PassItem], PassItem]) -> Self:
        return replace(self, passes=tuple(change(one) for one in self.passes))

    def _each(self, change: Callable[[Any], Any]) -> Self:
        return self._passes(
            lambda one: replace(change(one), edits=tuple(change(edit) for edit in one.edits))
        )

    def _replaced(self, at: int, one: PassItem) -> Self:
        return replace(self, passes=(*self.passes[:at], one, *self.passes[at + 1 :]))


def _shifted(items: tuple[Any, ...], at: int, by: int) -> tuple[Any, ...]:
    rest = [*items[:at], *items[at + 1 :]]
    rest.insert(min(max(0, at + by), len(rest)), items[at])
    return tuple(rest)


def _said(values: Values, picks: Picks) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, Pick):
            value = picks(value)
        if value is not None:
            found[name] = value
    return found


def _pick(value: str) -> Pick:
    return Pick(value if value.startswith("data:") else f"file:{value}")


def _pictures(schema: Mapping[str, Any]) -> set[str]:
    """The parameters that are pictures or masks."""
    return {
        name
        for name, said in schema.get("properties", {}).items()
        if any(one.get("format") in ("image", "mask") for one in (said, *said.get("anyOf", ())))
    }
