"""Out of memory: less is asked for, once and aloud; or one line says so, and the editor goes on."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from diffedit import Editor, Pass, errors, testing
from diffedit.cli import main
from diffedit.memory import exhausted, let_go
from diffedit.models import holding
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_ip_adapter import IPAdapter
from diffedit_lora import LoRA
from diffedit_style import Style
from tests.families import FAMILIES, Tiny, ip_adapter
from tests.families.additions import additions, written
from tests.laws.state import state, unchanged

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[10:40, 10:40] = 255
BARE = Pass(prompt="a", steps=1, guidance=2)
SMALLER = Pass(prompt="a", steps=1, guidance=1)
MASKED = BARE.model_copy(update={"edits": (Inpaint(mask=MASK),)})


class Allocator(TorchDispatchMode):
    """Counts allocations, and fails at the n-th, or from the n-th on."""

    def __init__(self, at: int | None = None, lasting: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.lasting, self.count = at, lasting, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {_storage(one) for one in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(made):
            storage = _storage(tensor)
            if storage is not None and storage not in known:
                known.add(storage)
                self.count += 1
                if self.count == self.at or (self.lasting and self.count > (self.at or 0)):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return made


def _storage(one: Any) -> int | None:
    """Of a tensor: which memory it has, if it has any."""
    if not isinstance(one, torch.Tensor) or one.untyped_storage().nbytes() == 0:
        return None
    return int(one.untyped_storage()._cdata)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """What is loaded stays, and need not be searched after each failure."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def smallest() -> Editor:
    """As few allocations as a real model makes do with."""
    pipe = testing.tiny_pipeline()
    settings = dict(pipe.text_encoder.config.to_dict()) | {"num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=0,
            sample_size=64,
        )
        text = CLIPTextModel(CLIPTextConfig(**settings))
    for name, part in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        pipe.register_modules(**{name: part.eval().requires_grad_(False)})
    return Editor(StableDiffusion(pipe, "smallest"))


def added(editor: Editor, folder: Path) -> Pass:
    """A pass with everything that comes on top of a model, from files."""
    unet = editor.model.pipe.unet  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = T2IAdapter(
            channels=[16], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
        )
    net.save_pretrained(folder / "net")
    adapter = ip_adapter.write(folder / "adapter", unet)
    lora = written(folder / "lora.safetensors", additions(editor.model.pipe))  # type: ignore[attr-defined]
    edits = (
        Inpaint(mask=MASK),
        LoRA(model=lora),
        IPAdapter(model=str(adapter), image=PICTURE[::-1].copy()),
        ControlNet(model=str(folder / "net"), image=PICTURE),
    )
    return BARE.model_copy(update={"edits": edits})


def as_new(editor: Editor) -> None:
    """Take back what the model gave up, so that the next one may give it up too."""
    model: Any = editor.model
    model.one_by_one = False
    model.vae.disable_tiling()
    model.vae.disable_slicing()
    editor.forget()


