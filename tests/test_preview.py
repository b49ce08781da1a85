"""What a step shows of the picture to come: cheap, and near what the decoder makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffedit import Editor
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.training.world.source import Drawn


@pytest.fixture(scope="module")
def model() -> Any:
    return Editor.load(device="cpu").model


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def test_a_preview_is_nearer_to_the_decoded_picture_than_any_colour_per_cell(model: Any) -> None:
    drawn = Drawn({"rich": 1.0}, 6, 128, first=70_000)
    pictures = np.stack([np.asarray(drawn[i].image) for i in range(6)])
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        decoded, seen = model.decode(latents), model.preview(latents)
    assert seen.shape == decoded.shape
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    cells = F.avg_pool2d(decoded, model.grid)
    # The best that a colour per cell can be, told these very pictures.
    a = np.concatenate([latents.permute(1, 0, 2, 3).flatten(1).numpy(), np.ones((1, 6 * 256))]).T
    b = cells.permute(1, 0, 2, 3).flatten(1).numpy().T
    best = (a @ np.linalg.lstsq(a, b, rcond=None)[0]).T.reshape(3, 6, 16, 16)
    flat = torch.from_numpy(best).permute(1, 0, 2, 3).float().clamp(0, 1)
    assert _psnr(seen, decoded) > _psnr(F.interpolate(flat, scale_factor=8), decoded) + 1
    assert _psnr(F.avg_pool2d(seen, model.grid), cells) > _psnr(flat, cells) + 0.5


def test_a_linear_autoencoder_is_seen_through() -> None:
    """Latents that are mixed mean colours are mixed back."""
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 0.3], [0.2, 0.0, 2.0], [1.0, 1.0, 1.0]])

    class Stub(StableDiffusion):
        def __init__(self) -> None:
            self.cell, self.channels, self._look = 4, 4, None
            self.denoiser = SimpleNamespace(parameters=lambda: iter([mixing]))

        def encode(
            self,
            pixels: Tensor,
            generator: torch.Generator | None = None,
            role: str | None = None,
        ) -> Tensor:
            return torch.einsum("kc,bchw->bkhw", mixing, F.avg_pool2d(pixels, self.cell))

    stub = Stub()
    colour = torch.tensor([0.9, 0.4, 0.1]).view(1, 3, 1, 1)
    seen = stub.preview(stub.encode(colour.expand(1, 3, 16, 16)))
    assert torch.allclose(seen, colour.expand(1, 3, 16, 16), atol=0.04)
    half = torch.cat([colour.expand(1, 3, 16, 8), 1 - colour.expand(1, 3, 16, 8)], dim=3)
    seen = stub.preview(stub.encode(half))
    assert torch.allclose(F.avg_pool2d(seen, 4), F.avg_pool2d(half, 4), atol=0.05)


def test_a_look_draws_from_no_one_elses_random_numbers(model: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model._look = None
    first = model.preview(torch.zeros(1, 4, 4, 4))
    assert torch.equal(torch.rand(1), expected)
    model._look = None
    assert torch.equal(model.preview(torch.zeros(1, 4, 4, 4)), first)
