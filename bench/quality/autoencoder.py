"""What a picture keeps through the autoencoder: the ceiling of everything that is painted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bench.quality import intervals, pictures
from bench.quality.cases import Source
from diffedit.training.pictures import psnr, to_pictures, to_tensor
from diffedit.training.world.backdrops import KEPT_FOR_JUDGING, Pixels
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import RICH, draw_scene
from diffedit.training.world.source import HELD_OUT

SCENES = 64
"""How many held-out scenes are judged."""

PHOTO_SIDE = 256
"""Side of the photographs in pixels, whatever the model's own."""

_CROPS = ((0.5, 0.5, 1.0), (0.0, 0.0, 0.6), (1.0, 0.0, 0.6), (0.0, 1.0, 0.6), (1.0, 1.0, 0.6))
"""Of every photograph: the square in its middle, and four that each show a corner."""


@torch.no_grad()
def reconstruct(vae: Any, images: Iterable[Pixels]) -> list[Pixels]:
    """Each (h, w, 3) picture through the autoencoder, without noise."""
    made = []
    for image in images:
        pixels = to_tensor(image[None]).to(next(vae.parameters()))
        made.append(to_pictures(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)[0])
    return made


def decibels(vae: Any, images: Sequence[Pixels]) -> list[float]:
    """Peak signal-to-noise ratio of each picture's reconstruction, in dB."""
    made = reconstruct(vae, images)
    return [psnr(to_tensor(a[None]), to_tensor(b[None])) for a, b in zip(made, images, strict=True)]


def rows(vae: Any, native: int, limit: int | None = None) -> list[dict[str, Any]]:
    """Two rows for the table: held-out scenes of the whole drawn world, and kept photographs.

    Args:
        vae: an ``AutoencoderKL``.
        native: the side of the scenes in pixels.
        limit: at most so many scenes, and a quarter of that many photographs.
    """
    count = SCENES if limit is None else min(SCENES, limit)
    drawn = [render(draw_scene(HELD_OUT, i, RICH), native).image for i in range(count)]
    whole = [
        pictures.photograph(Source(photo=name, crop=crop), PHOTO_SIDE)
        for crop in _CROPS
        for name in KEPT_FOR_JUDGING
    ][: max(1, count // 3)]
    return [
        {
            "category": "autoencoder",
            "group": group,
            "measure": "PSNR, dB",
            "engines": {"diffedit": intervals.mean(decibels(vae, images)).listed()},
        }
        for group, images in (
            (f"held-out scenes at {native} px", drawn),
            (f"held-out photographs at {PHOTO_SIDE} px", whole),
        )
    ]
