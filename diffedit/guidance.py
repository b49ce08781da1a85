"""Guidance: pure functions from named predictions to one.

A prediction is the denoiser's raw output (epsilon, v, …), ``(b, c, h, w)``. "positive" is the one
under the prompt, "negative" the one under the negative prompt; edits may add others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

POSITIVE, NEGATIVE = "positive", "negative"


def classifier_free(predictions: Mapping[str, Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6), from the negative.

    Without a negative prediction (a scale of at most 1 drops it) the positive one is returned.
    """
    positive = predictions[POSITIVE]
    negative = predictions.get(NEGATIVE)
    if negative is None:
        return positive
    return negative + scale * (positive - negative)


def rescaled(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Pull the guided prediction's contrast back to the positive one's.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed"
    (arXiv:2305.08891), eqs. 15-16: the standard deviation over all but the batch.

    Args:
        guided: the prediction after guidance.
        positive: the prediction under the prompt.
        amount: phi in the paper; 0 changes nothing, 1 takes the whole correction.
    """
    dims = list(range(1, guided.ndim))
    corrected = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return amount * corrected + (1 - amount) * guided


def with_terms(
    guided: Tensor,
    predictions: Mapping[str, Tensor],
    terms: Sequence[tuple[float | Tensor, str, str]],
) -> Tensor:
    """Add ``weight * (toward - away)`` for every term."""
    for weight, toward, away in terms:
        if isinstance(weight, Tensor):
            weight = weight.to(guided)
        guided = guided + weight * (predictions[toward] - predictions[away])
    return guided
