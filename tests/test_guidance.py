"""Guidance, shared attention and what is kept, against formulas written here and diffusers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffedit import Contribution, Pass
from diffedit.attention import QKV, Site
from diffedit.guidance import classifier_free, rescaled, with_terms
from diffedit.rows import RowKey, RowMap
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style, shared
from tests.laws.photographs import mask, photograph
from tests.laws.tools import Custom, Watched

DRAW = torch.Generator().manual_seed(0)
POSITIVE, NEGATIVE, THIRD = torch.randn(3, 2, 4, 8, 8, generator=DRAW)
GIVEN = {"positive": POSITIVE, "negative": NEGATIVE, "third": THIRD}
SIZE = (64, 64)
IMAGE = photograph("rgb8", SIZE)
ROWS = RowMap(
    (RowKey("positive", 0), RowKey("positive", 1), *(RowKey("positive", i, "r") for i in (0, 1)))
)


def test_classifier_free_guidance() -> None:
    assert torch.allclose(classifier_free(GIVEN, 3.5), 3.5 * POSITIVE - 2.5 * NEGATIVE, atol=1e-5)
    assert classifier_free({"positive": POSITIVE}, 3.5) is POSITIVE


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_rescale_as_diffusers_has_it(amount: float) -> None:
    guided = classifier_free(GIVEN, 7.5)
    theirs = rescale_noise_cfg(guided, POSITIVE, guidance_rescale=amount)
    assert torch.equal(rescaled(guided, POSITIVE, amount), theirs)


def test_terms_are_added_with_numbers_and_with_maps() -> None:
    where = torch.zeros(1, 1, 8, 8)
    where[..., :4] = 2
    terms: list[tuple[float | torch.Tensor, str, str]] = [
        (0.5, "third", "negative"),
        (where, "positive", "third"),
    ]
    expected = POSITIVE + 0.5 * (THIRD - NEGATIVE) + where * (POSITIVE - THIRD)
    assert torch.allclose(with_terms(POSITIVE, GIVEN, terms), expected, atol=1e-6)


def attended(qkv: QKV) -> torch.Tensor:
    """Softmax attention, written out."""
    scores = qkv.q @ qkv.k.transpose(-1, -2) / math.sqrt(qkv.q.shape[-1])
    if qkv.bias is not None:
        scores = scores + qkv.bias
    return scores.softmax(-1) @ qkv.v


def a_qkv() -> QKV:
    q, k, v = torch.randn(3, 4, 2, 9, 5, generator=torch.Generator().manual_seed(1))
    return QKV(q, k, v)


def test_shared_attention_tends_to_none_and_leaves_references_alone() -> None:
    qkv, site = a_qkv(), Site("s", False, ROWS)
    plain = attended(qkv)
    for strength, near in ((1e-6, 1e-4), (1e-3, 0.1)):
        made = attended(shared(qkv, site, "r", strength))
        assert (made - plain).abs().max() < near
    for strength in (0.5, 1.0, 2.0):
        made = attended(shared(qkv, site, "r", strength))
        assert torch.allclose(made[2:], plain[2:], atol=1e-6)
        assert (made[:2] - plain[:2]).abs().max() > 0.05


def test_the_canvas_does_not_reach_the_reference() -> None:
    """Its rows come out of the denoiser as if it were denoised without style."""
    watched = Watched()
    style = Style(image=photograph(which="coffee"))

    class Beside(Style):
        """The same row, and nobody looks at it."""

        def contribute(self, run: Any) -> Contribution:
            return Contribution(rows=super().contribute(run).rows)

    rows: list[Any] = []
    for edit in (style, Beside(image=style.image)):
        watched.inputs.clear()
        watched.outputs.clear()
        watched.editor.run(IMAGE, Pass(prompt="x", steps=1, edits=[edit]), seed=2)
        x = watched.inputs[0]
        at = [i for i, key in enumerate(x.rows.keys) if key.reference]
        canvas = x.rows.canvas
        rows.append((watched.outputs[0][at], watched.outputs[0][canvas], x.latents[at]))
    (with_style, canvas, seen), (alone, plain, also) = rows
    assert torch.equal(seen, also)
    assert torch.allclose(with_style, alone, atol=1e-5)
    assert not torch.allclose(canvas, plain, atol=1e-3)


@pytest.mark.parametrize("strength", [None, 0.6, 1.0])
def test_what_is_not_masked_ends_as_the_sources_latents(strength: float | None) -> None:
    watched = Watched()
    white = mask(SIZE, (17, 9, 40, 33))
    edits = [Inpaint(mask=white, feather=0)] + ([Img2Img(strength=strength)] if strength else [])
    made = watched.editor.run(IMAGE, Pass(prompt="x", steps=5, edits=edits), seed=2).latents
    assert made is not None
    source = watched.model.encode(watched.encoded[0])
    cells = torch.nn.functional.max_pool2d(torch.from_numpy(white).float()[None, None], 8) > 0
    same = (made == source).all(dim=1, keepdim=True)
    assert torch.equal(same, ~cells)


def test_softer_cells_are_let_go_later_and_keep_only_restricts() -> None:
    watched = Watched()
    soft = mask(SIZE, (0, 0, 64, 64))
    soft[:, :16], soft[:, 16:32], soft[:, 32:48] = 64, 128, 192
    inpaint = Inpaint(mask=soft, feather=0)
    steps = 8
    with watched.editor.stream(IMAGE, Pass(prompt="x", steps=steps, edits=[inpaint])) as events:
        latents = [step.latents for step in events]
    keep = torch.zeros(1, 1, 8, 8)
    keep[..., 4:, :] = 1
    edits = [inpaint, Custom(parts={"keep": keep})]
    what = Pass(prompt="x", steps=steps, edits=edits)
    restricted = watched.editor.run(IMAGE, what).latents
    assert restricted is not None
    source = watched.model.encode(watched.encoded[-1])
    assert torch.equal(restricted[..., 4:, :], source[..., 4:, :])
    assert not torch.isclose(restricted[..., :4, :], source[..., :4, :]).all()
    away = (latents[-1] - source).abs().mean(dim=(0, 1, 2)).view(4, 2).mean(1)
    assert (away[1:] > away[:-1]).all()  # the longer free, the further from the source


def test_latents_are_handed_on_or_encoded_again() -> None:
    watched = Watched()
    first, second = mask(SIZE, (9, 9, 40, 33)), mask(SIZE, (9, 9, 40, 41))

    def encodes(*whites: Any, finish: bool = False) -> int:
        watched.encoded.clear()
        more = [Custom(parts={"finish": lambda pixels: pixels * 1})] if finish else []
        passes = [Pass(prompt="x", steps=1, edits=[Inpaint(mask=w), *more]) for w in whites]
        watched.editor.run(IMAGE, passes)
        return len(watched.encoded)

    assert encodes(first) == 1
    assert encodes(first, first, first) == 1
    assert encodes(first, second) == 2
    assert encodes(first, first, finish=True) == 2
