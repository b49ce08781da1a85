"""Rectified flow: what a training learns is the exact velocity, and its scheduler samples it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from diffedit import Editor
from diffedit.errors import InputError
from diffedit.sampler import sample
from diffedit.schedule import Schedule
from diffedit.training import config
from diffedit.training.config import DenoiserTraining, Objective
from diffedit.training.denoiser import DenoiserTask
from diffedit.training.denoising import Latents, scheduler_for
from diffedit.training.loop import Rows, accelerator, train
from diffedit.training.optim import optimizers
from diffedit.training.parts import new_scheduler
from diffedit.training.process import RectifiedFlow
from diffedit.workflow import Pass

CPU = torch.device("cpu")
_MEAN, _STD = 0.7, 0.5


def _training(tmp_path: Path, model: str | Path = "tiny", **changes: Any) -> DenoiserTraining:
    said: dict[str, Any] = {
        "train": "denoiser",
        "model": str(model),
        "data": {"world": "simple", "count": 16, "side": 32, "held_out": 4},
        "out": str(tmp_path / "out"),
        "steps": 2,
        "batch": 4,
        "text": "frozen",
        "objective": {"target": "flow_prediction"},
        "optimiser": {"rate": 1e-3, "warmup": 1},
    }
    file = tmp_path / "training.yaml"
    file.write_text(json.dumps(said | changes), "utf-8")
    return cast(DenoiserTraining, config.load(file)[0])


def _velocity(x: Tensor, s: Tensor) -> Tensor:
    """E[ε − x_0 | x_s] for x_0 ~ N(mean, std²): Liu et al. 2022, eq. 2, in closed form."""
    a, b = 1 - s, s
    gain = (b - a * _STD**2) / (a**2 * _STD**2 + b**2)
    return gain * (x - a * _MEAN) - _MEAN


class _Gaussian(Latents):
    """Examples of N(mean, std²), without pictures, words or a cache."""

    def __init__(self, training: DenoiserTraining) -> None:
        from diffedit.training.denoising import _process

        self.training, self.objective, self.device = training, training.objective, CPU
        self.process, self.kind = _process(training.objective, new_scheduler())

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        size = self.training.batch
        shape = (size, 4, 2, 2)
        return {
            "latents": _MEAN + _STD * torch.randn(shape, generator=generator),
            "noise": torch.randn(shape, generator=generator),
            "time": self.process.at(self._levels(size, generator)),
            "embeddings": torch.zeros(size, 1, 1),
        }


class _Network(nn.Module):
    """Sees each cell alone, as cells of independent Gaussians may be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)
        self.time = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 128))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        s = (timestep.float() / 1000).view(-1, 1)
        gain, shift = self.time(torch.cat([s, s**2, s**3], 1)).view(-1, 128, 1, 1).chunk(2, 1)
        made: Tensor = self.out(self.into(x) * (1 + gain) + shift)
        return made


class _FlowTask:
    """A network without words, trained as a denoiser is."""

    def __init__(self, training: DenoiserTraining) -> None:
        torch.manual_seed(0)
        self.unet = _Network()
        self.latents = _Gaussian(training)
        self.modules: Mapping[str, nn.Module] = {"unet": self.unet}
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers(
            [self.unet], training.optimiser
        )
        self.batch = self.latents.batch
        self.digest = "drawn from a Gaussian"

    def predict(self, x_t: Tensor, timestep: Tensor, words: Tensor | None = None) -> Tensor:
        made: Tensor = self.unet(x_t, timestep)
        return made

    def loss(self, rows: Rows) -> Tensor:
        return self.latents.loss(rows, self.predict)

    def validate(self) -> dict[str, float]:
        return {}

    def pictures(self) -> list[tuple[str, Any]]:
        return []

    def export(self, folder: Path) -> None: ...


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> _FlowTask:
    objective = {"target": "flow_prediction", "gamma": None, "shift": 1.5}
    optimiser = {"rate": 1e-2, "warmup": 10, "decay": 0.7}
    training = _training(
        tmp_path_factory.mktemp("flow"),
        objective=objective,
        optimiser=optimiser,
        steps=250,
        batch=64,
        ema=0.9,
    )
    task = _FlowTask(training)
    train(task, training, accelerator(training))
    return task


