"""Other ways to guide than plain classifier-free guidance; the pass's `guidance` is their scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from diffedit import (
    QKV,
    Branch,
    Call,
    Contribution,
    Edit,
    Guidance,
    Run,
    Site,
    Windowed,
    errors,
    hookimpl,
)


def _scale(run: Run, name: str) -> float:
    """The pass's scale; refuses where there is no guidance to change."""
    if run.guidance <= 1:
        raise errors.InputError(
            f"{name}: changes guidance, and this pass has none: set guidance above 1 (for models"
            " that take the guidance scale as an input, true_guidance)"
        )
    return run.guidance


class Interval(Windowed):
    """Guide in a part of the steps only: early and late guidance costs variety and detail.

    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and
    Distribution Quality in Diffusion Models" (arXiv:2404.07724).
    """

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "interval"
    version: ClassVar[str] = "1.0.0"

    start: float = Field(0.2, ge=0, le=1, description="From which fraction of the steps on")
    end: float = Field(0.8, ge=0, le=1, description="Up to which fraction of the steps")

    def contribute(self, run: Run) -> Contribution:
        """Classifier-free guidance inside, the positive prediction alone outside."""
        scale = _scale(run, self.name)

        def combine(predictions: Mapping[str, Tensor], call: Call) -> Tensor:
            inside = self.start <= call.index / call.total and (
                (call.index + 1) / call.total <= self.end
            )
            return run.model.combine(predictions, scale) if inside else predictions["positive"]

        return Contribution(combine=combine)


class AdaptiveProjected(Edit):
    """Guide strongly without glaring colours: what only stretches the prediction is left out."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "apg"
    version: ClassVar[str] = "1.0.0"

    parallel: float = Field(
        0.0, ge=0, le=1, description="How much of what only stretches the prediction is kept"
    )
    threshold: float = Field(
        0.0, ge=0, le=1000, description="The longest that the direction may be; 0: any length"
    )
    momentum: float = Field(
        -0.5, ge=-1, le=1, description="How much of the direction before is added; below 0: taken"
    )

    def contribute(self, run: Run) -> Contribution:
        """The combiner, which remembers the direction of the call before."""
        scale = _scale(run, self.name)
        before: list[Tensor] = []

        def combine(predictions: Mapping[str, Tensor], call: Call) -> Tensor:
            last = before.pop() if before and call.index else None
            guided, direction = projected(
                predictions, scale, self.parallel, self.threshold, last, self.momentum
            )
            before[:] = [direction]
            return guided

        return Contribution(combine=combine)


class PerpNeg(Edit):
    """Take the negative prompt's part in what the prompt asks for out of the negative prompt."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "perp_neg"
    version: ClassVar[str] = "1.0.0"

    weight: float = Field(
        1.0, ge=0, le=10, description="How far to lead away from the negative prompt"
    )

    def contribute(self, run: Run) -> Contribution:
        """One more prediction, under an empty prompt, and the combiner."""
        scale = _scale(run, self.name)
        empty = Branch("empty", "", negative=True)
        name = f"{self.scope}/{empty.name}"

        def combine(predictions: Mapping[str, Tensor], call: Call) -> Tensor:
            return perpendicular(predictions, name, scale, self.weight)

        return Contribution(branches=(empty,), combine=combine)


