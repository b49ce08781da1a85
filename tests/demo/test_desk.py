"""The desk: from a photograph and strokes to a workflow, and from its result to files."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffedit import Editor, Workflow
from diffedit.errors import ImageError, InputError, MaskError, WorkflowError
from diffedit.images import Picture, open_picture, save_picture
from diffedit.plugins import default
from diffedit.testing import tiny_editor
from diffedit_demo.desk import KEYWORD, Candidate, Desk, bound_pictures, read_workflow
from diffedit_demo.jobs import Cancelled, Models, Progress, run
from diffedit_demo.sessions import Sessions
from diffedit_demo.settings import Settings
from diffedit_demo.stack import EditItem, PassItem, Stack
from tests.laws.photographs import photograph


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(Sessions(tmp_path / "sessions")["somebody"])


@pytest.fixture(scope="module")
def editor() -> Editor:
    return tiny_editor()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_picture(Picture(photograph("rgb16", (90, 70))), tmp_path / "photo.png")


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Painted at half the picture's size, soft at its edge."""
    drawn = np.zeros((35, 45), np.uint8)
    drawn[10:20, 10:25] = 255
    drawn[20, 10:25] = 60
    file = tmp_path / "mask-A.png"
    Image.fromarray(drawn).save(file)
    return file


FAST = {"steps": 3, "guidance": 1.0}


def paint(**values: Any) -> PassItem:
    edit = EditItem("inpaint", {"mask": "layer:A", "feather": 4} | values)
    return PassItem({"prompt": "a red circle", **FAST}, (edit,))


VARY = PassItem({"prompt": "a blue square", **FAST}, (EditItem("img2img", {"strength": 0.4}),))
PAINT = Stack((paint(),))
BOTH = Stack((paint(), VARY))


def workflow_of(desk: Desk, stack: Stack, mask: Path | None, **settings: Any) -> Workflow:
    pictures = {} if mask is None else {"layer:A": mask}
    return desk.workflow(stack, Settings(**settings), pictures, desk.history.now, plugins=default())


def made(desk: Desk, editor: Editor, workflow: Workflow) -> list[Progress]:
    assert desk.history.now is not None
    found: list[Candidate] = []
    steps = list(
        run(
            editor,
            desk.history.now.file,
            workflow,
            threading.Event(),
            lambda result: found.extend(desk.made(result, desk.history.now)),
        )
    )
    desk.propose(found)
    return steps


def test_an_opened_picture_keeps_its_bytes_and_shows_a_copy(desk: Desk, photo: Path) -> None:
    node = desk.open(photo)
    assert node.file.read_bytes() == photo.read_bytes()
    with Image.open(node.shown) as shown:
        assert (shown.size, shown.mode) == ((90, 70), "RGB")
    assert (node.size, node.title, node.parent) == ((90, 70), "photo.png", None)


def test_what_is_no_picture_or_too_large_is_refused_and_leaves_the_desk(
    desk: Desk, photo: Path, tmp_path: Path
) -> None:
    desk.open(photo)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<svg/>")
    with pytest.raises(ImageError):
        desk.open(bad)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    with pytest.raises(ImageError, match="more than 64 million pixels"):
        desk.open(bomb)
    assert len(desk.history) == 1
    assert desk.history.now is not None
    assert desk.history.now.title == "photo.png"


def test_strokes_become_a_mask_of_the_pictures_size_without_greys(
    desk: Desk, photo: Path, mask: Path
) -> None:
    desk.open(photo)
    painted = desk.picked("layer:A", {"layer:A": mask}, desk.history.now)
    assert painted.shape == (70, 90)
    assert set(np.unique(painted)) == {0, 255}
    assert (painted[20:40, 20:50] == 255).mean() > 0.95
    assert abs(int((painted > 0).sum()) - 600) < 40


def test_nothing_painted_and_foreign_pictures_are_refused(
    desk: Desk, photo: Path, tmp_path: Path
) -> None:
    desk.open(photo)
    empty = tmp_path / "empty.png"
    Image.new("L", (90, 70)).save(empty)
    for masks in ({}, {"layer:A": empty}):
        with pytest.raises(MaskError, match="nothing is painted on mask A"):
            desk.picked("layer:A", masks, desk.history.now)
    for pick in (str(photo), f"file:{photo}", "result:7", "result:-1", "result:²", "own:no", 3):
        with pytest.raises(InputError, match="not here any more"):
            desk.picked(pick, {"own:gone": tmp_path / "gone.png"}, desk.history.now)
    with pytest.raises(InputError, match="choose it again"):
        desk.picked("own:gone", {"own:gone": tmp_path / "gone.png"}, desk.history.now)


def test_a_picture_of_ones_own_is_read_from_the_session(desk: Desk, photo: Path) -> None:
    own = desk.session.add(photo, ".png")
    picture = desk.picked("own:x", {"own:x": own}, desk.history.now)
    assert (picture.pixels == open_picture(photo).pixels).all()


