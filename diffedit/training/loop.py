"""One loop for every training: seeded by step, checkpointed, stoppable anywhere, on any devices.

All randomness of step ``k`` comes from ``(seed, k)`` and is drawn for the whole batch before the
batch is divided. So a checkpoint needs no generator state, a run that was stopped and resumed gives
the curve of one that was not, and dividing a batch otherwise (more devices, more accumulation,
threads) changes nothing but the order in which floats are added.

On a CPU the parts of a batch run side by side in threads of one core each; see ``threads.py``.
Devices, mixed precision and processes are accelerate's. Gradients are summed over processes once
per step, as one tensor.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn

from diffedit.errors import InputError, OutputError
from diffedit.training.config import Training
from diffedit.training.ema import Constant, Ema, Power
from diffedit.training.files import whole_file
from diffedit.training.logbook import Logbook
from diffedit.training.optim import lr_factor
from diffedit.training.precision import resolve
from diffedit.training.threads import cores, in_parallel, keep_memory, one_core, shares

log = logging.getLogger(__name__)

Rows: TypeAlias = Mapping[str, Tensor]
"""A batch: named tensors, all with one row per example."""

Picture: TypeAlias = Any
"""(h, w, 3) uint8."""


_PIECE = 8
"""Rows that one core takes at a time: more of them fall out of its cache."""


class Task(Protocol):
    """What is trained. ``modules`` are kept in checkpoints and averaged."""

    modules: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]

    @property
    def digest(self) -> str:
        """Of the examples, as they are learned from."""
        ...

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        """Batch number ``step``, on the CPU. All that is random is drawn here."""
        ...

    def loss(self, rows: Rows) -> Tensor:
        """The mean loss of some rows of a batch, a scalar. Called under autocast, in any thread."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures on held-out data. The averaged weights stand in the modules."""
        ...

    def pictures(self) -> list[tuple[str, Picture]]:
        """Samples with their titles. The averaged weights stand in the modules."""
        ...

    def export(self, folder: Path) -> None:
        """Write the result; after training the averaged weights stand in the modules."""
        ...


class NotFinite(InputError):
    """The loss became infinite or not a number; the last good state is kept."""


@dataclass(slots=True)
class Report:
    """Where a run stands: the loss of every step, the seconds spent, whether it is finished."""

    losses: list[float] = field(default_factory=list)
    figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)


def accelerator(training: Training) -> Accelerator:
    """The devices and the number format of a training."""
    device = training.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve(training.precision, device)
    mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    # accelerate keeps a process to the first format it is asked for; stages may have others.
    AcceleratorState._reset_state()
    # Threads share the weights; a cache of their casts would not be theirs alone.
    return Accelerator(
        mixed_precision=mixed,
        cpu=device == "cpu",
        kwargs_handlers=[AutocastKwargs(cache_enabled=device != "cpu")],
    )


def train(
    task: Task,
    training: Training,
    machine: Accelerator,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    plan: Callable[[int], float] | None = None,
) -> Report:
    """Run ``task`` to its last step, or until time or SIGTERM ends it, resumably.

    ``training.out`` takes ``checkpoint.pt`` (whole or not at all, every ``save_minutes``, at
    SIGTERM and at the end), ``log.jsonl``, ``curve.png``, ``index.html`` and sample grids.

    Args:
        resume: go on from the checkpoint, if there is one.
        max_minutes: stop, resumably, after this long.
        plan: what the learning rate of a step is multiplied with, besides warm-up and decay.

    Raises:
        InputError: a checkpoint of another training, or one that is not to be overwritten.
        NotFinite: the loss is not a number; the state before that step is kept.
        OutputError: the last checkpoint cannot be written.
    """
    checkpoint = training.out / "checkpoint.pt"
    ema = Ema(task.modules, _decay(training))
    report = Report()
    if checkpoint.exists():
        if not resume:
            raise InputError(
                f"{checkpoint} is there already: go on with --resume, or name another 'out'"
            )
        report = _load(task, ema, checkpoint, training, aloud=machine.is_main_process)
        log.info("resumed at step %d", report.step)
    loop = _Loop(task, training, machine, ema, report, plan)
    book = Logbook(
        training.out,
        step=report.step,
        steps=training.steps,
        settings=training.model_dump(mode="json", exclude_unset=True),
        active=machine.is_main_process,
    )
    on_cpu = machine.device.type == "cpu"
    if on_cpu:
        keep_memory()
    with book, one_core() if on_cpu else nullcontext():
        loop.run(book, checkpoint, max_minutes)
    for name, module in task.modules.items():
        module.load_state_dict(ema.shadow[name])
    return report


def _decay(training: Training) -> Callable[[int], float]:
    if training.ema_width is not None:
        return Power.of_width(training.ema_width)
    # A decay of 0 is no average: the shadow is the present weights.
    return Constant(training.ema) if training.ema is not None else lambda step: 0.0


