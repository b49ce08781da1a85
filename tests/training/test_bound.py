"""The variational bound against torch.distributions, closed forms and a known likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from diffedit.errors import InputError
from diffedit.training.bound import (
    Predict,
    Variance,
    bits_per_dim,
    discretized_gaussian,
    normal_kl,
    prior_kl,
)
from diffedit.training.losses import mse
from diffedit.training.process import (
    Diffusion,
    Process,
    RectifiedFlow,
    linear,
    zero_terminal_snr,
)
from diffedit.training.timesteps import stratified

LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _masses(mean: float, std: float) -> Tensor:
    """Probabilities of 256 levels: a rounded normal, (256,)."""
    return (-0.5 * ((LEVELS - mean) / std) ** 2).softmax(0)


def _exact(process: Process, masses: Tensor) -> Predict:
    """The best possible prediction of x_0: its posterior mean over the 256 levels."""

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        t = timestep / process.steps if isinstance(process, RectifiedFlow) else timestep
        a, b = (c.view(-1, *[1] * x.ndim) for c in process.coefficients(t))
        logits = masses.log() - 0.5 * ((x.unsqueeze(-1) - a * LEVELS) / b).square()
        return (logits.softmax(-1) * LEVELS).sum(-1)

    return predict


def _data(masses: Tensor, n: int, values: int) -> Tensor:
    drawn = torch.multinomial(masses, n * values, replacement=True, generator=_generator(9))
    return LEVELS[drawn].view(n, values)


def test_kl_is_that_of_torch_distributions() -> None:
    a, b = torch.randn(2, 3, 2, 4, generator=_generator(), dtype=torch.float64)
    va, vb = torch.rand(2, 3, generator=_generator(1), dtype=torch.float64) + 0.1
    expected = kl_divergence(
        Normal(a, va.sqrt().view(-1, 1, 1)), Normal(b, vb.sqrt().view(-1, 1, 1))
    )
    torch.testing.assert_close(normal_kl(a, va, b, vb), expected.sum((1, 2)))


def test_the_discretized_gaussian_is_scipys_and_sums_to_one() -> None:
    for mean, std in ((0.1, 0.05), (-1.3, 0.02), (0.9, 0.004), (0.0, 5.0)):
        n = len(LEVELS)
        logs = discretized_gaussian(
            LEVELS.view(n, 1), torch.full((n, 1), mean), torch.full((n,), std**2).double()
        )
        assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-6)
        edges = torch.cat(
            [torch.tensor([-math.inf]), LEVELS[1:] - 1 / 255, torch.tensor([math.inf])]
        )
        cells = stats.norm(float(torch.tensor(mean)), std).cdf(edges)
        assert logs.exp().numpy() == pytest.approx(cells[1:] - cells[:-1], abs=1e-9)
    far = discretized_gaussian(
        torch.ones(1, 1), torch.tensor([[-1.0]]), torch.tensor([1e-4]).double()
    )
    assert float(far) == pytest.approx(stats.norm.logsf(1 - 1 / 255, -1, 0.01), rel=1e-6)


def test_terms_are_those_of_the_epsilon_formula() -> None:
    """Ho et al., eq. 12, summed by hand for a network that always answers with a constant."""
    process = Diffusion(linear(6, 0.05, 0.3))
    x0 = _data(_masses(0.0, 0.3), 3, 8)
    bound = bits_per_dim(
        lambda x, t: torch.full_like(x, 0.3), process, x0, _generator(4), clip=False,
        variance="large",
    )  # fmt: skip
    generator, total = _generator(4), torch.zeros(3, dtype=torch.float64)
    beta, bar = process.betas, process.alphas_cumprod
    for t in range(5, 0, -1):
        noise = torch.randn(x0.shape, generator=generator).double()
        small = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]
        gap = beta[t] ** 2 / (2 * beta[t] * (1 - beta[t]) * (1 - bar[t])) * (noise - 0.3) ** 2
        spread = 0.5 * (small / beta[t] - 1 - (small / beta[t]).log())
        total += (gap + spread).sum(1)
    torch.testing.assert_close(bound.steps, total)
    noise = torch.randn(x0.shape, generator=generator).double()
    x1 = bar[0].sqrt() * x0 + (1 - bar[0]).sqrt() * noise
    mean = (x1 - (1 - bar[0]).sqrt() * 0.3) / bar[0].sqrt()
    std = ((1 - bar[0]) / (1 - bar[1]) * beta[1]).sqrt()
    normal = Normal(mean, std)
    mass = normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)
    torch.testing.assert_close(bound.decoder, -mass.log().sum(1), rtol=1e-5, atol=1e-6)
    prior = kl_divergence(Normal(bar[-1].sqrt() * x0, (1 - bar[-1]).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(bound.prior, prior.sum(1))
    torch.testing.assert_close(bound.nats, bound.prior + bound.steps + bound.decoder)
    torch.testing.assert_close(bound.bits_per_dim, bound.nats / 8 / math.log(2))


def _even(steps: int) -> Diffusion:
    """log(snr) in equal steps from e^14, far below the distance of two levels, to e^-9."""
    signal = torch.linspace(14, -9, steps, dtype=torch.float64).sigmoid()
    return Diffusion(1 - signal / torch.cat([torch.ones(1).double(), signal[:-1]]))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_exact_denoisers_bound_comes_down_to_the_known_likelihood(variance: Variance) -> None:
    masses = _masses(0.1, 0.15)
    x0 = _data(masses, 8, 64)
    truth = -float(masses[((x0 + 1) * 127.5).round().long()].log2().mean())
    figures = []
    for steps in (20, 60, 300):
        process = _even(steps)
        bound = bits_per_dim(
            _exact(process, masses), process, x0, _generator(), kind="sample", clip=False,
            variance=variance,
        )  # fmt: skip
        figures.append(float(bound.bits_per_dim.mean()))
    assert figures[0] > figures[1] > figures[2] > truth
    # The distance falls like 1/T, for more steps are a finer sum of one integral.
    assert figures[2] < truth + 0.3
    assert (figures[1] - truth) / (figures[2] - truth) == pytest.approx(5, rel=0.3)


def test_the_bound_knows_only_the_signal_to_noise_ratio() -> None:
    """Kingma et al. 2021, section 5.1: a flow and a chain of the same ratios cost the same."""
    masses = _masses(0.1, 0.15)
    x0 = _data(masses, 4, 64)
    flow = RectifiedFlow(shift=0.3, steps=40)
    snr = flow.snr(flow.grid().flip(0))
    signal = snr / (1 + snr)
    chain = Diffusion(1 - signal / torch.cat([torch.ones(1).double(), signal[:-1]]))
    of_flow, of_chain = (
        bits_per_dim(_exact(process, masses), process, x0, _generator(), kind="sample")
        for process in (flow, chain)
    )
    torch.testing.assert_close(of_flow.prior, of_chain.prior, rtol=0, atol=1e-9)
    torch.testing.assert_close(of_flow.steps, of_chain.steps)
    # The decoder's variance is by convention that of x_1, whose scales differ a little.
    torch.testing.assert_close(of_flow.decoder, of_chain.decoder, rtol=0.01, atol=0)


def test_the_exact_denoiser_beats_every_other() -> None:
    masses = _masses(0.1, 0.15)
    process = Diffusion(linear(20, 0.001, 0.5))
    x0 = _data(masses, 24, 64)
    exact = _exact(process, masses)

    def figure(shift: float) -> float:
        bound = bits_per_dim(
            lambda x, t: exact(x, t) + shift, process, x0, _generator(), kind="sample", clip=False
        )
        return float(bound.bits_per_dim.mean())

    assert figure(0) < min(figure(0.02), figure(-0.02))


def test_a_sample_of_the_steps_estimates_their_sum() -> None:
    masses = _masses(0.0, 0.2)
    process = Diffusion(linear(30, 0.001, 0.4))
    x0 = _data(masses, 4, 64)
    exact = _exact(process, masses)
    full = bits_per_dim(exact, process, x0, _generator(), kind="sample").steps.mean()
    parts = [
        bits_per_dim(exact, process, x0, _generator(seed), kind="sample", samples=7).steps.mean()
        for seed in range(60)
    ]
    estimates = torch.stack(parts)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(float(estimates.mean() - full)) < 4 * float(error) + 0.01 * float(full)
    for wrong in (0, 30):
        with pytest.raises(InputError, match="samples"):
            bits_per_dim(exact, process, x0, _generator(), kind="sample", samples=wrong)


def test_zero_terminal_snr_leaves_nothing_for_the_prior() -> None:
    x0 = _data(_masses(0.0, 0.3), 2, 8)
    process = Diffusion(zero_terminal_snr(linear(10, 0.01, 0.4)))
    assert prior_kl(process, x0).abs().max() == 0
    assert prior_kl(RectifiedFlow(), x0).abs().max() == 0
    bound = bits_per_dim(lambda x, t: -x, process, x0, _generator(), kind="v_prediction")
    assert bound.nats.isfinite().all()


def test_the_clip_only_helps_a_bad_network() -> None:
    process = Diffusion(linear(10, 0.01, 0.4))
    x0 = _data(_masses(0.0, 0.3), 4, 16)
    clipped, free = (
        bits_per_dim(lambda x, t: 3 * x, process, x0, _generator(), clip=clip).nats.sum()
        for clip in (True, False)
    )
    assert clipped < free


def test_training_lowers_the_bound() -> None:
    torch.manual_seed(0)
    masses = _masses(-0.2, 0.2)
    process = Diffusion(linear(50, 0.001, 0.2))
    data = _data(masses, 256, 16).float()
    held = _data(_masses(-0.2, 0.2), 32, 16).float()
    net = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(torch.cat([x, t.view(-1, 1) / 50], 1))
        return out

    def figure() -> float:
        return float(bits_per_dim(predict, process, held, _generator()).bits_per_dim.mean())

    optimizer, generator = torch.optim.Adam(net.parameters(), 3e-3), _generator()
    figures = [figure()]
    for steps in (100, 500):
        for _ in range(steps):
            x0 = data[torch.randint(256, (64,), generator=generator)]
            noise = torch.randn(x0.shape, generator=generator)
            t = process.at(stratified(64, generator))
            loss = mse(predict(process.noised(x0, noise, t), t), noise).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        figures.append(figure())
    truth = -float((masses * masses.log2()).sum())
    assert figures[0] > figures[1] + 0.1 > figures[2] + 0.2
    assert figures[2] > truth
