"""Muon's updates and the learning rate's course."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffedit import Editor
from diffedit.training import optim, threads
from diffedit.training.config import Optimiser
from diffedit.training.optim import Muon, lr_factor, optimizers, orthogonalise
from diffedit.training.threads import shares


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


@pytest.mark.parametrize("layers", [1, 7])
def test_shared_out_to_the_cores_adamw_does_the_same(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 4)
    shared_out: list[list[int]] = []
    in_parallel = threads.in_parallel

    def noted(step: Any, parts: list[torch.optim.Optimizer]) -> Any:
        given = [[p for group in part.param_groups for p in group["params"]] for part in parts]
        shared_out.append([sum(p.numel() for p in some) for some in given])
        assert {id(p) for some in given for p in some} == {id(p) for p in one.parameters()}
        return in_parallel(step, parts)

    monkeypatch.setattr(optim, "in_parallel", noted)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))

    one, other = made(), made()
    how = Optimiser(rate=0.01, weight_decay=0.1)
    (shared,) = optimizers([one], how)
    plain = torch.optim.AdamW(
        other.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )

    def step(number: int) -> None:
        for module, optimizer in ((one, shared), (other, plain)):
            torch.manual_seed(number)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
            for param in module.parameters():
                param.grad = torch.randn(param.shape)
            optimizer.step()
        assert all(map(torch.equal, one.parameters(), other.parameters()))

    for number in range(3):
        step(number)
    # A checkpoint of either is one of the other.
    told, wanted = copy.deepcopy(shared.state_dict()), copy.deepcopy(plain.state_dict())
    assert told["param_groups"] == wanted["param_groups"]
    shared.load_state_dict(wanted)
    plain.load_state_dict(told)
    step(3)
    assert len(shared_out) == 4
    assert max(shared_out[0]) <= max(25, 0.4 * sum(shared_out[0]))


def test_every_core_has_much_the_same_to_do() -> None:
    unet = Editor.load(device="cpu").model.denoiser  # type: ignore[attr-defined]
    sizes = [sum(p.numel() for p in some) for some in shares(unet.parameters(), Tensor.numel)]
    assert sum(sizes) == sum(p.numel() for p in unet.parameters())
    assert max(sizes) < 1.01 * min(sizes)


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
