"""Byte counts against arithmetic by hand, seconds against a clock that is told what to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffedit.errors import InputError
from diffedit.training import loop, stages
from diffedit.training.config import LoraTraining
from diffedit.training.estimate import (
    Estimate,
    _bytes,
    available,
    describe,
    estimate,
    optimizer_bytes,
)
from diffedit.training.loop import accelerator
from diffedit.training.optim import Muon
from diffedit.training.stages import build

FP32 = torch.float32


class Clock:
    """Shows the seconds that were put on it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _estimate(
    module: nn.Module, loss: Callable[[int], Tensor], batch: int, **options: Any
) -> Estimate:
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(module.parameters())
    precision = options.pop("precision", FP32)
    options = {"steps": 10, **options}
    return estimate(module.parameters(), (), optimizer, precision, batch, loss=loss, **options)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


# -- what is counted -----------------------------------------------------------------------------


def test_weights_gradients_averages_and_state_are_counted() -> None:
    mlp, frozen = _mlp(), nn.Linear(100, 7).to(torch.bfloat16)
    weights = (8 * 32 + 32 + 32 * 4 + 4) * 4
    made = estimate(
        mlp.parameters(),
        frozen.parameters(),
        torch.optim.AdamW(mlp.parameters()),
        FP32,
        4,
        loss=lambda n: mlp(torch.ones(n, 8)).sum(),
        steps=1,
        averages=2,
    )
    assert made.weights_bytes == weights + (100 * 7 + 7) * 2
    assert made.gradient_bytes == weights
    assert made.ema_bytes == 2 * weights
    assert made.optimizer_bytes == 2 * weights + 4 * 4  # two moments, one step count per tensor
    counted = made.weights_bytes + made.gradient_bytes + made.ema_bytes + made.optimizer_bytes
    assert made.total_bytes == counted + made.activation_bytes


def test_tied_weights_are_counted_once() -> None:
    embedding = nn.Embedding(50, 8)
    head = nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    params = [embedding.weight, head.weight]
    made = estimate(
        params,
        [embedding.weight[:10]],
        torch.optim.SGD([embedding.weight]),
        FP32,
        1,
        loss=lambda n: head(embedding(torch.zeros(n, dtype=torch.long))).sum(),
        steps=1,
    )
    assert made.weights_bytes == made.gradient_bytes == 50 * 8 * 4


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
    ],
)
def test_optimizer_state_is_what_a_real_step_leaves(
    make: Callable[[Any], torch.optim.Optimizer], numbers: int
) -> None:
    mlp = _mlp()
    optimizer = make(mlp.parameters())
    foreseen = optimizer_bytes(optimizer)
    assert not optimizer.state
    mlp(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    left = [v for state in optimizer.state.values() for v in state.values()]
    assert foreseen == sum(v.nbytes for v in left if isinstance(v, Tensor))
    weights = sum(p.nbytes for p in mlp.parameters())
    assert foreseen == pytest.approx(numbers * weights, abs=16)


def test_muon_keeps_one_number_for_a_weight() -> None:
    module = nn.Sequential(nn.Conv2d(4, 16, 3, bias=False), nn.Conv2d(16, 8, 3, bias=False))
    foreseen = optimizer_bytes(Muon(module.parameters(), lr=1e-3))
    assert foreseen == 4 * (4 * 16 * 9 + 16 * 8 * 9)


def test_an_optimizer_that_needs_real_memory_counts_as_adam() -> None:
    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError("no meta tensors here")

    mlp = _mlp()
    weights = sum(p.nbytes for p in mlp.parameters())
    assert optimizer_bytes(Stubborn(mlp.parameters())) == 2 * weights


# -- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_activations_of_an_mlp_by_hand(batch: int) -> None:
    mlp = _mlp()
    made = _estimate(mlp, lambda n: mlp(torch.ones(n, 8)).square().sum(), batch)
    # The first layer keeps its input, tanh its output, which is the second layer's input too
    # (one storage), and the square keeps the second layer's output. The weights are no activations.
    assert made.activation_bytes == batch * (8 + 32 + 4) * 4


def test_what_no_batch_enlarges_is_not_multiplied() -> None:
    mlp, table = _mlp(), torch.ones(1, 1000)
    weight = nn.Parameter(torch.ones(1, 1000))
    modules = nn.ParameterList([*mlp.parameters(), weight])
    made = _estimate(
        modules, lambda n: mlp(torch.ones(n, 8)).square().sum() + (table * weight).sum(), 100
    )
    assert made.activation_bytes == 100 * (8 + 32 + 4) * 4 + 4 * 1000


def test_a_graph_that_is_dropped_is_not_counted() -> None:
    mlp = _mlp()

    def loss(n: int) -> Tensor:
        for _ in range(5):
            mlp(torch.ones(n, 8)).square().sum()
        made: Tensor = mlp(torch.ones(n, 8)).square().sum()
        return made

    assert _estimate(mlp, loss, 4).activation_bytes == 4 * (8 + 32 + 4) * 4


def test_checkpointing_keeps_only_the_blocks_inputs() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)) for _ in range(4))

    def loss(n: int, *, checkpointed: bool) -> Tensor:
        x = torch.ones(n, 16)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x.sum()

    plain = _estimate(blocks, lambda n: loss(n, checkpointed=False), 32)
    spared = _estimate(blocks, lambda n: loss(n, checkpointed=True), 32)
    assert plain.activation_bytes == 32 * 4 * (16 + 64) * 4
    assert spared.activation_bytes == 32 * 4 * 16 * 4
    assert spared.weights_bytes == plain.weights_bytes


