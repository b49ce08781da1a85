"""Workflows as values: round trips, YAML 1.2, errors that say what, where and what is right."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import Field, model_validator

from diffedit import Edit, ImageField, MaskField, ModelField, Pass, Workflow, hookimpl, yaml
from diffedit import plugins as installed
from diffedit.edit import canonical
from diffedit.errors import (
    ImageError,
    InputError,
    OutputError,
    ParameterError,
    PluginError,
    WorkflowError,
)
from diffedit.parameters import parameters
from diffedit.plugins import Plugins
from diffedit.yaml import parse_scalar


class Note(Edit):
    """One parameter of every plain kind."""

    name: ClassVar[str] = "note"

    text: str = "nothing"
    maybe: str | None = None
    count: int = Field(8, ge=0, le=64)
    amount: float = Field(0.5, gt=0, le=1)
    flag: bool = False
    kind: Literal["plain", "no", "1"] = "plain"
    words: tuple[str, ...] = ()
    table: dict[str, float] = Field(default_factory=dict)


class Paint(Edit):
    """Images."""

    name: ClassVar[str] = "paint"

    mask: MaskField
    image: ImageField | None = None
    brush: ModelField | None = None
    feather: int = Field(8, ge=0, le=64)


class Vignette(Edit):
    """No required parameter."""

    name: ClassVar[str] = "vignette"

    amount: float = Field(0.5, gt=0, le=1, description="How dark the corners become")

    @model_validator(mode="before")
    @classmethod
    def _odd(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("amount") == "crash":
            raise TypeError("a plugin's own mistake")
        return data


class Local:
    @hookimpl
    def register_edits(self) -> list[type[Edit]]:
        return [Note, Paint, Vignette]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return make_plugins()


def make_plugins() -> Plugins:
    made = Plugins()
    made.register(Local(), "local")
    return made


LOCAL = make_plugins()


def mask(size: int = 8) -> np.ndarray[Any, Any]:
    values = np.zeros((size, size), np.uint8)
    values[2:4, 1:5] = 255
    return values


# -- round trips -----------------------------------------------------------------------------------

# Texts that a reader could take for something else.
WORDS = """\
no No on y null Null ~ true TRUE 1e3 1_000 0o17 0x1F .5e3 1. -1 +.inf .nan .NaN 2021-01-01 12:30:45
= << #b ' " \\ --- ... &a *a | > a,b @x `x` % ! ? : - [] {} {a:b}"""
PHRASES = [
    *("", "- a", "? b", "a: b", "a #b", "%YAML 1.1", "!!int 3", "[a, b]", "{a: b}", "x" * 300),
    *(" leading", "trailing ", "two\nlines\n", "\n", "\ttab", "a\r\nb", "emoji 🖼️ 東京"),
    *("\x07\x00", "nel\x85ls\u2028ps\u2029", "\ufeffbom", "\x7f", "\ufffe\uffff", "\xa0"),
]
TRICKY = st.sampled_from([*WORDS.split(), *PHRASES])
TEXTS = st.one_of(TRICKY, st.text())
FLOATS = st.floats(0, 100, allow_subnormal=True)

NOTES = st.builds(
    Note,
    id=st.none() | TEXTS,
    text=TEXTS,
    maybe=st.none() | TEXTS,
    count=st.integers(0, 64),
    amount=st.floats(0, 1, exclude_min=True),
    flag=st.booleans(),
    kind=st.sampled_from(["plain", "no", "1"]),
    words=st.lists(TEXTS, max_size=3).map(tuple),
    table=st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=3),
)
PASSES = st.builds(
    Pass,
    prompt=st.none() | TEXTS,
    negative=TEXTS,
    steps=st.integers(1, 1000),
    guidance=FLOATS,
    rescale=st.floats(0, 1),
    scheduler=st.none() | TEXTS.filter(bool),
    edits=st.lists(st.one_of(NOTES, st.just(Vignette()), st.builds(Note)), max_size=3).map(tuple),
)
SEEDS = st.integers(0, 2**63 - 1)
WORKFLOWS = st.builds(
    Workflow,
    model=TEXTS.filter(bool),
    seed=SEEDS | st.lists(SEEDS, min_size=1, max_size=3).map(tuple),
    size=st.none() | st.tuples(st.integers(1, 16384), st.integers(1, 16384)),
    passes=st.lists(PASSES, min_size=1, max_size=3).map(tuple),
)


