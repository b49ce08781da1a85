"""The stack of the page: a value whose every change keeps the rest, and the workflow it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffedit import Workflow
from diffedit_demo.stack import EditItem, PassItem, Pick, Stack


def stack(*sizes: int) -> Stack:
    """Passes p0, p1, … with so many edits e00, e01, …"""
    return Stack(
        tuple(
            PassItem(
                {"prompt": f"prompt {p}"},
                tuple(EditItem("img2img", {}, uid=f"e{p}{e}") for e in range(size)),
                uid=f"p{p}",
            )
            for p, size in enumerate(sizes)
        )
    )


def outline(one: Stack) -> list[list[str]]:
    return [[item.uid, *(edit.uid for edit in item.edits)] for item in one.passes]


def test_values_of_widgets_are_taken_over_and_those_of_removed_ones_passed_over() -> None:
    one = stack(1, 1).with_values({"p1": {"steps": 7}, "e00": {"strength": 0.3}, "gone": {"x": 1}})
    assert one.passes[1].values == {"prompt": "prompt 1", "steps": 7}
    assert one.passes[0].edits[0].values == {"strength": 0.3}
    assert one.passes[0].values == {"prompt": "prompt 0"}


@pytest.mark.parametrize(
    ("uid", "by", "then"),
    [
        ("p1", -1, [["p1", "e10"], ["p0", "e00", "e01"]]),
        ("p1", 5, [["p0", "e00", "e01"], ["p1", "e10"]]),
        ("e00", 1, [["p0", "e01", "e00"], ["p1", "e10"]]),
        ("e01", 1, [["p0", "e00"], ["p1", "e01", "e10"]]),
        ("e10", -1, [["p0", "e00", "e01", "e10"], ["p1"]]),
        ("e10", 1, [["p0", "e00", "e01"], ["p1", "e10"]]),
        ("e00", -1, [["p0", "e00", "e01"], ["p1", "e10"]]),
        ("gone", 1, [["p0", "e00", "e01"], ["p1", "e10"]]),
    ],
)
def test_moving(uid: str, by: int, then: list[list[str]]) -> None:
    assert outline(stack(2, 1).moved(uid, by)) == then


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_no_move_loses_or_doubles_anything(sizes: list[int], data: st.DataObject) -> None:
    one = stack(*sizes)
    uids = [item.uid for item in one.items()]
    for _ in range(5):
        one = one.moved(data.draw(st.sampled_from(uids)), data.draw(st.integers(-2, 2)))
    assert sorted(item.uid for item in one.items()) == sorted(uids)


def test_removing_disabling_and_adding() -> None:
    one = stack(2, 0).removed("e00").enabled("p1", False).add_edit("p0", "style", {"strength": 1.0})
    assert [edit.name for edit in one.passes[0].edits] == ["img2img", "style"]
    assert not one.passes[1].enabled
    assert len(one.removed("p0").add_pass({"prompt": "x"}).passes) == 2


def test_a_copy_has_uids_of_its_own_and_no_id() -> None:
    one = stack(1).with_values({"e00": {"id": "mine", "strength": 0.2}})
    copied = one.duplicated("e00").duplicated("p0")
    uids = [item.uid for item in copied.items()]
    assert len(uids) == len(set(uids)) == 6
    first, second = copied.passes[0].edits
    assert (first.values, second.values) == ({"id": "mine", "strength": 0.2}, {"strength": 0.2})


def test_the_workflow_has_what_acts_in_the_order_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(file)
    paths = {"layer:A": str(file), "source": None}
    one = (
        stack(1, 1, 0)
        .add_edit("p2", "inpaint", {"mask": Pick("layer:A"), "feather": 3})
        .add_edit("p2", "controlnet", {"image": Pick("source"), "kind": "canny", "model": None})
        .enabled("e00", False)
        .enabled("p1", False)
        .moved("p2", -2)
    )
    said = one.data(paths.__getitem__)
    workflow = Workflow.from_data(said)
    assert [one.prompt for one in workflow.passes] == ["prompt 2", "prompt 0"]
    assert [edit.name for edit in workflow.passes[0].edits] == ["inpaint", "controlnet"]
    assert said["passes"][0]["edits"][0] == {"inpaint": {"mask": str(file), "feather": 3}}
    assert said["passes"][0]["edits"][1] == {"controlnet": {"kind": "canny"}}
    assert workflow.passes[1].edits == ()


def test_a_prompt_is_never_taken_for_a_pick() -> None:
    def none(pick: Pick) -> str | None:
        raise AssertionError(pick)

    for said in ("source", "layer:A", "file:/etc/passwd"):
        made = stack(0).with_values({"p0": {"prompt": said}}).data(none)
        assert made["passes"][0]["prompt"] == said


def test_places_of_errors_are_found_on_the_page() -> None:
    one = stack(2, 2).enabled("p0", False).enabled("e10", False)
    assert one.at("passes.0.edits.0.img2img.strength") == ("e11", "strength")
    assert one.at("passes.0.steps") == ("p1", "steps")
    assert one.at("passes.1.steps") is None
    assert one.at("seed") is None


def test_a_workflow_and_its_stack_are_one(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(file)
    given: dict[str, Any] = {
        "passes": [
            {"prompt": "a", "steps": 3, "edits": [{"inpaint": {"mask": "mask.png", "feather": 0}}]},
            {"prompt": "source", "edits": ["img2img"]},
        ]
    }
    workflow = Workflow.from_data(given, base=tmp_path)
    again = Workflow.from_data(Stack.of(workflow).data(lambda pick: pick.removeprefix("file:")))
    assert again.passes == workflow.passes
    assert again.to_yaml() == workflow.to_yaml()


def test_a_stack_hashes_by_what_it_says() -> None:
    one = stack(1).with_values({"e00": {"strength": 0.3, "id": "x"}})
    same = stack(1).with_values({"e00": {"id": "x", "strength": 0.3}})
    assert one == same
    assert hash(one) == hash(same)
    other = one.with_values({"e00": {"strength": 0.4}})
    assert hash(other) != hash(one)
    assert hash(one.enabled("p0", False)) != hash(one)
