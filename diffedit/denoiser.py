"""Folds the merged contributions of a pass into one denoiser.

One call makes every prediction of the pass as one batch: branch x (canvas items, references).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffedit.attention import QKV, Beside, Site
from diffedit.contribution import Branch, Merged, Owned
from diffedit.errors import DiffeditError, PluginError
from diffedit.guard import Guard
from diffedit.guidance import NEGATIVE, POSITIVE, composed, rescaled, with_terms
from diffedit.memory import exhausted
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.rows import RowKey, RowMap, index_on
from diffedit.run import Lead, Run
from diffedit.schedule import Call, Schedule


@dataclass(frozen=True)
class Reference:
    """A reference sampled beside the canvas, ready for the loop.

    Attributes:
        name: as the attention terms know it.
        at: its latents at the level of a call, ``(items, c, h, w)``, unscaled.
        clean: its clean latents, where they are known.
        conditioning: one row or one per item, for every branch that is not negative.
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
        branches: the predictions in batch order, their prompts as conditioning of one row, or of
            one per item.
        references: pictures sampled beside the canvas.
        channels: further inputs of the denoiser by role, ``(items, c, h, w)``.
        tokens: pictures that become part of its sequence by role, ``(items, c, h, w)`` each.
        guidance: scale of classifier-free guidance.
        rescale: how much of the contrast correction is taken, 0 to 1.
        embedded_guidance: the scale for models that take it as an input.
        lead: the model's own control network, which leads before anything that edits contribute.
        guard: runs what plugins contributed.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        merged: Merged,
        branches: Sequence[Branch],
        *,
        references: Sequence[Reference] = (),
        channels: Mapping[str, Tensor] | None = None,
        tokens: Mapping[str, Sequence[Tensor]] | None = None,
        guidance: float = 1.0,
        rescale: float = 0.0,
        embedded_guidance: float | None = None,
        lead: Lead | None = None,
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
        self.lead = lead
        self.guard = guard or Guard()
        self.call = schedule.call(0)
        self.bare = False
        self.branches = tuple(one.name for one in branches)
        keys: list[RowKey] = []
        conditioning: list[Conditioning] = []
        for branch in branches:
            own = branch.prompt
            assert isinstance(own, Conditioning)
            away = branch.negative
            keys += [RowKey(branch.name, item, negative=away) for item in range(items)]
            conditioning += _for_each(own, items)
            for one in references:
                keys += [RowKey(branch.name, item, one.name, away) for item in range(items)]
                conditioning += _for_each(own if branch.negative else one.conditioning, items)
        self.rows = RowMap(tuple(keys))
        self.conditioning = Conditioning.stack(conditioning)
        self.channels = {
            role: torch.cat([self._channel(role, value, branch) for branch in branches])
            for role, value in (channels or {}).items()
        }
        beside = len(branches) * (1 + len(references))
        self.tokens = {
            role: tuple(torch.cat([one] * beside) for one in some)
            for role, some in (tokens or {}).items()
        }

    def _channel(self, role: str, canvas: Tensor, branch: Branch) -> Tensor:
        """One branch's rows of a channel: nothing of a reference is to change."""
        parts = [torch.zeros_like(canvas) if role in branch.without else canvas]
        for one in self.references:
            known = role == "masked" and one.clean is not None
            parts.append(one.clean.expand_as(canvas) if known else torch.zeros_like(canvas))  # type: ignore[union-attr]
        return torch.cat(parts)

    def __call__(self, latents: Tensor, index: int, *, scaled: bool = False) -> Tensor:
        """Predict for every item: ``(items, c, h, w)`` in, the guided raw output out.

        Args:
            scaled: the latents are as the model is to see them already.
        """
        call = self.call = self.schedule.call(index)
        beside = [one.at(call).to(latents.dtype) for one in self.references]
        rows = torch.cat([latents, *beside] * len(self.branches))
        x = ModelInput(
            latents=self.run.laid_out(rows if scaled else self.schedule.scale(rows, index)),
            timestep=self.schedule.timesteps[index],
            conditioning=self.conditioning,
            rows=self.rows,
            channels=self.channels,
            guidance=self.embedded_guidance,
            tokens=self.tokens,
        )
        output = self._predict(self._with_residuals(x, call, self.merged.residuals))
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
        acting += [part.owner for part in self.merged.beside if part.active(call)]
        self.bare = True
        if acting and bool(
            torch.isfinite(self.model.predict(self._with_residuals(x, call, ()))).all()
        ):
            owners = ", ".join(dict.fromkeys(acting))
            return PluginError(owners, "makes the denoiser's output not finite (NaN or inf)")
        return DiffeditError(
            f"the denoiser's own output is not finite in call {call.index + 1} of"
            f" {call.total}, and no edit is at fault: try dtype bfloat16 or float32"
        )

    def _with_residuals(
        self, x: ModelInput, call: Call, given: Sequence[Owned[Lead]]
    ) -> ModelInput:
        """The input, with what the model's own network adds to the canvas's rows, and these do."""
        acting = [part for part in given if part.active(call)]
        if not acting and self.lead is None:
            return x
        canvas = self.rows.canvas
        only = replace(x.only(canvas), tokens={})
        total = None if self.lead is None else self.lead(only, call)
        for part in acting:
            made = self.guard.call(
                part.owner, "residuals", part.value, only, call, lent=(only.latents, x.latents)
            )
            self._check_residuals(part.owner, made, len(canvas))
            if total is not None and not made.fits(total):
                raise PluginError(
                    part.owner, "residuals are of other shapes than others of this pass"
                )
            total = made if total is None else total + made
        assert total is not None
        return replace(x, residuals=total.spread(canvas, len(self.rows)))

    @staticmethod
    def _check_residuals(owner: str, made: object, rows: int) -> None:
        right = isinstance(made, Residuals) and all(
            len(place) == rows for place in (*made.places, *made.inside)
        )
        if not right:
            raise PluginError(owner, f"residuals must be Residuals of {rows} rows")

    def _predict(self, x: ModelInput) -> Tensor:
        try:
            if not self.model.one_by_one:
                return self.model.predict(x)
            output = torch.empty_like(x.latents)
            for rows in x.rows.apart:
                output[index_on(tuple(rows), output.device)] = self.model.predict(x.only(rows))
            return output
        except RuntimeError as error:
            foreign = [p.owner for p in self.merged.residuals]
            foreign += [p.owner for p in self.merged.attention]
            foreign += [p.owner for p in self.merged.beside]
            if exhausted(error) or not foreign:
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
        own = (qkv.q, qkv.k, qkv.v)
        for one in self.merged.beside:
            if not self.bare and one.active(self.call):
                made = self.guard.call(one.owner, "beside", one.value, qkv, site, lent=own)
                if not isinstance(made, Beside | None):
                    raise PluginError(
                        one.owner, f"beside returned {type(made).__name__}, not a Beside or None"
                    )
                qkv = qkv if made is None else qkv.plus(made)
        return qkv

    def _composed(self, predictions: Mapping[str, Tensor], call: Call) -> Mapping[str, Tensor]:
        """The predictions, those under the prompts with others' in parts of the picture."""
        made = dict(predictions)
        for name, negative in ((POSITIVE, False), (NEGATIVE, True)):
            parts = [
                (part.value.within, predictions[part.value.name])
                for part in self.merged.branches
                if part.value.within is not None
                and part.value.negative == negative
                and part.active(call)
            ]
            if parts and name in predictions:
                made[name] = composed(predictions[name], parts)
        return made

    def _combined(self, own: Mapping[str, Tensor], call: Call) -> Tensor:
        predictions = self._composed(own, call)
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
            guided = self.model.combine(predictions, self.guidance)
        terms = [
            (part.value.weight, part.value.toward, part.value.away)
            for part in self.merged.terms
            if part.active(call)
        ]
        if self.guard.diagnosing:
            for part in self.merged.terms:
                weight = torch.as_tensor(part.value.weight)
                self.guard.check_finite(part.owner, "the weight of a term", weight)
        guided = with_terms(guided, own, terms)
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


def _for_each(said: Conditioning, items: int) -> list[Conditioning]:
    """Conditioning of one row for each item."""
    return [said] * items if len(said) == 1 else [said.rows([item]) for item in range(items)]
