"""Words attend to where they stand: a loss on cross-attention, where the data knows the places.

A denoiser has to find out by itself which word means which part of a picture, and binding "red" to
the circle and "blue" to the square takes it long. Where the places are known, as in a drawn world,
they can be told: Wang et al. 2023 (TokenCompose, arXiv:2312.03626), eq. 4.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

SMALLEST = 8
"""Least side of the attention that is told, in cells: coarser cells hold several objects."""


# Not an attribute: a UNet that is watched is copied and saved like any other.
_recording = threading.local()


class Watched:
    """Keeps the cross-attention of a UNet while :meth:`recording`, each thread its own."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        processors = dict(unet.attn_processors)
        for name in processors:
            if ".attn2." in name:
                processors[name] = _Recorder(self)
        unet.set_attn_processor(processors)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """The attention of every layer in the block, heads averaged: (n, cells, tokens) each."""
        found: list[Tensor] = []
        _recording.now = (self, found)
        try:
            yield found
        finally:
            del _recording.now

    def saw(self, attention: Tensor, heads: int) -> None:
        """Keep attention (n · heads, cells, tokens)."""
        watched, found = getattr(_recording, "now", (None, []))
        if watched is self:
            found.append(attention.unflatten(0, (-1, heads)).mean(1))


class _Recorder:
    """Plain cross-attention, whose weights go to ``watched``."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        weights = attn.get_attention_scores(query, key, attention_mask)
        self.watched.saw(weights, attn.heads)
        joined = attn.to_out[0](attn.batch_to_head_dim(weights @ value))
        made: Tensor = attn.to_out[1](joined) / attn.rescale_output_factor
        return made


def grounding(attentions: Sequence[Tensor], phrases: Tensor, spans: Tensor) -> Tensor:
    """How much of the attention to a phrase's tokens falls elsewhere than where it stands.

    For a token i with the place M, 1 in its cells: (1 − Σ_{u in M} A_ui / Σ_u A_ui)², the mean over
    tokens, phrases and layers (arXiv:2312.03626, eq. 4). Layers of less than :data:`SMALLEST` cells
    a side are left out.

    Args:
        attentions: (n, side², tokens) each.
        phrases: (n, p, h, w) in [0, 1].
        spans: (n, p, tokens), 1 for the tokens of a phrase.

    Returns:
        (n,), 0 where an example has no phrase.
    """
    count = spans.sum((1, 2)).clamp(min=1)
    total, layers = torch.zeros(len(spans), device=spans.device), 0
    for attention in attentions:
        side = round(attention.shape[1] ** 0.5)
        if side < SMALLEST:
            continue
        places = functional.adaptive_avg_pool2d(phrases, side).flatten(2)
        inside = torch.einsum("npu,nui->npi", places, attention.float())
        every = attention.float().sum(1).unsqueeze(1)
        total = total + (((1 - inside / every.clamp(min=1e-8)) ** 2) * spans).sum((1, 2))
        layers += 1
    return total / (count * max(1, layers))
