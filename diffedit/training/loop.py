"""One training loop for every part of the model: seeded by step, checkpointed, interruptible.

A batch comes in parts, which run side by side in threads of one core each; their gradients are
added in the order of the parts. That is faster on a CPU than threads inside each operation, above
all where other work competes for the cores, and the sums come out the same whoever did what.

All randomness of step ``k`` comes from ``(seed, k)``, so a checkpoint needs no generator state
and a run that was stopped and resumed gives the same curve as one that was not.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffedit.training.optim import lr_factor
from diffedit.training.threads import in_parallel, one_core

log = logging.getLogger(__name__)


class Task(Protocol):
    """What is trained: its modules, its optimisers, the loss of a step and a validation."""

    modules: Mapping[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]

    def parts(self, step: int, generator: torch.Generator) -> list[Callable[[], Tensor]]:
        """Batch number ``step`` in parts, each giving its share of the scalar loss when called.

        All that is random is drawn from ``generator`` here, not when a part is called.
        """
        ...

    def rate(self, step: int) -> float:
        """What the learning rates of ``step`` are multiplied with, besides the run's own shape."""
        ...

    def validate(self, ema: Ema) -> dict[str, float]:
        """Figures on held-out data, made with the averaged weights."""
        ...


class Ema:
    """Exponential moving averages of the modules' weights, with a warm-up of the decay."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: {k: v.detach().clone() for k, v in module.state_dict().items()}
            for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        """Move towards the present weights; ``step`` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in modules.items():
            shadow = self.shadow[name]
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    shadow[key].lerp_(value, 1 - decay)
                else:
                    shadow[key].copy_(value)

    @contextmanager
    def applied(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The averaged weights stand in the modules for the time of the ``with`` block."""
        present = {
            name: {k: v.detach().clone() for k, v in module.state_dict().items()}
            for name, module in modules.items()
        }
        for name, module in modules.items():
            module.load_state_dict(self.shadow[name])
        try:
            yield
        finally:
            for name, module in modules.items():
                module.load_state_dict(present[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run goes on. ``minutes`` ends it early (and resumably); ``None`` is no limit."""

    steps: int
    seed: int = 0
    minutes: float | None = None
    decay: float = 0.25
    ema_decay: float = 0.999
    clip: float = 1.0
    log_every: int = 25
    validate_every: int = 200
    save_seconds: float = 150.0


@dataclass(slots=True)
class Report:
    """Where a run stands: the loss of every step, the seconds spent, the validations made."""

    losses: list[float] = field(default_factory=list)
    figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)


def train(task: Task, settings: Settings, checkpoint: Path, *, resume: bool) -> tuple[Report, Ema]:
    """Run ``task`` up to ``settings.steps`` steps, or until time or SIGTERM ends it.

    ``checkpoint`` is written whole or not at all, every ``save_seconds``, at SIGTERM and at the
    end. ``resume`` takes it up where it stands; without one on disk, the run starts anew.
    """
    ema = Ema(task.modules, settings.ema_decay)
    report = Report()
    base = [[group["lr"] for group in opt.param_groups] for opt in task.optimizers]
    if resume and checkpoint.exists():
        report = _load(task, ema, checkpoint)
        log.info("%s: resumed at step %d", checkpoint.stem, report.step)
    params = [p for opt in task.optimizers for group in opt.param_groups for p in group["params"]]
    began = saved = time.monotonic()
    before = report.seconds
    with _stop_on_sigterm() as stop, one_core():
        while report.step < settings.steps:
            step = report.step
            factor = task.rate(step) * lr_factor(step, settings.steps, decay=settings.decay)
            for opt, rates in zip(task.optimizers, base, strict=True):
                for group, rate in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            done = in_parallel(partial(_gradients, params), task.parts(step, generator))
            for param, *grads in zip(params, *(grads for _, grads in done), strict=True):
                param.grad = sum(grads[1:], start=grads[0])
            nn.utils.clip_grad_norm_(params, settings.clip)
            for opt in task.optimizers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            ema.update(task.modules, step)
            report.losses.append(sum(loss for loss, _ in done))
            now = time.monotonic()
            report.seconds = before + now - began
            if report.step % settings.log_every == 0:
                recent = report.losses[-settings.log_every :]
                log.info(
                    "%s: step %d  loss %.5f  %.0f s",
                    checkpoint.stem,
                    report.step,
                    sum(recent) / len(recent),
                    report.seconds,
                )
            finished = report.step >= settings.steps
            if report.step % settings.validate_every == 0 or finished:
                figures = task.validate(ema)
                report.figures.append((report.step, figures))
                log.info("%s: step %d  %s", checkpoint.stem, report.step, figures)
            out_of_time = settings.minutes is not None and now - began >= 60 * settings.minutes
            ending = finished or out_of_time or stop.is_set()
            if ending or now - saved > settings.save_seconds:
                _save(task, ema, report, checkpoint)
                saved = now
            if ending:
                break
    return report, ema


def _gradients(
    params: list[nn.Parameter], part: Callable[[], Tensor]
) -> tuple[float, tuple[Tensor, ...]]:
    loss = part()
    return float(loss.detach()), torch.autograd.grad(loss, params, materialize_grads=True)


def _save(task: Task, ema: Ema, report: Report, checkpoint: Path) -> None:
    state: dict[str, Any] = {
        "modules": {name: module.state_dict() for name, module in task.modules.items()},
        "optimizers": [opt.state_dict() for opt in task.optimizers],
        "ema": ema.shadow,
        "losses": report.losses,
        "figures": report.figures,
        "seconds": report.seconds,
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoint.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, checkpoint)


def _load(task: Task, ema: Ema, checkpoint: Path) -> Report:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for name, module in task.modules.items():
        module.load_state_dict(state["modules"][name])
        for key, value in state["ema"][name].items():
            ema.shadow[name][key].copy_(value)
    for opt, saved in zip(task.optimizers, state["optimizers"], strict=True):
        opt.load_state_dict(saved)
    return Report(state["losses"], state["figures"], state["seconds"])


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the step under way ends and a checkpoint is written."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
