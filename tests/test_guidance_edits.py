"""The edits that guide in other ways: their formulas, and that they act on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from skimage import data

from diffedit import Edit, Editor, Pass, errors
from diffedit_guidance import (
    AdaptiveProjected,
    Interval,
    PerpNeg,
    PerturbedAttention,
    perpendicular,
    projected,
)
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.families import FAMILIES, FLUX, SD, SD3, Tiny
from tests.laws.photographs import mask

NAMES = ("positive", "negative", "empty")
PICTURE = data.coffee()[:64, :64]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def predictions() -> dict[str, torch.Tensor]:
    drawn = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return dict(zip(NAMES, drawn.unbind(), strict=True))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


def test_projected_guidance_leaves_out_what_stretches() -> None:
    one = predictions()
    positive, negative = one["positive"], one["negative"]
    guided, direction = projected(one, 7.0)
    assert torch.equal(direction, positive - negative)
    torch.testing.assert_close(dot(guided - positive, positive), torch.zeros(2), atol=1e-3, rtol=0)
    # All of it, of any length, without memory: classifier-free guidance.
    plain = negative + 7.0 * (positive - negative)
    torch.testing.assert_close(projected(one, 7.0, parallel=1.0)[0], plain)
    short, _ = projected(one, 2.0, parallel=1.0, threshold=0.5)
    torch.testing.assert_close((short - positive).flatten(1).norm(dim=1), torch.full((2,), 0.5))
    before = torch.ones_like(positive)
    pulled, kept = projected(one, 2.0, parallel=1.0, before=before, momentum=-0.5)
    torch.testing.assert_close(kept, positive - negative - 0.5)
    torch.testing.assert_close(pulled, positive + kept)


def test_perpendicular_negatives_leave_the_prompt() -> None:
    one = predictions()
    toward = one["positive"] - one["empty"]
    guided = perpendicular(one, "empty", 5.0)
    torch.testing.assert_close(dot(guided - one["empty"], toward), 5.0 * dot(toward, toward))
    # A negative prompt that means what the prompt means takes nothing away.
    same = {**one, "negative": one["positive"]}
    torch.testing.assert_close(perpendicular(same, "empty", 5.0), one["empty"] + 5.0 * toward)


def run(editor: Editor, *edits: Edit, **said: Any) -> torch.Tensor:
    given: dict[str, Any] = {"prompt": "x", "negative": "y", "steps": 4, "edits": edits, **said}
    if "embedded_guidance" in editor.model.capabilities:
        given.setdefault("true_guidance", 4.0)
    latents = editor.run(PICTURE, Pass(**given), seed=3).latents
    assert latents is not None
    return latents


def pag(family: Tiny, **said: Any) -> PerturbedAttention:
    unet = family.model.networks[0] == "unet"
    return PerturbedAttention(layers="mid" if unet else "att", **said)


@every_family
def test_they_act_on_every_family(family: Tiny) -> None:
    editor = family.editor()
    plain = run(editor)
    some: list[Edit] = [AdaptiveProjected(), Interval(), PerpNeg()]
    if family.styled:
        some.append(pag(family))
    made = [run(editor, one) for one in some]
    for edit, one in zip(some, made, strict=True):
        assert torch.isfinite(one).all()
        assert not torch.equal(one, plain), edit.name


def test_neutral_settings_are_plain_guidance() -> None:
    editor = SD.editor()
    plain = run(editor)
    assert torch.equal(run(editor, Interval(start=0, end=1)), plain)
    assert torch.equal(run(editor, PerturbedAttention(scale=0)), plain)
    neutral = AdaptiveProjected(parallel=1.0, momentum=0.0)
    torch.testing.assert_close(run(editor, neutral), plain, atol=1e-2, rtol=1e-3)
    none = run(editor, Interval(start=0.5, end=0.5))
    torch.testing.assert_close(none, run(editor, guidance=1.0), atol=1e-2, rtol=1e-3)


def test_a_run_forgets_the_direction_of_the_one_before() -> None:
    editor = SD.editor()
    edit = AdaptiveProjected()
    assert torch.equal(run(editor, edit), run(editor, edit))


@pytest.mark.parametrize("family", [SD, SD3, FLUX], ids=lambda family: family.name)
def test_with_a_style_under_a_mask(family: Tiny) -> None:
    """Attention terms of two edits act one after the other, and nothing outside changes."""
    editor = family.editor()
    white = mask((64, 64), (9, 9, 40, 50))
    edits = [
        pag(family),
        Style(image=data.rocket()),
        Inpaint(mask=white, feather=0),
        AdaptiveProjected(),
    ]
    said: dict[str, Any] = {"true_guidance": 3.0} if family is FLUX else {}
    results = [
        editor.run(PICTURE, Pass(prompt="x", steps=3, edits=some, **said), seed=1)
        for some in (edits, edits[::-1], edits[1:], (edits[0], *edits[2:]))
    ]
    first, reverse, without_pag, without_style = results
    assert torch.equal(first.latents, reverse.latents)  # type: ignore[arg-type]
    assert not torch.equal(first.latents, without_pag.latents)  # type: ignore[arg-type]
    assert not torch.equal(first.latents, without_style.latents)  # type: ignore[arg-type]
    assert (first.pixels == PICTURE)[white == 0].all()


def test_what_is_refused() -> None:
    editor = SD.editor()
    for edit in (AdaptiveProjected(), Interval(), PerpNeg()):
        with pytest.raises(errors.InputError, match=rf"{edit.name}: .*set guidance above 1"):
            run(editor, edit, guidance=1.0)
    with pytest.raises(errors.InputError, match=r"is called like 'nowhere'; there are .*attn1"):
        run(editor, PerturbedAttention(layers="nowhere"))
    # A text of a visitor's is no pattern: it must not be able to keep the machine busy.
    with pytest.raises(errors.InputError, match="is called like"):
        run(editor, PerturbedAttention(layers=r"(\w+[._]?)+!"))
    with pytest.raises(ValidationError, match="lies after end"):
        Interval(start=0.8, end=0.2)
    with pytest.raises(errors.ConflictError, match="put them into two passes"):
        run(editor, Interval(), PerpNeg())