class _Loop:
    def __init__(
        self,
        task: Task,
        training: Training,
        machine: Accelerator,
        ema: Ema,
        report: Report,
        plan: Callable[[int], float] | None,
    ) -> None:
        self.task, self.training, self.machine = task, training, machine
        self.ema, self.report, self.plan = ema, report, plan or (lambda step: 1.0)
        self.base = [[group["lr"] for group in opt.param_groups] for opt in task.optimizers]
        self.params: list[nn.Parameter] = [
            p for opt in task.optimizers for group in opt.param_groups for p in group["params"]
        ]

    def run(self, logbook: Logbook, checkpoint: Path, max_minutes: float | None) -> None:
        training, report, task = self.training, self.report, self.task
        began = saved = time.monotonic()
        before = report.seconds
        with _stop_on_sigterm() as stop:
            while report.step < training.steps:
                try:
                    loss, rate = self.step(report.step)
                except NotFinite:
                    self.save(checkpoint, last=True)
                    raise
                report.losses.append(loss)
                now = time.monotonic()
                report.seconds = before + now - began
                logbook.step(report.step, loss, rate, training.batch)
                finished = report.step >= training.steps
                if report.step % training.validate_every == 0 or finished:
                    with self.ema.applied(task.modules):
                        figures = task.validate()
                    report.figures.append((report.step, figures))
                    logbook.figures(report.step, figures)
                if report.step % training.sample_every == 0 or finished:
                    with self.ema.applied(task.modules):
                        pictures = task.pictures()
                    if pictures:
                        logbook.pictures(report.step, pictures)
                out_of_time = max_minutes is not None and now - began >= 60 * max_minutes
                ending = self.any(finished or out_of_time or stop.is_set())
                if ending or now - saved >= 60 * training.save_minutes:
                    self.save(checkpoint, last=ending)
                    saved = time.monotonic()
                if ending:
                    break
        report.finished = report.step >= training.steps

    def step(self, step: int) -> tuple[float, float]:
        """One update: the loss of the whole batch, and the first learning rate."""
        training, machine = self.training, self.machine
        shape = training.optimiser
        factor = self.plan(step) * lr_factor(step, training.steps, shape.warmup, shape.decay)
        for opt, rates in zip(self.task.optimizers, self.base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
        rows = self.task.batch(step, generator)
        mine = {k: v[machine.process_index :: machine.num_processes] for k, v in rows.items()}
        total = _count(rows)
        loss = torch.zeros((), device=machine.device, dtype=torch.float64)
        for micro in _dealt(mine, training.accumulate):
            loss += self.gradients(micro, total)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        if machine.num_processes > 1:
            flat = machine.reduce(nn.utils.parameters_to_vector(grads), "sum")
            loss = machine.reduce(loss.float(), "sum").double()
            nn.utils.vector_to_parameters(flat, grads)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        scaler = machine.scaler
        if scaler is not None:
            for opt in self.task.optimizers:
                scaler.unscale_(opt)
        norm = self.clip(shape.clip)
        value = float(loss)
        # A scaler meets infinite gradients by skipping the step and scaling less.
        if not math.isfinite(value) or (scaler is None and not math.isfinite(float(norm))):
            self.clear()
            what = "loss" if not math.isfinite(value) else "gradient"
            raise NotFinite(
                f"the {what} of step {step + 1} is not finite ({value:g}); the state before it is "
                f"kept in {training.out}: lower the rate (now {self.base[0][0] * factor:.3g})"
                " or take fp32"
            )
        for opt in self.task.optimizers:
            if scaler is not None:
                scaler.step(opt)
            else:
                opt.step()
        if scaler is not None:
            scaler.update()
        self.clear()
        self.ema.update(self.task.modules, step)
        return value, self.base[0][0] * factor

    def gradients(self, rows: Rows, total: int) -> Tensor:
        """Add the gradients of some rows, their share of ``total``; the rows' share of the loss."""
        on_cpu = self.machine.device.type == "cpu"
        parts = _dealt(rows, part_count(_count(rows)) if on_cpu else 1)
        if len(parts) == 1:
            loss = self.share(parts[0], total)
            (self.machine.scaler.scale(loss) if self.machine.scaler else loss).backward()
            return loss.detach().double()
        done = in_parallel(partial(self.part, total=total), parts)
        columns = list(zip(self.params, *(grads for _, grads in done), strict=True))
        in_parallel(_add, shares(columns, lambda column: column[0].numel()))
        return sum((loss for loss, _ in done[1:]), start=done[0][0])

    def part(self, rows: Rows, total: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.share(rows, total)
        grads = torch.autograd.grad(loss, self.params, materialize_grads=True)
        return loss.detach().double(), grads

    def share(self, rows: Rows, total: int) -> Tensor:
        with self.machine.autocast() if self.machine.mixed_precision != "no" else nullcontext():
            loss = self.task.loss(rows)
        return loss * (_count(rows) / total)

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to a norm of ``most``; the norm they had."""
        if self.machine.device.type != "cpu":
            had: Tensor = nn.utils.clip_grad_norm_(self.params, most)
            return had
        dealt = shares(self.params, nn.Parameter.numel)
        norms = in_parallel(_norm, dealt)
        norm: Tensor = torch.stack(norms).norm()
        if not norm + 1e-6 <= most:  # else torch would multiply all of them by 1
            in_parallel(partial(_clip, most=most, norm=norm), dealt)
        return norm

    def clear(self) -> None:
        for param in self.params:
            param.grad = None

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all stop at the same step."""
        if self.machine.num_processes == 1:
            return flag
        said = self.machine.reduce(torch.tensor(float(flag), device=self.machine.device), "sum")
        return bool(said > 0)

    def save(self, checkpoint: Path, *, last: bool) -> None:
        """Write the checkpoint; if that fails on the way, training goes on with a warning."""
        if not self.machine.is_main_process:
            return
        try:
            _save(self.task, self.ema, self.report, checkpoint, self.training)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the disk says
            kept = "the one before it is kept" if checkpoint.exists() else "there is none yet"
            said = getattr(error, "strerror", None) or str(error).splitlines()[0]
            message = f"{checkpoint}: the checkpoint of step {self.report.step} cannot be written"
            message = f"{message} ({said}); {kept}"
            if last:
                raise OutputError(message) from error
            log.warning("%s; training goes on", message)


def _add(columns: Sequence[tuple[nn.Parameter, ...]]) -> None:
    """Each parameter's gradient, as the sum of those that stand beside it."""
    for param, *grads in columns:
        added = sum(grads[1:], start=grads[0])
        param.grad = added if param.grad is None else param.grad + added


def _norm(params: Sequence[nn.Parameter]) -> Tensor:
    norm: Tensor = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm


def _clip(params: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
    nn.utils.clip_grads_with_norm_(params, most, norm)


def part_count(rows: int) -> int:
    """Into how many parts so many rows are dealt on a CPU, for one core each."""
    return min(rows, max(cores(), -(-rows // _PIECE)))


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _dealt(rows: Rows, count: int) -> list[Rows]:
    """Rows dealt out like cards, so that each hand sees the whole range of a sorted batch."""
    hands = range(min(count, _count(rows)))
    return [{k: v[hand :: len(hands)] for k, v in rows.items()} for hand in hands]


def _save(task: Task, ema: Ema, report: Report, checkpoint: Path, training: Training) -> None:
    state: dict[str, Any] = {
        "training": training.model_dump(mode="json"),
        "examples": task.digest,
        "modules": {name: module.state_dict() for name, module in task.modules.items()},
        "optimizers": [opt.state_dict() for opt in task.optimizers],
        "ema": ema.shadow,
        "losses": report.losses,
        "figures": report.figures,
        "seconds": report.seconds,
    }
    with whole_file(checkpoint) as file:
        torch.save(state, file)


def _load(task: Task, ema: Ema, checkpoint: Path, training: Training, *, aloud: bool) -> Report:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        made_with = state["training"]
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{checkpoint} cannot be read as a checkpoint ({said})") from None
    differing = _differences(made_with, training.model_dump(mode="json"), training.FREE)
    if differing:
        raise InputError(
            f"{checkpoint} is of another training ({'; '.join(differing)}): put it back, or name"
            " another 'out'"
        )
    rates = [[group["lr"] for group in opt.param_groups] for opt in task.optimizers]
    try:
        for name, module in task.modules.items():
            module.load_state_dict(state["modules"][name])
            for key, value in state["ema"][name].items():
                ema.shadow[name][key].copy_(value)
        for opt, saved in zip(task.optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError):
        # With the same settings: the model or the data that they name has become another one.
        raise InputError(
            f"{checkpoint} has weights of other shapes: the model or the words of the data are no"
            " longer those it was begun with; bring them back, or name another 'out'"
        ) from None
    if aloud and state.get("examples", task.digest) != task.digest:
        # Not refused: somebody may have taken a spoilt picture out, hours after the start.
        log.warning(
            "%s: its data, or what encodes them, are others than at its start (files of more than"
            " 256 MiB in all are known by their times): it goes on with the present ones",
            checkpoint,
        )
    for opt, own in zip(task.optimizers, rates, strict=True):
        # The checkpoint has the rates of its step, warmed up or decayed.
        for group, rate in zip(opt.param_groups, own, strict=True):
            group["lr"] = rate
    return Report(list(state["losses"]), list(state["figures"]), state["seconds"])


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], free: frozenset[str], prefix: str = ""
) -> list[str]:
    """``"batch is 8, was 16"`` for each setting that differs."""
    found = []
    for key in sorted({*there, *here} - free):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, frozenset(), f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {new!r}, was {old!r}")
    return found


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
