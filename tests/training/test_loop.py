"""The loop: resumed runs, divided batches, what goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffedit.errors import InputError, OutputError
from diffedit.training import config, loop
from diffedit.training.loop import NotFinite, Rows, accelerator, train
from diffedit.training.optim import optimizers


class LineTask:
    """Fits a small network to a fixed function; every batch is drawn anew."""

    def __init__(self, training: config.Training, broken_at: int | None = None) -> None:
        torch.manual_seed(training.seed)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 2))
        self.modules: Mapping[str, nn.Module] = {"net": self.net}
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers(
            [self.net], training.optimiser
        )
        self.size, self.broken_at, self.kill_at = training.batch, broken_at, -1
        self.digest = "a line"

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        x = torch.randn(self.size, 3, generator=generator)
        y = torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": x, "y": y if step != self.broken_at else y * float("nan")}

    def loss(self, rows: Rows) -> Tensor:
        made: Tensor = (self.net(rows["x"]) - rows["y"]).square().mean()
        return made

    def validate(self) -> dict[str, float]:
        x = torch.linspace(-1, 1, 30).view(10, 3)
        with torch.no_grad():
            return {"mean": float(self.net(x).mean())}

    def pictures(self) -> list[tuple[str, Any]]:
        return [("grey", np.full((8, 8, 3), 128, np.uint8))]

    def export(self, folder: Path) -> None:
        folder.mkdir()


class Asked(LineTask):
    """Remembers which batches it was asked for."""

    def __init__(self, training: config.Training) -> None:
        super().__init__(training)
        self.asked: list[int] = []

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        self.asked.append(step)
        return super().batch(step, generator)


def training(out: Path, **changes: Any) -> config.Training:
    values: dict[str, Any] = {
        "train": "denoiser",
        "data": {"world": "plain", "count": 4},
        "out": out,
        "steps": 12,
        "batch": 10,
        "device": "cpu",
        "precision": "fp32",
        "ema": 0.9,
        "validate_every": 5,
        "optimiser": {"name": "muon", "rate": 1e-2, "muon_rate": 1e-2, "warmup": 3},
    }
    return config.DenoiserTraining.model_validate(values | changes)


def run(how: config.Training, task: LineTask | None = None, **options: Any) -> loop.Report:
    return train(task or LineTask(how), how, accelerator(how), **options)


def weights(task: LineTask) -> Tensor:
    return nn.utils.parameters_to_vector(task.net.parameters()).detach()


def test_the_loss_falls_and_all_is_written(tmp_path: Path) -> None:
    how = training(tmp_path / "out", steps=60)
    report = run(how)
    assert report.finished
    assert np.mean(report.losses[-10:]) < 0.6 * np.mean(report.losses[:10])
    written = {path.name for path in how.out.iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "curve.png", "index.html", "samples"} <= written


def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole_task = LineTask(how := training(tmp_path / "whole"))
    whole = run(how, whole_task)
    how = training(tmp_path / "parts")
    first = LineTask(how)
    first.kill_at = 4
    stopped = run(how, first)
    assert (stopped.step, stopped.finished) == (5, False)
    second = Asked(how)
    resumed = run(how, second, resume=True)
    assert resumed.finished
    assert second.asked == list(range(5, 12))
    assert resumed.losses == whole.losses
    assert torch.equal(weights(second), weights(whole_task))
    lines = (how.out / "log.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == list(range(1, 13))


SCRIPT = """
import sys, time
from pathlib import Path
from tests.training.test_loop import LineTask, training, run

class Slow(LineTask):
    def batch(self, step, generator):
        time.sleep(0.03)
        return super().batch(step, generator)

