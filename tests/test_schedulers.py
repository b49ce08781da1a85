"""Every named scheduler against oracles that know nothing of ``diffedit.schedulers``."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor

from diffedit import schedulers
from diffedit.errors import DiffeditError, SchedulerError
from diffedit.schedule import Schedule, flow_calls_kept
from diffedit.schedulers import SCHEDULERS, build, usable
from tests.gaussian import (
    COUNTS,
    FLOW,
    MEAN,
    STD,
    error,
    gaussian_model,
    latents_of,
    level_of,
    order,
    own_scheduler,
    posterior_mean,
    samplers,
    trip,
)

# diffusers passes tensors to NumPy functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde, unseeded
]

STEPS = 30
SECOND_ORDER = ["dpm2", "dpmpp_2m", "dpmpp_2m_karras", "heun", "lms", "plms", "unipc"]
STOCHASTIC = [name for name, info in SCHEDULERS.items() if info.stochastic]
ZERO_SNR = [
    "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_exponential", "dpmpp_2m_karras", "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras", "euler", "euler_a", "euler_exponential", "euler_karras", "lcm", "tcd",
    "unipc",
]  # fmt: skip
# Multistep samplers round the timesteps of these, so the model sees another noise level.
ROUNDED = [f"dpmpp_2m_{kind}" for kind in ("beta", "exponential", "karras", "sde_karras")]
FLOWS = [name for name, info in SCHEDULERS.items() if info.flow]
MODELS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True), (FLOW, False)]
CASES = [
    pytest.param(name, prediction, zero_snr, id=f"{name}-{prediction}{'-zero' * zero_snr}")
    for prediction, zero_snr in MODELS
    for name in (ZERO_SNR if zero_snr else FLOWS if prediction == FLOW else SCHEDULERS)
]


# The oracle of the whole trip


@pytest.mark.parametrize(("name", "prediction", "zero_snr"), CASES)
def test_samples_the_gaussian(name: str, prediction: str, zero_snr: bool) -> None:
    schedule = Schedule(build(name, own_scheduler(prediction, zero_snr)), STEPS)
    noise = latents_of(0, size=32)
    # Of exactly unit variance: deterministic samplers are then free of sampling error.
    noise = (noise - noise.mean()) / noise.std() * schedule.initial_noise_scale
    out = trip(schedule, gaussian_model(prediction, zero_snr), noise, [1])
    # Plain schedules start from noise that still holds some signal: the mean is lost by 0.02.
    # PLMS combines raw outputs of several noise levels, which v-prediction forgives less.
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)

    if name in SECOND_ORDER:
        # A good solver is exact up to its last call, which jumps from there to the posterior mean.
        a, s = level_of(float(schedule.timesteps[-1]), zero_snr, prediction)
        exact = STD**2 / math.hypot(STD, s / a)
        low, high = (0.93, 1.08) if prediction == "v_prediction" else (0.98, 1.08)
        if prediction == FLOW:  # Heun's last call is a step of first order from further away
            high = 1.12
        assert low * exact < out.std().item() < high * exact
        if prediction == "epsilon" and name in {"dpm2", "dpmpp_2m_karras", "heun"}:
            assert 0.250 <= out.std().item() <= 0.267  # as the design measured
    elif name == "ddim":
        assert out.std().item() == pytest.approx(0.213, abs=0.006)
    elif name == "deis":  # ends at the noise level of timestep 0, without that jump
        assert 0.250 < out.std().item() < 0.267
    elif name == "lcm":  # jumps to the posterior mean at every step, which loses variance
        assert 0.12 < out.std().item() < 0.18
    else:  # first order, or noise at each step
        assert 0.17 < out.std().item() < 0.30


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("ddim", "epsilon", 0.9),  # the exact path is not quite reached with integer timesteps
        ("euler_karras", "epsilon", 1.0),
        ("euler_exponential", "epsilon", 1.0),
        ("heun", "epsilon", 1.8),
        ("euler", FLOW, 1.0),
        ("euler_beta", FLOW, 1.0),
        ("heun", FLOW, 2.0),
        ("dpmpp_2m", FLOW, 1.1),
        ("unipc", FLOW, 1.5),
    ],
)
def test_order_of_convergence(name: str, prediction: str, expected: float) -> None:
    errors = [error(name, prediction, steps) for steps in COUNTS]
    assert order(errors) == pytest.approx(expected, abs=0.15)


def test_the_page_has_every_sampler() -> None:
    """Written by `tests.gaussian`; where samplers were added since, it has to be again."""
    page = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text("utf-8")
    of_noise, of_flows = page.partition("## Inversion")[0].split("## Rectified flows")
    for text, prediction in ((of_noise, "epsilon"), (of_flows, FLOW)):
        assert re.findall(r"^\| `(\w+)`", text, re.M) == [one.name for one in samplers(prediction)]


# Noise levels and conversions


@pytest.mark.parametrize(("name", "prediction", "zero_snr"), CASES)
def test_x0_at_every_call(name: str, prediction: str, zero_snr: bool) -> None:
    """to_x0 of the exact model output is the posterior mean, also inside two-call steps."""
    schedule = Schedule(build(name, own_scheduler(prediction, zero_snr)), STEPS)
    rounds = name in ROUNDED
    tolerance = 0.15 if rounds and prediction == "epsilon" else 0.02 if rounds else 1e-3
    visited = []

    def check(i: int, x: Tensor, out: Tensor) -> None:
        a, s = level_of(float(schedule.timesteps[i]), zero_snr, prediction)
        own_a, own_s = schedule.coefficients(i)
        scaled = x if prediction == FLOW else x / math.hypot(own_a, own_s)
        expected = posterior_mean(scaled.double(), a, s).float()
        got = schedule.to_x0(out, i, x)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(schedule.from_x0(got, i, x), out, atol=1e-4, rtol=1e-4)
        visited.append(i)

    noise = latents_of(3) * schedule.initial_noise_scale
    trip(schedule, gaussian_model(prediction, zero_snr), noise, [1], check)
    assert visited == list(range(len(schedule)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_equals_what_diffusers_predicts(name: str, prediction: str) -> None:
    """Where a scheduler tells its own x0, for any output, it is the one of to_x0."""
    schedule = Schedule(build(name, own_scheduler(prediction)), 8)
    latents = latents_of(1) * schedule.initial_noise_scale
    schedule.seed([1], latents)
    told = 0
    for i in range(len(schedule)):
        output = latents_of(10 + i)
        x0 = schedule.to_x0(output, i, latents)
        schedule.scale(latents, i)
        shadow = copy.deepcopy(schedule.scheduler)
        result = shadow.step(output, schedule._calls[i], latents)
        theirs = result.get("pred_original_sample")
        if hasattr(shadow, "convert_model_output") and name != "deis":
            shadow = copy.deepcopy(schedule.scheduler)
            shadow._step_index = i
            theirs = shadow.convert_model_output(output, sample=latents)
        if theirs is not None:
            told += 1
            torch.testing.assert_close(x0, theirs, atol=1e-4, rtol=1e-4)
        latents = schedule.step(output, i, latents, [torch.Generator().manual_seed(i)])
    assert told == (0 if name in {"deis", "lcm", "plms", "tcd"} else len(schedule))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_from_x0_inverts_to_x0_in_half_precision(name: str, prediction: str) -> None:
    schedule = Schedule(build(name, own_scheduler(prediction)), 5)
    x, output = latents_of(1).half(), latents_of(2).half()
    for i in range(len(schedule)):
        x0 = schedule.to_x0(output, i, x)
        assert x0.dtype == torch.float16
        if schedule.coefficients(i)[0] > 0.3:
            back = schedule.from_x0(x0, i, x)
            torch.testing.assert_close(back, output, atol=0.05, rtol=0.05)


def test_zero_snr_start_is_finite() -> None:
    schedule = Schedule(build(None, own_scheduler("v_prediction", True)), 5)
    a, s = schedule.coefficients(0)
    assert a == pytest.approx(0, abs=1e-6)
    assert s == pytest.approx(1)
    output = latents_of(2)
    torch.testing.assert_close(schedule.to_x0(output, 0, latents_of(1)), -output)
    torch.testing.assert_close(schedule.from_x0(-output, 0, latents_of(1)), output)


@pytest.mark.parametrize("at", [1.0, 0.6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_add_noise_at_the_start_and_after_each_step(name: str, at: float) -> None:
    """The level is that of the timestep that the model is asked about next."""
    schedule = Schedule(build(name, own_scheduler()), 10, at=at)
    x0, noise, latents = latents_of(1), latents_of(2), latents_of(3)
    schedule.seed([1], latents)
    rounds = name in ROUNDED
    for i, t in enumerate(schedule.timesteps):
        noised = schedule.add_noise(x0, noise, i)
        a, s = level_of(float(t), zero_snr=False)
        # The model's input is variance preserving, whatever the sampler's own parametrisation.
        seen = schedule.scale(noised, i)
        tolerance = 0.03 if rounds else 2e-5
        torch.testing.assert_close(seen, a * x0 + s * noise, atol=tolerance, rtol=0)
        own_a, own_s = schedule.coefficients(i)
        torch.testing.assert_close(noised, own_a * x0 + own_s * noise, atol=2e-5, rtol=1e-5)
        # Out of order it is computed, not read off the scheduler's position.
        for j in {0, len(schedule) - 1} - {i}:
            own_a, own_s = schedule.coefficients(j)
            assert torch.equal(schedule.add_noise(x0, noise, j), own_a * x0 + own_s * noise)
        latents = schedule.step(latents_of(4), i, latents, [torch.Generator().manual_seed(1)])
    assert schedule.add_noise(x0, noise, len(schedule)) is x0


@pytest.mark.parametrize("at", [1.0, 0.6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_bits_as_the_loop_of_a_diffusers_pipeline(name: str, at: float) -> None:
    """The scheduler calls of StableDiffusionInpaintPipeline, written out."""
    ours = Schedule(build(name, own_scheduler()), 10, at=at, compat=True)
    theirs: Any = build(name, own_scheduler())
    source, noise, mask = latents_of(1), latents_of(2), (latents_of(3) > 0).float()
    model = gaussian_model("epsilon", zero_snr=False)

    def loop_of_diffusers() -> Any:
        generator = torch.Generator().manual_seed(7)
        theirs.set_timesteps(10)
        pipe: Any = SimpleNamespace(scheduler=theirs)
        timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, 10, at, "cpu")
        x = theirs.add_noise(source, noise, timesteps[:1].repeat(1))
        takes_generator = "generator" in theirs.step.__code__.co_varnames
        extra = {"generator": generator} if takes_generator else {}
        for i, t in enumerate(timesteps):
            out = model(theirs.scale_model_input(x, t), t)
            x = theirs.step(out, t, x, **extra, return_dict=False)[0]
            kept = source
            if i < len(timesteps) - 1:
                kept = theirs.add_noise(source, noise, torch.tensor([timesteps[i + 1]]))
            x = (1 - mask) * kept + mask * x
        return x

    def loop_of_ours() -> Tensor:
        generator = torch.Generator().manual_seed(7)
        x = ours.add_noise(source, noise, 0)
        for i, t in enumerate(ours.timesteps):
            x = ours.step(model(ours.scale(x, i), t), i, x, [generator])
            x = (1 - mask) * ours.add_noise(source, noise, i + 1) + mask * x
        return x

    torch.manual_seed(0)  # DPM++ SDE draws from the global generator
    expected = loop_of_diffusers()
    torch.manual_seed(0)
    assert torch.equal(loop_of_ours(), expected)


def test_compat_differs_only_at_the_midpoints() -> None:
    for name, wrong in {"dpm2": True, "dpmpp_sde": True, "dpm2_a": False, "heun": False}.items():
        exact, compat = (Schedule(build(name, own_scheduler()), 5, compat=c) for c in (False, True))
        differs = []
        x0, noise = latents_of(1), latents_of(2)
        for schedule in (exact, compat):
            schedule.seed([1], x0)
        for i in range(len(exact)):
            mine, theirs = (s.add_noise(x0, noise, i) for s in (exact, compat))
            differs.append(not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-4))
            for schedule in (exact, compat):
                schedule.step(noise, i, x0, [torch.Generator()])
        assert differs == [wrong and i % 2 == 1 for i in range(len(exact))], name


# Timesteps and strength


@pytest.mark.parametrize("at", [1.0, 0.75, 0.5, 0.29, 0.1])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_cuts_as_diffusers(name: str, at: float) -> None:
    schedule = Schedule(build(name, own_scheduler()), 20, at=at)
    theirs: Any = build(name, own_scheduler())
    theirs.set_timesteps(20)
    pipe: Any = SimpleNamespace(scheduler=theirs)
    timesteps, steps = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, 20, at, "cpu")
    assert torch.equal(schedule.timesteps, timesteps)
    assert schedule.begin == getattr(theirs, "begin_index", len(theirs.timesteps) - len(timesteps))
    if hasattr(theirs, "begin_index"):
        assert schedule.scheduler.begin_index == theirs.begin_index
    if name == "plms":  # repeats its second call
        assert len(schedule) == steps + 1
    else:
        assert len(schedule) == (steps - 1) * SCHEDULERS[name].calls + 1


def test_flow_schedulers_round_as_sd3_and_convert() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for at in (1.0, 0.29, 0.55):
        schedule = Schedule(own, 20, at=at, kept=flow_calls_kept)
        theirs = copy.deepcopy(own)
        theirs.set_timesteps(20)
        pipe: Any = SimpleNamespace(scheduler=theirs)
        timesteps, _ = StableDiffusion3Img2ImgPipeline.get_timesteps(pipe, 20, at, "cpu")
        assert torch.equal(schedule.timesteps, timesteps)
    assert schedule.prediction_type == "flow_prediction"
    assert schedule.initial_noise_scale == 1
    x0, noise = latents_of(1), latents_of(2)
    x = schedule.add_noise(x0, noise, 0)
    sigma = float(schedule.timesteps[0]) / 1000
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise)
    assert torch.equal(schedule.scale(x, 0), x)
    torch.testing.assert_close(schedule.to_x0(noise - x0, 0, x), x0)
    torch.testing.assert_close(schedule.from_x0(x0, 0, x), noise - x0)
    with pytest.raises(
        SchedulerError, match=r"'ddim' does not fit .* not for rectified flows; use"
    ):
        build("ddim", own)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_sampler_shifts_noise_with_the_pictures_size(name: str, kind: str) -> None:
    """The timestep stays a thousand times the share of noise, and large pictures see more of it."""
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    taken = []
    for mu in (0.5, 1.5):
        scheduler: Any = build(name, own, mu)
        more: dict[str, Any] = {"mu": mu} if schedulers.needs_size(scheduler) else {}
        schedule = Schedule(scheduler, 10, **more)
        levels = [schedule.coefficients(i) for i in range(len(schedule))]
        for t, (a, s) in zip(schedule.timesteps.tolist(), levels, strict=True):
            assert (a, s) == pytest.approx((1 - t / 1000, t / 1000), abs=1e-6)
        taken.append(schedule.timesteps)
    assert (taken[0] <= taken[1]).all()
    if name in {"euler", "dpmpp_2m", "unipc"}:
        sigma = np.linspace(1, 0.001, 10) if name == "euler" else np.linspace(0.999, 0.0999, 10)
        by = 1.5 if kind == "linear" else math.exp(1.5)
        expected = 1000 * by * sigma / (1 + (by - 1) * sigma)
        np.testing.assert_allclose(taken[1], expected, rtol=1e-2)


def test_a_flow_that_has_not_been_told_a_size_has_its_own_shift() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name in FLOWS:
        schedule = Schedule(build(name, own), 2)
        late = schedule.coefficients(len(schedule) - 1)[1]
        assert late == pytest.approx(0.75, abs=0.01) if name == "dpmpp_2m" else late < 1


@pytest.mark.parametrize(("steps", "at"), [(10, 0.05), (49, 0.02), (20, 1 / 49), (3, 0.3)])
def test_no_call_left_names_what_would_work(steps: int, at: float) -> None:
    own = own_scheduler()
    with pytest.raises(SchedulerError, match="leaves no step") as caught:
        Schedule(own, steps, at=at)
    words = str(caught.value).replace(";", "").split()
    strength, enough = float(words[words.index(">=") + 1]), int(words[-2])
    assert len(Schedule(own, steps, at=strength)) == 1
    assert len(Schedule(own, enough, at=at)) >= 1
    with pytest.raises(SchedulerError):
        Schedule(own, enough - 1, at=at)


@pytest.mark.parametrize(("steps", "at"), [(0, 1.0), (-3, 1.0), (10, 0.0), (10, 1.5)])
def test_steps_and_strength_out_of_range(steps: int, at: float) -> None:
    with pytest.raises(SchedulerError, match="need steps"):
        Schedule(own_scheduler(), steps, at=at)


def test_more_steps_than_the_scheduler_can_make() -> None:
    with pytest.raises(SchedulerError, match="cannot make 60 steps"):
        Schedule(build("lcm", own_scheduler()), 60)


def test_a_scheduler_without_add_noise_runs_only_from_the_start() -> None:
    own = IPNDMScheduler()
    with pytest.raises(SchedulerError, match="cannot start at strength"):
        Schedule(own, 10, at=0.5)
    schedule = Schedule(own, 10)
    assert len(schedule) == 10
    for attempt in (
        lambda: schedule.add_noise(latents_of(1), latents_of(2), 0),
        lambda: schedule.coefficients(0),
    ):
        with pytest.raises(SchedulerError, match="IPNDM"):
            attempt()


def test_calls_run_in_order() -> None:
    schedule = Schedule(build("euler", own_scheduler()), 5)
    x = latents_of(1)
    with pytest.raises(DiffeditError, match="out of order"):
        schedule.step(x, 1, x)
    schedule.step(x, 0, x)
    with pytest.raises(DiffeditError, match="out of order"):
        schedule.scale(x, 0)


# Noise of stochastic samplers


def stochastic_run(name: str, seeds: list[int], latents: Tensor) -> Tensor:
    schedule = Schedule(build(name, own_scheduler()), 8)
    model = gaussian_model("epsilon", zero_snr=False)
    return trip(schedule, model, latents * schedule.initial_noise_scale, seeds)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_neighbours_in_a_batch_change_no_noise(name: str) -> None:
    latents = latents_of(0, batch=3)
    together = stochastic_run(name, [5, 6, 7], latents)
    for item, seed in enumerate([5, 6, 7]):
        alone = stochastic_run(name, [seed], latents[item : item + 1])
        assert torch.equal(alone[0], together[item])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_seed_matters_exactly_to_stochastic_samplers(name: str) -> None:
    one, other = (stochastic_run(name, [seed], latents_of(0)) for seed in (5, 6))
    assert torch.equal(one, other) is not SCHEDULERS[name].stochastic


def test_eta_makes_ddim_stochastic() -> None:
    schedule = Schedule(own_scheduler(), 5, eta=1.0)
    theirs = own_scheduler()
    theirs.set_timesteps(5)
    x, out = latents_of(1), latents_of(2)
    expected = theirs.step(
        out, theirs.timesteps[0], x, eta=1.0, generator=torch.Generator().manual_seed(3)
    ).prev_sample
    got = schedule.step(out, 0, x, [torch.Generator().manual_seed(3)])
    assert torch.equal(got, expected)
    with pytest.raises(SchedulerError, match="eta"):
        Schedule(build("euler", own_scheduler()), 5, eta=1.0)


def test_seed_needs_one_seed_per_item() -> None:
    schedule = Schedule(build("dpmpp_sde", own_scheduler()), 5)
    with pytest.raises(DiffeditError, match="2 seeds for a batch of 3"):
        schedule.seed([1, 2], latents_of(0, batch=3))


# Names


def test_the_table_tells_the_truth_about_the_classes() -> None:
    for name, info in SCHEDULERS.items():
        cls = getattr(diffusers, info.cls)
        assert (info.name, info.calls) == (name, cls.order)
        assert info.add_noise == hasattr(cls, "add_noise")
        if info.flow is not None:
            flow = getattr(diffusers, info.flow)
            assert flow.order == info.calls
            assert hasattr(flow, "add_noise") or hasattr(flow, "scale_noise")
    assert list(SCHEDULERS) == sorted(SCHEDULERS)
    assert list(schedulers.__all__) == sorted(schedulers.__all__, key=lambda n: (n.upper() != n, n))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(SchedulerError, match="did you mean 'dpmpp_2m'"):
        build("dpmp_2m", own_scheduler())


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(ZERO_SNR)))
def test_a_scheduler_that_ignores_zero_snr_is_refused(name: str) -> None:
    own = own_scheduler("v_prediction", zero_snr=True)
    with pytest.raises(SchedulerError, match="training noise schedule") as caught:
        build(name, own)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(name) in message
    assert "use one of: ddim, ddpm" in message
    assert usable(own) == ZERO_SNR


def test_a_prediction_type_without_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SchedulerError, match="predicts 'sample'"):  # accepts it, then rejects it
        build("euler_a", own_scheduler("sample"))
    build("ddim", own_scheduler("sample"))

    # A class that takes no prediction type; from_config keeps the key in its config all the same.
    monkeypatch.setattr(diffusers, "DDIMScheduler", IPNDMScheduler)
    with pytest.raises(SchedulerError, match="model predicts 'v_prediction'"):
        build("ddim", own_scheduler("v_prediction"))
    with pytest.raises(SchedulerError, match="another kind"):
        build("ddim", own_scheduler())


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_the_models_own_scheduler_is_left_alone(name: str | None) -> None:
    own = own_scheduler()
    config, state = dict(own.config), copy.deepcopy(vars(own))
    schedule = Schedule(build(name, own), 5, at=0.5)
    trip(schedule, gaussian_model("epsilon", zero_snr=False), latents_of(1), [1])
    assert dict(own.config) == config
    assert repr(vars(own)) == repr(state)


def test_schedules_of_one_scheduler_share_nothing() -> None:
    scheduler = build("dpmpp_2m", own_scheduler())
    model = gaussian_model("epsilon", zero_snr=False)
    state = repr(vars(scheduler))
    alone = trip(Schedule(scheduler, 6), model, latents_of(1), [1])
    assert repr(vars(scheduler)) == state

    first, other = Schedule(scheduler, 6), Schedule(scheduler, 9)
    x, y = latents_of(1), latents_of(2)
    for i, t in enumerate(first.timesteps):  # interleaved
        x = first.step(model(first.scale(x, i), t), i, x)
        y = other.step(model(other.scale(y, i), other.timesteps[i]), i, y)
    assert torch.equal(x, alone)


def test_making_a_schedule_draws_nothing() -> None:
    for name in SCHEDULERS:
        before = torch.random.get_rng_state()
        Schedule(build(name, own_scheduler()), 5)
        assert torch.equal(torch.random.get_rng_state(), before), name


def test_build_keeps_what_is_known_of_the_model() -> None:
    # As StableDiffusionPipeline patches it: the config changes, the list of defaults does not.
    own: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    patched = dict(own.config) | {"steps_offset": 1}
    own._internal_dict = diffusers.configuration_utils.FrozenDict(patched)
    assert "steps_offset" in own.config["_use_default_values"]
    for name in SCHEDULERS:
        built: Any = build(name, own)
        assert built.config.steps_offset == 1, name
        assert not built.config.get("clip_sample"), name
    # Defaults of the own class are not those of Heun.
    plain: Any = build("heun", DDIMScheduler())
    assert (plain.config.beta_start, plain.config.beta_end) == (0.0001, 0.02)


def test_a_name_means_one_thing() -> None:
    own = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    )
    euler, dpm, karras = (build(n, own) for n in ("euler", "dpmpp_2m", "dpmpp_2m_karras"))
    assert not euler.config.use_karras_sigmas
    assert (dpm.config.use_karras_sigmas, dpm.config.algorithm_type) == (False, "dpmsolver++")
    assert karras.config.use_karras_sigmas
    assert build(None, own).config.use_karras_sigmas


@pytest.mark.parametrize(
    ("name", "why"), [("ipndm", "without add_noise"), ("cm", "consistency models in pixels")]
)
def test_some_are_refused_by_name_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(SchedulerError, match=why):
        build(name, own_scheduler())
