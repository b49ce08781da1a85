"""The calls that one pass makes to a scheduler of diffusers.

diffusers' schedulers are reused as they are. They keep state from call to call (a step index,
earlier model outputs), so a pass gets its own deep copy, wrapped in a :class:`Schedule`.

Words: the latents at a call are ``a * x0 + s * noise``. Variance-exploding samplers (Euler, Heun,
DPM2 …) have ``a = 1`` and ``s = sigma``; variance-preserving ones ``a = sqrt(alpha_cumprod)`` and
``s = sqrt(1 - alpha_cumprod)``; rectified flows ``a = 1 - sigma`` and ``s = sigma``. A *call* is
one model evaluation: Heun makes 19 for 10 steps.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffedit.errors import DiffeditError, SchedulerError

__all__ = [
    "Call",
    "Schedule",
    "flow_calls_kept",
    "prediction_type",
    "sd_calls_kept",
]


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


def prediction_type(scheduler: Any) -> str:
    """What a model's raw output means: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_…``."""
    default = "flow_prediction" if hasattr(scheduler, "scale_noise") else "epsilon"
    said: str = scheduler.config.get("prediction_type", default)
    return said


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
        eta: how much noise DDIM and TCD draw at each step, in [0, 1]; None: what is usual (DDIM
            none, TCD 0.3).
        compat: noise levels exactly as diffusers' inpaint pipelines have them, also where they are
            wrong (see :meth:`add_noise`).
        since, until: the share of the way from noise to data that is made, in training time, where
            another trip goes on after this one or went before.
        options: passed to ``set_timesteps`` (Flux: ``mu``, ``sigmas``).

    Raises:
        SchedulerError: ``steps``, ``at`` or ``eta`` is out of the scheduler's range, or no call is
            left.

    Attributes:
        scheduler: the copy.
        steps, at: as asked.
        begin: index of the first call in the uncut schedule.
        takes_noise: whether what it draws can be said from outside.
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
        eta: float | None = None,
        compat: bool = False,
        since: float = 0.0,
        until: float = 1.0,
        **options: Any,
    ) -> None:
        self.scheduler: Any = copy.deepcopy(scheduler)
        self.steps, self.at, self.compat = steps, at, compat
        self.since, self.until = since, until
        self._name = type(scheduler).__name__
        if steps == 1 and self.scheduler.config.get("shift_terminal"):
            # It says where the last of the steps is, and stretches the others; diffusers divides
            # 0 by 0 where the last is the first.
            self.scheduler.register_to_config(shift_terminal=None)
        if steps < 1 or not 0 < at <= 1:
            raise SchedulerError(f"need steps >= 1 and strength in (0, 1]; got {steps} and {at:g}")
        try:
            self.scheduler.set_timesteps(steps, device="cpu", **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise SchedulerError(f"{self._name} cannot make {steps} steps: {error}") from error
        self._noise_fn = _noise_function(self.scheduler)
        if at < 1 and self._noise_fn is None:
            raise SchedulerError(f"{self._name} cannot start at strength {at:g}, only at 1")

        cut = steps - kept(steps, at)
        self.begin: int = cut * self.scheduler.order
        end = len(self.scheduler.timesteps)
        if since > 0:
            self.begin = self._passed(since)
            if compat and self.scheduler.order == 2 and (end - self.begin) % 2 == 0:
                self.begin -= 1  # as in diffusers, where base and refiner then overlap
        if until < 1:
            end = self._passed(until)
        timesteps = self.scheduler.timesteps[self.begin : end]
        if not len(timesteps) and (since, until) != (0.0, 1.0):
            whence = f"strength {at:g}" if at < 1 else f"{since:g}"
            raise SchedulerError(
                f"none of {steps} steps lies between {whence} and {until:g} of the way"
            )
        if until < 1 and end == len(self.scheduler.timesteps):
            raise SchedulerError(
                f"all {steps} steps lie before {until:g} of the way, and nothing is left for"
                " another pass: stop earlier, or take more steps"
            )
        if not len(timesteps):
            strength = math.ceil(1000 / steps) / 1000
            raise SchedulerError(
                f"strength {at:g} of {steps} steps leaves no step to run; use strength >= "
                f"{strength:g} or at least {_enough_steps(at, kept)} steps"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin)
        self._calls: list[Tensor] = list(timesteps.unbind())
        self._next: list[Tensor] = list(self.scheduler.timesteps[end : end + 1].unbind())
        self.prediction_type = prediction_type(self.scheduler)
        if self.prediction_type == "flow_prediction" and not (
            compat or timesteps.is_floating_point()
        ):
            # Some classes cut a flow's timesteps to integers, up to a thousandth of the whole off.
            sigmas = self.scheduler.sigmas[self.begin :][: len(timesteps)]
            timesteps = sigmas * self.scheduler.config.num_train_timesteps
        self._times: list[float] = timesteps.tolist()
        on_mps = torch.device(device).type == "mps" and timesteps.dtype == torch.float64
        self.timesteps: Tensor = timesteps.to(device, torch.float32 if on_mps else timesteps.dtype)

        accepted = inspect.signature(self.scheduler.step).parameters
        self._takes_generator = "generator" in accepted
        self.takes_noise: bool = "variance_noise" in accepted
        if eta is not None and "eta" not in accepted:
            raise SchedulerError(f"{self._name} has no eta; only DDIM and TCD have")
        self._step_options = {} if eta is None else {"eta": eta}
        self._done = 0
        #: Whether it draws noise as it goes.
        self.draws: bool = hasattr(self.scheduler, "noise_sampler")
        self._levels = self._rehearse() if self._noise_fn else []

    def __len__(self) -> int:
        """The number of model calls, which is not always the number of steps."""
        return len(self._calls)

    def _passed(self, share: float) -> int:
        """How many calls of the whole schedule are made when so much of the way has been."""
        trained = self.scheduler.config.num_train_timesteps
        calls = int((self.scheduler.timesteps >= round(trained - share * trained)).sum())
        whole = calls if self.compat or self.scheduler.order == 1 else calls + calls % 2
        return min(whole, len(self.scheduler.timesteps))  # steps of two calls are not cut in two

    def progress(self, i: int, origin: float | None = None) -> float:
        """The share of the calls from where sampling began that are made before call ``i``.

        Args:
            origin: where it began, as a share of the whole schedule; None: with this trip.
        """
        whole = len(self.scheduler.timesteps)
        began = self.begin if origin is None else origin * whole
        return (self.begin + i - began) / (whole - began)

    @property
    def origin(self) -> float:
        """Where this trip begins, as a share of the whole schedule."""
        return self.begin / len(self.scheduler.timesteps)

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
        return Call(i, len(self), self._times[i], a, s)

    def scale(self, latents: Tensor, i: int) -> Tensor:
        """The latents as the model wants to see them at call ``i``, the next to be made."""
        self._expect(i)
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = self.scheduler.scale_model_input(latents, self._calls[i])
        return scaled

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """``x0`` with the noise level that the latents have before call ``i``.

        After the last call (``i == len(self)``) that is ``x0`` itself, unless the way goes on. With
        ``compat`` the result for the next call to be made has the bits of diffusers' pipelines.

        diffusers is wrong at the second call of DPM2 and DPM++ SDE: the latents are at a midpoint
        between two noise levels, but get a source with the lower one. Only ``compat`` follows it.
        """
        if i == len(self) and not self._next:
            return x0
        if self._noise_fn is None:
            raise SchedulerError(f"{self._name} cannot noise a source image")
        # Only for comparisons: it makes a GPU wait, and the sigma samplers ignore the timestep
        # given here and use their own position.
        if self.compat and i == self._done < len(self):
            return self._noise_fn(x0, noise, self._calls[i][None])
        a, s = self._levels[i]
        return a * x0 + s * noise

    def step(
        self,
        output: Tensor,
        i: int,
        latents: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The latents after call ``i``.

        Args:
            output: (b, c, h, w) the model's raw output, guidance applied.
            i: the next call to be made; calls run in order.
            latents: (b, c, h, w) before the call, not scaled.
            generators: one per batch item, so that an item draws what it draws alone; or a single
                one for the whole batch. Samplers that draw nothing leave them untouched.
            noise: (b, c, h, w) instead of what it would draw, of unit deviation.
        """
        self._expect(i)
        options: dict[str, Any] = dict(self._step_options)
        if noise is not None:
            if not self.takes_noise:
                raise SchedulerError(
                    f"{self._name} takes no noise from outside: use ddim with eta 1, or"
                    " dpmpp_2m_sde"
                )
            options["variance_noise"] = noise
        elif self._takes_generator and generators:
            options["generator"] = generators[0] if len(generators) == 1 else list(generators)
        stepped: Tensor = self.scheduler.step(
            output, self._calls[i], latents, return_dict=False, **options
        )[0]
        self._done += 1
        return stepped

    def drawing(self, output: Tensor, i: int, latents: Tensor) -> tuple[Tensor, float]:
        """What the next call, ``i``, leads to apart from what it draws, and how much it draws.

        Made on copies; nothing is used up.

        Returns:
            The latents after it, had it drawn zeros, and the deviation of what it adds.
        """
        nothing, ones = torch.zeros_like(latents), torch.ones_like(latents)
        still = copy.deepcopy(self).step(output, i, latents, noise=nothing)
        lifted = copy.deepcopy(self).step(output, i, latents, noise=ones)
        return still, float((lifted - still).double().mean())

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
            ``(a, s)`` of every call, and of the next where the way goes on.
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
            for t in self._calls + self._next:
                scaled = dry.scale_model_input(one, t) if hasattr(dry, "scale_model_input") else one
                a, s = noise_fn(one, zero, t[None]).item(), noise_fn(zero, one, t[None]).item()
                if not getattr(dry, "state_in_first_order", True):
                    if self.prediction_type == "flow_prediction":
                        s = t.item() / dry.config.num_train_timesteps
                        a = 1 - s
                    else:  # scaled = 1 / sqrt(1 + s²)
                        s = math.sqrt(1 / scaled.item() ** 2 - 1)
                levels.append((a, s))
                try:
                    made = dry.step(zero, t, zero, return_dict=False, **self._step_options)[0]
                    self.draws = self.draws or bool(made.any())
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