def same(one: Workflow, other: Workflow) -> None:
    assert one == other
    digests = [[edit.digest for edit in a.edits] for a in one.passes]
    assert digests == [[edit.digest for edit in a.edits] for a in other.passes]


@given(WORKFLOWS)
def test_yaml_keeps_everything(workflow: Workflow) -> None:
    same(Workflow.from_yaml(workflow.to_yaml(), plugins=LOCAL), workflow)


@given(WORKFLOWS)
def test_json_and_plain_data_keep_everything(workflow: Workflow) -> None:
    context = {"plugins": LOCAL}
    same(Workflow.model_validate(workflow.model_dump(), context=context), workflow)
    text = workflow.model_dump_json()
    same(Workflow.model_validate_json(text, context=context), workflow)


@given(TEXTS)
def test_every_text_survives_yaml(text: str) -> None:
    read = Workflow.from_yaml(Workflow(passes=(Pass(prompt=text),)).to_yaml())
    assert read.passes[0].prompt == text


def test_edits_stand_under_their_names(plugins: Plugins) -> None:
    pass_ = Pass(edits=(Vignette(), Note(count=3)))
    assert pass_.edits[0] == Vignette()
    data = pass_.model_dump()["edits"]
    assert list(data[0]) == ["vignette"]
    assert data[1]["note"]["count"] == 3
    text = Workflow(passes=(pass_,)).to_yaml()
    assert "- vignette\n" in text
    assert "- note: {count: 3}\n" in text
    assert "guidance" not in text


def test_workflows_hash_and_compare() -> None:
    def one(count: int) -> Workflow:
        return Workflow(passes=(Pass(edits=(Note(count=count, table={}),)),))

    assert one(3) == one(3)
    assert one(3) != one(4)
    assert hash(Pass(prompt="a")) == hash(Pass(prompt="a"))
    painted = Pass(edits=(Paint(mask=mask()),))
    assert hash(painted) == hash(Pass(edits=(Paint(mask=Image.fromarray(mask())),)))


def test_a_saved_workflow_takes_its_pictures_along(tmp_path: Path, plugins: Plugins) -> None:
    Image.fromarray(mask(16)).save(tmp_path / "given.png")
    deep = (np.arange(64 * 3).reshape(8, 8, 3) * 300).astype(np.uint16)
    edits = (Paint(mask=mask(), image=deep), Paint(id="b", mask=tmp_path / "given.png"))
    workflow = Workflow(passes=(Pass(prompt="no", edits=edits),))
    path = workflow.save(tmp_path / "edit.yaml")
    assert "given.png" in path.read_text()
    assert str(tmp_path) not in path.read_text()
    same(Workflow.load(path, plugins=plugins), workflow)
    files = {file.name for file in tmp_path.iterdir()}
    assert len(files) == 4, files  # the file, the given mask, and two pictures

    # The folder moves as a whole.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Workflow.load(moved / "edit.yaml", plugins=plugins) == workflow


def test_text_alone_holds_pictures_as_data(plugins: Plugins) -> None:
    workflow = Workflow(passes=(Pass(edits=(Paint(mask=mask()),)),))
    assert "data:image/png;base64," in workflow.to_yaml()
    same(Workflow.from_yaml(workflow.to_yaml(), plugins=plugins), workflow)


