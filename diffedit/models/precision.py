"""Weights held in eight bits, and computed with in the type that a model was made for.

As diffusers' layerwise casting holds them, without its rewriting of every weight twice a step: here
nothing about a network changes while it runs, so what a pass leaves is what it found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffedit.errors import ModelError

#: Layers whose weights are most of a network.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        if isinstance(layer, _LAYERS) and not any(re.search(one, name) for one in exact):
            _hold(layer, getattr(torch, storage))


def computing(network: nn.Module) -> torch.dtype:
    """The type that a network computes in, whatever its weights are held in."""
    first = next(network.parameters()).dtype
    if first.itemsize > 1:
        return first
    for layer in network.modules():
        if isinstance(kind := layer.__dict__.get("_computes_in"), torch.dtype):
            return kind
    return first


def _hold(layer: Any, storage: torch.dtype) -> None:
    computes = layer.weight.dtype
    for weight in (layer.weight, layer.bias):
        if weight is not None:
            weight.data = weight.data.to(storage)
    layer._computes_in = computes
    layer.forward = MethodType(_linear if isinstance(layer, nn.Linear) else _convolution, layer)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, *_wide(layer))


def _convolution(layer: Any, x: Tensor) -> Tensor:
    forward: Callable[..., Tensor] = layer._conv_forward
    return forward(x, *_wide(layer))


def _wide(layer: Any) -> tuple[Tensor, Tensor | None]:
    kind = layer._computes_in
    return layer.weight.to(kind), None if layer.bias is None else layer.bias.to(kind)


__all__ = ["computing", "narrow"]
