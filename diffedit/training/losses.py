"""Losses per item, and the weights that balance the noise levels of a batch.

Each loss takes ``(n, …)`` predictions and targets and gives ``(n,)`` means in float32 (float64
stays). ``where``, broadcast to them, weighs single cells: ``mse(p, y, where=objects)``.

The errors of all prediction types are multiples of one another at a given x_t, so a weight for one
type says what it is for the others (Salimans & Ho 2022, arXiv:2202.00512, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffedit.errors import InputError, nearest
from diffedit.training.process import Kind


def mse(prediction: Tensor, target: Tensor, *, where: Tensor | None = None) -> Tensor:
    """(x - y)², the simple loss of Ho et al. 2020 (arXiv:2006.11239, eq. 14)."""
    return _mean(_error(prediction, target).square(), where)


def l1(prediction: Tensor, target: Tensor, *, where: Tensor | None = None) -> Tensor:
    """|x - y|: medians instead of means, so fewer outliers and less variety."""
    return _mean(_error(prediction, target).abs(), where)


def huber(
    prediction: Tensor, target: Tensor, *, c: float = 0.1, where: Tensor | None = None
) -> Tensor:
    """2c (√((x - y)² + c²) - c): (x - y)² for small errors, 2c |x - y| - 2c² for large ones.

    The pseudo-Huber loss with the factor that diffusers' scripts give it, so that its small end is
    :func:`mse`; Song & Dhariwal 2023 (arXiv:2310.14189) have it without the 2c, and
    ``torch.nn.functional.huber_loss`` is another, piecewise function at half this scale. Khrapov
    et al. 2024 (arXiv:2403.16728) measure that it survives corrupt pictures in the data.
    """
    squared = _error(prediction, target).square()
    # The same as the formula above, without the difference of two near numbers.
    return _mean(2 * c * squared / ((squared + c**2).sqrt() + c), where)


def min_snr(kind: Kind, snr: Tensor, *, gamma: float = 5.0, floor: float = 0.0) -> Tensor:
    """Min-SNR-γ weights of ``mse`` losses of a prediction type; like ``snr``, (n,) in [0, ∞].

    Hang et al. 2023 (arXiv:2303.09556): the error of x_0 weighs min(snr, γ); the
    error of ε is snr times as large, that of v (snr + 1) times, that of ε - x_0 (√snr + 1)² times.

    Args:
        kind: what the network predicts; ``v_prediction`` for variance-preserving processes.
        snr: a² / b², from :meth:`Process.snr`; its limits 0 and ∞ are finite.
        gamma: γ; the paper recommends 5.
        floor: least weight where there is more noise than signal (snr < 1). The weights of ``v``,
            of ``ε - x_0`` and of ``x_0`` vanish with the signal, and there the composition is
            decided.
    """
    ratios = {
        "epsilon": snr,
        "flow": (snr.sqrt() + 1).square(),
        "flow_prediction": (snr.sqrt() + 1).square(),
        "sample": torch.ones_like(snr),
        "v_prediction": snr + 1,
    }
    if kind not in ratios:
        raise InputError(f"unknown prediction type {kind!r}{nearest(kind, ratios)}")
    # Where ε is predicted from pure noise both are 0; the limit is 1.
    weight = torch.where(
        (snr == 0) & (ratios[kind] == 0), torch.ones_like(snr), snr.clamp_max(gamma) / ratios[kind]
    )
    return torch.where(snr < 1, weight.clamp_min(floor), weight)


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    if prediction.shape != target.shape:
        raise InputError(
            f"a prediction of shape {tuple(prediction.shape)} for a target of shape "
            f"{tuple(target.shape)}; they must be the same"
        )
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(exact) - target.to(exact)


def _mean(error: Tensor, where: Tensor | None) -> Tensor:
    if where is not None:
        error = error * where.to(error)
    return error.flatten(1).mean(1)
