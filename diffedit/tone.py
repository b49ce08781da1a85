"""Colours that an autoencoder shifts, put right where new pixels meet old ones.

An autoencoder gives a picture back a little lighter, darker or more colourful. Pasted beside
pixels that never went through it, that shows as a patch, on even ground most of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CELL = 8
"""Pixels to a side over which differences are averaged: what is finer is texture, not tone."""

_LARGEST = 0.12
"""From here on a difference, of values in [0, 1], is a thing and no tone."""

_TINY = 1e-9
"""Keeps a mean of nothing finite."""


def matched(new: Tensor, old: Tensor, made: Tensor) -> Tensor:
    """`new` with the tone of `old`: what separates them around what was made is taken out of it.

    Elsewhere `new` is `old` through the autoencoder, so that their difference there is the
    autoencoder's own. Its low frequencies are carried inwards smoothly, as by a membrane in the
    seamless cloning of Pérez et al. 2003 (here by pull-push: Gortler et al. 1996, "The Lumigraph"),
    and added. Large differences do not count: they are things that reach over the edge (Tukey's
    biweight: Beaton and Tukey 1974).

    Args:
        new: ``(b, 3, h, w)`` in [0, 1], decoded.
        old: ``(1 or b, 3, h, w)`` in [0, 1], the picture as it was.
        made: ``(1 or b, 1, h, w)``, 0 where nothing was made.

    Returns:
        ``(b, 3, h, w)`` in [0, 1]; `new` itself if all of it was made, or nothing.
    """
    known = (made == 0).to(new.dtype)
    if known.all() or not known.any():
        return new
    shares = _pooled(known, _CELL)
    means = _pooled((old - new) * known, _CELL) / shares.clamp_min(_TINY)
    size = means.abs().amax(dim=1, keepdim=True) / _LARGEST
    weights = shares * (1 - size.square()).clamp_min(0).square()
    return (new + _grown(_filled(means, weights), _CELL, new)).clamp(0, 1)


def _filled(values: Tensor, weights: Tensor) -> Tensor:
    """Each value as far as its weight goes; the rest is what stands around it, 0 where nothing is.

    Args:
        values: ``(b, c, h, w)``, with weights ``(b, 1, h, w)`` in [0, 1].
    """
    around = torch.zeros_like(values)
    if max(values.shape[-2:]) > 1:
        shares = _pooled(weights, 2)
        coarse = _pooled(values * weights, 2) / shares.clamp_min(_TINY)
        # Four cells in one: a coarse one is known where a single fine one is.
        around = _grown(_filled(coarse, (4 * shares).clamp_max(1)), 2, values)
    return torch.lerp(around, values, weights.expand_as(values))


def _pooled(values: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(values, size, ceil_mode=True, count_include_pad=False)


def _grown(values: Tensor, size: int, like: Tensor) -> Tensor:
    """Undo `_pooled`, smoothly; the last cells may reach beyond the edge."""
    height, width = like.shape[-2:]
    return F.interpolate(values, scale_factor=size, mode="bilinear")[..., :height, :width]
