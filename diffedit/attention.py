"""Attention terms: what the edits of a pass put between projection and softmax, in any denoiser.

An edit's attention term is a function of queries, keys and values; it may change them, append keys
and values, bias the scores, and put another attention beside. Terms are chained. They act where a
denoiser's attention modules call torch's scaled-dot-product attention, whatever processors these
have, so that no family needs a processor of ours. Nothing is replaced: the modules are listened to
while a pass has terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffedit.errors import CapabilityError
from diffedit.rows import RowMap


@dataclass(frozen=True)
class Site:
    """Where attention happens.

    Attributes:
        name: the module's path inside the denoiser.
        cross: whether keys and values come from the text alone.
        rows: what the rows of the batch are.
    """

    name: str
    cross: bool
    rows: RowMap


@dataclass(frozen=True)
class Beside:
    """A second attention of the same queries, whose result is added to that of the first.

    Attributes:
        k: keys ``(rows, heads, keys, d)``.
        v: values ``(rows, heads, keys, d)``.
        weight: how much of it is added.
        mask: where, ``(1 or rows, 1, tokens, 1)``; None: everywhere.
        late: it is of the queries as they were before they were turned by their places, and is
            added to what the whole block makes, in families that know of such.
    """

    k: Tensor
    v: Tensor
    weight: float = 1.0
    mask: Tensor | None = None
    late: bool = False


@dataclass(frozen=True)
class QKV:
    """What goes into one attention: ``softmax(q k^T / sqrt(d) + bias) v``.

    Where picture and text attend together, these are the picture's; the text's keys are looked at
    besides, and the text itself looks at what it would look at without terms.

    Attributes:
        q: queries ``(rows, heads, tokens, d)``.
        k: keys ``(rows, heads, keys, d)``; in self-attention the first `tokens` are the row's own.
        v: values ``(rows, heads, keys, d)``.
        bias: added to the scores, broadcastable to
            ``(rows, heads, tokens, keys)``; -inf hides a key.
        places: how `q` and the own keys have been turned by where a token is in the picture
            (rotary embedding, Su et al. 2021, arXiv:2104.09864), complex ``(tokens, d / 2)``, or
            ``(rows, 1, tokens, d / 2)`` where each row has places of its own; None: not at all.
        beside: attentions of their own that are added, in order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    places: Tensor | None = None
    beside: tuple[Beside, ...] = ()

    def appended(self, k: Tensor, v: Tensor, bias: Tensor | None = None) -> QKV:
        """With further keys and values, whose scores get `bias` (``(rows, 1, 1, new keys)``)."""
        old, new = self.bias, bias
        if old is not None or new is not None:
            old = k.new_zeros(1, 1, 1, self.k.shape[2]) if old is None else old
            new = k.new_zeros(1, 1, 1, k.shape[2]) if new is None else new
            old = torch.cat(_broadcast_but_last(old, new), dim=-1)
        return replace(
            self, k=torch.cat([self.k, k], dim=2), v=torch.cat([self.v, v], dim=2), bias=old
        )

    def plus(self, other: Beside) -> QKV:
        """With one more attention beside it: its scores compete with nobody's."""
        return replace(self, beside=(*self.beside, other))

    def placed(self, x: Tensor) -> Tensor:
        """Turn ``(rows, heads, tokens, d)`` by where the tokens are, as queries and keys are."""
        return x if self.places is None else _turned(x, self.places)

    def unplaced(self, x: Tensor) -> Tensor:
        """The inverse of `placed`: what the tokens say, wherever they are."""
        return x if self.places is None else _turned(x, self.places.conj())

    def of_rows(self, keys: Tensor, rows: Tensor) -> Tensor:
        """Own keys of other rows, for each row one, as if their tokens stood in its places."""
        if self.places is None or self.places.ndim == 2:  # which are the same in all
            return keys[rows]
        return self.placed(self.unplaced(keys)[rows])


