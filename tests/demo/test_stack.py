"""The stack of the page: read from a browser, and the workflow that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffedit
from diffedit import Workflow
from diffedit.errors import WorkflowError
from diffedit_demo.stack import EditItem, PassItem, Stack, parameters_of, picture_parameters

PICTURES = {
    name: picture_parameters(edit.model_json_schema()) for name, edit in diffedit.edits().items()
}


def stack(*sizes: int, **changed: dict[str, Any]) -> Stack:
    """Passes p0, p1, … with so many edits e00, e01, …; what is changed of each by uid."""
    return Stack(
        tuple(
            PassItem(
                uid=f"p{p}",
                edits=tuple(
                    EditItem(**{"name": "img2img", "uid": f"e{p}{e}"} | changed.get(f"e{p}{e}", {}))
                    for e in range(size)
                ),
                **{"values": {"prompt": f"prompt {p}"}} | changed.get(f"p{p}", {}),
            )
            for p, size in enumerate(sizes)
        )
    )


def test_which_parameters_are_pictures() -> None:
    assert {
        "apg": frozenset(),
        "controlnet": {"image"},
        "img2img": frozenset(),
        "inpaint": {"mask"},
        "instruct": {"image"},
        "interval": frozenset(),
        "invert": frozenset(),
        "ip_adapter": {"image", "mask"},
        "lora": frozenset(),
        "pag": frozenset(),
        "perp_neg": frozenset(),
        "region": {"mask"},
        "style": {"image"},
        "textual_inversion": frozenset(),
    } == PICTURES
    controlnet = diffedit.edits()["controlnet"].model_json_schema()
    assert parameters_of(controlnet, ("model",)) == {"model", "weights"}


def test_the_workflow_has_what_acts_in_the_order_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(file)
    asked: list[tuple[str, str]] = []

    def picks(where: str, pick: str) -> Any:
        asked.append((where, pick))
        return {"layer:A": str(file), "source": None}[pick]

    one = stack(
        2, 1, 1,
        e00={"name": "inpaint", "values": {"mask": "layer:A", "feather": 3}},
        e01={"name": "controlnet", "values": {"image": "source", "kind": "canny", "model": None}},
        e10={"enabled": False},
        p2={"enabled": False},
    )  # fmt: skip
    said = one.data(PICTURES, picks)
    workflow = Workflow.from_data(said)
    assert [one.prompt for one in workflow.passes] == ["prompt 0", "prompt 1"]
    assert [edit.name for edit in workflow.passes[0].edits] == ["inpaint", "controlnet"]
    assert said["passes"][0]["edits"][0] == {"inpaint": {"mask": str(file), "feather": 3}}
    assert said["passes"][0]["edits"][1] == {"controlnet": {"kind": "canny"}}
    assert workflow.passes[1].edits == ()
    assert asked == [
        ("passes.0.edits.0.inpaint.mask", "layer:A"),
        ("passes.0.edits.1.controlnet.image", "source"),
    ]


def test_a_prompt_is_never_taken_for_a_pick() -> None:
    def none(where: str, pick: str) -> None:
        raise AssertionError(pick)

    for said in ("source", "layer:A", "own:x"):
        made = stack(0, p0={"values": {"prompt": said}}).data(PICTURES, none)
        assert made["passes"][0]["prompt"] == said


def test_places_of_errors_are_found_on_the_page() -> None:
    one = stack(2, 2, p0={"enabled": False}, e10={"enabled": False})
    assert one.at("passes.0.edits.0.img2img.strength") == ("e11", "strength")
    assert one.at("passes.0.edits.0.img2img") == ("e11", "")
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
    shown = Stack.of(workflow, lambda said: f"own:{said}")
    assert shown.passes[0].edits[0].values["mask"].startswith("own:")
    again = Workflow.from_data(shown.data(PICTURES, lambda where, pick: pick.removeprefix("own:")))
    assert again.passes == workflow.passes
    assert again.to_yaml() == workflow.to_yaml()


def test_what_a_browser_sends_is_read_as_it_was_written() -> None:
    one = stack(2, 0, e00={"values": {"strength": 0.3, "path": "x"}}, p1={"enabled": False})
    assert Stack.from_page(one.to_page()) == one
    assert one.find("e01") is one.passes[0].edits[1]
    assert one.find("gone") is None


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ("text", "no stack"),
        ({"passes": []}, "no stack"),
        ([{"uid": "../../x", "values": {}}], "uid"),
        ([{"uid": "a", "values": []}], "values"),
        ([{"uid": "a", "edits": [{"uid": "b"}]}], "name"),
        ([{"uid": "a", "edits": [{"uid": "a", "name": "img2img"}]}], "same uid"),
        ([{"uid": f"p{k}"} for k in range(40)], "more than 32 passes"),
        (
            [{"uid": "p", "edits": [{"uid": f"e{k}", "name": "img2img"} for k in range(40)]}],
            "more than 32 edits",
        ),
    ],
)
def test_what_is_no_stack_is_refused(sent: Any, why: str) -> None:
    with pytest.raises(WorkflowError, match=why):
        Stack.from_page(sent)
