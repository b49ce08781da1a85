"""Folds the merged contributions of a pass into one denoiser.

One call makes every prediction of the pass as one batch: branch x (canvas items, references).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffedit.attention import QKV, Site
from diffedit.edit import Merged
from diffedit.errors import DiffeditError, PluginError
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, classifier_free, rescaled, with_terms
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.rows import RowKey, RowMap
from diffedit.run import Run
from diffedit.schedulers import Call, Schedule


@dataclass(frozen=True)
class Reference:
    """A reference sampled beside the canvas, ready for the loop.

    Attributes:
        name: as the attention terms know it.
        at: its latents at the level of a call, ``(items, c, h, w)``, unscaled.
        clean: its clean latents, where they are known.
        conditioning: one row, for every branch but the negative one.
    """

    name: str
    at: Callable[[Call], Tensor]
    clean: Tensor | None
    conditioning: Conditioning


class Denoiser:
    """The denoiser of one pass: latents and a call's index in, one prediction out.

    Args:
        run: the pass.
        schedule: the calls of this trip.
        merged: what the edits contribute.
        branches: conditioning (one row each) of every prediction, in batch order.
        references: pictures sampled beside the canvas.
        channels: further inputs of the denoiser by role, ``(items, c, h, w)``.
        guidance: scale of classifier-free guidance.
        rescale: how much of the contrast correction is taken, 0 to 1.
        embedded_guidance: the scale for models that take it as an input.
        guard: runs what plugins contributed.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        merged: Merged,
        branches: Mapping[str, Conditioning],
        *,
        references: Sequence[Reference] = (),
        channels: Mapping[str, Tensor] | None = None,
        guidance: float = 1.0,
        rescale: float = 0.0,
        embedded_guidance: float | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.run, self.model = run, run.model
        self.schedule = schedule
        self.merged = merged
        self.references = references
        self.items = items = run.items
        self.guidance = guidance
        self.rescale = rescale
        self.embedded_guidance = embedded_guidance
        self.guard = guard or Guard()
        self.call = schedule.call(0)
        self.bare = False
        self.branches = tuple(branches)
        keys: list[RowKey] = []
        conditioning: list[Conditioning] = []
        for branch, own in branches.items():
            keys += [RowKey(branch, item) for item in range(items)]
            conditioning += [own] * items
            for one in references:
                keys += [RowKey(branch, item, one.name) for item in range(items)]
                conditioning += [own if branch == NEGATIVE else one.conditioning] * items
        self.rows = RowMap(tuple(keys))
        self.conditioning = Conditioning.stack(conditioning)
        self.channels = {
            role: torch.cat([self._channel(role, value)] * len(branches))
            for role, value in (channels or {}).items()
        }

    def _channel(self, role: str, canvas: Tensor) -> Tensor:
        """One branch's rows of a channel: nothing of a reference is to change."""
        parts = [canvas]
        for one in self.references:
            known = role == "masked" and one.clean is not None
            parts.append(one.clean.expand_as(canvas) if known else torch.zeros_like(canvas))  # type: ignore[union-attr]
        return torch.cat(parts)

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        """Predict for every item: ``(items, c, h, w)`` in, the guided raw output out."""
        call = self.call = self.schedule.call(index)
        beside = [one.at(call).to(latents.dtype) for one in self.references]
        rows = torch.cat([latents, *beside] * len(self.branches))
        x = ModelInput(
            latents=self.run.laid_out(self.schedule.scale(rows, index)),
            timestep=self.schedule.timesteps[index],
            conditioning=self.conditioning,
            rows=self.rows,
            channels=self.channels,
            guidance=self.embedded_guidance,
        )
        output = self._predict(self._with_residuals(x, call))
        # A branch's canvas rows stand together; a list of indices would make a GPU wait.
        stride = len(self.rows) // len(self.branches)
        predictions = {
            name: output[number * stride : number * stride + self.items]
            for number, name in enumerate(self.branches)
        }
        if self.guard.diagnosing and not torch.isfinite(output).all():
            raise self._blame(x, call)
        return self._refined(self._combined(predictions, call), latents, call)

    def _blame(self, x: ModelInput, call: Call) -> DiffeditError:
        """Say who made the denoiser's output not finite: what was contributed, or the denoiser."""
        acting = [part.owner for part in self.merged.residuals if part.active(call)]
        acting += [part.owner for part in self.merged.attention if part.active(call)]
        self.bare = True
        if acting and bool(torch.isfinite(self.model.predict(x)).all()):
            owners = ", ".join(dict.fromkeys(acting))
            return PluginError(owners, "makes the denoiser's output not finite (NaN or inf)")
        return DiffeditError(
            f"the denoiser's own output is not finite in call {call.index + 1} of"
            f" {call.total}, and no edit is at fault: try dtype float32"
        )

    def _with_residuals(self, x: ModelInput, call: Call) -> ModelInput:
        acting = [p for p in self.merged.residuals if p.active(call)]
        if not acting:
            return x
        canvas = self.rows.canvas
        only = x.only(canvas)
        total: Residuals | None = None
        for part in acting:
            made = self.guard.call(
                part.owner, "residuals", part.value, only, call, lent=(only.latents, x.latents)
            )
            self._check_residuals(part.owner, made, len(canvas))
            if total is not None and made.shapes != total.shapes:
                raise PluginError(
                    part.owner, "residuals are of other shapes than another edit's of this pass"
                )
            total = made if total is None else total + made
        assert total is not None
        return replace(x, residuals=total.spread(canvas, len(self.rows)))

    @staticmethod
    def _check_residuals(owner: str, made: object, rows: int) -> None:
        if not isinstance(made, Residuals) or any(len(place) != rows for place in made.places):
            raise PluginError(owner, f"residuals must be Residuals of {rows} rows")

    def _predict(self, x: ModelInput) -> Tensor:
        try:
            return self.model.predict(x)
        except RuntimeError as error:
            foreign = [p.owner for p in self.merged.residuals]
            foreign += [p.owner for p in self.merged.attention]
            if isinstance(error, torch.OutOfMemoryError) or not foreign:
                raise
            said = str(error).splitlines()[0]
            owners = ", ".join(dict.fromkeys(foreign))
            raise PluginError(
                owners, f"the denoiser cannot use what was contributed: {said}"
            ) from error

    def attend(self, qkv: QKV, site: Site) -> QKV:
        """The chained attention terms, as the transform of the model's attention processor."""
        for part in self.merged.attention:
            if not self.bare and part.active(self.call):
                qkv = self.guard.call(
                    part.owner, "attention", part.value, qkv, site, lent=(qkv.q, qkv.k, qkv.v)
                )
                if not isinstance(qkv, QKV):
                    raise PluginError(
                        part.owner, f"attention returned {type(qkv).__name__}, not a QKV"
                    )
                if qkv.k.shape[:3] != qkv.v.shape[:3]:  # torch does not always notice
                    raise PluginError(part.owner, "attention returned unequal numbers of k and v")
        return qkv

    def _combined(self, predictions: Mapping[str, Tensor], call: Call) -> Tensor:
        combine = self.merged.combine
        if combine is not None:
            guided = self.guard.call(
                combine.owner,
                "combine",
                combine.value,
                predictions,
                call,
                lent=list(predictions.values()),
                like=next(iter(predictions.values())),
            )
        else:
            guided = classifier_free(predictions, self.guidance)
        terms = [
            (part.value.weight, part.value.toward, part.value.away)
            for part in self.merged.terms
            if part.active(call)
        ]
        if self.guard.diagnosing:
            for part in self.merged.terms:
                weight = torch.as_tensor(part.value.weight)
                self.guard.check_finite(part.owner, "the weight of a term", weight)
        guided = with_terms(guided, predictions, terms)
        if self.rescale > 0 and NEGATIVE in predictions:
            guided = rescaled(guided, predictions["positive"], self.rescale)
        return guided

    def _refined(self, output: Tensor, latents: Tensor, call: Call) -> Tensor:
        acting = [p for p in self.merged.refine if p.active(call)]
        if not acting:
            return output
        x0 = self.schedule.to_x0(output, call.index, latents)
        for part in acting:
            x0 = self.guard.call(part.owner, "refine", part.value, x0, call, lent=(x0,), like=x0)
        return self.schedule.from_x0(x0, call.index, latents)
