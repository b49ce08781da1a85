"""The variational bound on -log p(x_0), term by term: how many bits a diffusion model needs.

L = L_T + Σ_t L_{t-1} + L_0 (Ho et al. 2020, arXiv:2006.11239, eq. 5): what the last x_T still tells
of the picture, what each step of the model adds, and the cost of the 8-bit values given x_1. It
bounds the description length of the picture from above, for whatever network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffedit.errors import InputError
from diffedit.training.process import Kind, Process
from diffedit.training.timesteps import stratified

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(x_t, timestep) -> prediction``: ``lambda x, t: unet(x, t).sample``."""

Variance = Literal["small", "large"]
"""The model's variance at t: that of q(x_{t-1} | x_t, x_0), or of q(x_t | x_{t-1}), which is β_t.

Ho et al. 2020, section 3.2. With either, the last step has the posterior variance of the step
before it, for its own is 0.
"""


@dataclass(frozen=True, eq=False)
class Bound:
    """The terms of each item, (n,) float64 in nats, summed over its values.

    Attributes:
        prior: L_T.
        steps: Σ L_{t-1} over t = 2 … T.
        decoder: L_0.
        values: how many values an item has (channels × height × width).
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    values: int

    @property
    def nats(self) -> Tensor:
        """L, (n,)."""
        return self.prior + self.steps + self.decoder

    @property
    def bits_per_dim(self) -> Tensor:
        """L in bits for each value, (n,)."""
        return self.nats / (self.values * math.log(2))


@torch.no_grad()
def bits_per_dim(
    predict: Predict,
    process: Process,
    x0: Tensor,
    generator: torch.Generator,
    *,
    kind: Kind = "epsilon",
    variance: Variance = "small",
    levels: int = 256,
    clip: bool = True,
    samples: int | None = None,
) -> Bound:
    """The bound of pictures ``x0`` (n, …), whose values are the ``levels`` equal steps of [-1, 1].

    Args:
        predict: the network.
        process: what it was trained on.
        x0: quantised; other values have no such code length.
        generator: draws the noise, on its own device.
        kind: what the network predicts.
        variance: of the model's steps.
        levels: 256 for 8-bit pictures.
        clip: the implied picture is brought into [-1, 1], as in sampling.
        samples: estimate the steps' sum, without bias, from as many of them; None is all, T calls.
    """
    grid = process.grid()
    if len(grid) < 2:
        raise InputError("the bound needs a process of at least 2 steps")

    def step(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of q(x_{t-1} | x_t, x_0) at a drawn x_t, its variance, and the model's mean."""
        noise = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0)
        x_t = process.noised(x0, noise, t)
        prediction = predict(x_t, process.timestep(t).to(x0.device))
        implied = process.x0(kind, prediction, x_t, t)
        mean, var = process.posterior(x0, x_t, t)
        return mean, var, process.posterior(implied.clamp(-1, 1) if clip else implied, x_t, t)[0]

    chosen, share = _chosen(grid[:-1], samples, generator)
    total = torch.zeros(len(x0), dtype=torch.float64)
    for t in chosen.unsqueeze(1).expand(-1, len(x0)):
        mean, var, model_mean = step(t)
        model_var = process.transition(t) if variance == "large" else var
        total += normal_kl(mean, var, model_mean, model_var) * share
    second, first = (t.expand(len(x0)) for t in grid[-2:])
    least = process.posterior(x0, x0, second)[1]
    decoder = -discretized_gaussian(x0, step(first)[2], least, levels)
    return Bound(prior_kl(process, x0), total, decoder, x0[0].numel())


def prior_kl(process: Process, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, (n,) float64; 0 with zero terminal SNR."""
    last = process.grid()[0].expand(len(x0))
    mean = process.noised(x0, torch.zeros_like(x0), last)
    var = process.coefficients(last)[1].square()
    return normal_kl(mean, var, torch.zeros_like(mean), torch.ones_like(var))


def normal_kl(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """KL(N(mean_a, var_a) || N(mean_b, var_b)) in nats, summed over each item: (n,) float64.

    Means are (n, …), variances (n,).
    """
    gap = (mean_a.cpu().double() - mean_b.cpu().double()).square().flatten(1).sum(1)
    ratio = var_a / var_b
    return 0.5 * (mean_a[0].numel() * (ratio - 1 - ratio.log()) + gap / var_b)


def discretized_gaussian(x: Tensor, mean: Tensor, var: Tensor, levels: int = 256) -> Tensor:
    """The log-likelihood of values in [-1, 1] under a rounded Gaussian: nats, (n,) float64.

    Each of the ``levels`` values has the mass of its cell, the outermost that of the tails (Ho et
    al. 2020, eq. 13). ``x`` and ``mean`` are (n, …), ``var`` is (n,).
    """
    x, mean = (tensor.cpu().double().flatten(1) for tensor in (x, mean))
    std, half = var.sqrt().unsqueeze(1), 1 / (levels - 1)
    low = torch.where(x < -1 + half, -torch.inf, (x - half - mean) / std)
    high = torch.where(x > 1 - half, torch.inf, (x + half - mean) / std)
    # On the left of 0 the logarithms of the distribution function are exact far into the tail.
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    mass: Tensor = log_high + torch.log(-torch.expm1(log_low - log_high))
    return mass.sum(1)


def _chosen(times: Tensor, samples: int | None, generator: torch.Generator) -> tuple[Tensor, float]:
    """One random time of each of ``samples`` equal cells, and the times that each stands for."""
    if samples is None:
        return times, 1.0
    if not 0 < samples <= len(times):
        raise InputError(f"samples is {samples}; it must be 1 to {len(times)}, or None for all")
    share = len(times) / samples
    return times[(stratified(samples, generator).cpu() * len(times)).long()], share
