"""Losses and weights against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffedit.errors import InputError
from diffedit.training.losses import huber, l1, min_snr, mse
from diffedit.training.process import (
    Diffusion,
    Kind,
    Process,
    RectifiedFlow,
    linear,
    scaled_linear,
    zero_terminal_snr,
)


def _pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return a, b


def test_mse_and_l1_are_torchs_item_by_item() -> None:
    a, b = _pair()
    for i in range(3):
        assert mse(a, b)[i] == pytest.approx(float(F.mse_loss(a[i], b[i])), rel=1e-6)
        assert l1(a, b)[i] == pytest.approx(float(F.l1_loss(a[i], b[i])), rel=1e-6)


@pytest.mark.parametrize("c", [0.05, 0.1, 2.0])
def test_huber_is_the_formula_and_its_two_limits(c: float) -> None:
    a, b = _pair(torch.float64)
    expected = (2 * c * (((a - b) ** 2 + c**2).sqrt() - c)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(huber(a, b, c=c), expected)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    small, large = 1e-4 * c, 1e4 * c
    assert huber(zero + small, zero, c=c).item() == pytest.approx(small**2, rel=1e-6)
    assert huber(zero + large, zero, c=c).item() == pytest.approx(
        2 * c * large - 2 * c * c, rel=1e-6
    )


def test_huber_has_a_gradient_where_the_error_is_zero() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    huber(x, torch.zeros(1, 2)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(1, 2))


def test_weights_of_cells_weigh_cells() -> None:
    a, b = _pair()
    where = torch.zeros(3, 1, 4, 4)
    where[:, :, :2] = 1
    for loss in (mse, l1, huber):
        torch.testing.assert_close(loss(a, b, where=where), loss(a[:, :, :2], b[:, :, :2]) / 2)


def test_half_precision_is_summed_in_float32() -> None:
    a, b = (tensor.half() for tensor in _pair())
    assert mse(a, b).dtype == torch.float32
    assert torch.equal(mse(a, b), mse(a.float(), b.float()))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 1, 4\).*\(2, 3, 4\)"):
        mse(torch.zeros(2, 1, 4), torch.zeros(2, 3, 4))


def test_min_snr_is_the_papers_table() -> None:
    snr = torch.tensor([0.1, 1.0, 5.0, 40.0])
    assert min_snr("epsilon", snr).tolist() == pytest.approx([1, 1, 1, 1 / 8])
    assert min_snr("sample", snr).tolist() == pytest.approx([0.1, 1, 5, 5])
    assert min_snr("v_prediction", snr).tolist() == pytest.approx([0.1 / 1.1, 0.5, 5 / 6, 5 / 41])


@pytest.mark.parametrize(
    ("process", "kinds"),
    [
        (Diffusion(linear()), ["epsilon", "v_prediction", "flow_prediction", "flow"]),
        (RectifiedFlow(), ["epsilon", "flow_prediction"]),
    ],
    ids=["chain", "flow"],
)
def test_all_kinds_weigh_the_same_mistake_the_same(process: Process, kinds: list[Kind]) -> None:
    """One wrong picture, told in different kinds, has one weighted loss."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = process.at(torch.tensor([0.1, 0.4, 0.7, 0.95]))
    x_t = process.noised(x0, noise, t)
    implied = process.epsilon("sample", wrong, x_t, t)
    snr = process.snr(t)
    expected = min_snr("sample", snr) * mse(wrong, x0)
    for kind in kinds:
        error = mse(process.target(kind, wrong, implied, t), process.target(kind, x0, noise, t))
        torch.testing.assert_close(min_snr(kind, snr) * error, expected, rtol=1e-6, atol=0)


def test_the_ends_of_the_way_have_finite_weights() -> None:
    ends = torch.tensor([0.0, math.inf])
    assert min_snr("epsilon", ends).tolist() == [1, 0]
    assert min_snr("sample", ends).tolist() == [0, 5]
    assert min_snr("v_prediction", ends).tolist() == [0, 0]
    assert min_snr("flow", ends).tolist() == [0, 0]


def test_the_floor_is_that_of_the_denoisers_training() -> None:
    process = Diffusion(zero_terminal_snr(scaled_linear()))
    snr = process.snr(torch.arange(1000))
    weight = snr.clamp_max(5) / (snr + 1)
    expected = torch.where(snr < 1, weight.clamp_min(0.2), weight)
    assert torch.equal(min_snr("v_prediction", snr, floor=0.2), expected)
    assert min_snr("v_prediction", snr, floor=0.2)[-1] == 0.2
    assert min_snr("v_prediction", snr, floor=0.2)[0] < 0.2


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'sample'"):
        min_snr("sampel", torch.ones(1))  # type: ignore[arg-type]
