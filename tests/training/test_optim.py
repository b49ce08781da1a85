"""Muon's updates and the learning rate's course."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffedit.training.config import Optimiser
from diffedit.training.optim import Muon, SharedOut, lr_factor, optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 8, 40), (3, 40, 8)])
def test_orthogonalised_matrices_are_nearly_the_polar_factor(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalise(given)
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(given, full_matrices=False)
    polar = u @ vh
    cosine = (made * polar).sum((1, 2)) / (made.norm(dim=(1, 2)) * polar.norm(dim=(1, 2)))
    assert float(cosine.min()) > 0.97


def test_muon_takes_hidden_weights_and_adamw_all_else() -> None:
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(20, 16),
            "stem": nn.Conv2d(3, 16, 3),
            "hidden": nn.Conv2d(16, 24, 3),
            "frozen": nn.Linear(16, 16),
        }
    )
    model["frozen"].requires_grad_(False)
    muon, adamw = optimizers([model], Optimiser(name="muon"))
    assert isinstance(muon, Muon)
    given = {id(p) for group in muon.param_groups for p in group["params"]}
    assert given == {id(model["hidden"].weight)}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    wanted = {id(p) for p in model.parameters() if p.requires_grad} - given
    assert others == wanted


@pytest.mark.parametrize("number", [1, 7])
def test_shared_out_to_the_cores_adamw_does_the_same(number: int) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(5, 5) for _ in range(number)))

    one, other = layers(), layers()
    (shared,) = optimizers([one], Optimiser(rate=0.01))
    assert isinstance(shared, SharedOut)
    plain = torch.optim.AdamW(
        other.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=Optimiser().weight_decay,
        fused=True,
    )  # fmt: skip
    for step in range(5):
        for module, optimizer in ((one, shared), (other, plain)):
            torch.manual_seed(step)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            for param in module.parameters():
                param.grad = torch.randn(param.shape)
            optimizer.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    # And a checkpoint of either is one of the other.
    told, wanted = shared.state_dict(), plain.state_dict()
    assert told["state"].keys() == wanted["state"].keys()
    for key, state in wanted["state"].items():
        assert all(torch.equal(told["state"][key][name], value) for name, value in state.items())
    assert told["param_groups"] == wanted["param_groups"]


def test_muon_finds_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(12, 10, generator=generator)
    layer = nn.Linear(10, 12, bias=False)
    x = torch.randn(64, 10, generator=generator)
    muon = Muon(layer.parameters(), lr=0.1)
    steps = 300
    for step in range(steps):
        muon.zero_grad()
        nn.functional.mse_loss(layer(x), x @ wanted.T).backward()
        muon.param_groups[0]["lr"] = 0.2 * (1 - step / steps)
        muon.step()
    error = (layer.weight.detach() - wanted).norm() / wanted.norm()
    assert float(error) < 0.02


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    course = [lr_factor(step, 100, warmup=10, decay=0.2) for step in range(101)]
    assert course[0] == pytest.approx(0.1)
    assert course[10:80] == [1.0] * 70
    assert course[90] == pytest.approx(0.5)
    assert course[100] == 0.0
