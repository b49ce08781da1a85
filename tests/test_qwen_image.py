"""What only Qwen-Image brings: unequal texts, what it reads of pictures, guidance, ControlNets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from skimage import data

from diffedit import Pass
from diffedit.errors import InputError
from diffedit.guidance import classifier_free, kept_in_length
from diffedit.models.protocol import Conditioning, ModelInput
from diffedit.models.qwen_image import Family, _picture
from diffedit.rows import RowKey, RowMap
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_instruct import Instruct
from diffedit_style import Style
from tests.families import QWEN_IMAGE

PICTURE = data.coffee()[:64, :96]
MASK = np.zeros(PICTURE.shape[:2], bool)
MASK[16:40, 24:60] = True


def test_only_what_is_ragged_is_filled_up() -> None:
    ragged = frozenset({"text"})
    short, long = (
        Conditioning({"text": torch.ones(1, n, 4), "sizes": torch.ones(1, 2)}, ragged)
        for n in (3, 5)
    )
    both = Conditioning.stack([short, long])
    assert both.tensors["text"].sum(dim=(1, 2)).tolist() == [12, 20]
    assert both.tensors["text"].shape == (2, 5, 4)
    assert both.rows([1, 0, 0]).ragged == ragged
    plain = [Conditioning({"text": one.tensors["text"]}) for one in (short, long)]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        Conditioning.stack(plain)


def test_prompts_of_unequal_lengths_say_beside_each_other_what_they_say_alone() -> None:
    model = QWEN_IMAGE.editor().model
    prompts = ("a red circle", "a red circle on a blue ground, seen from far away", "")
    parts = [model.embed([prompt], (96, 64)) for prompt in prompts]
    keys = tuple(RowKey("positive", item) for item in range(3))
    latents = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    together = ModelInput(latents, torch.tensor(500.0), Conditioning.stack(parts), RowMap(keys))
    made = model.predict(together)
    assert torch.allclose(model.predict(together.only([2, 0])), made[[2, 0]], atol=1e-5)
    for row, part in enumerate(parts):
        alone = ModelInput(latents[[row]], torch.tensor(500.0), part, RowMap(keys[row : row + 1]))
        assert torch.allclose(model.predict(alone), made[[row]], atol=1e-5)
    changed = Conditioning.stack([parts[0], parts[0], parts[0]])
    other = model.predict(ModelInput(latents, torch.tensor(500.0), changed, RowMap(keys)))
    assert not torch.allclose(other[1], made[1], atol=1e-3)


def test_guidance_turns_a_tokens_velocity_and_keeps_its_length() -> None:
    draw = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 2, 16, 6, 4, generator=draw)
    model = QWEN_IMAGE.editor().model
    made = model.combine({"positive": positive, "negative": negative}, 4.0)

    def lengths(x: torch.Tensor) -> torch.Tensor:
        return x.unfold(2, 2, 2).unfold(3, 2, 2).square().sum(dim=(1, 4, 5))

    assert torch.allclose(lengths(made), lengths(positive))
    plain = classifier_free({"positive": positive, "negative": negative}, 4.0)
    along = (plain / made).unfold(2, 2, 2).unfold(3, 2, 2)  # one factor to a token
    assert torch.allclose(along, along.mean(dim=(1, 4, 5), keepdim=True)[..., :1, :1], rtol=1e-4)
    assert model.combine({"positive": positive}, 4.0) is positive
    assert torch.allclose(kept_in_length(3 * positive, positive), positive)


def test_a_reference_joins_the_sequence_after_the_picture() -> None:
    model = QWEN_IMAGE.editor().model
    draw = torch.Generator().manual_seed(1)
    latents, *beside = (torch.randn(1, 16, *size, generator=draw) for size in ((8, 12), (6, 4)))
    told = model.embed(["x"], (96, 64)), RowMap((RowKey("positive", 0),))
    plain = ModelInput(latents, torch.tensor(500.0), *told)
    shown = ModelInput(latents, torch.tensor(500.0), *told, tokens={"reference": tuple(beside)})
    made = model.predict(shown)
    assert made.shape == latents.shape
    assert not torch.allclose(made, model.predict(plain), atol=1e-3)


def test_a_control_net_for_inpainting_sees_the_mask_and_asks_for_one(tmp_path: Path) -> None:
    editor = QWEN_IMAGE.editor()
    pipe: Any = editor.model.pipe  # type: ignore[attr-defined]
    QWEN_IMAGE.control_net(pipe, inpainting=True).save_pretrained(tmp_path)
    net = ControlNet(model=str(tmp_path), kind="none")
    inpaint = Inpaint(mask=MASK, feather=0)
    with pytest.raises(InputError, match="for inpainting: it needs a mask"):
        editor.run(PICTURE, Pass(prompt="x", steps=1, edits=(net,)))
    made, without = (
        editor.run(PICTURE, Pass(prompt="x", steps=2, edits=edits)).pixels
        for edits in ((net, inpaint), (inpaint,))
    )
    assert (made == PICTURE)[~MASK].all()
    assert (made != without).any()


def test_one_step_is_finite() -> None:
    """Where the schedule says how it ends, diffusers divides 0 by 0 when it has one step."""
    editor = QWEN_IMAGE.editor()
    schedule = editor.model.schedule(None, 1)
    assert schedule.timesteps.tolist() == [1000.0]
    scheduler: Any = editor.model.pipe.scheduler  # type: ignore[attr-defined]
    assert scheduler.config.shift_terminal == 0.02
    made = editor.run(None, Pass(prompt="x", steps=1), size=(64, 64))
    assert made.latents is not None
    assert torch.isfinite(made.latents).all()


def _told(editor: Any, *passes: Pass, **said: Any) -> tuple[list[Conditioning], list[Any]]:
    """What is embedded, and what the denoiser is called with."""
    said_of: list[Conditioning] = []
    calls: list[Any] = []
    embed, predict = editor.model.embed, editor.model.predict

    def embedded(*args: Any, **more: Any) -> Conditioning:
        said_of.append(embed(*args, **more))
        return said_of[-1]

    def predicted(x: Any) -> Any:
        calls.append(x)
        return predict(x)

    editor.model.embed, editor.model.predict = embedded, predicted
    editor.run(PICTURE, list(passes), **said)
    return said_of, calls


def test_what_is_read_is_the_prompt_with_the_picture() -> None:
    editor = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed"))
    edits = (Instruct(), Style(image=data.rocket()))
    told, _ = _told(editor, Pass(prompt="x", steps=1, edits=edits))
    alone = QWEN_IMAGE.editor().model.embed(["x"], (96, 64))
    counts = [int(one.tensors["said"]) for one in told]
    assert min(counts) > int(alone.tensors["said"])  # negative, positive, and the reference
    assert len(counts) == 3
    model = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed")).model
    unshown = model.embed(["x"], (96, 64))
    assert torch.equal(unshown.tensors["text"], alone.tensors["text"])
    dark, light = (
        model.embed(["x"], (96, 64), pictures=[torch.full((1, 3, 64, 96), level)]).tensors["text"]
        for level in (0.0, 1.0)
    )
    assert dark.shape == light.shape
    assert not torch.allclose(dark, light, atol=1e-3)


def test_a_prompt_cannot_stand_for_a_picture() -> None:
    model = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed")).model
    with pytest.raises(InputError, match=r"a prompt cannot hold <\|image_pad\|> or"):
        model.embed(["a <|video_pad|>"], (64, 64), pictures=[torch.zeros(1, 3, 64, 64)])


def test_items_that_are_shown_unequal_pictures_are_told_apart() -> None:
    editor = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed"))
    first = Pass(prompt="x", steps=2, guidance=1, edits=(Img2Img(strength=0.9),))
    second = Pass(prompt="y", steps=1, guidance=1, edits=(Instruct(),))
    told, calls = _told(editor, first, second, seed=[1, 2])
    assert len(told) == 3  # the first pass's prompt serves both
    text = calls[-1].conditioning.tensors["text"]
    assert not torch.allclose(text[0], text[1], atol=1e-3)
    again = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed"))
    _, alone = _told(again, first, second, seed=[2])
    assert torch.allclose(alone[-1].conditioning.tensors["text"][0], text[1], atol=0.02)
    third = QWEN_IMAGE.editor(**QWEN_IMAGE.options("instructed"))
    told, _ = _told(third, second, seed=[1, 2])
    assert len(told) == 1


def test_a_large_picture_is_read_as_small_as_its_pipelines_show_it() -> None:
    assert _picture(torch.zeros(1, 3, 64, 96), 1024).size == (96, 64)
    assert _picture(torch.zeros(1, 3, 1024, 2048), 1024).size == (1440, 736)
    assert _picture(torch.zeros(1, 3, 16, 2048), 64).size == (736, 32)
    levels = torch.arange(48).reshape(1, 3, 4, 4) / 255
    assert np.array_equal(
        np.asarray(_picture(levels, 64)), np.arange(48).reshape(3, 4, 4).transpose(1, 2, 0)
    )


@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_several_pictures_are_read_in_their_order(kind: str) -> None:
    model: Any = QWEN_IMAGE.editor(kind=getattr(diffusers, kind)).model
    read: list[str] = []
    processor = model.pipe.processor

    def reading(text: list[str], **more: Any) -> Any:
        read.extend(text)
        return processor(text=text, **more)

    vars(model.pipe)["processor"] = reading
    one, two = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 96)
    model.embed(["x"], (64, 64), pictures=[one, two])
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    first, second = ("Picture 1: ", "Picture 2: ") if "Plus" in kind else ("", "")
    assert f"<|im_start|>user\n{first}{seen}{second}{seen}x<|im_end|>" in read[0]


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ("QwenImagePipeline", True),
        ("QwenImageControlNetInpaintPipeline", True),
        ("QwenImageEditPlusPipeline", True),
        ("QwenImageLayeredPipeline", False),
        ("QwenImage21Pipeline", False),
    ],
)
def test_what_is_recognised(named: str, known: bool) -> None:
    assert Family().recognises({"_class_name": named}) == known
