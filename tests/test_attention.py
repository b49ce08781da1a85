"""Attention terms reach every kind of attention, and change what they are to change and no more."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from diffedit.attention import QKV, Beside, Layout, Site, attending, separate
from diffedit.errors import CapabilityError
from diffedit.rows import RowKey, RowMap
from diffedit_style import shared

ROWS = RowMap(tuple(RowKey("positive", item) for item in range(3)))
PICTURE, TEXT = 10, 7


class Denoiser(nn.Module):
    """One attention, as a part of a denoiser."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attn = attention


def listened(attention: Any, transform: Any, layout: Any = None) -> Any:
    more = {} if layout is None else {"layout": layout}
    return attending(Denoiser(attention), transform, lambda: ROWS, **more)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_term_that_changes_nothing_changes_no_bit(
    cross: bool, group_norm: bool, flat: bool
) -> None:
    torch.manual_seed(0)
    attention: Any = Attention(
        query_dim=16,
        cross_attention_dim=12 if cross else None,
        heads=4,
        dim_head=4,
        norm_num_groups=4 if group_norm else None,
        residual_connection=group_norm,
        processor=AttnProcessor2_0(),
    ).eval()
    x = torch.randn(3, PICTURE, 16) if flat else torch.randn(3, 16, 5, 2)
    context = torch.randn(3, TEXT, 12) if cross else None
    theirs = attention(x, encoder_hidden_states=context)
    seen: list[Site] = []

    def identity(qkv: QKV, site: Site) -> QKV:
        seen.append(site)
        return qkv

    with listened(attention, identity):
        assert torch.equal(attention(x, encoder_hidden_states=context), theirs)
    assert seen == [Site("attn", cross, ROWS)]
    assert torch.equal(attention(x, encoder_hidden_states=context), theirs)
    assert len(seen) == 1  # nobody listens any more


def joint() -> tuple[Any, Tensor, Tensor]:
    """Attention over picture and text together, as in Stable Diffusion 3, and what goes in."""
    torch.manual_seed(1)
    attention: Any = Attention(
        query_dim=16,
        added_kv_proj_dim=16,
        heads=4,
        dim_head=4,
        context_pre_only=False,
        bias=True,
        processor=JointAttnProcessor2_0(),
    ).eval()
    return attention, torch.randn(3, PICTURE, 16), torch.randn(3, TEXT, 16)


def picture_first(given: Any, tokens: int) -> Layout:
    return Layout(slice(0, given["hidden_states"].shape[1]))


def test_together_with_text_terms_see_the_picture() -> None:
    attention, x, text = joint()
    theirs = attention(x, text)
    seen: list[QKV] = []

    def identity(qkv: QKV, site: Site) -> QKV:
        assert not site.cross
        seen.append(qkv)
        return qkv

    with listened(attention, identity, picture_first):
        ours = attention(x, encoder_hidden_states=text)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert seen[0].q.shape == seen[0].k.shape == seen[0].v.shape == (3, 4, PICTURE, 4)


@pytest.mark.parametrize("changes", [False, True])
def test_a_mask_of_truths_hides_where_text_attends_elsewhere(changes: bool) -> None:
    q, k, v = torch.randn(3, 3, 4, PICTURE, 5, generator=torch.Generator().manual_seed(1))
    shown = torch.ones(3, 1, 1, PICTURE, dtype=torch.bool)
    shown[..., 4:] = False

    class Plain(nn.Module):
        def set_processor(self, processor: Any) -> None: ...

        def forward(self, hidden_states: Tensor) -> Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(hidden_states, k, v, attn_mask=shown)

    module = Plain()
    theirs = module(q)
    term = (lambda qkv, site: replace(qkv, q=qkv.q.clone())) if changes else lambda qkv, site: qkv
    with attending(Denoiser(module), term, lambda: ROWS):
        torch.testing.assert_close(module(q), theirs)


