"""Forms come from the edits' own schemas, and give back what the edits accept."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

import diffedit
from diffedit import Contribution, Edit, MaskField, Pass, Run
from diffedit_demo.forms import fields, pass_fields

REGISTRIES = {"preprocessors": ("none", "canny")}


class Mood(Enum):
    calm = "calm"
    wild = "wild"


class Inner(BaseModel):
    x: int = 0


class Everything(Edit):
    """One parameter of each sort."""

    name: ClassVar[str] = "everything"
    version: ClassVar[str] = "1.0.0"

    mask: MaskField
    mood: Mood = Mood.calm
    word: Literal["one", "two"] = "two"
    only: Literal["this"] = "this"
    on: bool = True
    share: float = Field(0.5, ge=0, le=1, description="How much of it")
    open: float = Field(0.5, gt=0, lt=1, json_schema_extra={"step": 0.05})
    maybe: Annotated[int, Field(ge=0, le=9)] | None = None
    huge: int = Field(3, ge=0, le=10**9)
    either: int | str = "x"
    said: str = Field("", max_length=9)
    many: tuple[int, ...] = ()
    inner: Inner = Inner()
    folded: int = Field(1, ge=0, le=3, json_schema_extra={"advanced": True})

    def contribute(self, run: Run) -> Contribution:
        return Contribution()


FIELDS = {one.name: one for one in fields(Everything.model_json_schema(), REGISTRIES)}


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "mask": "mask",
        "mood": "choice",
        "word": "choice",
        "only": "choice",
        "on": "switch",
        "share": "slider",
        "open": "slider",
        "maybe": "number",
        "huge": "number",
        "either": "text",
        "said": "text",
        "folded": "slider",
    }.items(),
)
def test_every_sort_of_parameter_has_its_widget(name: str, kind: str) -> None:
    assert FIELDS[name].kind == kind


def test_lists_and_records_are_left_to_workflow_files() -> None:
    assert not {"many", "inner"} & set(FIELDS)


def test_bounds_help_and_folding_come_from_the_schema() -> None:
    assert (FIELDS["share"].low, FIELDS["share"].high, FIELDS["share"].step) == (0, 1, 0.01)
    assert (FIELDS["open"].low, FIELDS["open"].high) == (0.05, 0.95)
    assert FIELDS["share"].help == "How much of it"
    assert FIELDS["mood"].choices == ("calm", "wild")
    assert FIELDS["maybe"].nullable
    assert FIELDS["mask"].required
    assert [one.name for one in FIELDS.values() if one.advanced] == ["id", "after", "folded"]
    assert [one.advanced for one in FIELDS.values()][-3:] == [True] * 3


@pytest.mark.parametrize("name", sorted(diffedit.edits()))
def test_what_a_form_shows_untouched_is_what_the_edit_is_by_default(name: str) -> None:
    cls = diffedit.edits()[name]
    found = fields(cls.model_json_schema(), REGISTRIES)
    assert len(found) == len(cls.model_fields)
    for one in found:
        assert one.required == cls.model_fields[one.name].is_required()
        if not one.required:
            assert cls.model_fields[one.name].default == one.default


def test_choices_are_filled_at_run_time() -> None:
    (kind,) = (
        one
        for one in fields(diffedit.edits()["controlnet"].model_json_schema(), REGISTRIES)
        if one.name == "kind"
    )
    assert (kind.kind, kind.choices, kind.free) == ("choice", ("none", "canny"), True)


def test_a_pass_has_a_form_too() -> None:
    found = {
        one.name: one
        for one in pass_fields(
            Pass.model_json_schema(), {"schedulers": ["ddim"], "models": ["tiny"]}
        )
    }
    assert found["prompt"].kind == "text"
    assert (found["steps"].kind, found["steps"].low, found["steps"].high) == ("number", 1, 1000)
    assert found["scheduler"].choices == ("ddim",)
    assert found["scheduler"].nullable
    assert [one.name for one in found.values() if not one.advanced] == ["prompt"]
    assert "edits" not in found
