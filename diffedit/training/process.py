"""The forward process: how a picture becomes noise, what a network is asked, and the way back.

Every process here is Gaussian, x_t = a_t x_0 + b_t ε with ε ~ N(0, I), and every question asked of
a network is a fixed mixture of x_0 and ε. So all targets, their inversions and the posterior follow
from the pair (a_t, b_t), and a trainer need not know which process it trains::

    t = process.at(uniform(len(x0), generator))           # random times
    x_t = process.noised(x0, noise, t)
    prediction = model(x_t, process.timestep(t))
    loss = mse(prediction, process.target(kind, x0, noise, t))

Times are tensors (n,), one per item: for :class:`Diffusion` the integers 0 … T-1 of diffusers
(papers count 1 … T), for :class:`RectifiedFlow` real numbers in [0, 1]. Keep them on the CPU, then
nothing waits for a GPU. Coefficients are float64 and applied in the tensors' dtype, on their
device.

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672);
Kingma et al. 2021 (VDM, arXiv:2107.00630); Salimans & Ho 2022 (v-prediction, arXiv:2202.00512);
Liu et al. 2022 (rectified flow, arXiv:2209.03003); Lin et al. 2023 (arXiv:2305.08891);
Esser et al. 2024 (SD3, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffedit.errors import InputError, SchedulerError, nearest

Kind = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "flow"]
"""What a network predicts, in diffusers' words; ``flow`` is short for ``flow_prediction``."""


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """β in equal steps (Ho et al. 2020, section 4), (T,) float64."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """√β in equal steps, as latent diffusion and Stable Diffusion have it, (T,) float64."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()


def cosine(steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> Tensor:
    """ᾱ_t = f(t) / f(0), f(t) = cos²((t/T + s) / (1 + s) · π/2), β clipped; (T,) float64.

    Nichol & Dhariwal 2021, eq. 17; diffusers' ``squaredcos_cap_v2``.
    """
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - f[1:] / f[:-1]).clamp_max(most)


def raised_cosine(steps: int = 1000, most: float = 0.02) -> Tensor:
    """β_t = (1 − cos(πt/T)) / 2 · β_max for t = 1 … T, (T,) float64: flat at both ends."""
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return (1 - (math.pi * time).cos()) / 2 * most


def sigmoid(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """β along a logistic curve from -6 to 6 (GeoDiff, Xu et al. 2022; diffusers), (T,) float64."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas (T,) shifted and scaled in √ᾱ so that ᾱ_T = 0 (Lin et al. 2023, algorithm 1)."""
    root = (1 - betas.double()).cumprod(0).sqrt()
    signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return 1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])


BETAS: Mapping[str, Callable[..., Tensor]] = {
    "linear": linear,
    "raised_cosine": raised_cosine,
    "scaled_linear": scaled_linear,
    "sigmoid": sigmoid,
    "squaredcos_cap_v2": cosine,
}
"""Schedules by the names that diffusers' configs use (``raised_cosine`` is not among theirs)."""


