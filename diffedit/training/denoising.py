"""What all trainings of a denoiser share: latents, noise, targets, weights, validation, samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from diffedit.errors import InputError
from diffedit.training import losses, timesteps
from diffedit.training.cache import LatentCache
from diffedit.training.config import Data, Objective, Training
from diffedit.training.data import Captioned, Folder, Source, Views, check, split
from diffedit.training.loop import Rows
from diffedit.training.parts import Parts
from diffedit.training.process import Kind, Process, RectifiedFlow, scaled
from diffedit.training.world.source import Drawn

log = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, timestep, text embeddings) -> prediction."""

_LOSSES = {"mse": losses.mse, "l1": losses.l1, "huber": losses.huber}


def source(data: Data, seed: int) -> Source:
    """The examples that a training file names, checked as far as that goes without reading all."""
    if data.world is not None:
        said = {data.world: 1.0} if isinstance(data.world, str) else data.world
        shares = {str(name): share for name, share in said.items()}
        return Drawn(shares, data.count, data.side, seed=seed, first=data.first, style=data.style)
    crop: Literal["random", "centre"] = "random" if data.views > 1 else "centre"
    views = Views(data.views, crop=crop, zoom=1.25 if data.views > 1 else 1.0, flip=data.flip)
    if data.captions is not None:
        return check(Captioned(data.captions, data.side, views=views))
    assert data.folder is not None
    return check(Folder(data.folder, data.side, data.caption, views=views))


