"""Inversion: the functions on the exact denoiser, and the edit on every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from diffedit import Contribution, Edit, Editor, Pass, Run, Step, errors
from diffedit.inversion import Inversion
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_invert import Invert
from tests.families import FAMILIES, SD, SD3, Tiny
from tests.gaussian import FLOW, there_and_back
from tests.laws.tools import Custom

PICTURE = data.coffee()[:64, :96]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("ddim", "epsilon"), ("ddim", "v_prediction"), ("euler", "epsilon"), ("euler", FLOW)],
)
def test_the_way_back_is_off_by_what_falls_with_the_steps(name: str, prediction: str) -> None:
    found = [there_and_back(name, prediction, steps) for steps in (10, 50, 200)]
    assert 0.05 < found[0] < 0.15
    assert found[0] > 2.5 * found[1] > 6 * found[2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", FLOW])
def test_refined_often_it_is_exact(prediction: str) -> None:
    """From pure noise too, where a step in terms of noise would say nothing."""
    name = "euler" if prediction == FLOW else "ddim"
    assert there_and_back(name, prediction, 50, 8) < 1e-6
    assert there_and_back(name, prediction, 10, 10) < 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_refinements_make_it_exact(prediction: str) -> None:
    plain, once, thrice = (there_and_back("ddim", prediction, 50, n) for n in (0, 1, 3))
    assert plain > 4 * once > 100 * thrice
    assert thrice < 1e-4


def test_the_edit_friendly_one_is_exact_with_ddim() -> None:
    assert there_and_back("ddim", "epsilon", 10, eta=1.0) < 1e-12
    assert there_and_back("ddim", "epsilon", 10, eta=0.5) < 1e-12


def clean(editor: Editor) -> torch.Tensor:
    return editor.model.encode(torch.as_tensor(PICTURE).permute(2, 0, 1)[None].float() / 255)


def run(editor: Editor, *edits: Edit, seed: Any = 3, **said: Any) -> torch.Tensor:
    pass_ = Pass(**{"prompt": "x", "steps": 8, "guidance": 1.0, "edits": edits, **said})
    latents = editor.run(PICTURE, pass_, seed=seed).latents
    assert latents is not None
    return latents


@every_family
def test_the_same_prompt_leads_back_to_the_picture(family: Tiny) -> None:
    editor = family.editor()
    source = clean(editor)
    back = [
        run(editor, Invert(prompt="x", strength=0.5, refinements=n), scheduler="euler")
        for n in (0, 4)
    ]
    off = [(one - source).abs().mean() for one in back]
    varied = run(editor, Img2Img(strength=0.5), scheduler="euler")
    assert off[1] < off[0] < (varied - source).abs().mean()
    assert not torch.equal(
        back[1],
        run(editor, Invert(prompt="y", strength=0.5, refinements=4), scheduler="euler"),
    )


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_edit_friendly_one_leads_back_whatever_the_prompt_of_the_inversion(
    strength: float,
) -> None:
    editor = SD.editor()
    said: dict[str, Any] = {"scheduler": "ddim", "eta": 1.0}
    friendly = Invert(prompt="x", kind="edit_friendly", strength=strength)
    source = clean(editor)
    torch.testing.assert_close(run(editor, friendly, **said), source, atol=1e-4, rtol=0)
    other = run(editor, friendly, **said, prompt="something else")
    assert (other - source).abs().mean() > 1e-3


@pytest.mark.parametrize("friendly", [True, False])
def test_a_pass_that_stops_on_the_way_is_inverted_as_a_whole(friendly: bool) -> None:
    editor = SD.editor()
    edit = Invert(prompt="x", strength=1.0, kind="edit_friendly" if friendly else "ddim")
    said: dict[str, Any] = {"prompt": "x", "guidance": 1.0, "steps": 8, "scheduler": "ddim"}
    said |= {"eta": 1.0} if friendly else {}
    whole = editor.run(PICTURE, Pass(**said, edits=(edit,)), seed=3)
    with editor.stream(PICTURE, Pass(**said, edits=(edit,)), seed=3) as events:
        latents = [step.latents for step in events]
    stopped = editor.run(PICTURE, Pass(**said, stop=0.5, edits=(edit,)), seed=3)
    assert any(torch.equal(stopped.latents, one) for one in latents[:-1])  # type: ignore[arg-type]
    if not friendly:
        rest = editor.run(stopped, Pass(**said))
        assert torch.equal(rest.latents, whole.latents)  # type: ignore[arg-type]


def test_an_item_of_a_batch_is_what_it_is_alone() -> None:
    editor = SD.editor()
    said: dict[str, Any] = {"scheduler": "ddim", "eta": 1.0, "prompt": "y"}
    friendly = Invert(prompt="x", kind="edit_friendly")
    both = run(editor, friendly, seed=[1, 2], **said)
    torch.testing.assert_close(both[1:], run(editor, friendly, seed=2, **said), atol=2e-4, rtol=0)
    assert not torch.equal(both[0], both[1])


@every_family
def test_nothing_outside_a_mask_changes(family: Tiny) -> None:
    mask = np.zeros(PICTURE.shape[:2], bool)
    mask[20:50, 30:70] = True
    edits = (Invert(prompt="a cup", strength=0.75), Inpaint(mask=mask, feather=0))
    made = family.editor().run(PICTURE, Pass(prompt="x", steps=4, edits=edits)).pixels
    assert (made == PICTURE)[~mask].all()
    assert (made != PICTURE).any(axis=2)[mask].mean() > 0.5


def test_its_steps_are_progress_and_it_can_be_left() -> None:
    editor = SD.editor()
    pass_ = Pass(prompt="x", steps=4, edits=(Invert(strength=1.0, refinements=1),))
    with editor.stream(PICTURE, pass_) as events:
        told = [(step.index, step.total, step.preview().shape) for step in events]
    assert {shape for *_, shape in told} == {(1, 3, 64, 96)}
    seen = [(index, total) for index, total, _ in told]
    assert seen[:8] == [(n, 8) for n in range(8)]
    assert seen[8:] == [(n, 4) for n in range(4)]
    expected = run(editor, Img2Img())
    before = {key: value.clone() for key, value in editor.model.unet.state_dict().items()}  # type: ignore[attr-defined]
    with editor.stream(PICTURE, pass_) as events:
        next(events)
    after = editor.model.unet.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(run(editor, Img2Img()), expected)


def test_other_edits_do_not_act_in_it() -> None:
    seen: list[Inversion] = []

    def keeping(run: Run) -> Iterator[Step]:
        seen.append((yield from run.invert("x")))

    editor = SD.editor()
    shift = Custom(parts={"refine": lambda x0, call: x0 + 1})
    for others in ((), (shift,)):
        run(editor, Custom(parts={"prepare": keeping}, id="a"), *others)
    assert torch.equal(seen[0].latents, seen[1].latents)


def test_what_is_refused() -> None:
    editor = SD.editor()
    with pytest.raises(errors.SchedulerError, match=r"takes no noise from outside.*eta 1"):
        run(editor, Invert(kind="edit_friendly"), scheduler="euler")
    with pytest.raises(errors.SchedulerError, match=r"draws nothing.*eta 1"):
        run(editor, Invert(kind="edit_friendly"), scheduler="ddim")
    for more in ({"scheduler": "euler_a"}, {"scheduler": "ddim", "eta": 1.0}):
        with pytest.raises(errors.SchedulerError, match="draws noise as it goes"):
            run(editor, Invert(), **more)
    with pytest.raises(errors.SchedulerError, match="has no eta"):
        run(SD3.editor(), Img2Img(), eta=1.0)
    early = Custom(parts=lambda run: Contribution(start=next(run.invert())))
    with pytest.raises(errors.DiffeditError, match="ask for it in prepare"):
        run(editor, early)
    with pytest.raises(errors.InputError, match="needs a picture"):
        editor.run(None, Pass(prompt="x", edits=(Invert(),)), size=(64, 64))
