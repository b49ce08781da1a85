"""Timestep samplers against the distributions they claim."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from diffedit.errors import InputError
from diffedit.training.process import Diffusion, linear
from diffedit.training.timesteps import focused, logit_normal, stratified, uniform


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_is_uniform() -> None:
    assert stats.kstest(uniform(4000, _generator()).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_is_the_density_of_the_paper(mean: float, std: float) -> None:
    u = logit_normal(4000, _generator(), mean, std).numpy()
    # Independent of the code under test: scipy's normal, through the change of variables.
    assert stats.kstest(u, lambda x: stats.norm.cdf(stats.logistic.ppf(x), mean, std)).pvalue > 0.01


def test_one_of_each_cell_and_uniform_within() -> None:
    draws = torch.stack([stratified(8, _generator(seed), (0.2, 0.6)) for seed in range(500)])
    cells = ((draws - 0.2) / 0.05).floor()
    assert torch.equal(cells, torch.arange(8.0, dtype=torch.float64).expand(500, 8))
    within = ((draws - 0.2) / 0.05 - cells).flatten().numpy()
    assert stats.kstest(within, "uniform").pvalue > 0.01


def test_stratified_integers_cover_the_range_once_each() -> None:
    process = Diffusion(linear(64))
    assert torch.equal(process.at(stratified(64, _generator())), torch.arange(64))


def test_focused_puts_its_share_in_the_span_and_the_rest_everywhere() -> None:
    u = focused(20, _generator(), (0.5, 0.9), 0.3)
    assert len(u) == 20
    assert ((u[:6] >= 0.5) & (u[:6] < 0.9)).all()
    assert torch.equal((u[6:] * 14).floor(), torch.arange(14.0, dtype=torch.float64))
    assert focused(4, _generator(), (0.5, 0.9), 0.0)[0] < 0.25
    assert focused(4, _generator(), (0.5, 0.9), 1.0).min() >= 0.5


def test_the_generator_decides() -> None:
    for sampler in (uniform, stratified, logit_normal):
        assert torch.equal(sampler(5, _generator(3)), sampler(5, _generator(3)))
        assert not torch.equal(sampler(5, _generator(3)), sampler(5, _generator(4)))
        assert sampler(0, _generator()).shape == (0,)


def test_spans_and_shares_out_of_range_are_refused() -> None:
    for span in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(InputError, match="span"):
            stratified(4, _generator(), span)
    with pytest.raises(InputError, match="share"):
        focused(4, _generator(), (0.1, 0.5), 1.5)
