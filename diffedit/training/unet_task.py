"""What the trainings of a UNet, or of something added to it, have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffedit.errors import InputError
from diffedit.training import parts as models
from diffedit.training.config import Objective, Training
from diffedit.training.data import Source
from diffedit.training.denoising import Latents, kind_of, samples, scheduler_for, source
from diffedit.training.loop import Picture, Rows
from diffedit.training.optim import optimizers
from diffedit.training.parts import Parts

_Training = TypeVar("_Training", bound=Training)


class UNetTask(Generic[_Training]):
    """A task on noised latents: loads the data and the model; a subclass says what is trained.

    It sets ``latents``, calls :meth:`trains` once, and writes its ``export``.

    Attributes:
        examples: the data, which was checked before the model was loaded.
        parts: the model; all of it frozen.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    latents: Latents

    def __init__(self, training: _Training, device: torch.device) -> None:
        torch.manual_seed(training.seed + 1)
        self.training, self.device = training, device
        self.examples = self.found()
        self.parts = models.load(training.model, device)

    @property
    def digest(self) -> str:
        """Of the examples, and of what encodes them."""
        return self.latents.cache.key

    def found(self) -> Source:
        """The examples that the training names; what is wrong with them is told here."""
        return source(self.training.data, self.training.seed)

    def trains(self, modules: Mapping[str, nn.Module]) -> None:
        """Make the optimisers of ``modules``, and have the UNet checkpoint if that is asked for."""
        self.modules = modules
        if self.training.checkpointing:
            self.parts.unet.train()  # diffusers checkpoints nothing in evaluation mode
            self.parts.unet.enable_gradient_checkpointing()
        self.optimizers = optimizers(modules.values(), self.training.optimiser)

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        """Latents, noise, times, and token ids or embeddings."""
        return self.latents.batch(step, generator)

    def loss(self, rows: Rows) -> Tensor:
        """The objective's."""
        return self.latents.loss(rows, self.predict)

    def predict(self, x_t: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        """The UNet's prediction for (n, c, h, w), (n,) and (n, length, d): (n, c, h, w)."""
        made: Tensor = self.parts.unet(x_t, timestep, encoder_hidden_states=words).sample
        return made

    def validate(self) -> dict[str, float]:
        """The loss on held-out examples."""
        return self.latents.validate(self.predict)

    def pictures(self) -> list[tuple[str, Picture]]:
        """A sample of every prompt."""
        scheduler: Any = scheduler_for(self.latents.objective, self.parts.scheduler)
        return samples(self.parts, self.training.prompts, scheduler=scheduler)


def must_fit(objective: Objective, parts: Parts, model: str) -> None:
    """Make sure that what is added to a model can be used with its scheduler.

    Raises:
        InputError: the objective asks for another target than the model predicts.
    """
    asked, native = objective.target, kind_of(parts.scheduler)
    if asked not in (None, native):
        raise InputError(
            f"target {asked}: what is added to {model}, which predicts {native}, has to predict"
            " the same: leave target out"
        )
