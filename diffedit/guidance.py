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


def kept_in_length(guided: Tensor, positive: Tensor) -> Tensor:
    """Give every vector of the guided prediction the length that the positive one's has.

    Guidance then turns predictions, but does not stretch them.

    Args:
        guided: the prediction after guidance, ``(..., d)``.
        positive: the prediction under the prompt, of the same shape.
    """
    wanted: Tensor = positive.norm(dim=-1, keepdim=True)
    found: Tensor = guided.norm(dim=-1, keepdim=True)
    return guided * (wanted / found)


def composed(whole: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One prediction of several, each with a weight in every place.

    Bar-Tal et al. 2023, "MultiDiffusion" (arXiv:2302.08113), eq. 5. What the weights of the parts
    leave of 1 is the weight of the whole; where they add up to more than 1, they are divided by
    their sum. Where they are 0 the whole keeps its bits, and a part where it alone has weight 1.

    Args:
        whole: a prediction.
        parts: weights in [0, 1], ``(1 or b, 1, h, w)``, each with another prediction.
    """
    weights = [weight.to(whole) for weight, _ in parts]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    share = total.clamp_min(1)
    made = (1 - total).clamp_min(0) * whole
    for weight, (_, part) in zip(weights, parts, strict=True):
        made = made + weight / share * part
    return made


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