def test_precision_halves_what_is_kept() -> None:
    mlp = _mlp()
    made = _estimate(mlp, lambda n: mlp(torch.ones(n, 8)).sum(), 1000, precision=torch.bfloat16)
    # Inputs of both layers in bf16 (tanh runs in bf16 too), and copies of the weights in bf16.
    assert made.activation_bytes == 1000 * (8 + 32) * 2 + (32 * 4) * 2


@pytest.mark.parametrize(("batch", "per_step"), [(1, 5.0), (4, 11.0), (32, 67.0)])
def test_seconds_follow_the_line_through_two_batches(batch: int, per_step: float) -> None:
    clock, mlp = Clock(), _mlp()
    asked: list[int] = []

    def loss(n: int) -> Tensor:
        # The first pass of every size is slow, as it is.
        clock.seconds += 3 + 2 * n + 1000 * (n not in asked)
        asked.append(n)
        made: Tensor = mlp(torch.ones(n, 8)).sum()
        return made

    made = _estimate(mlp, loss, batch, steps=10, clock=clock)
    assert made.seconds_per_step == pytest.approx(per_step)
    assert made.seconds == pytest.approx(10 * per_step)
    assert asked == ([1, 1] if batch == 1 else [1, 1, 4, 4])


def test_seconds_of_accumulation_and_of_all_else() -> None:
    clock, mlp = Clock(), _mlp()

    def loss(n: int) -> Tensor:
        clock.seconds += n
        made: Tensor = mlp(torch.ones(n, 8)).sum()
        return made

    made = _estimate(mlp, loss, 8, clock=clock, accumulate=3, other_seconds=0.5)
    assert made.seconds_per_step == pytest.approx(3 * 8 + 0.5)


def test_the_backward_pass_is_timed_and_noise_never_makes_large_batches_cheaper() -> None:
    clock = Clock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            clock.seconds += 7 if len(grads[0]) == 1 else 5
            return grads[0]

    mlp = _mlp()
    made = _estimate(mlp, lambda n: Slow.apply(mlp(torch.ones(n, 8))).sum(), 100, clock=clock)
    assert made.seconds_per_step == 5


def test_nothing_is_changed_by_estimating() -> None:
    mlp = nn.Sequential(_mlp(), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in mlp.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _estimate(mlp, lambda n: mlp(torch.randn(n, 8)).sum(), 8)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())
    assert all(p.grad is None for p in mlp.parameters())


def test_nothing_to_train_is_told() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(InputError, match="nothing to train"):
        estimate([], [], optimizer, FP32, 1, loss=lambda n: torch.zeros(()), steps=1)


# -- what is told --------------------------------------------------------------------------------

MADE = Estimate(
    weights_bytes=46_000_000,
    optimizer_bytes=92_000_000,
    gradient_bytes=46_000_000,
    ema_bytes=0,
    activation_bytes=1_216_000_000,
    total_bytes=1_400_000_000,
    seconds_per_step=0.75,
    seconds=1500.0,
    steps=2000,
    batch=32,
    device="cuda:0",
    available_bytes=24_000_000_000,
)


def test_describe_is_one_line() -> None:
    assert describe(MADE) == (
        "needs about 1.4 GB (weights 46 MB, gradients 46 MB, optimiser 92 MB, "
        "activations at batch 32 1.2 GB) and 25 min for 2000 steps"
    )
    assert "\n" not in describe(replace(MADE, available_bytes=None))


def test_describe_warns_of_too_little_memory() -> None:
    told = describe(replace(MADE, available_bytes=1_300_000_000))
    first, second = told.splitlines()
    assert first == describe(MADE)
    assert second.startswith("warning: that is more than the 1.3 GB that cuda:0 has; use a smaller")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "0 s"), (40, "40 s"), (150, "2 min"), (5400, "90 min"), (11_400, "3 h 10 min")],
)
def test_durations(seconds: float, told: str) -> None:
    assert f" and {told} for " in describe(replace(MADE, seconds=seconds))


def test_available_memory_is_the_machines() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("no /proc/meminfo to compare with")
    lines = dict(line.split(":") for line in meminfo.read_text("utf-8").splitlines())
    assert available(torch.device("cpu")) == int(lines["MemTotal"].split()[0]) * 1024


def test_available_cuda_memory_is_the_free_and_the_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    assert available(torch.device("cuda:0")) == 900


def test_a_training_tells_all_that_it_holds_and_what_its_cores_do_at_once(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = LoraTraining.model_validate(
        {
            "train": "lora",
            "model": str(small_model),
            "data": {"world": "plain", "count": 40, "side": 32},
            "out": tmp_path / "out",
            "batch": 32,
            "accumulate": 2,
            "device": "cpu",
            "precision": "bf16",
        }
    )
    task = build(how, torch.device("cpu"))
    asked: dict[str, Any] = {}

    def watched(*given: Any, **said: Any) -> Estimate:
        asked.update(said, precision=given[3], batch=given[4])
        made.append(estimate(*given, **said))
        return made[0]

    made: list[Estimate] = []
    monkeypatch.setattr(stages, "estimate", watched)
    monkeypatch.setattr(stages, "cores", lambda: 2)
    monkeypatch.setattr(loop, "cores", lambda: 2)
    line = stages.told(task, how, accelerator(how))
    parts = cast(Any, task).parts
    held = {
        p.data_ptr(): p.nbytes
        for part in (parts.vae, parts.text_encoder, parts.unet)
        for p in part.parameters()
    }
    assert made[0].weights_bytes == sum(held.values())
    # 16 rows at a time, 8 on each of two cores.
    assert (asked["precision"], asked["batch"], asked["accumulate"]) == (torch.bfloat16, 8, 2)
    assert f"activations at batch 16 {_bytes(2 * made[0].activation_bytes)}" in line
    assert f"needs about {_bytes(made[0].total_bytes + made[0].activation_bytes)} " in line
