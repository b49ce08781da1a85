"""The edit `instruct`, on every family that has a model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from diffedit import Pass, errors
from diffedit.cli import main
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_instruct import Instruct, instructed
from diffedit_style import Style
from tests.families import CHROMA, FAMILIES, FLUX, SD, Tiny

PICTURE = data.coffee()[:64, :96]
FOLLOWING = tuple(family for family in FAMILIES if family.instructed is not None)
following = pytest.mark.parametrize("family", FOLLOWING, ids=lambda family: family.name)


def run(editor: Any, *edits: Any, **said: Any) -> torch.Tensor:
    given = said.pop("image", PICTURE)
    seed = said.pop("seed", 3)
    pass_ = Pass(prompt="x", steps=3, edits=edits, **said)
    latents: torch.Tensor | None = editor.run(given, pass_, seed=seed).latents
    assert latents is not None
    return latents


@following
def test_it_shows_the_model_the_picture(family: Tiny) -> None:
    editor = family.editor(**family.options("instructed"))
    assert "instructions" in editor.model.capabilities
    own = run(editor, Instruct())
    assert torch.equal(own, run(editor, Instruct(image=PICTURE)))
    other = run(editor, Instruct(image=data.chelsea()[:100, :80]))
    assert not torch.equal(own, other)


def test_a_picture_in_the_sequence_keeps_its_proportions() -> None:
    editor = FLUX.editor(**FLUX.options("instructed"))
    seen: list[Any] = []
    predict = editor.model.predict

    def watched(x: Any) -> torch.Tensor:
        seen.append({role: [tuple(one.shape) for one in some] for role, some in x.tokens.items()})
        return predict(x)

    editor.model.predict = watched  # type: ignore[method-assign]
    second = Instruct(image=data.chelsea()[:150, :100], after="a")
    run(editor, second, Instruct(id="a"))
    assert seen[0] == {"reference": [(1, 16, 8, 12), (1, 16, 12, 8)]}


def test_guidance_is_that_of_the_paper() -> None:
    predictions = {
        name: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        for number, name in enumerate(("positive", "negative", "blind"))
    }
    made = instructed(predictions, "blind", 7.0, 1.5)
    blind, negative, positive = (predictions[k] for k in ("blind", "negative", "positive"))
    expected = blind + 1.5 * (negative - blind) + 7.0 * (positive - negative)
    torch.testing.assert_close(made, expected)
    # With a scale of 1 the picture's guidance is classifier-free guidance.
    torch.testing.assert_close(
        instructed(predictions, "blind", 7.0, 1.0), negative + 7.0 * (positive - negative)
    )


def test_the_blind_prediction_sees_no_picture() -> None:
    editor = SD.editor(**SD.options("instructed"))
    seen: list[Any] = []
    predict = editor.model.predict

    def watched(x: Any) -> torch.Tensor:
        seen.append(x)
        return predict(x)

    editor.model.predict = watched  # type: ignore[method-assign]
    reference = Style(image=data.rocket())
    run(editor, Instruct(), reference, seed=[1, 2])
    rows, shown = seen[0].rows, seen[0].channels["image"]
    by_branch = {name: shown[rows.of_branch(name)] for name in ("positive", "negative")}
    assert torch.equal(by_branch["positive"], by_branch["negative"])
    assert by_branch["positive"].any()
    assert not shown[rows.of_branch("instruct/blind")].any()
    seen.clear()
    run(editor, Instruct(), guidance=1.0)
    assert [key.branch for key in seen[0].rows.keys] == ["positive"]


def test_image_guidance_acts_and_needs_guidance() -> None:
    editor = SD.editor(**SD.options("instructed"))
    weak, strong = Instruct(image_guidance=1.0), Instruct(image_guidance=3.0)
    assert not torch.equal(run(editor, weak), run(editor, strong))
    assert torch.equal(run(editor, weak, guidance=1.0), run(editor, strong, guidance=1.0))


@following
def test_an_item_of_a_batch_is_what_it_is_alone(family: Tiny) -> None:
    editor = family.editor(**family.options("instructed"))
    both = run(editor, Instruct(), Img2Img(strength=0.7), seed=[1, 2])
    alone = run(editor, Instruct(), Img2Img(strength=0.7), seed=2)
    torch.testing.assert_close(both[1:], alone, atol=2e-4, rtol=1e-3)


@following
def test_with_all_other_edits_in_one_pass(family: Tiny) -> None:
    editor = family.editor(**family.options("instructed"))
    editor._resources["control:net:"] = family.control_net(editor.model.pipe)  # type: ignore[attr-defined]
    mask = np.zeros(PICTURE.shape[:2], bool)
    mask[20:50, 30:70] = True
    edits = family.carried(
        [
            Instruct(),
            Inpaint(mask=mask, feather=0),
            Img2Img(strength=0.6),
            ControlNet(model="net", weight=0.5),
            Style(image=data.astronaut()),
        ]
    )
    made = editor.run(PICTURE, Pass(prompt="x", steps=3, edits=edits), seed=1)
    assert (made.pixels == PICTURE)[~mask].all()
    assert (made.pixels != PICTURE).any(axis=2)[mask].mean() > 0.5
    reverse = editor.run(PICTURE, Pass(prompt="x", steps=3, edits=edits[::-1]), seed=1)
    assert torch.equal(made.latents, reverse.latents)  # type: ignore[arg-type]
    for left_out in edits:
        rest = tuple(one for one in edits if one is not left_out)
        if left_out.name == "instruct" and "image" in editor.model.roles:
            continue  # such a model cannot do without
        other = editor.run(PICTURE, Pass(prompt="x", steps=3, edits=rest), seed=1)
        assert not torch.equal(made.latents, other.latents), left_out.name  # type: ignore[arg-type]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.CapabilityError, match=r"instruct: .* has no 'instructions'"):
        run(SD.editor(), Instruct())
    following = SD.editor(**SD.options("instructed"))
    with pytest.raises(errors.CapabilityError, match=r"'image'.*instruct gives an image"):
        run(following)
    with pytest.raises(errors.InputError, match="instruct: needs an image"):
        following.run(None, Pass(prompt="x", edits=(Instruct(),)), size=(64, 64))
    for kind in (following, FLUX.editor(**FLUX.options("instructed"))):
        with pytest.raises(errors.ConflictError, match=r"put them into two passes|'after'"):
            run(kind, Instruct(), Instruct(id="b"))
    # Before a weight is read, where no model of the family can follow instructions.
    CHROMA.save(CHROMA.pipeline(), tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    capsys.readouterr()
    line = ["edit", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "-p", "x"]
    assert main([*line, "--model", str(tmp_path / "model"), "-e", "instruct"]) == 2
    assert "instruct: the family chroma has no 'instructions'" in capsys.readouterr().err


@following
def test_from_a_folder(family: Tiny, tmp_path: Path) -> None:
    from diffedit import Editor

    own = family.editor(**family.options("instructed"))
    family.save(own.model.pipe, tmp_path / "model")  # type: ignore[attr-defined]
    loaded = Editor.load(tmp_path / "model", device="cpu")
    assert torch.equal(run(loaded, Instruct()), run(own, Instruct()))