class PerturbedAttention(Windowed):
    """Guide away from a picture without structure: one whose tokens look at themselves only.

    Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance"
    (arXiv:2403.17377, eq. 14). Needs no negative prompt.
    """

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "pag"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"shared_attention"})

    scale: float = Field(
        3.0, ge=0, le=30, description="How far to lead away", json_schema_extra={"step": 0.1}
    )
    layers: str = Field(
        "mid",
        min_length=1,
        max_length=200,
        description="Which self-attentions: parts of the names of layers, with commas between",
        json_schema_extra={"advanced": True},
    )

    def contribute(self, run: Run) -> Contribution:
        """A prediction of the same prompt with identity for its attention maps, and a term."""
        wanted = [part.strip() for part in self.layers.split(",") if part.strip()]
        name = f"{self.scope}/perturbed"
        seen: dict[str, bool] = {}

        def attention(qkv: QKV, site: Site) -> QKV:
            if site.cross:
                return qkv
            if site.name in seen and not any(seen.values()):
                raise errors.InputError(
                    f"pag: no self-attention of this model is called like {self.layers!r}; there"
                    f" are {', '.join(list(seen)[:4])} …"
                )
            seen[site.name] = any(part in site.name for part in wanted)
            return alone(qkv, site, name) if seen[site.name] else qkv

        return Contribution(
            branches=(Branch("perturbed", run.prompt),),
            terms=(Guidance(self.scale, "positive", name),),
            attention=attention,
            during=self.during,
        )


def projected(
    predictions: Mapping[str, Tensor],
    scale: float,
    parallel: float = 0.0,
    threshold: float = 0.0,
    before: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al. 2025, arXiv:2410.02416, algorithm 1).

    Strong guidance oversaturates by the part of its direction that is parallel to the prediction.
    The paper's predictions are clean latents; raw ones, as others take too, do as well here.

    Args:
        predictions: positive and negative.
        scale: of guidance.
        parallel: share of the parallel part that is kept (eta in the paper); 1 keeps it.
        threshold: the longest that a direction may be (r in the paper); 0: any length.
        before: the direction of the call before, as this function returned it.
        momentum: how much of that is added (beta in the paper, where it is negative).

    Returns:
        The guided prediction, and the direction for the next call.
    """
    positive = predictions["positive"]
    direction = positive - predictions["negative"]
    if before is not None:
        direction = direction + momentum * before
    dims = tuple(range(1, positive.ndim))
    pull = direction
    if threshold > 0:
        length = torch.linalg.vector_norm(pull, dim=dims, keepdim=True)
        pull = pull * (threshold / length).clamp(max=1.0)
    along = _along(pull, positive)
    return positive + (scale - 1) * (pull - along + parallel * along), direction


def perpendicular(
    predictions: Mapping[str, Tensor], empty: str, scale: float, weight: float = 1.0
) -> Tensor:
    """Perp-Neg (Armandpour et al. 2023, arXiv:2304.04968, eq. 7): negatives that leave the prompt.

    Of what the negative prompt means only the part perpendicular to the prompt's is led away from,
    so that what both speak of stays.

    Args:
        predictions: positive, negative, and one under an empty prompt.
        empty: the name of that one.
        scale: of guidance.
        weight: of the negative prompt.
    """
    nothing = predictions[empty]
    toward, away = (predictions[name] - nothing for name in ("positive", "negative"))
    return nothing + scale * (toward - weight * (away - _along(away, toward)))


def _along(x: Tensor, other: Tensor) -> Tensor:
    """The part of `x` that is parallel to `other`, over all but the batch."""
    dims = tuple(range(1, x.ndim))
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    u, v = x.to(wide), other.to(wide)
    share = (u * v).sum(dims, keepdim=True) / (v * v).sum(dims, keepdim=True).clamp(min=1e-12)
    return (share * v).to(x.dtype)


def alone(qkv: QKV, site: Site, branch: str) -> QKV:
    """Attention in which the tokens of one branch look at themselves only."""
    rows = torch.tensor([key.branch == branch for key in site.rows.keys], device=qkv.q.device)
    tokens, keys = qkv.q.shape[2], qkv.k.shape[2]
    others = ~torch.eye(tokens, keys, dtype=torch.bool, device=qkv.q.device)
    bias = qkv.q.new_zeros(len(rows), 1, tokens, keys)
    bias = bias.masked_fill(rows[:, None, None, None] & others, -torch.inf)
    return replace(qkv, bias=bias if qkv.bias is None else qkv.bias + bias)


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edits of this plugin."""
    return [AdaptiveProjected, Interval, PerpNeg, PerturbedAttention]
