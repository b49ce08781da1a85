"""Samplers by name, and the calls that one pass makes to one of them.

diffusers' schedulers are reused as they are. They keep state from call to call (a step index,
earlier model outputs), so a pass gets its own deep copy, wrapped in a :class:`Schedule`.

Words: the latents at a call are ``a * x0 + s * noise``. Variance-exploding samplers (Euler, Heun,
DPM2 …) have ``a = 1`` and ``s = sigma``; variance-preserving ones ``a = sqrt(alpha_cumprod)`` and
``s = sqrt(1 - alpha_cumprod)``. A *call* is one model evaluation: Heun makes 19 for 10 steps.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor

from diffedit.errors import DiffeditError, SchedulerError, nearest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

__all__ = [
    "SCHEDULERS",
    "Call",
    "Schedule",
    "SchedulerInfo",
    "build",
    "flow_calls_kept",
    "named",
    "sd_calls_kept",
    "usable",
]


@dataclass(frozen=True)
class SchedulerInfo:
    """What a named scheduler is and can do.

    Attributes:
        name: short and stable; what a workflow file says.
        cls: name of the class in diffusers.
        options: constructor arguments that make the name mean one thing, whatever the model's own
            scheduler is configured to.
        order: order of accuracy of the solver (of its deterministic part, if stochastic).
        calls: model calls per step (the last step of a two-call solver takes one).
        stochastic: draws noise at each step.
        add_noise: can start inside the schedule, as img2img and inpaint do.
    """

    name: str
    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)
    order: int = 1
    calls: int = 1
    stochastic: bool = False
    add_noise: bool = True


_DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = _DPMPP | {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}

SCHEDULERS: Mapping[str, SchedulerInfo] = {
    info.name: info
    for info in (
        SchedulerInfo("ddim", "DDIMScheduler"),
        SchedulerInfo("ddpm", "DDPMScheduler", stochastic=True),
        SchedulerInfo("deis", "DEISMultistepScheduler",
                      {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"}, 2),
        SchedulerInfo("dpm2", "KDPM2DiscreteScheduler", order=2, calls=2),
        SchedulerInfo("dpm2_a", "KDPM2AncestralDiscreteScheduler", order=2, calls=2,
                      stochastic=True),
        SchedulerInfo("dpmpp_2m", "DPMSolverMultistepScheduler", _DPMPP, 2),
        SchedulerInfo("dpmpp_2m_karras", "DPMSolverMultistepScheduler", _DPMPP | _KARRAS, 2),
        SchedulerInfo("dpmpp_2m_sde", "DPMSolverMultistepScheduler", _SDE, 2, stochastic=True),
        SchedulerInfo("dpmpp_2m_sde_karras", "DPMSolverMultistepScheduler", _SDE | _KARRAS, 2,
                      stochastic=True),
        SchedulerInfo("dpmpp_sde", "DPMSolverSDEScheduler", order=2, calls=2, stochastic=True),
        SchedulerInfo("dpmpp_sde_karras", "DPMSolverSDEScheduler", _KARRAS, 2, 2, stochastic=True),
        SchedulerInfo("euler", "EulerDiscreteScheduler"),
        SchedulerInfo("euler_a", "EulerAncestralDiscreteScheduler", stochastic=True),
        SchedulerInfo("euler_karras", "EulerDiscreteScheduler", _KARRAS),
        SchedulerInfo("heun", "HeunDiscreteScheduler", order=2, calls=2),
        SchedulerInfo("lcm", "LCMScheduler", stochastic=True),
        SchedulerInfo("lms", "LMSDiscreteScheduler", order=4),
        SchedulerInfo("plms", "PNDMScheduler", {"skip_prk_steps": True}, 4),
        SchedulerInfo("unipc", "UniPCMultistepScheduler",
                      {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}, 2),
    )
}  # fmt: skip

#: Schedulers of diffusers that people ask for by name and that no model here can use, and why.
_REFUSED: Mapping[str, str] = {
    "ipndm": "IPNDMScheduler ignores the model's training schedule, and without add_noise it"
    " could do neither img2img nor inpaint",
}

# Latents are not bounded, yet DDIM and DDPM clip to [-1, 1] unless told otherwise; and a model
# whose own scheduler uses Karras sigmas must not turn "euler" into something else.
_COMMON: Mapping[str, Any] = {
    "clip_sample": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}

# Facts about the model, not choices of a sampler. `from_config` drops values that nobody set
# explicitly, and with them what a pipeline patched in later (steps_offset), and takes the new
# class's defaults instead, which differ.
_MODEL_KEYS = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "steps_offset",
})  # fmt: skip


def build(name: str | None, own: SchedulerMixin) -> SchedulerMixin:
    """Return a fresh scheduler for a model whose own scheduler is ``own``, which is left alone.

    ``None`` means a copy of the model's own. A name means that sampler on the model's training
    schedule.

    Raises:
        SchedulerError: the name is unknown, or that scheduler cannot represent the model's training
            schedule or prediction type.
    """
    if name is None:
        return copy.deepcopy(own)
    scheduler: SchedulerMixin = _construct(name, own)
    if reason := _unfit(scheduler, own):
        rest = ", ".join(other for other in usable(own) if other != name)
        advice = f"use one of: {rest}" if rest else "use the model's own scheduler"
        raise SchedulerError(f"scheduler {name!r} does not fit this model: {reason}; {advice}")
    return scheduler


def named(name: str) -> SchedulerInfo:
    """What is known of a scheduler by its name; needs no model.

    Raises:
        SchedulerError: the name is unknown, or no model here can use it.
    """
    if name in _REFUSED:
        raise SchedulerError(f"scheduler {name!r} cannot be used: {_REFUSED[name]}")
    if name not in SCHEDULERS:
        raise SchedulerError(f"unknown scheduler {name!r}{nearest(name, SCHEDULERS)}")
    return SCHEDULERS[name]


def usable(own: SchedulerMixin) -> list[str]:
    """Names of the schedulers that :func:`build` accepts for this model."""
    names = []
    for name in SCHEDULERS:
        try:
            if not _unfit(_construct(name, own), own):
                names.append(name)
        except SchedulerError:  # an optional dependency is missing
            continue
    return names


def _construct(name: str, own: Any) -> Any:
    info = named(name)
    cls = getattr(diffusers, info.cls)
    config = dict(own.config)
    config["_use_default_values"] = set(config.get("_use_default_values", ())) - _MODEL_KEYS
    accepted = inspect.signature(cls.__init__).parameters
    options = {key: value for key, value in _COMMON.items() if key in accepted} | dict(info.options)
    try:
        return cls.from_config(config, **options)
    except ImportError as error:
        raise SchedulerError(f"scheduler {name!r} needs a missing package: {error}") from error


def _unfit(scheduler: Any, own: Any) -> str | None:
    """Why ``scheduler`` cannot run the model of ``own``, or None.

    Compares what the scheduler computed, not what its config says: PNDM and Heun keep the zero-SNR
    key of a config and ignore it.
    """
    wanted = own.config.get("prediction_type", "epsilon")
    accepted = inspect.signature(type(scheduler).__init__).parameters
    got = scheduler.config.get("prediction_type") if "prediction_type" in accepted else "epsilon"
    if got != wanted:
        return f"the model predicts {wanted!r}, the scheduler expects {got!r}"
    levels = getattr(own, "alphas_cumprod", None)
    ours = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or ours is None or levels.shape != ours.shape:
        return "its training noise schedule is of another kind"
    # Several classes put 2**-24 in place of the last 0 for zero terminal SNR.
    if not torch.allclose(ours.cpu(), levels.cpu(), rtol=0, atol=1e-4):
        return (
            "it cannot represent the model's training noise schedule (signal left at the last "
            f"timestep: model {levels[-1]:.2g}, scheduler {ours[-1]:.2g})"
        )
    try:
        Schedule(scheduler, 4)
    except SchedulerError as error:  # a prediction type that the class accepts and then rejects
        return str(error)
    return None


@dataclass(frozen=True)
class Call:
    """One call of a trip, as contributed functions see it.

    Attributes:
        index: which call, counted from 0.
        total: how many calls the trip makes, after strength has cut the schedule.
        timestep: the model's timestep at this call.
        signal: `a`, where the latents before the call are ``a * x0 + s * noise``; nan for a
            scheduler that does not tell.
        noise: `s` of the same.
    """

    index: int
    total: int
    timestep: float
    signal: float = math.nan
    noise: float = math.nan


def sd_calls_kept(steps: int, at: float) -> int:
    """Steps that run at strength ``at``, as SD and SDXL round."""
    return min(int(steps * at), steps)


def flow_calls_kept(steps: int, at: float) -> int:
    """Steps that run at strength ``at``, as SD3 and Flux round."""
    return steps - int(max(steps - steps * at, 0))


class Schedule:
    """The scheduler calls that one pass makes: one deep copy, one trip, in order.

    Everything the scheduler looks up stays on the CPU, so that no call waits for a GPU; only
    ``timesteps``, which the model reads, is on ``device``.

    Args:
        scheduler: from :func:`build`; copied, not changed.
        steps: sampling steps asked for, before the strength cut.
        device: where ``timesteps`` goes.
        at: strength in (0, 1]; 1 runs the whole schedule.
        kept: how a model family rounds ``steps * at``.
        eta: DDIM's noise, in [0, 1]; 0 is deterministic.
        compat: noise levels exactly as diffusers' inpaint pipelines have them, also where they are
            wrong (see :meth:`add_noise`).
        options: passed to ``set_timesteps`` (Flux: ``mu``, ``sigmas``).

    Raises:
        SchedulerError: ``steps``, ``at`` or ``eta`` is out of the scheduler's range, or no call is
            left.

    Attributes:
        scheduler: the copy.
        steps, at: as asked.
        begin: index of the first call in the uncut schedule.
        timesteps: (calls,) the timestep of each call that runs.
        prediction_type: what the model's raw output means: ``epsilon``, ``v_prediction``,
            ``sample`` or ``flow_prediction``.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        device: str | torch.device = "cpu",
        *,
        at: float = 1.0,
        kept: Callable[[int, float], int] = sd_calls_kept,
        eta: float = 0.0,
        compat: bool = False,
        **options: Any,
    ) -> None:
        self.scheduler: Any = copy.deepcopy(scheduler)
        self.steps, self.at, self.compat = steps, at, compat
        self._name = type(scheduler).__name__
        if steps < 1 or not 0 < at <= 1:
            raise SchedulerError(f"need steps >= 1 and strength in (0, 1]; got {steps} and {at:g}")
        try:
            self.scheduler.set_timesteps(steps, device="cpu", **options)
        except ValueError as error:
            raise SchedulerError(f"{self._name} cannot make {steps} steps: {error}") from error
        self._noise_fn = _noise_function(self.scheduler)
        if at < 1 and self._noise_fn is None:
            raise SchedulerError(f"{self._name} cannot start at strength {at:g}, only at 1")

        cut = steps - kept(steps, at)
        self.begin: int = cut * self.scheduler.order
        timesteps = self.scheduler.timesteps[self.begin :]
        if not len(timesteps):
            strength = math.ceil(1000 / steps) / 1000
            raise SchedulerError(
                f"strength {at:g} of {steps} steps leaves no step to run; use strength >= "
                f"{strength:g} or at least {_enough_steps(at, kept)} steps"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin)
        self._calls: list[Tensor] = list(timesteps.unbind())
        on_mps = torch.device(device).type == "mps" and timesteps.dtype == torch.float64
        self.timesteps: Tensor = timesteps.to(device, torch.float32 if on_mps else timesteps.dtype)

        default = "flow_prediction" if hasattr(self.scheduler, "scale_noise") else "epsilon"
        self.prediction_type: str = self.scheduler.config.get("prediction_type", default)
        accepted = inspect.signature(self.scheduler.step).parameters
        self._takes_generator = "generator" in accepted
        if eta and "eta" not in accepted:
            raise SchedulerError(f"{self._name} has no eta; only DDIM has")
        self._step_options = {"eta": eta} if "eta" in accepted else {}
        self._done = 0
        self._levels = self._rehearse() if self._noise_fn else []

    def __len__(self) -> int:
        """The number of model calls, which is not always the number of steps."""
        return len(self._calls)

    @property
    def tells_noise(self) -> bool:
        """Whether the scheduler says how noisy its latents are, as x0 and img2img need."""
        return self._noise_fn is not None

    @property
    def initial_noise_scale(self) -> float:
        """Standard deviation of the latents that pure noise starts from."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def call(self, i: int) -> Call:
        """Call `i` as contributed functions see it."""
        a, s = self._levels[i] if self.tells_noise else (math.nan, math.nan)
        return Call(i, len(self), float(self._calls[i]), a, s)

    def scale(self, latents: Tensor, i: int) -> Tensor:
        """The latents as the model wants to see them at call ``i``, the next to be made."""
        self._expect(i)
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = self.scheduler.scale_model_input(latents, self._calls[i])
        return scaled

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """``x0`` with the noise level that the latents have before call ``i``.

        After the last call (``i == len(self)``) that is ``x0`` itself. With ``compat`` the result
        for the next call to be made has the bits of diffusers' pipelines.

        diffusers is wrong at the second call of DPM2 and DPM++ SDE: the latents are at a midpoint
        between two noise levels, but get a source with the lower one. Only ``compat`` follows it.
        """
        if i == len(self):
            return x0
        if self._noise_fn is None:
            raise SchedulerError(f"{self._name} cannot noise a source image")
        # Only for comparisons: it makes a GPU wait, and the sigma samplers ignore the timestep
        # given here and use their own position.
        if self.compat and i == self._done:
            return self._noise_fn(x0, noise, self._calls[i][None])
        a, s = self._levels[i]
        return a * x0 + s * noise

    def step(
        self,
        output: Tensor,
        i: int,
        latents: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """The latents after call ``i``.

        Args:
            output: (b, c, h, w) the model's raw output, guidance applied.
            i: the next call to be made; calls run in order.
            latents: (b, c, h, w) before the call, not scaled.
            generators: one per batch item, so that an item draws what it draws alone; or a single
                one for the whole batch. Samplers that draw nothing leave them untouched.
        """
        self._expect(i)
        options: dict[str, Any] = dict(self._step_options)
        if self._takes_generator and generators:
            options["generator"] = generators[0] if len(generators) == 1 else list(generators)
        stepped: Tensor = self.scheduler.step(
            output, self._calls[i], latents, return_dict=False, **options
        )[0]
        self._done += 1
        return stepped

    def coefficients(self, i: int) -> tuple[float, float]:
        """``(a, s)`` such that the latents before call ``i`` are ``a * x0 + s * noise``."""
        if self._noise_fn is None:
            raise SchedulerError(f"{self._name} does not tell its noise levels")
        return self._levels[i]

    def to_x0(self, output: Tensor, i: int, latents: Tensor) -> Tensor:
        """The clean latents that the model's raw ``output`` at call ``i`` stands for.

        Stable at zero terminal SNR (``a = 0``) for ``v_prediction``, where epsilon says nothing.
        """
        a, s = self.coefficients(i)
        x, out = _wide(latents), _wide(output)
        match self.prediction_type:
            case "epsilon":
                x0 = (x - s * out) / a
            case "v_prediction":  # Salimans & Ho 2022, appendix D, for unit variance: a² + s² = 1
                c = math.hypot(a, s)
                x0 = (a / c) * (x / c) - (s / c) * out
            case "sample":
                x0 = out
            case "flow_prediction":  # the output is noise - x0
                x0 = (x - s * out) / (a + s)
            case other:
                raise SchedulerError(f"unknown prediction type {other!r}")
        return x0.to(latents.dtype)

    def from_x0(self, x0: Tensor, i: int, latents: Tensor) -> Tensor:
        """The raw output that stands for ``x0`` at call ``i``: the inverse of :meth:`to_x0`."""
        a, s = self.coefficients(i)
        x, clean = _wide(latents), _wide(x0)
        match self.prediction_type:
            case "epsilon":
                out = (x - a * clean) / s
            case "v_prediction":
                c = math.hypot(a, s)
                out = ((a / c) * (x / c) - clean) * (c / s)
            case "sample":
                out = clean
            case "flow_prediction":
                out = (x - (a + s) * clean) / s
            case other:
                raise SchedulerError(f"unknown prediction type {other!r}")
        return out.to(latents.dtype)

    def seed(self, seeds: Sequence[int], latents: Tensor) -> None:
        """Give samplers that draw from a Brownian tree (DPM++ SDE) one tree per batch item.

        The noise is drawn on the CPU in float32, so neither neighbours in the batch nor the device
        change it. Never called, such a sampler draws its seed from torch's global generator, as in
        diffusers. Does nothing for other samplers.
        """
        if not hasattr(self.scheduler, "noise_sampler"):
            return
        if len(seeds) != len(latents):
            raise DiffeditError(f"{len(seeds)} seeds for a batch of {len(latents)}")
        # Needs torchsde, without which there is no scheduler with such a tree.
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        sigmas = self.scheduler.sigmas
        shape = torch.empty(latents.shape, dtype=torch.float32)
        # A little wider than the schedule, whose ends torchsde's rounding would put outside.
        lowest, highest = sigmas[sigmas > 0].min().item() * 0.999, sigmas.max().item() * 1.001
        tree = BrownianTreeNoiseSampler(shape, lowest, highest, [int(seed) for seed in seeds])
        self.scheduler.noise_sampler = lambda sigma, sigma_next: tree(sigma, sigma_next).to(latents)

    def _expect(self, i: int) -> None:
        if i != self._done:
            raise DiffeditError(f"call {i} out of order: {self._done} is the next of {len(self)}")

    def _rehearse(self) -> list[tuple[float, float]]:
        """Run the trip on a double-precision copy and read the noise level of every call.

        The scheduler's own ``add_noise`` tells it, except inside a step of a two-call solver, where
        it may name the level that the step leads to; there the input scaling tells it.

        Returns:
            ``(a, s)`` of every call.
        """
        levels: list[tuple[float, float]] = []
        dry = copy.deepcopy(self.scheduler)
        for key, value in vars(dry).items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "timesteps":
                setattr(dry, key, value.double())
        if hasattr(dry, "noise_sampler"):
            dry.noise_sampler = lambda *_: 0.0  # a Brownian tree is slow to grow
        noise_fn = _noise_function(dry)
        assert noise_fn is not None  # the caller checked
        zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1).double()
        with torch.random.fork_rng(devices=[]):  # some samplers draw from the global generator
            for t in self._calls:
                scaled = dry.scale_model_input(one, t) if hasattr(dry, "scale_model_input") else one
                a, s = noise_fn(one, zero, t[None]).item(), noise_fn(zero, one, t[None]).item()
                if not getattr(dry, "state_in_first_order", True):  # scaled = 1 / sqrt(1 + s²)
                    s = math.sqrt(1 / scaled.item() ** 2 - 1)
                levels.append((a, s))
                try:
                    dry.step(zero, t, zero)
                except (NotImplementedError, ValueError) as error:
                    raise SchedulerError(
                        f"{self._name} cannot run a model that predicts {self.prediction_type!r}"
                    ) from error
        return levels


def _noise_function(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """``(x0, noise, timestep) -> noised``; flow matching has another name and order for it."""
    if hasattr(scheduler, "add_noise"):
        noise_fn: Callable[[Tensor, Tensor, Tensor], Tensor] = scheduler.add_noise
        return noise_fn
    if hasattr(scheduler, "scale_noise"):
        return lambda x0, noise, t: scheduler.scale_noise(x0, t, noise)
    return None


def _enough_steps(at: float, kept: Callable[[int, float], int]) -> int:
    steps = math.ceil(1 / at)
    while kept(steps, at) < 1:  # floats: int(n * (1 / n)) is 0 for n = 49
        steps += 1
    return steps


def _wide(x: Tensor) -> Tensor:
    """At least float32: sigmas near 4096 (zero terminal SNR) overflow half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
