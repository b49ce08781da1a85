"""Runs a training file: its stages one after another, each resumable, each with its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffedit.errors import InputError
from diffedit.training import config
from diffedit.training.config import Training
from diffedit.training.estimate import describe, estimate
from diffedit.training.loop import Task, accelerator, part_count, train
from diffedit.training.parts import Parts
from diffedit.training.precision import resolve
from diffedit.training.threads import cores, one_core

log = logging.getLogger(__name__)

RESULT = "model"
"""The folder below a training's ``out`` that takes what was made."""


def build(training: Training, device: torch.device) -> Task:
    """The task of a training; its data is checked before a model is loaded.

    Raises:
        InputError: the data or the model is not what it should be, or a library is missing.
    """
    try:
        return _task(training, device)
    except ModuleNotFoundError as error:
        raise InputError(
            f"training {training.train} needs {error.name}, install it with"
            " pip install 'diffedit[train]'"
        ) from error


def _task(training: Training, device: torch.device) -> Task:
    # Imported as they are needed: each pulls in other parts of diffusers and transformers.
    if isinstance(training, config.AutoencoderTraining):
        from diffedit.training.autoencoder import AutoencoderTask

        return AutoencoderTask(training, device)
    if isinstance(training, config.DenoiserTraining):
        from diffedit.training.denoiser import DenoiserTask

        return DenoiserTask(training, device)
    if isinstance(training, config.ControlNetTraining):
        from diffedit.training.control import ControlNetTask

        return ControlNetTask(training, device)
    if isinstance(training, config.LoraTraining):
        from diffedit.training.lora import LoraTask

        return LoraTask(training, device)
    if isinstance(training, config.InversionTraining):
        from diffedit.training.inversion import InversionTask

        return InversionTask(training, device)
    if isinstance(training, config.DistillTraining):
        from diffedit.training.distill import ConsistencyTask, GuidanceTask

        methods = {"consistency": ConsistencyTask, "guidance": GuidanceTask}
        return methods[training.method](training, device)
    raise InputError(f"train is {training.train!r}, should be one of {', '.join(config.KINDS)}")


def run(
    trainings: Sequence[Training],
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = log.info,
) -> bool:
    """Run every stage that is not finished. Returns whether all are.

    Args:
        resume: go on where an earlier run stopped, skipping finished stages.
        max_minutes: stop, resumably, after this long.
        dry_run: only say what the first unfinished stage needs.
        say: told in one line what a stage needs, and where its result is.
    """
    until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    for number, training in enumerate(trainings):
        title = f"stage {number + 1} of {len(trainings)}: " if len(trainings) > 1 else ""
        done = training.out / RESULT
        if done.exists():
            if not resume:
                raise InputError(f"{done} is there already: go on with --resume, or move it away")
            say(f"{title}{done} is finished")
            continue
        left = None if until is None else (until - time.monotonic()) / 60
        if left is not None and left <= 0:
            return False
        if not _stage(training, title, resume, left, dry_run, say):
            return False
    return True


def _stage(
    training: Training,
    title: str,
    resume: bool,
    max_minutes: float | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> bool:
    machine = accelerator(training)
    with machine.main_process_first():
        task = build(training, machine.device)
    if machine.is_main_process:
        say(f"{title}training {training.train} {told(task, training, machine)}")
    if dry_run:
        return False
    report = train(task, training, machine, resume=resume, max_minutes=max_minutes)
    if not report.finished:
        say(f"{title}stopped after step {report.step} of {training.steps}; go on with --resume")
        return False
    if machine.is_main_process:
        task.export(training.out / RESULT)
        say(f"{title}{training.out / RESULT} holds the result of {report.step} steps")
    machine.wait_for_everyone()
    return True


def told(task: Task, training: Training, machine: Accelerator) -> str:
    """What memory and time the training will take, measured on a small batch."""
    generator = torch.Generator().manual_seed(training.seed)
    rows = task.batch(0, generator)

    def loss(size: int) -> Tensor:
        return task.loss({name: value[:size] for name, value in rows.items()})

    on_cpu = machine.device.type == "cpu"
    share = max(1, training.batch // (training.accumulate * machine.num_processes))
    # On a CPU each core works on parts of the batch, as `loop` deals them.
    parts = part_count(share) if on_cpu else 1
    at_once = min(cores(), parts) if on_cpu else 1
    with one_core() if on_cpu else nullcontext():
        made = estimate(
            chain.from_iterable(
                group["params"] for opt in task.optimizers for group in opt.param_groups
            ),
            chain.from_iterable(network.parameters() for network in _networks(task)),
            task.optimizers,
            resolve(training.precision, machine.device),
            -(-share // parts),
            loss=loss,
            steps=training.steps,
            averages=0 if training.ema is training.ema_width is None else 1,
            accumulate=training.accumulate * -(-parts // at_once),
        )
    more = (at_once - 1) * made.activation_bytes
    return describe(
        replace(
            made,
            batch=share,
            activation_bytes=made.activation_bytes + more,
            total_bytes=made.total_bytes + more,
        )
    )


def _networks(task: Task) -> Iterator[nn.Module]:
    """All that a task holds in memory: what it trains, and the model that it trains it for."""
    held = [*task.modules.values(), *vars(task).values()]
    for one in held:
        yield from (one,) if isinstance(one, nn.Module) else ()
        if isinstance(one, Parts):
            yield from (one.vae, one.text_encoder, one.unet)