def test_a_training_learns_the_exact_velocity_of_gaussian_data(trained: _FlowTask) -> None:
    generator = torch.Generator().manual_seed(1)
    shares = torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    for s in shares:
        x0 = _MEAN + _STD * torch.randn(64, 4, 4, 4, generator=generator)
        x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator)
        x = x.float()
        with torch.no_grad():
            found = trained.predict(x, 1000 * s.expand(64))
        exact = _velocity(x, s)
        error = (found - exact).square().mean().sqrt()
        # The network that says the mean velocity and does not look is off by `spread`.
        spread = (exact - exact.mean()).square().mean().sqrt()
        assert error < 0.12 + 0.1 * spread, float(s)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_what_was_learnt_is_sampled_right_by_diffedit_and_diffusers(
    trained: _FlowTask, shift: float
) -> None:
    objective = Objective(target="flow_prediction", shift=shift)
    noise = torch.randn(4096, 4, 1, 1, generator=torch.Generator().manual_seed(2))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return trained.predict(x, t.expand(len(x)))

    def with_diffusers(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(12)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x

    schedule = Schedule(scheduler_for(objective, new_scheduler()), 12, compat=True)
    assert schedule.prediction_type == "flow_prediction"

    def denoise(latents: Tensor, index: int) -> Tensor:
        return predict(schedule.scale(latents, index), schedule.timesteps[index])

    *_, last = sample(denoise, noise, schedule, rng=[])
    ours, theirs = last.latents, with_diffusers(scheduler_for(objective, new_scheduler()))
    assert torch.allclose(ours, theirs, atol=1e-5)
    # Where the last step leads is the picture that the network expected there.
    assert torch.allclose(last.x0, ours, atol=1e-3)
    assert ours.mean().item() == pytest.approx(_MEAN, abs=0.05)
    assert ours.std().item() == pytest.approx(_STD, abs=0.05)
    # Other solvers of the same flow come to the same pictures, item by item.
    euler = with_diffusers(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert (euler - ours).abs().mean() < 0.1 * _STD


def test_the_noise_levels_of_sampling_are_the_shifted_ones() -> None:
    for shift in (1.0, 3.0):
        objective = Objective(target="flow_prediction", shift=shift)
        schedule = Schedule(scheduler_for(objective, new_scheduler()), 8)
        levels = np.array([schedule.coefficients(i) for i in range(8)])
        u = 0.999 - np.arange(8) * 0.999 / 8
        expected = shift * u / (1 + (shift - 1) * u)
        np.testing.assert_allclose(levels[:, 1], expected, atol=1e-5)
        np.testing.assert_allclose(levels.sum(axis=1), 1, atol=1e-5)
        # The network reads the time that it was trained to read.
        np.testing.assert_allclose(schedule.timesteps / 1000, expected, atol=1e-3)


def _shift(task: DenoiserTask) -> float:
    assert isinstance(task.latents.process, RectifiedFlow)
    return task.latents.process.shift


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_is_that_of_training_and_of_sampling(
    tmp_path: Path, small_model: Path, shift: float
) -> None:
    objective = {"target": "flow_prediction", "gamma": None, "shift": shift, "dropout": 0.0}
    training = _training(tmp_path, small_model, objective=objective)
    task = DenoiserTask(training, CPU)
    times = torch.cat([task.batch(k, torch.Generator().manual_seed(k))["time"] for k in range(100)])
    # The mean of s = shift u / (1 + (shift - 1) u) over uniform u, by the midpoint rule.
    u = (np.arange(100_000) + 0.5) / 100_000
    expected = np.mean(shift * u / (1 + (shift - 1) * u))
    assert float(times.mean()) == pytest.approx(expected, abs=0.01)
    train(task, training, accelerator(training))
    task.export(tmp_path / "model")

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.scheduler.config.flow_shift == shift
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    latents = torch.randn(1, 4, 4, 4, generator=generator)
    theirs = pipeline("a red circle", latents=latents, output_type="latent", **options).images
    editor = Editor.load(tmp_path / "model", device="cpu")
    made = editor.run(None, Pass(prompt="a red circle", steps=4, guidance=3.0), compat=True, seed=0)
    assert made.latents is not None
    assert torch.allclose(made.latents, theirs, atol=1e-4)

    # What is trained on goes on with the shift that it has, unless the file names another.
    further = _training(tmp_path, tmp_path / "model", objective={}, out=str(tmp_path / "more"))
    again = DenoiserTask(further, CPU)
    assert again.latents.kind == "flow_prediction"
    assert _shift(again) == shift
    assert scheduler_for(further.objective, again.parts.scheduler).config.flow_shift == shift
    objective = {"target": "flow_prediction", "shift": 5.0}
    further = _training(tmp_path, tmp_path / "model", objective=objective, out=str(tmp_path / "x"))
    again = DenoiserTask(further, CPU)
    assert _shift(again) == 5.0
    assert scheduler_for(further.objective, again.parts.scheduler).config.flow_shift == 5.0


def test_a_flow_asks_for_flow_prediction() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(InputError, match="target epsilon: the model is a flow"):
        scheduler_for(Objective(target="epsilon"), flow)
    made = scheduler_for(Objective(), flow)
    assert (made.config.flow_shift, made.config.prediction_type) == (3.0, "flow_prediction")
