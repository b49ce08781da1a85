"""Weights held otherwise than they are computed with: in eight bits, or in main memory.

As diffusers' layerwise casting and group offloading hold them, but that nothing about a network
changes while it runs: a layer computes with a copy of its weights that is made when it is called
and let go of when it is done. What a pass leaves is therefore what it found, however it ends.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffedit.errors import ModelError
from diffedit.guard import constituents

_MAIN = torch.device("cpu")


def narrow(network: Any, storage: str) -> None:
    """Hold the weights of a network's layers in a narrower type than it computes in.

    Positions, norms and what else a network wants exact keep their type: the layers left out are
    those that diffusers leaves out for the class.

    Args:
        network: of diffusers, in the type that it is to compute in.
        storage: the name of a type of torch, such as "float8_e4m3fn": 3 bits of mantissa, up to
            448.

    Raises:
        ModelError: the network cannot be held so.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    if not getattr(network, "_supports_layerwise_casting", True):
        raise ModelError(f"a {type(network).__name__} cannot be held in {storage}")
    exact = [
        *DEFAULT_SKIP_MODULES_PATTERN,
        *(network._skip_layerwise_casting_patterns or ()),
        *(network._keep_in_fp32_modules or ()),
    ]
    for name, layer in network.named_modules():
        known = type(layer) in _FORWARDS and not isinstance(layer, nn.Embedding)
        if known and not any(re.search(one, name) for one in exact):
            kind = layer.weight.dtype
            for weight in _weights(layer).values():
                weight.data = weight.data.to(getattr(torch, storage))
            _hold(layer, dtype=kind)


def place(networks: Sequence[nn.Module], device: torch.device, room: int | None = None) -> None:
    """Put networks where they are to compute; what there is no room for stays in main memory.

    A layer that stays is copied to the device each time it is called, and a table of embeddings is
    looked up where it lies; what is computed is the same. It may be called again with less room.

    Args:
        networks: the first find room first.
        room: for weights on the device, in bytes; None: enough. Layers and tables of torch's own
            classes are what may stay away; the rest, a few hundredths of most networks, never does.
    """
    device = torch.empty(0, device=device).device  # "cuda" is the one that is current, "cuda:0"
    left = math.inf if room is None else room
    layers = [layer for network in networks for layer in network.modules()]
    serves = Counter(id(one) for layer in layers for one in _weights(layer).values())
    others = [layer for layer in layers if type(layer) not in _FORWARDS]
    bound = {id(one) for layer in others for one in _weights(layer).values()}
    # Weights that serve several layers, as the tables of text encoders do: what they were, are,
    # and whether they stay. What others were is let go of at once.
    shared: dict[int, tuple[nn.Parameter, nn.Parameter, bool]] = {}
    for layer in layers:
        weights = _weights(layer)
        size = sum(_bytes(one) for one in weights.values() if id(one) not in shared)
        stays = any(shared[id(one)][2] for one in weights.values() if id(one) in shared)
        stays = stays or (size > left and not bound & {id(one) for one in weights.values()})
        if stays:
            _hold(layer, device=device)
        else:
            left = max(left - size, 0)
        for name, one in weights.items():
            if id(one) in shared:
                layer._parameters[name] = shared[id(one)][1]
                continue
            layer._parameters[name] = made = _moved(one, _MAIN if stays else device)
            if serves[id(one)] > 1:
                shared[id(one)] = one, made, stays
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.to(device)
    for network in networks:
        network.__dict__.pop("_computes_on", None)
        if away(network):
            network._computes_on = device  # type: ignore[assignment]


def _weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in layer._parameters.items() if one is not None}


def _moved(weight: nn.Parameter, to: torch.device) -> nn.Parameter:
    if weight.device == to:
        return weight
    return nn.Parameter(weight.detach().to(to), requires_grad=weight.requires_grad)


def computing(network: nn.Module) -> torch.dtype:
    """The type that a network computes in, whatever its weights are held in."""
    first = next(network.parameters()).dtype
    if first.itemsize > 1:
        return first
    for layer in network.modules():
        # The layers of diffusers' quantised networks say it themselves.
        kind = _held(layer).dtype or getattr(layer, "compute_dtype", None)
        if isinstance(kind, torch.dtype):
            return kind
    return first


def narrowest(network: nn.Module) -> torch.dtype:
    """The type that takes the least memory of those that weights are held in."""
    held = (part for weight in network.parameters() for part in constituents(weight))
    return min(held, key=Tensor.element_size).dtype


def where(network: nn.Module) -> torch.device:
    """Where a network computes, wherever its weights are held."""
    said = network.__dict__.get("_computes_on")
    return cast(torch.device, said or next(network.parameters()).device)


def unpacked(weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight; of one that is packed that which it is unpacked to."""
    return tuple(getattr(weight, "quant_shape", weight.shape))


def away(network: nn.Module) -> int:
    """The bytes of a network's weights that stay in main memory."""
    held = (one for one in network.modules() if _held(one).device is not None)
    weights = {id(one): one for layer in held for one in _weights(layer).values()}
    return sum(_bytes(one) for one in weights.values())


def _bytes(weight: Tensor) -> int:
    return sum(one.nbytes for one in constituents(weight))


def holds(network: nn.Module) -> bool:
    """Whether some layers of a network compute with copies of their weights."""
    return any(_held(one) != _Held() for one in network.modules())


def alike(layer: nn.Module, other: nn.Module) -> None:
    """Hold a layer as another of its class is held, in whose place it comes."""
    if (held := _held(other)) != _Held():
        _hold(layer, dtype=held.dtype, device=held.device)


@dataclass(frozen=True)
class _Held:
    """What a layer computes with: a type and a place; None: those of its weights."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None


def _held(layer: nn.Module) -> _Held:
    return cast(_Held, layer.__dict__.get("_held", _Held()))


def _hold(layer: Any, **how: Any) -> None:
    """Have a layer compute with copies of its weights."""
    layer._held = replace(_held(layer), **how)
    layer.forward = MethodType(_FORWARDS[type(layer)], layer)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, *_copies(layer))


def _convolution(layer: Any, x: Tensor) -> Tensor:
    forward: Callable[..., Tensor] = layer._conv_forward
    return forward(x, *_copies(layer))


def _lookup(layer: Any, ids: Tensor) -> Tensor:
    held, table = _held(layer), layer.weight
    rows = F.embedding(ids.to(table.device), table, layer.padding_idx)
    return rows.to(held.device).to(held.dtype or rows.dtype)


def _copies(layer: Any) -> tuple[Tensor, Tensor | None]:
    held = _held(layer)

    def copied(one: Tensor) -> Tensor:
        # As it is held first: fewer bytes travel.
        if held.device is not None:
            one = one.to(held.device)
        return one.to(held.dtype or one.dtype)

    return copied(layer.weight), None if layer.bias is None else copied(layer.bias)


#: What computes in the place of which layers. Classes that derive from them are left alone: they
#: have a way of their own, or somebody else reads their weights, as attention of torch's does.
_FORWARDS: Mapping[type, Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _lookup,
}


__all__ = [
    "alike",
    "away",
    "computing",
    "holds",
    "narrow",
    "narrowest",
    "place",
    "unpacked",
    "where",
]
