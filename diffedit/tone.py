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

_TINY = 1e-9
"""Keeps a mean of nothing finite."""

_PLAUSIBLE = 0.06
"""A difference this large, of values in [0, 1], counts a quarter: an autoencoder's are smaller."""


def matched(new: Tensor, old: Tensor, part: Tensor) -> Tensor:
    """`new` with the tone of `old`: what separates them around the mask is taken out within.

    Where nothing is to change, `new` is `old` through the autoencoder, so their difference there is
    the autoencoder's own. Its low frequencies are carried into the mask smoothly, as by a membrane
    in the seamless cloning of Pérez et al. 2003 (here by pull-push: Gortler et al. 1996, "The
    Lumigraph", section 3.4), and added. Large differences count little: they are things that reach
    over the edge, not tone (weights of Geman and McClure 1987).

    Args:
        new: ``(b, 3, h, w)`` in [0, 1], decoded.
        old: ``(1 or b, 3, h, w)`` in [0, 1], the picture as it was.
        part: ``(1 or b, 1, h, w)``, 0 where nothing is to change.

    Returns:
        ``(b, 3, h, w)``, not clamped; `new` itself if all of it is to change, or nothing is.
    """
    known = (part == 0).to(new.dtype)
    if known.all() or not known.any():
        return new
    away = old - new
    weight = known / (1 + (away.abs().amax(dim=1, keepdim=True) / _PLAUSIBLE).square()).square()
    weight = weight.expand(len(away), -1, -1, -1)
    shares = _pooled(weight, _CELL)
    means = _pooled(away * weight, _CELL) / shares.clamp_min(_TINY)
    return new + F.interpolate(_filled(means, shares), new.shape[-2:], mode="bilinear")


def _pooled(values: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(values, size, ceil_mode=True, count_include_pad=False)


def _filled(values: Tensor, weight: Tensor) -> Tensor:
    """Each value as far as its weight goes; the rest is what stands around it, 0 where nothing is.

    Args:
        values: ``(b, c, h, w)``, with weights ``(b, 1, h, w)`` in [0, 1].
    """
    around = torch.zeros_like(values)
    if max(weight.shape[-2:]) > 1:
        shares = _pooled(weight, 2)
        coarse = _pooled(values * weight, 2) / shares.clamp_min(_TINY)
        coarse = _filled(coarse, (4 * shares).clamp_max(1))
        around = F.interpolate(coarse, weight.shape[-2:], mode="bilinear")
    return torch.lerp(around, values, weight.expand_as(values))
