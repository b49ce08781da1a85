"""How much memory and time a training will take, told before it starts.

What is kept throughout (weights, gradients, the optimiser's state, averages) is counted. What the
batch adds is measured: the loss itself runs forward and backward on a few examples, and both the
bytes kept for the backward pass and the seconds are extended along a straight line to the batch.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.errors import InputError

log = logging.getLogger(__name__)

Loss = Callable[[int], Tensor]
"""The scalar loss of a batch of so many examples, as the training computes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a training will take, on each device. Bytes are bytes, seconds are seconds.

    ``activation_bytes`` is what a batch's forward pass leaves for its backward pass; a
    checkpointed block's own come on top while that block is worked on. ``available_bytes`` is
    what the device has for this process, ``None`` where that cannot be told.
    """

    weights_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    ema_bytes: int
    activation_bytes: int
    total_bytes: int
    seconds_per_step: float
    seconds: float
    steps: int
    batch: int
    device: str
    available_bytes: int | None


def estimate(
    params_trained: Iterable[Tensor],
    params_frozen: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    precision: torch.dtype,
    batch: int,
    *,
    loss: Loss,
    steps: int,
    averages: int = 1,
    accumulate: int = 1,
    other_seconds: float = 0.0,
    probe: tuple[int, int] = (1, 4),
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Count and measure; neither weights, gradients nor random generators of torch are changed.

    Args:
        params_trained: what the optimisers change; gradients and averages are of its size.
        params_frozen: other weights and buffers that stay in memory.
        precision: ``loss`` runs under autocast to it, the weights stay in the format they have.
        batch: examples in one forward pass.
        loss: called with the numbers of ``probe``; larger ones than ``batch`` are cut to it.
        steps: steps still to do, of ``accumulate`` forward and backward passes each.
        averages: how many moving averages of the trained weights are kept.
        other_seconds: what a step takes besides: the optimiser, the averages, loading data.
    """
    trained, frozen = list(params_trained), list(params_frozen)
    if not trained:
        raise InputError("nothing to train: no weight is trainable")
    device = trained[0].device
    weights = _storages([*trained, *frozen])
    changing = sum(tensor.nbytes for tensor in _distinct(trained))
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    state = sum(optimizer_bytes(each) for each in optimizers)

    small, large = (max(1, min(size, batch)) for size in probe)
    # A list, even if empty: by default every CUDA device would be saved.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The first pass of a size allocates and chooses kernels, so its time tells nothing.
        measured = [
            _measure(loss, size, trained, weights, precision, clock)
            for size in (small, small, *[large] * (2 * (large != small)))
        ]
    (kept, seconds), (kept_large, seconds_large) = measured[1], measured[-1]
    kept_at_batch = _extend(small, kept, large, kept_large, batch)
    per_pass = _extend(small, seconds, large, seconds_large, batch)
    seconds_per_step = accumulate * per_pass + other_seconds
    parts = {
        "weights_bytes": sum(weights.values()),
        "optimizer_bytes": state,
        "gradient_bytes": changing,
        "ema_bytes": averages * changing,
        "activation_bytes": round(kept_at_batch),
    }
    return Estimate(
        **parts,
        total_bytes=sum(parts.values()),
        seconds_per_step=seconds_per_step,
        seconds=steps * seconds_per_step,
        steps=steps,
        batch=batch,
        device=str(device),
        available_bytes=available(device),
    )


def describe(estimate: Estimate) -> str:
    """One line of what is needed, and a second one that warns if the device has less."""
    shares = {
        "weights": estimate.weights_bytes,
        "gradients": estimate.gradient_bytes,
        "optimiser": estimate.optimizer_bytes,
        "averages": estimate.ema_bytes,
        f"activations at batch {estimate.batch}": estimate.activation_bytes,
    }
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in shares.items() if size)
    told = (
        f"needs about {_bytes(estimate.total_bytes)} ({listed}) "
        f"and {_duration(estimate.seconds)} for {estimate.steps} steps"
    )
    there = estimate.available_bytes
    if there is None or estimate.total_bytes <= there:
        return told
    return (
        f"{told}\nwarning: that is more than the {_bytes(there)} that {estimate.device} has; "
        "use a smaller batch with accumulation, gradient checkpointing or a smaller model"
    )


def available(device: torch.device) -> int | None:
    """Bytes that this process may use on ``device``: all RAM; on CUDA what is free or already its.

    ``None`` where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" and pages > 0 else None
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that ``optimizer`` holds after a step.

    An optimiser of the same class takes one step on tensors of the same shapes without memory
    (device ``meta``). One that cannot is taken to keep two numbers per weight, as Adam does.
    """
    groups = []
    for group in optimizer.param_groups:
        twins = [torch.empty_like(p, device="meta").requires_grad_() for p in group["params"]]
        for twin in twins:
            twin.grad = torch.empty_like(twin)
        groups.append({**group, "params": twins, **({"fused": None} if "fused" in group else {})})
    try:
        twin_optimizer = type(optimizer)(groups)  # type: ignore[call-arg]
        twin_optimizer.step()
    except Exception as error:
        log.info("%s: state counted as Adam's (%s)", type(optimizer).__name__, error)
        return sum(2 * twin.nbytes for group in groups for twin in group["params"])
    states = (state for per in twin_optimizer.state.values() for state in per.values())
    return sum(state.nbytes for state in states if isinstance(state, Tensor))


class _Kept:
    """A tensor in the graph; it is gone as soon as the graph lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # A saved output that knew its own node would hold the graph in a circle, for good.
        self.tensor = tensor.detach()


def _measure(
    loss: Loss,
    size: int,
    trained: list[Tensor],
    weights: dict[tuple[str, int], int],
    precision: torch.dtype,
    clock: Callable[[], float],
) -> tuple[int, float]:
    """Bytes kept for the backward pass besides the weights, and seconds of both passes."""
    device, alive = trained[0].device, weakref.WeakSet[_Kept]()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    began = _now(device, clock)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor),
        torch.autocast(device.type, precision, enabled=precision != torch.float32),
    ):
        value = loss(size)
    storages = _storages(kept.tensor for kept in alive)
    torch.autograd.grad(value, trained, allow_unused=True)
    seconds = _now(device, clock) - began
    return sum(storages[key] for key in storages.keys() - weights.keys()), seconds


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[str, int], int]:
    """Bytes by place in memory: views and tied weights share one."""
    memory = [(str(t.device), t.untyped_storage()) for t in tensors]
    return {(device, storage.data_ptr()): storage.nbytes() for device, storage in memory}


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _extend(small: int, at_small: float, large: int, at_large: float, batch: int) -> float:
    """The straight line through two measurements, at ``batch``; it never falls (time is noisy)."""
    slope = max(0.0, (at_large - at_small) / (large - small)) if large != small else 0.0
    return at_large + slope * (batch - large)


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