class Latents:
    """Examples as batches of noised latents, and what a prediction for them is worth.

    Args:
        training: whose batches these are.
        objective: what is asked, and how an error counts.
        parts: the model; its autoencoder encodes every picture once.
        examples: the pictures with their captions, and hints where those are wanted.
        embeddings: whether the text encoder is frozen, so that embeddings can be kept too.
        phrases: how many phrases of each caption come with where they stand.
    """

    def __init__(
        self,
        training: Training,
        objective: Objective,
        parts: Parts,
        examples: Source,
        *,
        embeddings: bool,
        phrases: int = 0,
    ) -> None:
        self.training, self.objective, self.parts = training, objective, parts
        self.process, self.kind = _process(objective, parts.scheduler)
        held_out = min(training.data.held_out, len(examples) // 4)
        rest, held = split(examples, held_out, training.seed)
        folder = training.out.parent / ".latents"
        options: dict[str, Any] = {
            "tokenizer": parts.tokenizer,
            "text_encoder": parts.text_encoder if embeddings else None,
            "phrases": phrases,
        }
        self.cache = LatentCache(folder, rest, parts.vae, **options)
        self.cache.ensure()
        self.held = LatentCache(folder, held, parts.vae, **options) if len(held) else None
        if self.held is not None:
            self.held.ensure()
        self.device = next(parts.unet.parameters()).device
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        """Batch number ``step``: every example comes once before any comes again."""
        size = self.training.batch
        places = range(step * size, (step + 1) * size)
        indices = [self._at(place) for place in places]
        return self._rows(self.cache, indices, generator, self.objective.dropout)

    def _at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.cache))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.training.seed * 7_919 + epoch)
            self._order = (epoch, torch.randperm(len(self.cache), generator=generator))
        return int(self._order[1][position])

    def _rows(
        self,
        cache: LatentCache,
        indices: list[int],
        generator: torch.Generator,
        dropout: float,
    ) -> Rows:
        found, size = cache.rows(indices), len(indices)
        rows = {
            "latents": found.latents,
            "noise": torch.randn(found.latents.shape, generator=generator),
            "time": self.process.at(self._levels(size, generator)),
        }
        dropped = torch.rand(size, generator=generator) < dropout
        tokens, embeddings = cache.empty()
        if found.embeddings is not None and embeddings is not None:
            rows["embeddings"] = torch.where(dropped.view(-1, 1, 1), embeddings, found.embeddings)
        elif found.tokens is not None and tokens is not None:
            rows["tokens"] = torch.where(dropped.view(-1, 1), tokens, found.tokens)
        if found.weights is not None:
            backdrop = self.objective.backdrop
            rows["where"] = backdrop + (1 - backdrop) * found.weights
        if found.hints is not None:
            rows["hints"] = found.hints
        if found.phrases is not None and found.spans is not None:
            rows["phrases"] = found.phrases
            rows["spans"] = found.spans * ~dropped.view(-1, 1, 1)
        return rows

    def _levels(self, size: int, generator: torch.Generator) -> Tensor:
        objective = self.objective
        if objective.focus is not None:
            low, high, share = objective.focus
            return timesteps.focused(size, generator, (low, high), share)
        draw = {
            "uniform": timesteps.uniform,
            "stratified": timesteps.stratified,
            "logit_normal": timesteps.logit_normal,
        }[objective.timesteps]
        return draw(size, generator)

    def words(self, rows: Rows) -> Tensor:
        """Text embeddings (n, length, d) of a batch."""
        if "embeddings" in rows:
            return rows["embeddings"].to(self.device)
        encoded = self.parts.text_encoder(rows["tokens"].to(self.device))
        made: Tensor = encoded.last_hidden_state
        return made

    def noised(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """x_t and the timesteps that a model reads, on the device."""
        latents, noise = rows["latents"].to(self.device), rows["noise"].to(self.device)
        x_t = self.process.noised(latents, noise, rows["time"])
        return x_t, self.process.timestep(rows["time"]).to(self.device)

    def errors(self, rows: Rows, predict: Predict) -> Tensor:
        """The error of each prediction, (n,), unweighted over noise levels."""
        x_t, timestep = self.noised(rows)
        predicted = predict(x_t, timestep, self.words(rows))
        latents, noise = rows["latents"].to(self.device), rows["noise"].to(self.device)
        target = self.process.target(self.kind, latents, noise, rows["time"])
        where = rows["where"].unsqueeze(1).to(self.device) if "where" in rows else None
        return _LOSSES[self.objective.loss](predicted, target, where=where)

    def loss(self, rows: Rows, predict: Predict) -> Tensor:
        """The weighted mean of :meth:`errors`."""
        errors = self.errors(rows, predict)
        if self.objective.gamma is not None:
            errors = scaled(self._weights(rows, self.objective.floor), errors)
        return errors.mean()

    def _weights(self, rows: Rows, floor: float) -> Tensor:
        snr = self.process.snr(rows["time"])
        return losses.min_snr(self.kind, snr, gamma=self.objective.gamma or 5.0, floor=floor)

    def validate(self, predict: Predict) -> dict[str, float]:
        """The weighted loss on held-out examples, at fixed noise and evenly spread levels."""
        if self.held is None:
            return {}
        return {"validation loss": self.held_loss(lambda rows: predict)}

    @torch.no_grad()
    def held_loss(self, predict: Callable[[Rows], Predict]) -> float:
        """The loss of :meth:`validate`, of predictions that may depend on a batch's other rows."""
        assert self.held is not None
        errors = [
            scaled(self._weights(rows, 0.0), self.errors(rows, predict(rows)))
            for rows in self.held_rows()
        ]
        return float(torch.cat(errors).mean())

    def held_rows(self) -> Iterator[Rows]:
        """The held-out examples in batches, at fixed noise and evenly spread levels."""
        if self.held is None:
            return
        count = len(self.held)
        generator = torch.Generator().manual_seed(1)
        levels = timesteps.stratified(count, generator)
        levels = levels[torch.randperm(count, generator=generator)]
        for indices in torch.arange(count).split(16):
            rows = dict(self._rows(self.held, indices.tolist(), generator, 0.0))
            rows["time"] = self.process.at(levels[indices])
            rows.pop("where", None)
            yield rows


def kind_of(scheduler: Any) -> Kind:
    """What a model predicts that this scheduler samples."""
    if hasattr(scheduler, "scale_noise"):  # flow matching, whose schedulers do not say it
        return "flow_prediction"
    kind: Kind = scheduler.config.get("prediction_type", "epsilon")
    return kind


def _process(objective: Objective, scheduler: Any) -> tuple[Process, Kind]:
    kind: Kind = objective.target or kind_of(scheduler)
    if objective.target == "flow_prediction":
        return RectifiedFlow(objective.shift), kind
    process = Process.of(scheduler)
    if isinstance(process, RectifiedFlow) and kind != "flow_prediction":
        raise InputError(f"target {kind}: the model is a flow, its target is flow_prediction")
    if kind == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
        raise InputError(
            "target epsilon says nothing where the schedule has no signal left: take v_prediction"
        )
    return process, kind


def scheduler_for(objective: Objective, scheduler: Any) -> Any:
    """The scheduler that samples what was trained, with ``StableDiffusionPipeline`` too."""
    process, kind = _process(objective, scheduler)
    if isinstance(process, RectifiedFlow):
        # That pipeline cannot use FlowMatchEulerDiscreteScheduler, which says no init_noise_sigma.
        return DPMSolverMultistepScheduler(
            num_train_timesteps=process.steps,
            prediction_type=kind,
            use_flow_sigmas=True,
            flow_shift=process.shift,
        )
    if kind == kind_of(scheduler):
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type=kind)


@torch.no_grad()
def samples(
    parts: Parts,
    prompts: tuple[str, ...],
    *,
    scheduler: Any = None,
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """A picture of each prompt, by diffusers' own pipeline: (title, (h, w, 3) uint8)."""
    if not prompts:
        return []
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=scheduler or parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for prompt in prompts:
        image = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        made.append((prompt, np.asarray(image)))
    return made


def save_settings(folder: Path, values: Mapping[str, Any]) -> None:
    """A small JSON beside a result: what it belongs to."""
    import json

    (folder / "diffedit.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