def test_a_run_shows_its_steps_and_leaves_candidates_that_the_same_workflow_makes_again(
    desk: Desk, editor: Editor, photo: Path, mask: Path, tmp_path: Path
) -> None:
    desk.open(photo)
    workflow = workflow_of(desk, BOTH, mask, seed=4, count=2)
    steps = made(desk, editor, workflow)
    once = [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 1)]
    assert [(one.pass_index, one.step, one.steps) for one in steps] == once * 2
    assert [(one.picture, one.pictures) for one in steps] == [(0, 2)] * 4 + [(1, 2)] * 4
    assert steps[0].preview is not None
    assert steps[0].preview[:3] == b"\xff\xd8\xff"
    first, second = desk.candidates
    assert (first.seed, second.seed) == (4, 5)
    assert first.file.read_bytes() != second.file.read_bytes()
    # The picture carries what made it; a script gets the same pixels from it.
    with Image.open(second.file) as picture:
        text = picture.text[KEYWORD]  # type: ignore[attr-defined]
    again = editor.run(photo, Workflow.from_yaml(text, base=tmp_path / "elsewhere"))
    assert (again.pixels == open_picture(second.file).pixels).all()
    assert again.pixels.dtype == np.uint16
    # Opened on the page again, it runs there without a mask being painted, and is the same.
    files: dict[str, Path] = {}

    def keep(data: str) -> str:
        files["own:mask"] = desk.keep(data)
        return "own:mask"

    stack = Stack.of(read_workflow(second.file), keep)
    opened = desk.workflow(stack, Settings(seed=5), files, desk.history.now, plugins=default())
    assert opened.passes == Workflow.from_yaml(text).passes


def test_accepting_goes_on_from_there(desk: Desk, editor: Editor, photo: Path, mask: Path) -> None:
    desk.open(photo)
    made(desk, editor, workflow_of(desk, PAINT, mask))
    candidate = desk.candidates[0]
    node = desk.accept(0)
    assert (node.parent, node.file) == (0, candidate.file)
    assert desk.candidates == []
    assert node.file.exists()
    with pytest.raises(InputError, match="nothing to keep"):
        desk.accept(0)


def test_changes_are_counted_inside_the_masks_and_outside(
    desk: Desk, editor: Editor, photo: Path, mask: Path
) -> None:
    desk.open(photo)
    made(desk, editor, workflow_of(desk, PAINT, mask))
    found = desk.changes(desk.candidates[0])
    assert found is not None
    assert found.masked
    assert found.inside > 500
    assert found.outside > 0
    assert 1 <= found.reach <= 4  # the feather, and not a pixel further
    made(desk, editor, workflow_of(desk, Stack((paint(feather=0),)), mask))
    found = desk.changes(desk.candidates[0])
    assert found is not None
    assert (found.outside, found.reach) == (0, 0.0)


def test_a_cancelled_run_keeps_what_was_made_before(
    desk: Desk, editor: Editor, photo: Path, mask: Path
) -> None:
    desk.open(photo)
    assert desk.history.now is not None
    workflow = workflow_of(desk, PAINT, mask, seed=1, count=2)
    desk.order(workflow)
    order = desk.begin()
    assert order is not None
    found: list[Candidate] = []
    events = run(
        editor,
        desk.history.now.file,
        workflow,
        order.cancel,
        lambda result: found.extend(desk.made(result, desk.history.now)),
    )
    while not found:
        next(events)
    assert desk.cancel()
    with pytest.raises(Cancelled):
        next(events)
    assert [one.seed for one in found] == [1]
    made(desk, editor, workflow)
    assert [one.seed for one in desk.candidates] == [1, 2]


def test_what_is_kept_belongs_to_what_it_was_made_from(
    desk: Desk, editor: Editor, photo: Path, mask: Path
) -> None:
    first = desk.open(photo)
    made(desk, editor, workflow_of(desk, PAINT, mask))
    desk.open(photo, "another.png")  # what was made is still there to be kept
    changes = desk.changes(desk.candidates[0])
    assert changes is not None
    assert desk.accept(0).parent == first.id


def test_an_order_keeps_the_picture_of_its_moment(desk: Desk, photo: Path) -> None:
    first = desk.open(photo)
    desk.order("run")
    desk.open(photo, "another.png")
    order = desk.begin()
    assert order is not None
    assert order.source == first


def test_an_order_that_was_cancelled_while_it_waited_never_begins(desk: Desk) -> None:
    desk.order("first")
    desk.order("second")
    began = desk.begin()
    assert began is not None
    assert began.what == "second"
    assert desk.begin() is None
    desk.running = None
    desk.order("third")
    assert not desk.cancel()
    assert desk.begin() is None


def test_an_empty_stack_is_refused_and_errors_say_where(desk: Desk, photo: Path) -> None:
    desk.open(photo)
    off = Stack((PassItem({"prompt": "x"}, enabled=False),))
    with pytest.raises(WorkflowError, match="no pass to run"):
        workflow_of(desk, off, None)
    wrong = Stack((PassItem({"prompt": "x", "steps": 10**9}),))
    with pytest.raises(InputError, match=r"passes\.0\.steps"):
        workflow_of(desk, wrong, None)
    with pytest.raises(MaskError, match=r"^passes\.0\.edits\.0\.inpaint\.mask: nothing is painted"):
        workflow_of(desk, PAINT, None)