class Process(ABC):
    """x_t = a_t x_0 + b_t ε. Subclasses say what a_t and b_t are, and which times there are.

    Attributes:
        steps: T, the number of times (of a continuous process: of the grid it is sampled on).
    """

    steps: int

    @staticmethod
    def of(scheduler: Any) -> Process:
        """The process that a diffusers scheduler of this config assumes in training.

        Raises:
            SchedulerError: its noise levels do not come from a schedule of betas or a flow.
        """
        config = scheduler.config
        steps = config.get("num_train_timesteps", 1000)
        if hasattr(scheduler, "scale_noise"):
            # With dynamic shifting the shift belongs to a resolution; the table has none.
            shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
            return RectifiedFlow(shift, steps)
        if config.get("use_flow_sigmas"):
            return RectifiedFlow(config.get("flow_shift", 1.0), steps)
        name = config.get("beta_schedule")
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        elif name in ("linear", "scaled_linear", "sigmoid"):
            betas = BETAS[name](steps, config["beta_start"], config["beta_end"])
        elif name == "squaredcos_cap_v2":
            betas = cosine(steps)
        else:
            known = nearest(str(name), BETAS)
            raise SchedulerError(f"{type(scheduler).__name__} has no beta schedule {name!r}{known}")
        return Diffusion(
            zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
        )

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, b)`` at times ``t``, float64: the scales of the picture and of the noise."""

    @abstractmethod
    def at(self, u: Tensor) -> Tensor:
        """The times at shares ``u`` in [0, 1) of the way to noise (see ``timesteps.py``)."""

    @abstractmethod
    def before(self, t: Tensor) -> Tensor:
        """The times one step nearer to the picture; before the first time stands the picture."""

    @abstractmethod
    def grid(self) -> Tensor:
        """All T times, from the noisiest to the one next to the picture."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What a diffusers model reads as its ``timestep`` at times ``t``."""

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t | x_0), in closed form (Ho et al. 2020, eq. 4)."""
        a, b = self.coefficients(t)
        return scaled(a, x0) + scaled(b, noise)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a² / b², (n,) float64 (Kingma et al. 2021, eq. 2)."""
        a, b = self.coefficients(t)
        return (a / b).square()

    def target(self, kind: Kind, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of this kind is to predict at x_t.

        ``epsilon`` ε (Ho et al. 2020, eq. 14); ``sample`` x_0; ``v_prediction`` a ε − b x_0
        (Salimans & Ho 2022, section 4); ``flow_prediction`` ε − x_0 (Liu et al. 2022, eq. 1, with
        time running from picture to noise as in SD3).
        """
        p, q = self._mixture(kind, t)
        return scaled(p, x0) + scaled(q, noise)

    def x0(self, kind: Kind, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The picture that a prediction implies.

        Raises:
            InputError: ``kind`` is ``epsilon`` and some x_t holds no signal.
        """
        if kind == "sample":
            return prediction
        _, b, _, q, det = self._system(kind, t)
        return scaled(q / det, x_t) - scaled(b / det, prediction)

    def epsilon(self, kind: Kind, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies.

        Raises:
            InputError: ``kind`` is ``sample`` and some x_t holds no noise.
        """
        if kind == "epsilon":
            return prediction
        a, _, p, _, det = self._system(kind, t)
        return scaled(a / det, prediction) - scaled(p / det, x_t)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, …) and variance (n,) float64 of q(x_{t-1} | x_t, x_0).

        Ho et al. 2020, eqs. 6-7, written with (a, b) as in Kingma et al. 2021, appendix A.
        """
        a, b = self.coefficients(t)
        a_before, b_before = self.coefficients(self.before(t))
        variance = self.transition(t)
        mean = scaled(a / a_before * (b_before / b).square(), x_t)
        mean = mean + scaled(a_before * variance / b.square(), x0)
        return mean, variance * (b_before / b).square()

    def transition(self, t: Tensor) -> Tensor:
        """Variance of q(x_t | x_{t-1}), (n,) float64: β_t of a :class:`Diffusion`."""
        a, b = self.coefficients(t)
        a_before, b_before = self.coefficients(self.before(t))
        return b.square() - (a / a_before * b_before).square()

    def _mixture(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(p, q)``: a network of this kind predicts p x_0 + q ε."""
        a, b = self.coefficients(t)
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        mixtures = {
            "epsilon": (zero, one),
            "flow": (-one, one),
            "flow_prediction": (-one, one),
            "sample": (one, zero),
            "v_prediction": (-b, a),
        }
        if kind not in mixtures:
            raise InputError(f"unknown prediction type {kind!r}{nearest(kind, mixtures)}")
        return mixtures[kind]

    def _system(self, kind: Kind, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(a, b, p, q)`` of x_t = a x_0 + b ε and y = p x_0 + q ε, and the determinant."""
        (a, b), (p, q) = self.coefficients(t), self._mixture(kind, t)
        det = a * q - b * p
        if bool((det == 0).any()):
            end = "no signal" if kind == "epsilon" else "no noise"
            raise InputError(
                f"a prediction of {kind!r} says nothing new where x_t holds {end}; predict "
                "'v_prediction' or 'flow_prediction', or keep away from that time"
            )
        return a, b, p, q, det


@dataclass(frozen=True, eq=False)
class Diffusion(Process):
    """The variance-preserving chain x_t = √(1-β_t) x_{t-1} + √β_t ε (Ho et al. 2020, eq. 2).

    Attributes:
        betas: (T,) in (0, 1], noisiest last; kept in float64 on the CPU.
        alphas_cumprod: (T,) float64, ᾱ_t = a².
    """

    betas: Tensor
    alphas_cumprod: Tensor = field(init=False, repr=False)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        betas = self.betas.detach().cpu().double()
        if betas.ndim != 1 or not len(betas):
            raise InputError(f"a schedule is a row of betas; got shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise InputError(f"betas must be in (0, 1]; got {betas.min():g} to {betas.max():g}")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", (1 - betas).cumprod(0))
        object.__setattr__(self, "steps", len(betas))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1-ᾱ_t)); t = -1 is the picture itself."""
        signal = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])[t.cpu()]
        return signal.sqrt(), (1 - signal).sqrt()

    def at(self, u: Tensor) -> Tensor:
        """⌊u T⌋, integers."""
        return (u * self.steps).long().clamp(0, self.steps - 1)

    def before(self, t: Tensor) -> Tensor:
        """The integer before, t - 1."""
        return t - 1

    def grid(self) -> Tensor:
        """T-1 … 0."""
        return torch.arange(self.steps).flip(0)

    def timestep(self, t: Tensor) -> Tensor:
        """The same integers."""
        return t


@dataclass(frozen=True, eq=False)
class RectifiedFlow(Process):
    """Straight lines from picture to noise, x_s = (1-s) x_0 + s ε, s in [0, 1].

    Liu et al. 2022, eq. 1; Esser et al. 2024, eq. 13. ``shift`` moves the times towards noise, for
    pictures of more pixels: s = shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23).

    Attributes:
        shift: 1 for none; SD3 has 3 at 1024 px.
        steps: a diffusers model reads s times this.
    """

    shift: float = 1.0
    steps: int = 1000

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1-s, s)."""
        s = t.cpu().double()
        return 1 - s, s

    def at(self, u: Tensor) -> Tensor:
        """The shifted ``u``."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def before(self, t: Tensor) -> Tensor:
        """One step down the shifted grid; 0 is the picture."""
        u = t / (self.shift - (self.shift - 1) * t)
        return self.at((u - 1 / self.steps).clamp_min(0))

    def grid(self) -> Tensor:
        """The shifted 1, 1 - 1/T … 1/T, float64."""
        return self.at(torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps)

    def timestep(self, t: Tensor) -> Tensor:
        """The share of all T, as SD3 and Flux read it: s T."""
        return t * self.steps


def scaled(coefficient: Tensor, x: Tensor) -> Tensor:
    """``x`` (n, …) times one coefficient per item (n,), in the dtype and on the device of ``x``."""
    # The dtype first: some devices have no float64.
    factor = coefficient.to(x.dtype).to(x.device)
    return factor.view(-1, *[1] * (x.ndim - 1)) * x