def run(editor: Editor, pass_: Pass = BARE, **said: Any) -> np.ndarray:
    given = PICTURE if pass_.edits else None
    return editor.run(given, pass_, seed=1, **said).pixels


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def attempted(editor: Editor, pass_: Pass, at: int) -> tuple[np.ndarray | None, str]:
    """A run whose n-th allocation fails: its pixels, or what was said."""
    try:
        with Allocator(at):
            return run(editor, pass_), ""
    except errors.OutOfMemory as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("kind", "every"), [("masked", 1), ("bare", 11), ("added", 11), ("float8", 11)]
)
def test_whichever_allocation_fails_the_run_ends_well(
    kind: str, every: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    editor = smallest()
    pass_ = BARE if kind == "bare" else added(editor, tmp_path) if kind == "added" else MASKED
    if kind == "float8":
        holding.narrow(editor.model.pipe.unet, "float8_e4m3fn")  # type: ignore[attr-defined]
    meant, small = run(editor, pass_), run(editor, SMALLER)
    before = state(editor)
    editor.forget()
    with Allocator() as counted:
        run(editor, pass_)
    ended = {"less": 0, "line": 0}
    for at in range(1, counted.count + 1, every):
        as_new(editor)
        caplog.clear()
        made, said = attempted(editor, pass_, at)
        if made is None:
            assert "smaller" in said
            assert "\n" not in said
            ended["line"] += 1
        else:
            assert apart(made, meant) <= 1
            assert "trying again with predictions one after the other" in caplog.text
            assert editor.model.one_by_one
            ended["less"] += 1
        if at % 50 == 1 or every > 1:  # and the same editor does a job that fits
            assert apart(run(editor, SMALLER), small) <= 1
        if at % 50 == 1 or every > 1:  # and, with nothing given up, is what it was at first
            as_new(editor)
            unchanged(before, state(editor))
        if at % 50 == 1:
            np.testing.assert_array_equal(run(editor, pass_), meant)
    # What is made outside the passes, such as the opened picture, has no cheaper way.
    assert ended["less"] > 20 * ended["line"]


def test_it_is_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    editor = testing.tiny_editor()
    meant = run(editor)
    editor.forget()
    with Allocator(400, lasting=True), pytest.raises(errors.OutOfMemory) as told:
        run(editor)
    assert "also with predictions one after the other and the autoencoder in tiles" in str(
        told.value
    )
    assert caplog.text.count("trying again") == 1
    caplog.clear()
    with Allocator(400, lasting=True), pytest.raises(errors.OutOfMemory) as told:
        run(editor)  # it saves what it can already
    assert "also with" not in str(told.value)
    assert "trying again" not in caplog.text
    assert apart(run(editor), meant) <= 1


def test_each_cheaper_setting_is_tried_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = testing.tiny_editor()
    run(editor)
    editor.forget()
    left = iter(["less of this", "less of that", None])
    monkeypatch.setattr(editor.model, "save_memory", lambda: next(left))
    with Allocator(400, lasting=True), pytest.raises(errors.OutOfMemory) as told:
        run(editor)
    assert "also with less of this and less of that" in str(told.value)
    assert caplog.text.count("trying again") == 2


def test_the_cpus_own_allocator_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert exhausted(error.value)
    assert exhausted(MemoryError())
    assert not exhausted(RuntimeError("shapes do not match"))


def test_what_failed_is_let_go_of() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        large = torch.empty(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no memory")

    try:
        fails()
    except torch.OutOfMemoryError as caught:
        error = caught
    assert held[0]() is not None
    let_go(error)
    assert held[0]() is None


def test_a_plugin_is_not_blamed_for_it() -> None:
    editor = testing.tiny_editor()
    masked = Pass(prompt="a", steps=1, guidance=2, edits=(Inpaint(mask=MASK),))
    run(editor, masked)
    editor.forget()
    with Allocator(3, lasting=True), pytest.raises(errors.OutOfMemory):
        run(editor, masked)


def test_the_command_line_says_it_in_one_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(StableDiffusion, "predict", fails)
    said = ["edit", "-o", str(tmp_path / "out.png"), "--prompt", "x", "--size", "64x64"]
    assert main(said) == 1
    said_of_it = capsys.readouterr().err
    assert said_of_it.count("out of memory") == 2  # what is tried, and that it failed
    assert not (tmp_path / "out.png").exists()


def test_less_memory_from_the_start(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        testing.tiny_pipeline(seed=seed).save_pretrained(tmp_path / name)
    passes = [MASKED, Pass(prompt="b", steps=2, model=str(tmp_path / "two"), edits=(Img2Img(),))]
    usual = Editor.load(tmp_path / "one", device="cpu").run(PICTURE, passes, seed=1)
    editor = Editor.load(tmp_path / "one", device="cpu", low_memory=True)
    less = editor.run(PICTURE, passes, seed=1)
    assert apart(less.pixels, usual.pixels) <= 1
    for model in (editor.model, *editor._resources.values()):
        if isinstance(model, StableDiffusion):
            assert model.info["saves_memory"]
            assert model.vae.use_tiling
    assert sum(isinstance(one, StableDiffusion) for one in editor._resources.values()) == 1


def test_less_memory_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    predict = StableDiffusion.predict

    def counted(self: StableDiffusion, x: Any) -> torch.Tensor:
        calls.append(len(x.rows))
        return predict(self, x)

    monkeypatch.setattr(StableDiffusion, "predict", counted)
    file = tmp_path / "one.yaml"
    file.write_text("size: 64x64\npasses: [{prompt: x, steps: 1}]\n", "utf-8")
    lines = [["edit", "-p", "x", "--steps", "1", "--size", "64x64"], ["run", str(file)]]
    for number, line in enumerate(lines):
        for said, most in (([], 2), (["--low-memory"], 1)):
            calls.clear()
            out = str(tmp_path / f"{number}-{most}.png")
            assert main([*line, "-o", out, "--device", "cpu", *said]) == 0
            assert max(calls) == most


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_predictions_one_by_one_are_those_of_a_batch(
    family: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    editor = family.editor()
    edits = family.carried([Img2Img(strength=0.7), Style(image=PICTURE[::-1].copy())])
    pass_ = Pass(prompt="a", negative="b", steps=2, guidance=3, edits=edits)
    both = editor.run(PICTURE, pass_, seed=[1, 2]).latents
    assert editor.model.save_memory() is not None
    assert editor.model.save_memory() is None
    calls: list[int] = []
    predict = editor.model.predict

    def counted(x: Any) -> torch.Tensor:
        calls.append(len(x.rows))
        return predict(x)

    editor.model.predict = counted  # type: ignore[method-assign]
    one = editor.run(PICTURE, pass_, seed=[1, 2]).latents
    assert both is not None
    assert one is not None
    assert max(calls) == (2 if family.styled else 1)  # a reference is with its picture
    torch.testing.assert_close(one, both, atol=1e-3, rtol=1e-3)


def test_what_the_caller_is_handling_is_his_own_affair() -> None:
    editor = testing.tiny_editor()
    try:
        raise torch.OutOfMemoryError("elsewhere")
    except torch.OutOfMemoryError:
        with pytest.raises(errors.SchedulerError):
            editor.run(None, Pass(prompt="a", steps=1, scheduler="nonsense"), size=(64, 64))
    assert not editor.model.one_by_one
