"""What is behind the page: forms by trust, bounds on runs, hints, desks that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffedit import Workflow
from diffedit.errors import InputError
from diffedit.images import Picture, save_picture
from diffedit.plugins import default
from diffedit.testing import tiny_editor
from diffedit_demo.code import LANGUAGES
from diffedit_demo.jobs import Models
from diffedit_demo.sessions import Sessions
from diffedit_demo.stack import EditItem, PassItem, Stack
from diffedit_demo.workspace import MOST_STEPS, Workspace
from tests.laws.photographs import photograph


def workspace(tmp_path: Path, *, trusted: bool = True) -> Workspace:
    models = Models(["tiny"], lambda source: tiny_editor())
    return Workspace(models, Sessions(tmp_path / "sessions"), default(), trusted)


def names(found: Workspace, edit: str) -> set[str]:
    return {one.name for one in found.form(edit)}


def test_visitors_of_others_name_no_folders(tmp_path: Path) -> None:
    own, others = workspace(tmp_path), workspace(tmp_path, trusted=False)
    assert names(own, "controlnet") - names(others, "controlnet") == {"model", "weights"}
    one = {"prompt": "x", "edits": [{"controlnet": {"model": "/somewhere"}}]}
    asked = Workflow.from_data({"passes": [one]})
    own.check(asked)
    with pytest.raises(InputError, match=r"controlnet\.model is not for visitors"):
        others.check(asked)
    others.check(Workflow.from_data({"passes": [{"prompt": "x", "edits": ["controlnet"]}]}))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"passes": [{"prompt": "x"}] * 33}, "33 passes"),
        ({"passes": [{"prompt": "x", "edits": ["img2img"] * 33}]}, "33 edits in a pass"),
        ({"seed": list(range(9)), "passes": [{"prompt": "x"}]}, "9 seeds"),
        ({"size": [8, 4096], "passes": [{"prompt": "x"}]}, "4096 pixels"),
        ({"passes": [{"prompt": "x", "steps": 1000}] * 21}, f"21000 steps .* {MOST_STEPS}"),
    ],
)
def test_a_visitor_may_ask_for_so_much_only(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        workspace(tmp_path).check(Workflow.from_data(said))


def test_desks_go_with_their_sessions(tmp_path: Path) -> None:
    found = workspace(tmp_path)
    first = found.desk("first")
    assert found.desk("first") is first
    first.order("something")
    found.leave("first")  # the tab was closed
    assert first.begin() is None
    assert found.desk("first") is first  # and is back
    found.sessions.close("first")
    found.desk("second")
    assert set(found._desks) == {"second"}


def test_a_hint_is_what_the_preprocessor_makes(tmp_path: Path) -> None:
    found = workspace(tmp_path)
    desk = found.desk("somebody")
    photo = save_picture(Picture(photograph("rgb8", (900, 600))), tmp_path / "photo.png")
    desk.open(photo)

    def hint(**values: Any) -> Path:
        edit = EditItem("controlnet", values)
        return found.hint(desk, Stack((PassItem(edits=(edit,)),)), edit.uid, {})

    with Image.open(hint()) as edges:
        assert edges.size == (512, 341)
        assert set(edges.convert("L").tobytes()) == {0, 255}
    with Image.open(hint(kind="none")) as plain:
        assert len(set(plain.convert("L").tobytes())) > 50
    with pytest.raises(InputError, match="no preprocessor 'cany'"):
        hint(kind="cany")
    layer = tmp_path / "mask.png"
    Image.new("L", (90, 60), 255).save(layer)
    edit = EditItem("controlnet", {"image": "layer:A"})
    stack = Stack((PassItem(edits=(edit,)),))
    with pytest.raises(InputError, match="not of a mask"):
        found.hint(desk, stack, edit.uid, {"layer:A": layer})


def test_the_script_that_is_copied_says_the_same_workflow(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (16, 16), 255).save(mask)
    first = {"prompt": 'a "red" circle', "steps": 3, "edits": [{"inpaint": {"mask": str(mask)}}]}
    said = {
        "model": "tiny",
        "seed": [3, 4],
        "passes": [first, {"prompt": "b", "edits": ["img2img"]}],
    }
    workflow = Workflow.from_data(said)
    script = LANGUAGES["Python"](workflow, "photo.png")
    calls: list[Any] = []

    class Recorder:
        @classmethod
        def load(cls, model: str) -> Recorder:
            calls.append(model)
            return cls()

        def run(self, image: Any, passes: Any, **more: Any) -> Recorder:
            calls.append((image, passes, more))
            return self

        def save(self, name: str) -> None:
            calls.append(name)

    scope: dict[str, Any] = {}
    exec(script.replace("import Editor, Pass", "import Pass"), scope | {"Editor": Recorder})
    model, (image, passes, more), name = calls
    assert (model, image, name) == ("tiny", "photo.png", "edited.png")
    assert tuple(passes) == workflow.passes
    assert more == {"seed": (3, 4)}
    line = LANGUAGES["CLI"](workflow, "my photo.png")
    assert line == "diffedit run workflow.yaml 'my photo.png' --output edited.png\n"
    assert Workflow.from_yaml(LANGUAGES["YAML"](workflow, None)) == workflow


def test_only_the_owner_of_a_desk_that_was_left_comes_back_to_it(tmp_path: Path) -> None:
    found = workspace(tmp_path)
    for session, owner in (("old", "me"), ("new", "me"), ("theirs", "another"), ("free", "")):
        found.sessions.claim(session, owner)
    desk = found.desk("old")
    file = desk.session.add(b"x", ".png")
    assert not found.back("new", "old")  # its page is open
    found.leave("old")
    assert not found.back("theirs", "old")
    assert not found.back("free", "old")
    assert not found.back("new", "never")
    assert not found.back("unknown", "old")
    assert found.back("new", "old")
    assert found.desk("new") is desk
    assert found.sessions["new"].owns(file)
    assert "old" not in found.sessions
    assert not found.back("new", "old")
