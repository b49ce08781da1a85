"""The desk: from a photograph and strokes to a workflow, and from its result to files."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffedit import Editor, Workflow
from diffedit.errors import ImageError, InputError, MaskError, WorkflowError
from diffedit.images import Picture, open_picture, save_picture
from diffedit.testing import tiny_editor
from diffedit_demo.desk import KEYWORD, Desk, read_workflow
from diffedit_demo.jobs import Cancelled, Models, Progress, run
from diffedit_demo.sessions import Sessions
from diffedit_demo.stack import Pick, Stack
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


STACK = (
    Stack()
    .add_pass({"prompt": "a red circle", "steps": 3, "guidance": 1.0})
    .add_pass({"prompt": "a blue square", "steps": 3, "guidance": 1.0})
)
STACK = STACK.add_edit(
    STACK.passes[0].uid, "inpaint", {"mask": Pick("layer:A"), "feather": 4}
).add_edit(STACK.passes[1].uid, "img2img", {"strength": 0.4})
PAINT = STACK.removed(STACK.passes[1].uid)


def made(desk: Desk, editor: Editor, workflow: Workflow) -> list[Progress]:
    assert desk.history.now is not None
    desk.discard()
    return list(run(editor, desk.history.now.file, workflow, desk.cancel, desk.finished))


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
    painted = desk.picked(Pick("layer:A"), {"A": mask})
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
    for masks in ({}, {"A": empty}):
        with pytest.raises(MaskError, match="nothing is painted on mask A"):
            desk.picked(Pick("layer:A"), masks)
    for foreign in (f"file:{photo}", "file:../photo.png", "result:7", "result:-1", "what"):
        with pytest.raises(InputError, match="no picture of this session"):
            desk.picked(Pick(foreign), {})


def test_a_run_shows_its_steps_and_leaves_candidates_that_the_same_workflow_makes_again(
    desk: Desk, editor: Editor, photo: Path, mask: Path, tmp_path: Path
) -> None:
    desk.open(photo)
    workflow = desk.workflow(STACK, {"A": mask}, model="tiny", seeds=[4, 5], size=None)
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
    stack = Stack.of(read_workflow(second.file))
    opened = desk.workflow(stack, {}, model="tiny", seeds=[5], size=None)
    assert opened.passes == Workflow.from_yaml(text).passes


def test_accepting_goes_on_from_there(desk: Desk, editor: Editor, photo: Path, mask: Path) -> None:
    desk.open(photo)
    made(desk, editor, desk.workflow(PAINT, {"A": mask}, model="tiny", seeds=[1], size=None))
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
    made(desk, editor, desk.workflow(PAINT, {"A": mask}, model="tiny", seeds=[1], size=None))
    found = desk.changes(desk.candidates[0])
    assert found is not None
    assert found.masked
    assert found.inside > 500
    assert found.outside > 0
    assert 1 <= found.reach <= 4  # the feather, and not a pixel further
    sharp = PAINT.with_values({PAINT.passes[0].edits[0].uid: {"feather": 0}})
    made(desk, editor, desk.workflow(sharp, {"A": mask}, model="tiny", seeds=[1], size=None))
    found = desk.changes(desk.candidates[0])
    assert found is not None
    assert (found.outside, found.reach) == (0, 0.0)


def test_a_cancelled_run_leaves_nothing_and_the_next_one_works(
    desk: Desk, editor: Editor, photo: Path, mask: Path
) -> None:
    desk.open(photo)
    assert desk.history.now is not None
    workflow = desk.workflow(PAINT, {"A": mask}, model="tiny", seeds=[1], size=None)
    events = run(editor, desk.history.now.file, workflow, desk.cancel, desk.finished)
    next(events)
    desk.cancel.set()
    with pytest.raises(Cancelled):
        next(events)
    assert desk.candidates == []
    desk.cancel.clear()
    made(desk, editor, workflow)
    assert len(desk.candidates) == 1


def test_an_empty_stack_is_refused_and_errors_say_where(desk: Desk, photo: Path) -> None:
    desk.open(photo)
    off = PAINT.enabled(PAINT.passes[0].uid, False)
    with pytest.raises(WorkflowError, match="no pass to run"):
        desk.workflow(off, {}, model="tiny", seeds=[1], size=None)
    wrong = PAINT.with_values({PAINT.passes[0].uid: {"steps": 10**9}}).removed(
        PAINT.passes[0].edits[0].uid
    )
    with pytest.raises(InputError, match=r"passes\.0\.steps"):
        desk.workflow(wrong, {}, model="tiny", seeds=[1], size=None)


@pytest.mark.parametrize("named", ["/etc/hostname", "/no/such/file.png"])
def test_a_workflow_that_names_files_is_refused_whether_they_exist_or_not(
    tmp_path: Path, named: str
) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(f"passes: [{{prompt: x, edits: [inpaint: {{mask: {named}}}]}}]", "utf-8")
    with pytest.raises(InputError, match="is a file's name"):
        read_workflow(file)


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
