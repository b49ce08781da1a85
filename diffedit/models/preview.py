"""A rough, cheap look at latents while a picture forms, fitted to any autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Look:
    """A cell's pixels as a linear map of the cell and its eight neighbours.

    About a four-hundredth of the decoder's time, and 21 to 25 dB from what it makes of drawn
    scenes and photographs (the embedded model at 128 px; one colour to a cell: 19 to 22 dB).

    Args:
        encode: pixels ``(1, 3, h, w)`` in [0, 1] to latents.
        cell: pixels to a side of a latent cell.
        channels: of a latent.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], cell: int, channels: int) -> None:
        self.cell = cell
        pixels = _leaves(32 * cell)
        encoded = encode(pixels)
        latents = encoded.float().cpu()
        seen = F.unfold(_with_edge(latents), 3)  # (1, 9 c, cells)
        a = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)[0].T.double()
        b = F.pixel_unshuffle(pixels, cell).flatten(2)[0].T.double()
        # A little ridge: neighbouring cells say nearly the same.
        ridge = 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        solution = torch.linalg.solve(a.T @ a + ridge, a.T @ b).float().to(encoded.device)
        self.weight, self.bias = solution[:-1].T.reshape(-1, channels, 3, 3), solution[-1]

    def __call__(self, x0: Tensor) -> Tensor:
        """Pixels ``(b, 3, h, w)`` in [0, 1], float32, of latents ``(b, c, h / cell, w / cell)``."""
        pixels = F.conv2d(_with_edge(x0.float()), self.weight, self.bias)
        return F.pixel_shuffle(pixels, self.cell).clamp(0, 1)


def _with_edge(latents: Tensor) -> Tensor:
    return F.pad(latents, (1, 1, 1, 1), mode="replicate")


def _leaves(side: int, count: int = 60) -> Tensor:
    """Discs and bars of random colours on a smooth ground, (1, 3, side, side) in [0, 1].

    Occluding forms of all sizes have the statistics of pictures (Lee, Mumford & Huang 2001,
    "Occlusion models for natural images").
    """
    generator = torch.Generator().manual_seed(0)
    ground = torch.rand(1, 3, 16, 16, generator=generator)
    ground = F.interpolate(ground, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    picture = F.interpolate(ground, size=side, mode="bilinear")[0]
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    for number in range(count):
        left, top, size, turn, length = torch.rand(5, generator=generator).tolist()
        radius, angle = 0.03 + 0.17 * size**2, math.pi * turn
        u = (x - left) * math.cos(angle) + (y - top) * math.sin(angle)
        v = (y - top) * math.cos(angle) - (x - left) * math.sin(angle)
        bar = (u.abs() < radius) & (v.abs() < radius * (0.2 + length))
        inside = u.square() + v.square() < radius**2 if number % 2 else bar
        colour = torch.rand(3, 1, 1, generator=generator)
        shaded = colour + 0.2 * length * (x + y - 1) if number % 3 else colour
        picture = torch.where(inside, shaded, picture)
    return picture[None].clamp(0, 1)