@pytest.mark.parametrize("together", [False, True])
def test_attentions_beside_are_added(together: bool) -> None:
    """Against softmax attention written out: of the same queries, of scores of their own."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 3, 4, PICTURE + together * TEXT, 5, generator=generator)
    first, second = (Beside(*torch.randn(2, 3, 4, n, 5, generator=generator)) for n in (2, 6))
    mask = torch.linspace(0, 1, PICTURE)[None, None, :, None]
    second = replace(second, weight=0.5, mask=mask)

    class Plain(nn.Module):
        def set_processor(self, processor: Any) -> None: ...

        def forward(self, hidden_states: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(hidden_states, k, v)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / 5**0.5).softmax(-1) @ v

    module = Plain()
    layout = (lambda given, tokens: Layout(slice(0, PICTURE))) if together else separate
    term = lambda own, site: own.plus(first).plus(second)  # noqa: E731
    with attending(Denoiser(module), term, lambda: ROWS, layout):
        made = module(q)
    wanted = attention(q, k, v)
    own = q[:, :, :PICTURE]
    wanted[:, :, :PICTURE] += attention(own, first.k, first.v)
    wanted[:, :, :PICTURE] += 0.5 * mask * attention(own, second.k, second.v)
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("before", [0, 2, TEXT], ids=["text last", "around", "text first"])
@pytest.mark.parametrize("masked", [None, "bool", "scores"])
def test_what_is_appended_is_seen_by_the_picture_alone(
    biased: bool, before: int, masked: str | None
) -> None:
    """Against softmax attention written out."""
    q, k, v = torch.randn(3, 3, 4, PICTURE + TEXT, 5, generator=torch.Generator().manual_seed(1))
    more = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(2))
    bias = torch.linspace(-1, 1, 3 * 6).view(3, 1, 1, 6) if biased else None
    mask = None
    if masked:
        shown = torch.ones(3, 1, 1, PICTURE + TEXT, dtype=torch.bool)
        shown[1, ..., TEXT - 2 : TEXT + 2] = False
        mask = shown if masked == "bool" else torch.where(shown, 0.0, -torch.inf)

    class Plain(nn.Module):
        def set_processor(self, processor: Any) -> None: ...

        def forward(self, hidden_states: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    picture = slice(before, before + PICTURE)

    def term(qkv: QKV, site: Site) -> QKV:
        return replace(qkv, q=2 * qkv.q, k=3 * qkv.k).appended(more[0], more[1], bias)

    module = Plain()
    theirs = module(q)
    with attending(Denoiser(module), term, lambda: ROWS, lambda given, tokens: Layout(picture)):
        ours = module(q)
    is_text = torch.ones(PICTURE + TEXT, dtype=torch.bool)
    is_text[picture] = False
    torch.testing.assert_close(ours[:, :, is_text], theirs[:, :, is_text])
    keys, values = k.clone(), torch.cat([v, more[1]], dim=2)
    keys[:, :, picture] *= 3
    scores = 2 * q[:, :, picture] @ torch.cat([keys, more[0]], dim=2).mT / math.sqrt(5)
    if mask is not None:
        hidden = ~shown.expand(3, 4, PICTURE, -1)
        scores[..., : PICTURE + TEXT].masked_fill_(hidden, -torch.inf)
    if bias is not None:
        scores[..., PICTURE + TEXT :] += bias
    torch.testing.assert_close(ours[:, :, picture], scores.softmax(-1) @ values)


def test_an_adapters_own_attention_is_left_alone() -> None:
    """It comes second in its module, and looks at keys of its own."""
    q, own, image = torch.randn(3, 3, 4, PICTURE, 5, generator=torch.Generator().manual_seed(1))
    attend = torch.nn.functional.scaled_dot_product_attention

    class WithAdapter(nn.Module):
        def set_processor(self, processor: Any) -> None: ...

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return attend(q, own, own), attend(q, image, image)

    module = WithAdapter()
    theirs = module(q)
    with attending(Denoiser(module), lambda qkv, site: replace(qkv, v=0 * qkv.v), lambda: ROWS):
        ours = module(q)
    assert not ours[0].any()
    assert torch.equal(ours[1], theirs[1])


def test_places_are_turned_as_the_families_turn_them_and_back() -> None:
    x = torch.randn(3, 4, PICTURE, 8, generator=torch.Generator().manual_seed(1))
    cos, sin = get_1d_rotary_pos_embed(8, torch.arange(PICTURE), use_real=True)
    qkv = QKV(x, x, x, places=torch.complex(cos[:, ::2], sin[:, ::2]))
    torch.testing.assert_close(qkv.placed(x), apply_rotary_emb(x, (cos, sin)))
    torch.testing.assert_close(qkv.unplaced(qkv.placed(x)), x)
    bare = replace(qkv, places=None)
    assert bare.placed(x) is x
    assert bare.unplaced(x) is x


def test_keys_of_other_rows_stand_where_a_rows_own_do() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    angles = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(2))
    qkv = QKV(x, x, x, places=torch.polar(torch.ones_like(angles), angles))
    other = torch.tensor([1, 0])
    expected = qkv.placed(x[other])
    torch.testing.assert_close(qkv.of_rows(qkv.placed(x), other), expected)
    for places in (None, qkv.places[0, 0]):  # type: ignore[index]
        same = replace(qkv, places=places)
        assert torch.equal(same.of_rows(x, other), x[other])


def test_attention_that_is_not_torchs_is_refused_and_left_as_it_was() -> None:
    attention: Any = Attention(query_dim=16, heads=4, dim_head=4, processor=AttnProcessor()).eval()
    x = torch.randn(1, PICTURE, 16)
    with (
        pytest.raises(CapabilityError, match="together with AttnProcessor, which this model has"),
        listened(attention, lambda qkv, site: qkv),
    ):
        attention(x)
    attention(x)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", ["the term", "the module"])
def test_an_error_inside_leaves_nothing_behind(error: type[BaseException], inside: str) -> None:
    attention, x, text = joint()
    theirs = attention(x, text)

    def failing(*args: Any) -> Any:
        raise error

    term = failing if inside == "the term" else lambda qkv, site: qkv
    with ExitStack() as undo:
        undo.enter_context(pytest.raises(error))
        undo.enter_context(listened(attention, term, picture_first))
        if inside == "the module":
            hook = attention.to_q.register_forward_hook(failing)
            undo.callback(hook.remove)
        attention(x, text)
    assert not _get_current_function_mode_stack()
    assert all(torch.equal(a, b) for a, b in zip(attention(x, text), theirs, strict=True))
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


def test_style_likens_what_tokens_say_and_not_where_they_are() -> None:
    """With rotary places it does to what tokens say just what it does without places."""
    rows = RowMap((*ROWS.keys[:1], RowKey("positive", 0, "r")))
    q, k, v = torch.randn(3, 2, 4, PICTURE, 8, generator=torch.Generator().manual_seed(1))
    cos, sin = get_1d_rotary_pos_embed(8, torch.arange(PICTURE), use_real=True)
    bare = QKV(q, k, v)
    turned = replace(bare, places=torch.complex(cos[:, ::2], sin[:, ::2]))
    turned = replace(turned, q=turned.placed(q), k=turned.placed(k))
    site = Site("attn", False, rows)
    plain, placed = (shared(one, site, "r", 0.7) for one in (bare, turned))
    torch.testing.assert_close(placed.unplaced(placed.q), plain.q)
    for part in (slice(0, PICTURE), slice(PICTURE, 2 * PICTURE)):
        torch.testing.assert_close(placed.unplaced(placed.k[:, :, part]), plain.k[:, :, part])
    assert torch.equal(placed.q[1], turned.q[1])  # the reference's own row keeps its bits
    assert not torch.allclose(placed.q[0], turned.q[0])
