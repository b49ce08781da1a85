"""Everything that a user brings of his own, in one pass: it runs, it acts, and the laws hold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from diffedit import Edit, Editor, Pass, errors
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


def state(editor: Editor) -> dict[str, Any]:
    """All that a model is: modules, processors, hooks, weights."""
    found: dict[str, Any] = {}
    for number, part in enumerate(editor.model.parts()):
        for name, module in part.named_modules():
            own = vars(module)
            hooks = {k: len(v) for k, v in own.items() if "_hook" in k and isinstance(v, dict)}
            processor = type(getattr(module, "processor", None))
            found[f"{number}.{name}"] = type(module), processor, hooks, module.training
        for name, weight in part.state_dict().items():
            found[f"{number}.{name}."] = weight.clone()
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


@pytest.fixture(params=[SD, SDXL, FLUX], ids=lambda one: one.name)
def made(request: Any, tmp_path: Path) -> tuple[Tiny, Editor, list[Edit]]:
    family: Tiny = request.param
    return family, family.editor(), everything(family, tmp_path)


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
    assert same(state(editor), before)
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(family.editor(), few))


def test_a_cancelled_pass_leaves_nothing_behind(made: tuple[Tiny, Editor, list[Edit]]) -> None:
    family, editor, edits = made
    before = state(editor)
    with editor.stream(PICTURE, pass_of(editor, edits), seed=3) as steps:
        next(steps)
        assert not same(state(editor), before)  # the LoRA is there
    assert same(state(editor), before)
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
    assert same(state(editor), before)
    few = edits[:2]
    assert torch.equal(latents(editor, few), latents(family.editor(), few))