@pytest.mark.parametrize("named", ["/etc/hostname", "../photo.png", "data:image/png;base64,xx"])
def test_a_page_cannot_name_files_of_the_machine(desk: Desk, photo: Path, named: str) -> None:
    desk.open(photo)
    with pytest.raises(InputError, match="not here any more"):
        workflow_of(desk, Stack((paint(mask=named),)), None)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"seed": -1}, "settings: seed is -1"),
        ({"seed": "?"}, "settings: seed is '?'"),
        ({"count": 9}, "settings: count is 9"),
        ({"width": 10**6}, "settings: width is 1000000"),
    ],
)
def test_settings_of_a_browser_are_checked(said: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Settings.from_page(said)


def test_seeds_of_settings() -> None:
    assert Settings(seed=3).seeds == 3
    assert Settings(seed=3, count=3).seeds == [3, 4, 5]


@pytest.mark.parametrize("named", ["/etc/hostname", "/no/such/file.png"])
def test_a_workflow_that_names_files_is_refused_whether_they_exist_or_not(
    tmp_path: Path, named: str
) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(f"passes: [{{prompt: x, edits: [inpaint: {{mask: {named}}}]}}]", "utf-8")
    with pytest.raises(InputError, match="is a file's name"):
        read_workflow(file)


def test_a_workflow_with_a_large_reference_is_read_back(
    tmp_path: Path, desk: Desk, editor: Editor
) -> None:
    """Of its own making, as a file and out of the picture: pictures in it count nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    desk.open(save_picture(Picture(noise), tmp_path / "noise.png"))
    stack = Stack((PassItem({"prompt": "x", **FAST}, (EditItem("style", {"image": "source"}),)),))
    small = workflow_of(desk, stack, None).model_copy(update={"size": (64, 64)})
    result = editor.run(None, small)
    (one,) = desk.made(result, None)
    assert len(one.workflow) > 2_000_000
    file = tmp_path / "w.yaml"
    file.write_text(one.workflow, "utf-8")
    assert read_workflow(file) == read_workflow(one.file)
    assert read_workflow(file).passes == small.passes


def test_workflows_may_be_so_long_only(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("passes: [" + "{prompt: x}, " * 11_000 + "]", "utf-8")
    with pytest.raises(WorkflowError, match="143010 characters besides its pictures"):
        read_workflow(file)


def test_no_picture_in_a_workflow_is_larger_than_a_visitors_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    bound_pictures()
    data = io.BytesIO()
    Image.new("1", (8001, 8001)).save(data, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    file = tmp_path / "w.yaml"
    file.write_text(f'passes: [{{prompt: x, edits: [{{style: {{image: "{uri}"}}}}]}}]', "utf-8")
    with pytest.raises(InputError, match="too large"):
        read_workflow(file)


def test_the_present_picture_leaves_the_history_with_its_files(
    desk: Desk, editor: Editor, photo: Path, mask: Path
) -> None:
    first = desk.open(photo)
    with_mask = workflow_of(desk, PAINT, mask)
    made(desk, editor, with_mask)
    with pytest.raises(InputError, match="being edited"):
        desk.remove()  # what was made of it waits to be kept
    second = desk.accept(0)
    desk.history.go(first.id)
    desk.order("run")
    with pytest.raises(InputError, match="being edited"):
        desk.remove()
    desk.begin()
    with pytest.raises(InputError, match="being edited"):
        desk.remove()
    desk.running = None
    before = desk.session.used
    desk.remove()
    assert not first.file.exists()
    assert not first.shown.exists()
    assert desk.session.used < before
    assert desk.history.now is not None
    assert desk.history.now.id == second.id
    with pytest.raises(InputError, match="not here any more"):
        desk.picked(f"result:{first.id}", {}, None)
    desk.remove()
    with pytest.raises(InputError, match="no picture to remove"):
        desk.remove()
    assert desk.session.used == 0


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"passes: 3", b"\x89PNG\r\n\x1a\nrest"])
def test_what_is_no_workflow_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "w.yaml"
    file.write_bytes(data)
    with pytest.raises(InputError):
        read_workflow(file)


def test_one_model_is_loaded_at_a_time_and_only_what_is_offered(editor: Editor) -> None:
    loads: list[str] = []

    def load(source: str) -> Editor:
        loads.append(source)
        return editor

    models = Models(["tiny", "folder", "tiny"], load)
    assert models.sources == ("tiny", "folder")
    for source in ("tiny", "tiny", "folder", "tiny"):
        with models.editor(source):
            assert models.loaded == source
    assert loads == ["tiny", "folder", "tiny"]
    with pytest.raises(InputError, match="not offered"), models.editor("/etc"):
        pass


def test_runs_wait_for_each_other(editor: Editor) -> None:
    models, order = Models(["tiny"], lambda source: editor), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with models.editor("tiny"):
            order.append("first in")
            inside.set()
            leave.wait(10)
            order.append("first out")

    def second() -> None:
        with models.editor("tiny"):
            order.append("second in")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first in", "first out", "second in"]
