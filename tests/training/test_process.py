"""The forward process against diffusers' schedulers, closed forms and simulated chains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from diffedit.errors import InputError, SchedulerError
from diffedit.training.process import (
    BETAS,
    Diffusion,
    Kind,
    Process,
    RectifiedFlow,
    cosine,
    linear,
    raised_cosine,
    scaled_linear,
    zero_terminal_snr,
)

KINDS: list[Kind] = ["epsilon", "v_prediction", "sample", "flow_prediction"]
ZERO_SNR = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
}


def _tensors(n: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 3, 4, 4, generator=generator, dtype=dtype)
    return x0, noise


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.1, 0.2, 0.3]},
        ZERO_SNR,
    ],
)
def test_the_signal_is_that_of_diffusers(config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**config)
    process = Process.of(scheduler)
    assert isinstance(process, Diffusion)
    assert process.alphas_cumprod.dtype == torch.float64
    assert process.steps == len(scheduler.alphas_cumprod)
    torch.testing.assert_close(
        process.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=2e-6
    )


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    betas = scaled_linear()
    process = Diffusion(zero_terminal_snr(betas))
    assert process.alphas_cumprod[-1] == 0
    assert process.snr(torch.tensor([999])) == 0
    assert process.betas[0] == pytest.approx(float(betas[0]), rel=1e-12)


def test_cosine_and_raised_cosine_are_their_formulas() -> None:
    f = [math.cos((t / 20 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(21)]
    expected = [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, 21)]
    assert cosine(20).tolist() == pytest.approx(expected)
    assert cosine(20)[-1] == 0.999
    raised = [(1 - math.cos(math.pi * t / 20)) / 2 * 0.3 for t in range(1, 21)]
    assert raised_cosine(20, 0.3).tolist() == pytest.approx(raised)


def test_noising_and_velocity_are_those_of_diffusers() -> None:
    scheduler = DDIMScheduler(**ZERO_SNR)
    process = Process.of(scheduler)
    x0, noise = _tensors()
    t = torch.tensor([0, 10, 500, 998, 999])
    assert torch.allclose(
        process.noised(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-4
    )
    velocity = scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(process.target("v_prediction", x0, noise, t), velocity, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_that_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = Process.of(scheduler)
    assert isinstance(process, RectifiedFlow)
    assert torch.allclose(process.grid().float(), scheduler.sigmas, atol=1e-6)
    x0, noise = _tensors()
    rows = torch.tensor([0, 1, 300, 700, 999])
    timesteps = scheduler.timesteps[rows]
    s = process.grid()[rows]
    assert torch.allclose(process.timestep(s).float(), timesteps, atol=1e-3)
    expected = scheduler.scale_noise(x0, timesteps, noise)
    assert torch.allclose(process.noised(x0, noise, s), expected, atol=1e-5)
    assert torch.equal(process.target("flow", x0, noise, s), noise - x0)
    before = torch.cat([process.grid()[1:], torch.zeros(1, dtype=torch.float64)])
    assert torch.allclose(process.before(process.grid()), before, atol=1e-12)


def test_other_configs_of_diffusers() -> None:
    flow = Process.of(DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0))
    assert isinstance(flow, RectifiedFlow)
    assert flow.shift == 2
    dynamic = Process.of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert isinstance(dynamic, RectifiedFlow)
    assert dynamic.shift == 1
    with pytest.raises(SchedulerError, match="EDMEulerScheduler has no beta schedule"):
        Process.of(EDMEulerScheduler())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "process", [Diffusion(linear()), RectifiedFlow(3.0)], ids=["chain", "flow"]
)
def test_a_right_prediction_gives_back_picture_and_noise(process: Process, kind: Kind) -> None:
    x0, noise = _tensors(dtype=torch.float64)
    t = process.at(torch.tensor([0.05, 0.2, 0.5, 0.8, 0.9999]))
    x_t = process.noised(x0, noise, t)
    prediction = process.target(kind, x0, noise, t)
    assert torch.allclose(process.x0(kind, prediction, x_t, t), x0, atol=1e-9)
    assert torch.allclose(process.epsilon(kind, prediction, x_t, t), noise, atol=1e-9)


def test_pure_noise_tells_no_noise_apart_from_a_picture() -> None:
    process = Diffusion(zero_terminal_snr(linear()))
    x0, noise = _tensors(1)
    last = torch.tensor([999])
    with pytest.raises(InputError, match="holds no signal"):
        process.x0("epsilon", noise, noise, last)
    v = process.target("v_prediction", x0, noise, last)
    assert torch.allclose(process.x0("v_prediction", v, noise, last), x0)
    with pytest.raises(InputError, match="holds no noise"):
        RectifiedFlow().epsilon("sample", x0, x0, torch.zeros(1))


def test_posterior_is_the_papers_formula_and_that_of_diffusers() -> None:
    process = Diffusion(scaled_linear())
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              clip_sample=False, prediction_type="sample")  # fmt: skip
    x0, x_t = _tensors(4, torch.float64)
    t = torch.tensor([1, 5, 500, 999])
    mean, variance = process.posterior(x0, x_t, t)
    beta, bar = process.betas, process.alphas_cumprod
    for i, at in enumerate(t.tolist()):
        old = bar[at - 1]
        expected = (
            old.sqrt() * beta[at] / (1 - bar[at]) * x0[i]
            + (1 - beta[at]).sqrt() * (1 - old) / (1 - bar[at]) * x_t[i]
        )
        assert torch.allclose(mean[i], expected, atol=1e-10)
        assert variance[i] == pytest.approx(float((1 - old) / (1 - bar[at]) * beta[at]), rel=1e-9)
        assert variance[i] == pytest.approx(float(scheduler._get_variance(at)), rel=1e-2)
    assert torch.allclose(process.transition(t), beta[t])
    mean, variance = process.posterior(x0, x_t, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(mean, x0)
    assert variance.abs().max() < 1e-12


@pytest.mark.parametrize("process", [Diffusion(linear(10, 0.02, 0.4)), RectifiedFlow(steps=10)],
                         ids=["chain", "flow"])  # fmt: skip
def test_posterior_is_what_a_simulated_chain_shows(process: Process) -> None:
    """Regression of x_{t-1} on x_t over many two-step chains from one picture."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    t = process.grid()[4].expand(n)
    x0 = torch.full((n,), 0.8, dtype=torch.float64)
    first, second = torch.randn(2, n, generator=generator, dtype=torch.float64)
    before = process.before(t)
    x_before = process.noised(x0, first, before)
    ratio = process.coefficients(t)[0] / process.coefficients(before)[0]
    x_t = ratio * x_before + process.transition(t).sqrt() * second
    a, b = process.coefficients(t[:1])
    assert float(x_t.mean()) == pytest.approx(float(a) * 0.8, abs=0.01)
    assert float(x_t.std()) == pytest.approx(float(b), rel=0.01)
    mean, variance = process.posterior(x0, x_t, t)
    residual = x_before - mean
    assert float(residual.mean()) == pytest.approx(0, abs=0.005)
    assert float((residual * x_t).mean()) == pytest.approx(0, abs=0.005)
    assert float(residual.var()) == pytest.approx(float(variance[0]), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    x0, noise = (tensor.to(dtype) for tensor in _tensors(2))
    for process in (Diffusion(linear()), RectifiedFlow()):
        t = process.at(torch.tensor([0.3, 0.6]))
        x_t = process.noised(x0, noise, t)
        assert x_t.dtype == dtype
        assert process.x0("v_prediction", x_t, x_t, t).dtype == dtype
        assert process.posterior(x0, x_t, t)[0].dtype == dtype


def test_every_share_has_a_time() -> None:
    process = Diffusion(linear(4))
    assert process.at(torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])).tolist() == [0, 0, 1, 3, 3]
    assert process.grid().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("name", sorted(BETAS))
def test_every_schedule_ends_noisier_than_it_begins(name: str) -> None:
    snr = Diffusion(BETAS[name]()).snr(torch.arange(1000))
    assert (snr.diff() < 0).all()


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.5], [math.nan]])
def test_a_schedule_that_is_none_is_refused(betas: list[Any]) -> None:
    with pytest.raises(InputError, match="beta"):
        Diffusion(torch.tensor(betas))


def test_an_unknown_prediction_type_is_named() -> None:
    x0, noise = _tensors(1)
    with pytest.raises(InputError, match="did you mean 'epsilon'"):
        Diffusion(linear()).target("epsilom", x0, noise, torch.tensor([3]))  # type: ignore[arg-type]