@pytest.mark.parametrize("beside", ["", ";base64,@0", "data:image/png;base64,@@1 and @0"])
def test_pictures_pass_through_yaml_unread(beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach no scanner, which needs seconds for a megabyte, and come back as they were."""
    seen: list[int] = []
    real = yaml._yaml

    def watched() -> Any:
        made: Any = real()
        compose, write = made.compose, made.dump

        def reads(text: str) -> Any:
            seen.append(len(text))
            return compose(text)

        def writes(data: Any, to: Any) -> None:
            seen.append(len(str(data)))
            write(data, to)

        made.compose, made.dump = reads, writes
        return made

    monkeypatch.setattr(yaml, "_yaml", watched)
    picture = "data:image/png;base64," + "iVBORw0KGgo+/0AA" * 5000 + "AA=="
    data = {"a": {"b": [picture, beside, {"c": picture[:-4]}]}, "d": beside}
    text = yaml.dump(data)
    assert text.count(picture) == 1
    assert yaml.parse(text, "text")[0] == data
    assert yaml.parse(json.dumps(data), "text")[0] == data
    assert len(seen) == 3
    assert all(length < 1000 for length in seen)


def test_paths_count_from_the_file(tmp_path: Path, plugins: Plugins, monkeypatch: Any) -> None:
    folder = tmp_path / "some where"
    folder.mkdir()
    Image.fromarray(mask()).save(folder / "m.png")
    (folder / "w.yaml").write_text("passes: [{edits: [{paint: {mask: m.png}}]}]")
    monkeypatch.chdir(tmp_path)
    loaded = Workflow.load("some where/w.yaml", plugins=plugins)
    assert loaded.files() == [folder / "m.png"]


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        Workflow(passes=(Pass(),)).save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["w.yaml"]


def test_saving_never_replaces_an_image(tmp_path: Path) -> None:
    Image.fromarray(mask()).save(tmp_path / "m.png")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "m.png")
    workflow = Workflow(passes=(Pass(edits=(Paint(mask=tmp_path / "m.png"),)),))
    before = (tmp_path / "m.png").read_bytes()
    with pytest.raises(OutputError, match="is an image of this workflow"):
        workflow.save(tmp_path / "link.yaml")
    assert (tmp_path / "m.png").read_bytes() == before
    with pytest.raises(OutputError, match="does not exist"):
        workflow.save(tmp_path / "no" / "w.yaml")
    for wrong in (tmp_path, tmp_path / "w.json"):
        with pytest.raises(OutputError, match="should be a YAML file such as"):
            workflow.save(wrong)


# -- the built-in edits ----------------------------------------------------------------------------


def built_in_edits(folder: Path) -> dict[str, Edit]:
    from diffedit_controlnet import ControlNet
    from diffedit_guidance import AdaptiveProjected, Interval, PerpNeg, PerturbedAttention
    from diffedit_img2img import Img2Img
    from diffedit_inpaint import Inpaint
    from diffedit_instruct import Instruct
    from diffedit_invert import Invert
    from diffedit_ip_adapter import IPAdapter
    from diffedit_lora import LoRA
    from diffedit_region import Region
    from diffedit_style import Style
    from diffedit_textual_inversion import TextualInversion

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "style.png")
    return {
        "inpaint": Inpaint(mask=mask(64), feather=3),
        "img2img": Img2Img(strength=0.75),
        "controlnet": ControlNet(kind="canny", image=picture[::-1].copy(), weight=0.8, end=0.5),
        "style": Style(image=folder / "style.png", strength=0.5),
        "instruct": Instruct(image=folder / "style.png", image_guidance=1.2),
        "ip_adapter": IPAdapter(model="a.safetensors", image=picture[:, ::-1], mask=mask(64)),
        "invert": Invert(prompt="x", refinements=3),
        "apg": AdaptiveProjected(threshold=2.5),
        "interval": Interval(start=0.1),
        "perp_neg": PerpNeg(weight=0.5),
        "lora": LoRA(model="b.safetensors", weight=-0.5),
        "pag": PerturbedAttention(layers="mid, up"),
        "textual_inversion": TextualInversion(model="c.safetensors", token="<c>"),
        "region": Region(prompt="a (blue:1.2) cup", mask=mask(64), negative="red", feather=4),
    }


def test_built_in_edits_are_all_here(tmp_path: Path) -> None:
    assert set(built_in_edits(tmp_path)) == set(installed.edits())


@pytest.mark.parametrize("name", sorted(installed.edits()))
def test_built_in_edits_round_trip(name: str, tmp_path: Path) -> None:
    edit = built_in_edits(tmp_path)[name]
    workflow = Workflow(passes=(Pass(prompt="a", edits=(edit,)),))
    same(Workflow.from_yaml(workflow.to_yaml()), workflow)
    same(Workflow.model_validate_json(workflow.model_dump_json()), workflow)
    same(Workflow.load(workflow.save(tmp_path / "w.yaml")), workflow)


def test_round_trips_keep_the_result(tmp_path: Path) -> None:
    from diffedit.testing import tiny_editor

    edits = built_in_edits(tmp_path)
    # The test model has no nets or adapters of its own and does not follow instructions.
    together = tuple(edits.pop(name) for name in ("inpaint", "img2img", "style"))
    lacking = {"controlnet", "instruct", "ip_adapter", "lora", "textual_inversion"}
    alone = [edit for name, edit in edits.items() if name not in lacking]
    workflow = Workflow(
        seed=7,
        passes=tuple(
            Pass(prompt="a", steps=3, edits=edits) for edits in (together, *((e,) for e in alone))
        ),
    )
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    editor = tiny_editor()
    pixels = editor.run(picture, workflow).pixels
    assert not np.array_equal(pixels, picture)
    for other in (
        Workflow.load(workflow.save(tmp_path / "w.yaml")),
        Workflow.model_validate_json(workflow.model_dump_json()),
    ):
        np.testing.assert_array_equal(editor.run(picture, other).pixels, pixels)


# -- what may be written ---------------------------------------------------------------------------


def read(text: str) -> Workflow:
    return Workflow.from_yaml(text, where="w.yaml", plugins=LOCAL)


@pytest.mark.parametrize("head", ["", "%YAML 1.1\n---\n", "%YAML 1.2\n---\n"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2021-01-01", "2021-01-01"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("'7'", "7"),
        ("!!str 7", "7"),
        ("~", None),
        ("", None),
        ("|-\n    two\n    lines", "two\nlines"),
        ("a\n    b", "a b"),
    ],
)
def test_yaml_1_2(head: str, written: str, meant: str | None) -> None:
    workflow = read(f"{head}passes:\n - prompt: {written}\n")
    assert workflow.passes[0].prompt == meant


def test_the_example_of_the_design(tmp_path: Path) -> None:
    for name in ("mask.png", "photo.jpg"):
        Image.fromarray(mask(32)).save(tmp_path / name)
    (tmp_path / "workflow.yaml").write_text(
        """\
diffedit: 1
model: tiny
seed: 7
passes:
  - prompt: a red circle
    steps: 20
    guidance: 5.0
    scheduler: dpmpp_2m
    edits:
      - inpaint: {mask: mask.png, feather: 8}
      - controlnet: {kind: canny, image: photo.jpg, weight: 0.8}
      - img2img                  # no parameters: the bare name
"""
    )
    workflow = Workflow.load(tmp_path / "workflow.yaml")
    assert [edit.name for edit in workflow.passes[0].edits] == ["inpaint", "controlnet", "img2img"]
    assert workflow.seeds == (7,)


@pytest.mark.parametrize(
    "written",
    [
        "{note: {count: 3, id: a, after: b}}",
        "{note: {count: 3}, id: a, after: b}",
        "{id: a, note: {count: 3, after: b}}",
    ],
)
def test_ids_stand_inside_or_beside(written: str) -> None:
    (edit,) = read(f"passes: [{{edits: [{written}]}}]").passes[0].edits
    assert edit == Note(count=3, id="a", after="b")


@pytest.mark.parametrize("written", ["vignette", "{vignette: }", "{vignette: {}}"])
def test_edits_without_parameters(written: str) -> None:
    assert read(f"passes: [{{edits: [{written}]}}]").passes[0].edits == (Vignette(),)


def test_anchors_are_shared() -> None:
    text = "passes:\n - &a {prompt: x, edits: [vignette]}\n - *a\n"
    one, other = read(text).passes
    assert one == other


def test_size_may_be_written_as_people_do() -> None:
    assert read("size: 640x480\npasses: [{}]").size == (640, 480)
    assert read("size: [640, 480]\npasses: [{}]").size == (640, 480)


def test_passes_may_be_built_from_plain_lists() -> None:
    pass_ = Pass(edits=[Vignette()])
    assert pass_.edits == (Vignette(),)
    assert Workflow(passes=[pass_]).passes == (pass_,)


# -- what is refused -------------------------------------------------------------------------------

REFUSED = [
    ("", WorkflowError, "w.yaml is empty, should be a workflow with 'passes:'"),
    ("- a", WorkflowError, "w.yaml holds ['a'], should be a workflow with 'passes:'"),
    ("seed: 1", WorkflowError,
     "w.yaml:1:1: a workflow lacks 'passes', a list of at least 1, each a pass"),
    ("passes: []", WorkflowError,
     "w.yaml:1:1: passes is [], should be a list of at least 1, each a pass"),
    ("passes: {}", WorkflowError,
     "w.yaml:1:1: passes is {}, should be a list of at least 1, each a pass"),
    ("diffedit: 2\npasses: [{colour: red}]", WorkflowError,
     "w.yaml:1:1: diffedit is 2, should be 1"),
    ("modl: x\npasses: [{}]", WorkflowError,
     "w.yaml:1:1: a workflow has no parameter 'modl' (did you mean 'model'?)"),
    ("passes:\n  - promt: x", ParameterError,
     "w.yaml:2:5: passes.0: a pass has no parameter 'promt' (did you mean 'prompt'?)"),
    ("passes:\n  - steps: 0", ParameterError,
     "w.yaml:2:5: passes.0.steps is 0, should be a whole number from 1 to 1000"),
    ("passes:\n  - steps: many", ParameterError,
     "w.yaml:2:5: passes.0.steps is 'many', should be a whole number from 1 to 1000"),
    ("passes:\n  - guidance: .nan", ParameterError,
     "w.yaml:2:5: passes.0.guidance is nan, should be a number from 0 to 100"),
    ("passes:\n  - prompt: 7", ParameterError,
     "w.yaml:2:5: passes.0.prompt is 7, should be text or empty (put it in quotes)"),
    ("passes:\n  - edits: vignette", ParameterError,
     ("w.yaml:2:5: passes.0.edits is 'vignette', should be a list, "
     "each an edit's name, or its name with parameters")),
    ("passes:\n  - edits:\n    - vignete", ParameterError,
     "w.yaml:3:7: passes.0.edits.0: no edit 'vignete' (did you mean 'vignette'?)"),
    ("passes:\n  - edits:\n    - note: {cuont: 3}", ParameterError,
     "w.yaml:3:14: passes.0.edits.0.note: note has no parameter 'cuont' (did you mean 'count'?)"),
    ("passes:\n  - edits:\n    - note:\n        count: 65", ParameterError,
     "w.yaml:4:9: passes.0.edits.0.note.count is 65, should be a whole number from 0 to 64"),
    ("passes:\n  - edits:\n    - vignette: {amount: 0}", ParameterError,
     ("w.yaml:3:18: passes.0.edits.0.vignette.amount is 0, "
     "should be a number above 0 and at most 1")),
    ("passes:\n  - edits:\n    - note: {kind: round}", ParameterError,
     "w.yaml:3:14: passes.0.edits.0.note.kind is 'round', should be one of plain, no, 1"),
    ("passes:\n  - edits:\n    - note: {flag: 3}", ParameterError,
     "w.yaml:3:14: passes.0.edits.0.note.flag is 3, should be true or false"),
    ("passes:\n  - edits:\n    - note: 3", ParameterError,
     ("w.yaml:3:7: passes.0.edits.0: {'note': 3} is no edit, should be an edit's name, "
     "or its name with parameters inside: {inpaint: {mask: m.png}}")),
    ("passes:\n  - edits:\n    - note:\n      count: 3", ParameterError,
     ("w.yaml:3:7: passes.0.edits.0: {'count': 3, 'note': None} is no edit, should be "
     "an edit's name, or its name with parameters inside: {inpaint: {mask: m.png}}")),
    ("passes:\n  - edits:\n    - note: {id: a}\n      id: b", ParameterError,
     ("w.yaml:3:7: passes.0.edits.0: {'id': 'b', 'note': {'id': 'a'}} is no edit, should be "
     "an edit's name, or its name with parameters inside: {inpaint: {mask: m.png}}")),
    ("passes:\n  - edits:\n    - 7", ParameterError,
     ("w.yaml:3:7: passes.0.edits.0: 7 is no edit, should be an edit's name, "
     "or its name with parameters inside: {inpaint: {mask: m.png}}")),
    ("passes:\n  - edits:\n    - paint", ParameterError,
     "w.yaml:3:7: passes.0.edits.0.paint lacks 'mask', a mask (an image, white = change)"),
    ("size: [0, 8]\npasses: [{}]", WorkflowError,
     "w.yaml:1:8: size.0 is 0, should be greater than or equal to 1"),
    ("seed: -1\npasses: [{}]", WorkflowError,
     ("w.yaml:1:1: seed is -1, should be a whole number from 0 to 9223372036854775807 "
     "or a list of at least 1, each a whole number from 0 to 9223372036854775807")),
    ("model: ''\npasses: [{}]", WorkflowError,
     "w.yaml:1:1: model is '', should be text with a length of at least 1"),
    ("passes: [{}]\npasses: [{}]", WorkflowError,
     "w.yaml:2:1: 'passes' stands here twice"),
    ("passes:\n  - prompt: a\n   steps: 3", WorkflowError,
     "w.yaml:3:4: not YAML: expected <block end>, but found '<block mapping start>'"),
    ("passes: [{prompt: [a}]", WorkflowError,
     "w.yaml:1:21: not YAML: expected ',' or ']', but got '}'"),
    ("passes: !!python/object/apply:os.system [ls]", WorkflowError,
     ("w.yaml:1:9: no workflow has the tag "
     "'tag:yaml.org,2002:python/object/apply:os.system'")),
    ("a: *b", WorkflowError, "w.yaml:1:4: not YAML: found undefined alias 'b'"),
    ("a: &b [*b]", WorkflowError, "w.yaml: not a workflow: nested too deeply"),
    ("1: 2", WorkflowError, "w.yaml:1:1: a key should be a word"),
    ("[a]: 2", WorkflowError, "w.yaml:1:1: a key should be a word"),
    ("passes: [{}]\n---\na: 1", WorkflowError, "w.yaml:2:1: not YAML: but found another document"),
    ("passes:\n - prompt: a\x01", WorkflowError, ("w.yaml: not YAML: unacceptable character "
     "#x0001: special characters are not allowed in \"<unicode string>\", position 20")),
    ("[" * 20000, WorkflowError, "w.yaml: not a workflow: nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_in_one_line(text: str, kind: type[InputError], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_an_image_that_is_missing_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("passes:\n- edits:\n  - paint: {mask: m.png}\n")
    with pytest.raises(ImageError) as caught:
        Workflow.load(tmp_path / "w.yaml", plugins=LOCAL)
    assert str(caught.value) == (
        f"{tmp_path / 'w.yaml'}:3:13: passes.0.edits.0.paint.mask: {tmp_path / 'm.png'} "
        "does not exist, should be the path of an image"
    )


def test_files_that_are_no_workflows(tmp_path: Path) -> None:
    Image.fromarray(mask()).save(tmp_path / "m.png")
    for name, said in (
        ("no.yaml", "cannot be read as a workflow (No such file or directory)"),
        (".", "(Is a directory)"),
        ("m.png", "('utf-8' codec can't decode"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(WorkflowError, match=re.escape(said)):
            Workflow.load(f"{tmp_path}/{name}")


def test_aliases_do_not_blow_up() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    with pytest.raises(InputError) as caught:
        read("\n".join(lines))
    assert len(str(caught.value)) < 300


def test_a_plugin_that_cannot_read_its_parameters_is_named() -> None:
    with pytest.raises(PluginError, match=r"vignette: .*TypeError: a plugin's own mistake"):
        read("passes: [{edits: [{vignette: {amount: crash}}]}]")


# -- overrides -------------------------------------------------------------------------------------


def overridden(override: str) -> Workflow:
    text = "model: tiny\npasses: [{prompt: x, edits: [{note: {id: a, count: 3}}, vignette]}, {}]"
    return Workflow.from_yaml(text, overrides=[override], plugins=LOCAL)


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("passes.0.prompt=a red circle", lambda w: w.passes[0].prompt == "a red circle"),
        ("passes.0.prompt=no = yes", lambda w: w.passes[0].prompt == "no = yes"),
        ("passes.0.prompt=null", lambda w: w.passes[0].prompt is None),
        ('passes.0.prompt="7"', lambda w: w.passes[0].prompt == "7"),
        ("passes.0.prompt=[red] circle", lambda w: w.passes[0].prompt == "[red] circle"),
        ("passes.1.steps=7", lambda w: (w.passes[0].steps, w.passes[1].steps) == (20, 7)),
        ("passes.0.edits.0.note.count=9", lambda w: w.passes[0].edits[0] == Note(id="a", count=9)),
        ("passes.0.edits.1.vignette.amount=1e-1", lambda w: w.passes[0].edits[1].amount == 0.1),
        ("passes.0.edits.1=note", lambda w: w.passes[0].edits[1] == Note()),
        ("passes.0.edits=[]", lambda w: w.passes[0].edits == ()),
        ("seed=[1, 2]", lambda w: w.seeds == (1, 2)),
        ("size=8x9", lambda w: w.size == (8, 9)),
        ("model=else/where", lambda w: w.model == "else/where"),
    ],
)
def test_overrides(override: str, check: Any) -> None:
    assert check(overridden(override))


def test_overrides_leave_aliases_alone() -> None:
    text = "passes: [&a {prompt: x}, *a]"
    one, other = Workflow.from_yaml(text, overrides=["passes.1.prompt=y"]).passes
    assert (one.prompt, other.prompt) == ("x", "y")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.2.prompt=x", "--set passes.2.prompt: no '2' in passes, which has 0, 1"),
        ("pases.0.prompt=x", ("--set pases.0.prompt: no 'pases' in a workflow, "
         "which has model, passes")),
        ("passes.0.edits.0.vignette.amount=1", ("--set passes.0.edits.0.vignette.amount: "
         "no 'vignette' in passes.0.edits.0, which has note")),
        ("passes.0.prompt.x=1", ("--set passes.0.prompt.x: passes.0.prompt is 'x', "
         "which has no parts")),
        ("passes.0.promt=x", ("--set passes.0.promt: a pass has no parameter 'promt' "
         "(did you mean 'prompt'?)")),
        ("passes.0.steps=0", "--set passes.0.steps is 0, should be a whole number from 1 to 1000"),
        ("passes.0.edits.0.note.cuont=1", ("--set passes.0.edits.0.note.cuont: "
         "note has no parameter 'cuont' (did you mean 'count'?)")),
        ("passes.0.prompt", ("--set 'passes.0.prompt' should be place=value: "
         "passes.0.prompt=a red circle")),
        ("=x", "--set '=x' should be place=value: passes.0.prompt=a red circle"),
    ],
)  # fmt: skip
def test_overrides_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        overridden(override)
    assert str(caught.value) == message


def test_overrides_come_before_checks_and_paths_from_here(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "flows"
    folder.mkdir()
    (folder / "w.yaml").write_text("passes: [{steps: 0, edits: [{paint: {mask: TODO.png}}]}]")
    Image.fromarray(mask()).save(tmp_path / "m.png")
    monkeypatch.chdir(tmp_path)
    overrides = ["passes.0.edits.0.paint.mask=m.png", "passes.0.steps=3"]
    workflow = Workflow.load(folder / "w.yaml", overrides=overrides, plugins=LOCAL)
    assert workflow.files() == [tmp_path / "m.png"]
    assert workflow.passes[0].steps == 3


def test_models_are_found_beside_the_file_and_written_so(tmp_path: Path, monkeypatch: Any) -> None:
    flows, here = tmp_path / "flows", tmp_path / "here"
    for folder in (flows / "own", flows / "soft" / "round", here / "mine" / "hard", here / "soft"):
        folder.mkdir(parents=True)
    for file in (flows / "soft" / "b.safetensors", flows / "a.gguf", here / "set.safetensors"):
        file.touch()
    (flows / "tiny").touch()
    monkeypatch.chdir(here)
    said = {
        "soft/b.safetensors": flows / "soft" / "b.safetensors",  # beside the file
        "soft/round": flows / "soft" / "round",
        "a.gguf": flows / "a.gguf",
        "./own": flows / "own",
        "own": "own",  # a word alone is a name
        "tiny": "tiny",
        "../here/mine": here / "mine",
        "mine/hard": "mine/hard",  # here, as where models are loaded
        "owner/name": "owner/name",  # on the hub
        str(here / "soft"): here / "soft",
        "x" * 4096: "x" * 4096,  # no path at all
    }
    brushes = ", ".join(f"{{edits: [{{paint: {{mask: m.png, brush: '{one}'}}}}]}}" for one in said)
    Image.fromarray(mask()).save(flows / "m.png")
    text = f"{{model: soft/round, passes: [{{model: ./own}}, {brushes}]}}"
    (flows / "w.yaml").write_text(text)
    workflow = Workflow.load(flows / "w.yaml", plugins=LOCAL)
    assert (workflow.model, workflow.passes[0].model) == (
        str(flows / "soft" / "round"),
        str(flows / "own"),
    )
    found = [str(one.edits[0].brush) for one in workflow.passes[1:]]  # type: ignore[attr-defined]
    assert found == [str(one) for one in said.values()]

    workflow.save(flows / "again.yaml")
    again = yaml.parse((flows / "again.yaml").read_text(), "again")[0]
    assert (again["model"], again["passes"][0]["model"]) == ("./soft/round", "./own")
    written = [one["edits"][0]["paint"]["brush"] for one in again["passes"][1:]]
    assert written[:4] == ["./soft/b.safetensors", "./soft/round", "./a.gguf", "./own"]
    assert written[4:7] == ["own", "tiny", str(here / "mine")]
    # Where this is read, another one may lie at the same place.
    assert written[7] == str(here / "mine" / "hard")
    assert written[8:] == list(said)[8:]
    (flows / "mine" / "hard").mkdir(parents=True)
    edit = cast(Any, Workflow.load(flows / "again.yaml", plugins=LOCAL).passes[8].edits[0])
    assert edit.brush == str(here / "mine" / "hard")
    assert Workflow.from_yaml(text.replace("m.png", "../flows/m.png"), plugins=LOCAL).model == (
        "soft/round"
    )

    sets = [
        f"passes.{at}.edits.0.paint.brush={one}"
        for at, one in enumerate(("set.safetensors", "soft/round", "mine/hard"), 1)
    ]
    sets += ["model=mine/hard", "passes.0.model=./soft"]
    other = Workflow.load(flows / "w.yaml", overrides=sets, plugins=LOCAL)
    assert (other.model, other.passes[0].model) == (str(here / "mine" / "hard"), str(here / "soft"))
    assert [one.edits[0].brush for one in other.passes[1:4]] == [  # type: ignore[attr-defined]
        str(here / "set.safetensors"),
        str(flows / "soft" / "round"),
        str(here / "mine" / "hard"),
    ]


def test_the_order_of_edits_does_not_depend_on_where_their_folder_lies(tmp_path: Path) -> None:
    edits = [{"paint": {"mask": "m.png", "brush": f"./{one}/b"}} for one in ("ink", "oil", "wax")]
    orders = []
    for number in range(8):
        folder = tmp_path / f"{number * 7}"
        for one in ("ink", "oil", "wax"):
            (folder / one / "b").mkdir(parents=True)
        Image.fromarray(mask()).save(folder / "m.png")
        made = Workflow.from_data({"passes": [{"edits": edits}]}, base=folder, plugins=LOCAL)
        acting = [cast(Any, edit).brush for edit in canonical(made.passes[0].edits)]
        orders.append([str(Path(one).relative_to(folder)) for one in acting])
    assert orders == orders[:1] * 8
    ink, oil = (Paint(mask=mask(), brush=f"/{name}/b") for name in ("ink", "oil"))
    assert canonical([ink, oil]) == canonical([oil, ink])
    assert ink.digest != oil.digest


def test_whoever_may_name_no_files_is_not_told_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    data = {"model": "a.gguf", "passes": [{}]}
    assert Workflow.from_data(data, base=tmp_path, files=False).model == "a.gguf"
    assert Workflow.from_data(data, base=tmp_path).model == str(tmp_path / "a.gguf")


@given(TEXTS)
def test_scalars_of_options(text: str) -> None:
    value = parse_scalar(text)
    assert value == text or not isinstance(value, str) or text.strip()[:1] == '"'


# -- forms -----------------------------------------------------------------------------------------


def test_parameters_say_what_a_form_needs() -> None:
    found = parameters(Vignette)
    assert list(found) == ["id", "after", "amount"]
    amount = found["amount"]
    assert (amount.type, amount.allowed) == ("number", "a number above 0 and at most 1")
    assert (amount.required, amount.default) == (False, 0.5)
    assert amount.help == "How dark the corners become"
    assert parameters(Paint)["mask"].type == "mask"
    assert parameters(Paint)["image"].type == "image"
    assert parameters(Paint)["brush"].type == "model"


def test_parameters_of_a_type_without_a_schema() -> None:
    class Odd(Edit):
        name: ClassVar[str] = "odd"

        call: Callable[[], None]

    assert parameters(Odd)["call"].allowed == "another value"


@pytest.mark.parametrize("cls", [Pass, Workflow])
def test_every_field_has_help(cls: type[Pass] | type[Workflow]) -> None:
    assert [name for name, one in parameters(cls).items() if not one.help] == []


def test_json_schema_is_there() -> None:
    schema = Workflow.model_json_schema()
    assert schema["properties"]["passes"]["minItems"] == 1