how = training(Path(sys.argv[1]), steps=30, save_minutes=0.0005)
run(how, Slow(how), resume=True)
"""


def test_a_run_killed_outright_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    how = training(tmp_path / "out", steps=30)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(how.out)], env=environment)
    log = how.out / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b'"loss"') >= 12:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = torch.load(how.out / "checkpoint.pt", weights_only=True)
    done = len(kept["losses"])
    assert 0 < done < 30
    again = training(how.out, steps=30, save_minutes=0.0005)
    task = Asked(again)
    resumed = run(again, task, resume=True)
    assert task.asked == list(range(done, 30))  # and nothing from its beginning
    whole = run(training(tmp_path / "whole", steps=30))
    assert len(resumed.losses) == 30
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_dividing_a_batch_changes_only_rounding(tmp_path: Path, parts: int) -> None:
    task, divided = (LineTask(training(tmp_path / name)) for name in ("whole", "divided"))
    whole = run(training(tmp_path / "whole"), task)
    report = run(training(tmp_path / "divided", accumulate=parts), divided)
    np.testing.assert_allclose(report.losses, whole.losses, rtol=2e-5)
    torch.testing.assert_close(weights(divided), weights(task), rtol=1e-4, atol=1e-5)


def test_threads_change_only_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, alone = (LineTask(training(tmp_path / name)) for name in ("threads", "alone"))
    run(training(tmp_path / "threads"), task)
    monkeypatch.setattr(loop, "cores", lambda: 1)
    monkeypatch.setattr(loop, "_PIECE", 100)
    run(training(tmp_path / "alone"), alone)
    torch.testing.assert_close(weights(alone), weights(task), rtol=1e-4, atol=1e-5)


DEVICES = """
import sys
from pathlib import Path
import torch
from tests.training.test_loop import LineTask, training, run, weights
out = Path(sys.argv[1])
how = training(out)
task = LineTask(how)
report = run(how, task)
import os
if os.environ.get("RANK", "0") == "0":
    torch.save({"losses": report.losses, "weights": weights(task)}, out / "done.pt")
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    how = training(tmp_path / "one")
    task = LineTask(how)
    one = run(how, task)
    script = tmp_path / "two.py"
    script.write_text(DEVICES)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "two")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    two = torch.load(tmp_path / "two" / "done.pt")
    np.testing.assert_allclose(two["losses"], one.losses, rtol=2e-5)
    torch.testing.assert_close(two["weights"], weights(task), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    how = training(tmp_path / "out")
    task = LineTask(how, broken_at=7)
    with pytest.raises(NotFinite, match=r"loss of step 8 is not finite .*kept in .*lower the rate"):
        run(how, task)
    state = torch.load(how.out / "checkpoint.pt")
    assert len(state["losses"]) == 7
    assert all(bool(v.isfinite().all()) for v in state["modules"]["net"].values())
    mended = LineTask(how)
    whole = run(training(tmp_path / "whole"))
    assert run(how, mended, resume=True).losses == whole.losses


def test_a_full_disk_warns_and_the_last_checkpoint_must_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    how = training(tmp_path / "out", save_minutes=0.0)
    write, calls = torch.save, []

    def full(state: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) > 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"step 12 cannot be written .No space left.*is kept"):
        run(how)
    assert "checkpoint of step 4 cannot be written" in caplog.text
    assert len(torch.load(how.out / "checkpoint.pt")["losses"]) == 3
    assert not list(how.out.glob("*.part"))
    monkeypatch.undo()
    assert run(how, resume=True).losses == run(training(tmp_path / "whole")).losses


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    run(training(tmp_path / "out", steps=3))
    optimiser = {"name": "muon", "rate": 0.5, "muon_rate": 1e-2, "warmup": 3}
    other = training(tmp_path / "out", batch=6, optimiser=optimiser)
    with pytest.raises(InputError, match=r"batch is 6, was 10; optimiser.rate is 0.5, was 0.01"):
        run(other, resume=True)
    with pytest.raises(InputError, match="is there already: go on with --resume"):
        run(training(tmp_path / "out"))
    # Longer, and looked at more often: that is the same training.
    assert run(training(tmp_path / "out", steps=5, validate_every=1), resume=True).step == 5


def test_a_checkpoint_of_a_model_that_has_changed_is_refused(tmp_path: Path) -> None:
    how = training(tmp_path / "out", steps=3)
    run(how)
    other = LineTask(longer := training(tmp_path / "out", steps=5))
    other.net = other.modules["net"] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))  # type: ignore[index]
    other.optimizers = optimizers([other.net], longer.optimiser)
    with pytest.raises(InputError, match="weights of other shapes: the model or the words"):
        run(longer, other, resume=True)
    assert run(longer, resume=True).step == 5


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    how = training(tmp_path / "out")
    how.out.mkdir()
    (how.out / "checkpoint.pt").write_bytes(b"not one")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        run(how, resume=True)


def test_time_ends_a_run_resumably(tmp_path: Path) -> None:
    how = training(tmp_path / "out")
    report = run(how, max_minutes=1e-9)
    assert (report.step, report.finished) == (1, False)
    assert run(how, resume=True).finished


def test_the_averaged_weights_stand_in_the_modules_at_the_end(tmp_path: Path) -> None:
    how = training(tmp_path / "out")
    task = LineTask(how)
    run(how, task)
    state = torch.load(how.out / "checkpoint.pt")
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state["ema"]["net"][key])
    assert not torch.equal(state["ema"]["net"]["0.weight"], state["modules"]["net"]["0.weight"])


def test_each_training_of_a_process_has_its_own_number_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffedit.training.precision.multiplies_bf16", lambda device: True)
    for precision, mixed in [("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")]:
        machine = accelerator(training(tmp_path, precision=precision))
        assert machine.mixed_precision == mixed
