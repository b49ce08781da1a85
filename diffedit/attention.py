"""The one attention processor: it runs whatever the edits of a pass contribute.

An edit's attention term is a function of queries, keys and values; it may change them, append keys
and values, and bias the scores. Terms are chained. The processor is installed only while a pass has
terms, and what was there before is put back, however the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffedit.errors import CapabilityError
from diffedit.rows import RowMap


@dataclass(frozen=True)
class Site:
    """Where attention happens.

    Attributes:
        name: the module's path inside the denoiser.
        cross: whether keys and values come from the text instead of the picture.
        rows: what the rows of the batch are.
    """

    name: str
    cross: bool
    rows: RowMap


@dataclass(frozen=True)
class QKV:
    """What goes into one attention: ``softmax(q k^T / sqrt(d) + bias) v``.

    Attributes:
        q: queries ``(rows, heads, tokens, d)``.
        k: keys ``(rows, heads, keys, d)``; in self-attention the first `tokens` are the row's own.
        v: values ``(rows, heads, keys, d)``.
        bias: added to the scores, broadcastable to
            ``(rows, heads, tokens, keys)``; -inf hides a key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None

    def appended(self, k: Tensor, v: Tensor, bias: Tensor) -> QKV:
        """With further keys and values, whose scores get `bias` (``(rows, 1, 1, new keys)``)."""
        old = self.bias
        if old is None:
            old = bias.new_zeros(bias.shape[0], 1, 1, self.k.shape[2])
        elif old.shape[-2] != bias.shape[-2] or old.shape[1] != bias.shape[1]:
            old, bias = _broadcast_but_last(old, bias)
        return QKV(
            self.q,
            torch.cat([self.k, k], dim=2),
            torch.cat([self.v, v], dim=2),
            torch.cat([old, bias], dim=-1),
        )


def _broadcast_but_last(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])


class Transform(Protocol):
    """Changes what goes into one attention."""

    def __call__(self, qkv: QKV, site: Site) -> QKV:
        """Return what attention is to use instead."""


class Processor:
    """diffusers' scaled-dot-product attention with a transform between projection and softmax.

    With a transform that returns its input, the output equals `AttnProcessor2_0`'s bit for bit.
    """

    def __init__(self, name: str, transform: Transform, rows: Callable[[], RowMap]) -> None:
        self.name = name
        self.transform = transform
        self.rows = rows

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend, as a diffusers attention module asks its processor to."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:  # (b, c, h, w) -> (b, h*w, c)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        cross = encoder_hidden_states is not None
        if attention_mask is not None:
            length = (encoder_hidden_states if cross else hidden_states).shape[1]  # type: ignore[union-attr]
            attention_mask = attn.prepare_attention_mask(
                attention_mask, length, hidden_states.shape[0]
            )
            attention_mask = cast(Tensor, attention_mask)
            attention_mask = attention_mask.view(
                hidden_states.shape[0], attn.heads, -1, attention_mask.shape[-1]
            )
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:  # (rows, tokens, heads*d) -> (rows, heads, tokens, d)
            return cast(Tensor, x.unflatten(-1, (attn.heads, -1))).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        k, v = heads(attn.to_k(context)), heads(attn.to_v(context))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        site = Site(self.name.removesuffix(".processor"), cross, self.rows())
        qkv = self.transform(QKV(q, k, v, attention_mask), site)
        bias = qkv.bias if qkv.bias is None else qkv.bias.to(qkv.q.dtype)
        out = F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2).to(qkv.q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return cast(Tensor, out / attn.rescale_output_factor)


#: Processors that compute attention and nothing else, as `Processor` does.
_PLAIN = {"AttnProcessor", "AttnProcessor2_0"}


@contextmanager
def attending(module: Any, transform: Transform, rows: Callable[[], RowMap]) -> Iterator[None]:
    """Route every attention of a diffusers module through `transform`; put back what was there."""
    before = dict(module.attn_processors)
    for processor in before.values():
        if type(processor).__name__ not in _PLAIN:
            raise CapabilityError(
                f"attention terms cannot act together with {type(processor).__name__}, which this"
                " model has in place: put them into two passes"
            )
    module.set_attn_processor({name: Processor(name, transform, rows) for name in before})
    try:
        yield
    finally:
        module.set_attn_processor(before)