def _turned(x: Tensor, by: Tensor) -> Tensor:
    """Turn neighbouring channels as pairs; in float32, as the families do."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)


def _broadcast_but_last(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])


class Transform(Protocol):
    """Changes what goes into one attention."""

    def __call__(self, qkv: QKV, site: Site) -> QKV:
        """Return what attention is to use instead."""


#: Makes an attention that is put beside another; None: none there.
Addition = Callable[["QKV", Site], Beside | None]


@dataclass(frozen=True)
class Layout:
    """What the tokens of one attention are.

    Attributes:
        picture: which of them are the picture's; all, unless text and picture attend together.
        cross: whether keys and values come from the text alone.
        places: as in `QKV`, of the picture's tokens.
        late: takes those attentions beside this one that are added after the block.
    """

    picture: slice | None = None
    cross: bool = False
    places: Tensor | None = None
    late: Callable[[tuple[Beside, ...]], None] | None = None


def separate(given: Mapping[str, Any], tokens: int) -> Layout:
    """The layout of denoisers where picture and text attend in modules of their own."""
    return Layout(cross=given.get("encoder_hidden_states") is not None)


@contextmanager
def attending(
    denoiser: torch.nn.Module,
    transform: Transform,
    rows: Callable[[], RowMap | None],
    layout: Callable[[Mapping[str, Any], int], Layout] = separate,
    aside: tuple[str, ...] = (),
) -> Iterator[None]:
    """Route every attention of a denoiser through `transform`.

    Args:
        denoiser: of diffusers; its attention modules are those with processors.
        transform: what edits contributed.
        rows: what the rows of the present call are; None: it is not the denoiser that calls, but a
            control network that has parts of it.
        layout: of an attention, from what its module was called with and how many queries it has.
        aside: names of parts where no token of the picture attends, which are left alone.

    Raises:
        CapabilityError: when the denoiser is called, and an attention of it does not end in torch's
            scaled-dot-product attention.
    """
    with ExitStack() as undo:
        for name, module in denoiser.named_modules():
            if hasattr(module, "set_processor") and not name.startswith(aside):
                _Ear(name, module, transform, rows, layout, undo)
        yield


class _Ear(TorchFunctionMode):
    """Listens to one attention module, and changes what it puts into the softmax."""

    def __init__(
        self,
        name: str,
        module: Any,
        transform: Transform,
        rows: Callable[[], RowMap | None],
        layout: Callable[[Mapping[str, Any], int], Layout],
        undo: ExitStack,
    ) -> None:
        super().__init__()
        self.name, self.module = name, module
        self.transform, self.rows, self.layout = transform, rows, layout
        self.given: Mapping[str, Any] = {}
        self.heard = False
        self.listening = False
        before = module.register_forward_pre_hook(self.begin, with_kwargs=True)
        after = module.register_forward_hook(self.end, always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)
        # torch calls no hook after a KeyboardInterrupt.
        undo.callback(self.rest)

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module is called: listen."""
        self.heard = self.rows() is None
        if self.heard:
            return
        # Blocks give what attends by its place or its name.
        names = ("hidden_states", "encoder_hidden_states")
        self.given = dict(zip(names, args, strict=False)) | kwargs
        self.listening = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, module: Any, args: Any, output: Any) -> None:
        """The module is done, or has failed, when there is no output."""
        self.rest()
        if not self.heard and output is not None:
            raise CapabilityError(
                f"attention terms cannot act together with {type(self.module.processor).__name__},"
                " which this model has in place: put them into two passes"
            )

    def rest(self) -> None:
        """Listen no longer."""
        if self.listening:
            self.listening = False
            self.given = {}
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let everything pass but the module's own attention.

        A second one in the same module is an adapter's, which looks at keys of its own.
        """
        if func is not F.scaled_dot_product_attention or self.heard:
            return func(*args, **(kwargs or {}))
        self.heard = True
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Attention with the transform, ``(rows, heads, tokens, d)``."""
        layout = self.layout(self.given, query.shape[2])
        rows = self.rows()
        assert rows is not None  # else it would not listen
        site = Site(self.name, layout.cross, rows)
        mask = None if attn_mask is None else _over(attn_mask, query, key)
        if layout.picture is None:
            own = QKV(query, key, value, mask, layout.places)
            changed = self.transform(own, site)
            if changed is own:
                return F.scaled_dot_product_attention(query, key, value, attn_mask, **more)
            return _attention(changed, more)
        picture = layout.picture
        q, k, v = (_beside(picture, one, 2) for one in (query, key, value))
        own = QKV(
            query[:, :, picture],
            key[:, :, picture],
            value[:, :, picture],
            None if mask is None else mask[..., picture, picture],
            layout.places,
        )
        changed = self.transform(own, site)
        if layout.late is not None and (late := tuple(one for one in changed.beside if one.late)):
            layout.late(late)
            changed = replace(changed, beside=tuple(one for one in changed.beside if not one.late))
            if changed.beside == () and all(
                getattr(changed, part) is getattr(own, part) for part in ("q", "k", "v", "bias")
            ):
                changed = own
        if changed is own:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **more)
        seen = None if mask is None else _beside(picture, mask[..., picture, :], -1)
        drawn = _attention(changed.appended(k, v, seen), more)
        rest = None if mask is None else _beside(picture, mask, -2)
        others = F.scaled_dot_product_attention(q, key, value, rest, **more)
        start = picture.indices(query.shape[2])[0]
        return torch.cat([others[:, :, :start], drawn, others[:, :, start:]], dim=2)


def _attention(qkv: QKV, more: Mapping[str, Any]) -> Tensor:
    bias = qkv.bias if qkv.bias is None else qkv.bias.to(qkv.q.dtype)
    drawn = F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, attn_mask=bias, **more)
    for one in qkv.beside:
        seen = F.scaled_dot_product_attention(qkv.q, one.k, one.v, **more)
        drawn = drawn + one.weight * (seen if one.mask is None else seen * one.mask)
    return drawn


def _beside(picture: slice, x: Tensor, dim: int) -> Tensor:
    """What is not the picture's along a dimension: text, and references in the sequence."""
    start, stop, _ = picture.indices(x.shape[dim])
    before, after = x.narrow(dim, 0, start), x.narrow(dim, stop, x.shape[dim] - stop)
    if start == 0 or stop == x.shape[dim]:
        return after if start == 0 else before
    return torch.cat([before, after], dim)


def _over(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as scores, over all queries and keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2])
