"""Everything that a user brings of his own, in one pass: it runs, it acts, and the laws hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from diffedit import Edit, Editor, Pass, errors
from diffedit.cli import main
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_ip_adapter import IPAdapter
from diffedit_lora import LoRA
from diffedit_region import Region
from diffedit_style import Style
from tests.families import FLUX, SD, SDXL, Tiny
from tests.families import ip_adapter as adapters
from tests.families.additions import additions, written
from tests.laws.state import state, unchanged

PICTURE = data.astronaut()[:64, :96]


def mask(left: int, right: int) -> np.ndarray:
    made = np.zeros(PICTURE.shape[:2], np.uint8)
    made[12:52, left:right] = 255
    return made


def everything(family: Tiny, folder: Path) -> list[Edit]:
    """Seven edits, five of them with something that lies on the disk."""
    pipe = family.pipeline()
    family.control_net(pipe).save_pretrained(folder / "net")
    if family is FLUX:
        file = adapters.write_for_flux(folder / "adapter", pipe.transformer)
    else:
        file = adapters.write(folder / "adapter", pipe.unet, "plus")
    lora = written(folder / "lora.safetensors", additions(pipe))
    return [
        Inpaint(mask=mask(10, 80), feather=4),
        Img2Img(strength=0.6),
        ControlNet(model=str(folder / "net"), kind="canny", weight=0.6),
        IPAdapter(model=str(file), image=data.chelsea()[:80, :80], weight=0.5, mask=mask(10, 50)),
        LoRA(model=lora, weight=0.7),
        Style(image=data.coffee()[:64, :64], strength=0.6),
        Region(prompt="a green square", negative="red", mask=mask(40, 80)),
    ]


def pass_of(editor: Editor, edits: Any, steps: int = 3) -> Pass:
    weighs = "prompt_weights" in editor.model.capabilities
    prompt = "a (red:1.2) circle" if weighs else "a red circle"
    said = {"prompt": prompt, "negative": "blurry", "guidance": 4, "steps": steps}
    return Pass(edits=tuple(edits), **said)


def latents(editor: Editor, edits: Any) -> torch.Tensor:
    made = editor.run(PICTURE, pass_of(editor, edits), seed=3).latents
    assert made is not None
    return made


@pytest.fixture(params=[SD, SDXL, FLUX], ids=lambda one: one.name)
def made(request: Any, tmp_path: Path) -> tuple[Tiny, Editor, list[Edit]]:
    family: Tiny = request.param
    return family, family.editor(), everything(family, tmp_path)


@pytest.fixture(params=[SD, SDXL, FLUX], ids=lambda one: one.name)
def narrow(request: Any, tmp_path: Path) -> tuple[Editor, Editor, list[Edit]]:
    """Two editors of one model whose denoiser's weights are held in eight bits."""
    family: Tiny = request.param
    family.save(family.pipeline(), tmp_path / "model")
    one, other = (Editor.load(tmp_path / "model", device="cpu", dtype="float8") for _ in range(2))
    return one, other, everything(family, tmp_path)


def test_all_of_them_act_in_one_pass_in_any_order(made: tuple[Tiny, Editor, list[Edit]]) -> None:
    _, editor, edits = made
    whole = latents(editor, edits)
    for order in itertools.islice(itertools.permutations(edits), 11, None, 1700):
        assert torch.equal(latents(editor, order), whole)
    for one in edits:
        rest = [edit for edit in edits if edit is not one]
        assert not torch.equal(latents(editor, rest), whole), one.name


def test_nothing_changes_outside_the_mask(made: tuple[Tiny, Editor, list[Edit]]) -> None:
    _, editor, edits = made
    edits[0] = Inpaint(mask=mask(10, 80), feather=0)
    pixels = editor.run(PICTURE, pass_of(editor, edits), seed=3).pixels
    outside = mask(10, 80) == 0
    np.testing.assert_array_equal(pixels[outside], PICTURE[outside])
    assert not np.array_equal(pixels, PICTURE)


def test_a_pass_without_them_is_a_fresh_editors(made: tuple[Tiny, Editor, list[Edit]]) -> None:
    family, editor, edits = made
    before = state(editor)
    latents(editor, edits)
    unchanged(before, state(editor))
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(family.editor(), few))


@pytest.mark.parametrize("wrong", ["lora", "ip_adapter", "controlnet"])
def test_one_of_another_family_is_one_line_and_exit_code_2(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = {edit.name: edit for edit in everything(FLUX, tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    said = {"model": edits[wrong].model}  # type: ignore[attr-defined]
    said |= {"image": str(tmp_path / "in.png")} if wrong == "ip_adapter" else {}
    line = ["edit", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "-p", "x"]
    capsys.readouterr()  # what making the models said
    assert main([*line, "--edit", f"{wrong}:{json.dumps(said)}"]) == 2  # for the embedded model
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert said["model"] in told
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "in.png"])


def test_weights_in_eight_bits_are_as_they_were(
    narrow: tuple[Editor, Editor, list[Edit]],
) -> None:
    editor, fresh, edits = narrow
    before = state(editor)
    whole = latents(editor, edits)
    unchanged(before, state(editor))
    with editor.stream(PICTURE, pass_of(editor, edits), seed=3) as steps:
        next(steps)
    unchanged(before, state(editor))
    assert torch.equal(latents(editor, edits), whole)
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(fresh, few))


def test_a_cancelled_pass_leaves_nothing_behind(made: tuple[Tiny, Editor, list[Edit]]) -> None:
    family, editor, edits = made
    before = state(editor)
    with editor.stream(PICTURE, pass_of(editor, edits), seed=3) as steps:
        next(steps)
        with pytest.raises(AssertionError):  # the LoRA is there
            unchanged(before, state(editor))
    unchanged(before, state(editor))
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(family.editor(), few))


def test_an_error_in_the_midst_of_a_step_leaves_nothing_behind(
    made: tuple[Tiny, Editor, list[Edit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, editor, edits = made
    before = state(editor)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as broken:
        denoiser: Any = next(iter(editor.model.parts()))
        blocks = [denoiser.mid_block] if family is not FLUX else denoiser.single_transformer_blocks
        broken.setattr(blocks[0], "forward", fails)
        with pytest.raises(errors.PluginError, match="on purpose"):
            latents(editor, edits)
    unchanged(before, state(editor))
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(family.editor(), few))
