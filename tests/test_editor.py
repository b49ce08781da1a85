"""The editor: what it takes, what it refuses in one line, and what passes share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import IPNDMScheduler
from diffusers.models.attention_processor import AttnProcessor
from skimage import data

from diffedit import (
    Box,
    Call,
    Contribution,
    Edit,
    Editor,
    Guidance,
    Pass,
    Patch,
    Run,
    Start,
    Workflow,
    errors,
)
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.testing import tiny_editor, tiny_model, tiny_pipeline
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style

PHOTO = data.coffee()[:128, :160]
MASK = np.zeros(PHOTO.shape[:2], np.uint8)
MASK[40:80, 50:90] = 255


class Custom(Edit):
    """Contributes what the test says."""

    name: ClassVar[str] = "custom"
    parts: Any = None
    box: Any = None

    def region(self, image: Any) -> Box | None:
        return self.box  # type: ignore[no-any-return]

    def contribute(self, run: Run) -> Contribution:
        parts = self.parts(run) if callable(self.parts) else self.parts or {}
        return Contribution(**parts)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return tiny_editor()


def calls(editor: Editor, *edits: Edit, prompt: str | None = None) -> int:
    result = editor.run(PHOTO, Pass(prompt=prompt, steps=2, edits=edits), seed=1)
    return int(result.passes[0]["calls"])


# --- what can be run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("workflow.yaml", "cannot run str.*Workflow.load"),
        (Img2Img(), r"cannot run Img2Img.*Pass\(edits"),
        (None, "cannot run NoneType"),
        ([], "cannot run nothing"),
    ],
)
def test_what_is_no_pass_is_refused(editor: Editor, what: Any, said: str) -> None:
    with pytest.raises(errors.InputError, match=said):
        editor.run(PHOTO, what)


@pytest.mark.parametrize("seed", [1.5, "x", -1, 2**63, [], [1, 1], [1, None]])
def test_what_is_no_seed_is_refused(editor: Editor, seed: Any) -> None:
    with pytest.raises(errors.InputError, match="seed"):
        editor.run(PHOTO, Pass(prompt="x", steps=1), seed=seed)


@pytest.mark.parametrize("size", [64, (64.0, 64.0), (64,), "64x64", (4, 64)])
def test_what_is_no_size_is_refused(editor: Editor, size: Any) -> None:
    with pytest.raises(errors.InputError, match="size"):
        editor.run(None, Pass(prompt="x", steps=1), size=size)


def test_size_is_for_pictures_from_nothing(editor: Editor) -> None:
    made = editor.run(None, Pass(prompt="x", steps=1), size=(72, 64))
    assert made.pixels.shape == (64, 72, 3)
    with pytest.raises(errors.InputError, match="160x128"):
        editor.run(PHOTO, Pass(prompt="x", steps=1), size=(72, 64))


def test_numpy_integers_are_seeds(editor: Editor) -> None:
    pass_ = Pass(prompt="x", steps=2, edits=[Img2Img()])
    one = editor.run(PHOTO, pass_, seed=np.int64(3))  # type: ignore[arg-type]
    assert (one.pixels == editor.run(PHOTO, pass_, seed=3).pixels).all()


def test_a_model_is_the_same_by_every_path(
    editor: Editor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "m").mkdir()  # nothing in it: loading it would fail
    monkeypatch.chdir(tmp_path)
    named = Editor(editor.model, source="./m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with caplog.at_level(logging.WARNING, "diffedit"):
        for name in (str(tmp_path / "m"), "m", "./link", "../" + tmp_path.name + "/m"):
            flow = Workflow(model=name, passes=(Pass(steps=1, model=name),))
            named.run(None, flow)
    assert "asks for the model" not in caplog.text
    with pytest.raises(errors.ModelError):
        named.run(None, flow.model_copy(update={"passes": (Pass(steps=1, model="./other"),)}))


def test_result_says_what_made_it(editor: Editor, caplog: pytest.LogCaptureFixture) -> None:
    flow = Workflow(model="elsewhere", seed=5, passes=(Pass(prompt="x", steps=1),))
    with caplog.at_level(logging.WARNING, "diffedit"):
        result = editor.run(None, flow, seed=[8, 9])
    assert "asks for the model 'elsewhere'" in caplog.text
    assert result.workflow.model == editor.source
    assert result.workflow.seed == (8, 9)
    assert result.workflow.size == (64, 64)
    again = editor.run(None, result.workflow)
    for one, other in zip(result.pictures, again.pictures, strict=True):
        assert (one.pixels == other.pixels).all()


# --- what a pass reads ----------------------------------------------------------------------------


def test_inpaint_samples_also_beside_an_edit_that_only_finishes(editor: Editor) -> None:
    finish = Custom(parts={"finish": lambda pixels: pixels * 0.5})
    assert calls(editor, finish) == 0
    assert calls(editor, Inpaint(mask=MASK)) == 2
    assert calls(editor, Inpaint(mask=MASK), finish) == 2
    assert calls(editor, finish, prompt="x") == 2


def test_finish_alone_works_at_full_resolution(editor: Editor) -> None:
    large = data.astronaut()  # four times the tiny model's largest side
    seen: list[torch.Size] = []

    def finish(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.shape)
        return pixels

    result = editor.run(large, Pass(edits=[Custom(parts={"finish": finish})]))
    assert seen == [(1, 3, 512, 512)]
    assert (result.pixels == large).all()


def test_a_pass_that_looks_at_nothing_of_the_picture_says_so(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "diffedit"):
        calls(editor, Img2Img(), prompt="x")
        assert not caplog.records
        calls(editor, prompt="x")
    assert "nothing of it is kept" in caplog.text


@pytest.mark.parametrize("edit", [Img2Img(), Inpaint(mask=MASK), ControlNet(kind="none")])
def test_edits_of_a_picture_need_one(editor: Editor, edit: Edit) -> None:
    with pytest.raises(errors.InputError, match="starts from nothing"):
        editor.run(None, Pass(prompt="x", edits=[edit]), size=(160, 128))


def test_passes_share_no_noise(editor: Editor) -> None:
    starts: list[torch.Tensor] = []

    def keep_first(x0: torch.Tensor, call: Call) -> torch.Tensor:
        return x0

    def spy(run: Run) -> dict[str, Any]:
        starts.append(run.streams.normal("noise", (4, 8, 8)))
        return {"refine": keep_first}

    pass_ = Pass(prompt="x", steps=1, edits=[Custom(parts=spy)])
    editor.run(None, [pass_, pass_], seed=3)
    editor.run(None, pass_, seed=3)
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_a_term_that_names_no_prediction_is_refused_before_the_model_runs() -> None:
    editor = tiny_editor()
    editor.model.unet.forward = None  # type: ignore[attr-defined]
    term = Custom(parts={"terms": (Guidance(1.0, "positve", "negative"),)})
    with pytest.raises(errors.ParameterError, match=r"'positve'.*did you mean 'positive'"):
        calls(editor, Img2Img(), term, prompt="x")


def test_a_start_may_come_out_of_prepare(editor: Editor) -> None:
    held: dict[str, torch.Tensor] = {}

    def parts(run: Run) -> dict[str, Any]:
        def prepare(run: Run) -> None:
            held["latents"] = torch.zeros(1, 4, 8, 8)

        return {"prepare": prepare, "start": Start(lambda: held["latents"], at=0.5)}

    result = editor.run(None, Pass(prompt="x", steps=2, edits=[Custom(parts=parts)]), seed=1)
    assert result.passes[0]["calls"] == 1


def test_a_mask_without_a_wish_brings_its_own_region(editor: Editor) -> None:
    """Beside an inpaint elsewhere in a large picture."""
    large = data.astronaut()
    mine = torch.zeros(1, 1, 512, 512)
    mine[..., 400:440, 400:440] = 1
    theirs = np.zeros((512, 512), np.uint8)
    theirs[20:60, 20:60] = 255
    edits = [Custom(parts={"mask": mine}), Inpaint(mask=theirs, feather=0)]
    made = editor.run(large, Pass(prompt="x", steps=2, edits=edits), seed=1).pixels
    changed = (made != large).any(-1)
    allowed = (mine[0, 0].numpy() > 0) | (theirs > 0)
    assert changed[400:440, 400:440].any()
    assert changed[20:60, 20:60].any()
    assert not changed[~allowed].any()


def test_a_mask_beyond_the_region_that_was_asked_for_is_refused(editor: Editor) -> None:
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 400:440, 400:440] = 1
    edit = Custom(parts={"mask": mask}, box=Box(0, 0, 20, 20))
    with pytest.raises(errors.PluginError, match="beyond the region"):
        editor.run(data.astronaut(), Pass(prompt="x", edits=[edit]))


# --- what the model is asked for ------------------------------------------------------------------


def test_what_contribute_does_to_the_model_is_undone_and_named() -> None:
    editor = tiny_editor()
    unet = editor.model.unet  # type: ignore[attr-defined]
    before = {key: value.clone() for key, value in unet.state_dict().items()}

    def meddle(run: Run) -> dict[str, Any]:
        unet.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            unet.conv_in.weight.add_(1.0)
        return {}

    with pytest.raises(errors.PluginError, match=r"custom.*left the model changed"):
        calls(editor, Custom(parts=meddle), prompt="x")
    assert not unet._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_foreign_attention_processors_are_not_dropped_in_silence(editor: Editor) -> None:
    class Foreign(AttnProcessor):  # type: ignore[misc]
        """Attention of its own, which no term could reach."""

    def apply(model: Any) -> Any:
        before = dict(model.unet.attn_processors)
        model.unet.set_attn_processor(Foreign())
        return lambda: model.unet.set_attn_processor(before)

    patch = Custom(parts={"patches": (Patch(apply),)})
    assert calls(editor, patch, prompt="x") == 2
    with pytest.raises(errors.CapabilityError, match="Foreign"):
        calls(editor, patch, Style(image=PHOTO), prompt="x")
    assert calls(editor, Style(image=PHOTO), prompt="x") == 2


@pytest.mark.parametrize("in_channels", [4, 9])
def test_channels_are_checked_by_role(in_channels: int) -> None:
    editor = tiny_editor(in_channels=in_channels)
    mask = torch.ones(1, 1, 8, 8)

    def run(**channels: torch.Tensor) -> int:
        pass_ = Pass(prompt="x", steps=1, edits=[Custom(parts={"channels": channels})])
        return int(editor.run(None, pass_).passes[0]["calls"])

    if in_channels == 4:
        with pytest.raises(errors.CapabilityError, match="no channel 'mask'"):
            run(mask=mask)
        return
    assert run(mask=mask, masked=torch.zeros(1, 4, 8, 8)) == 1
    with pytest.raises(errors.CapabilityError, match=r"'depth'.*mask, masked"):
        run(depth=mask)
    with pytest.raises(errors.PluginError, match=r"channel 'mask' is \(1, 1, 3, 3\)"):
        run(mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(errors.ConflictError, match="masks of this pass"):
        calls(editor, Inpaint(mask=MASK), Custom(parts={"channels": {"mask": mask}}))


def test_a_scheduler_that_cannot_noise_a_picture_is_refused_before_the_model_runs() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = IPNDMScheduler()
    editor = Editor(StableDiffusion(pipe))
    pipe.unet.forward = None
    for edit in (Img2Img(strength=0.5), Inpaint(mask=MASK), Style(image=PHOTO)):
        with pytest.raises(errors.SchedulerError, match="IPNDM"):
            calls(editor, edit, prompt="x")


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home") / "model"
    tiny_pipeline().save_pretrained(place)
    return place


def test_a_folder_loads_also_from_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    pass_ = Pass(prompt="x", steps=1)
    made = [Editor.load(place).run(None, pass_).pixels for place in (str(folder), "~/model")]
    assert (made[0] == made[1]).all()
    assert (made[0] == Editor(tiny_model()).run(None, pass_).pixels).all()


def test_dtype_is_what_was_asked_for(folder: Path) -> None:
    editor = Editor.load(folder, dtype="bfloat16")
    assert editor.model.dtype == torch.bfloat16
    exact = Editor.load(folder).run(PHOTO, Pass(prompt="x", steps=2, edits=[Img2Img()])).pixels
    made = editor.run(PHOTO, Pass(prompt="x", steps=2, edits=[Img2Img()])).pixels
    assert abs(made.astype(int) - exact).mean() < 4


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("model.ckpt", b"x", errors.UnsafeWeights, "pickle"),
        ("model.weights", b"x", errors.ModelError, "safetensors"),
        ("model.safetensors", b"x" * 64, errors.ModelError, "not a readable"),
        ("model_index.json", b"[]", errors.ModelError, "not a model"),
        ("model_index.json", b"{", errors.ModelError, "not valid JSON"),
        ("model_index.json", b'{"_class_name": "FluxPipeline"}', errors.ModelError, "FluxPipel"),
    ],
)
def test_what_is_no_model_is_refused(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(error, match=said):
        Editor.load(tmp_path if name == "model_index.json" else file)


def test_a_folder_of_pickles_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(errors.UnsafeWeights, match="can run any code"):
        Editor.load(tmp_path)


def test_resources_are_loaded_once_and_named(editor: Editor, tmp_path: Path) -> None:
    from diffedit.testing import tiny_control_net

    tiny_control_net(tiny_pipeline()).save_pretrained(tmp_path)
    pass_ = Pass(prompt="x", steps=1, edits=[ControlNet(model=str(tmp_path))])
    first = editor.run(PHOTO, pass_)
    assert any(str(tmp_path) in key for key in first.provenance["resources"])
    (tmp_path / "config.json").unlink()
    assert (editor.run(PHOTO, pass_).pixels == first.pixels).all()
    editor.forget()
    with pytest.raises(errors.ModelError):
        editor.run(PHOTO, pass_)


def test_a_folder_may_say_at_which_sizes_its_model_draws(folder: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "diffedit.json").write_text('{"sides": [64, 64], "whole": 96}')
    editor = Editor.load(place)
    large = data.astronaut()
    mask = np.zeros((512, 512), np.uint8)
    mask[100:200, 100:200] = 255

    def size(*edits: Edit, image: Any = large) -> list[int]:
        result = editor.run(image, Pass(prompt="x", steps=2, edits=edits), size=None)
        return list(result.passes[0]["working_size"])

    assert size(Inpaint(mask=mask)) == [64, 64]
    assert size(Img2Img()) == [96, 96]
    assert size(image=None) == [64, 64]
    for wrong in ('{"sides": [64]}', '{"sides": [128, 64], "whole": 96}', "[]", "{"):
        (place / "diffedit.json").write_text(wrong)
        with pytest.raises(errors.ModelError, match=r"diffedit\.json"):
            Editor.load(place)
