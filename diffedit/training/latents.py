"""Drawn worlds as latents: chunks of scenes, encoded once, when training first asks for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from diffedit.training.autoencoder import to_tensor
from diffedit.training.scenes import Drawing, Mix, draw_scene, render
from diffedit.training.text import tokenise
from diffedit.training.threads import in_parallel

log = logging.getLogger(__name__)

Chunk: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Latents (n, 4, h, w), token ids (n, LENGTH), cells on or beside an object (n, h, w)."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a world grows while it is trained on, so that training begins before all is drawn.

    ``first`` chunks of ``size`` scenes, one more every ``steps`` steps, ``most`` at last.
    """

    size: int = 2048
    first: int = 2
    steps: int = 160
    most: int = 8

    def chunks(self, step: int) -> int:
        """How many chunks there are ``step`` steps after the world came in."""
        return min(self.most, self.first + step // self.steps)


@dataclass(frozen=True, slots=True)
class World:
    """One kind of training data: a name (also of its folder), a mix of scenes, a side in pixels."""

    name: str
    mix: Mix
    side: int


def encode(vae: AutoencoderKL, pixels: Tensor, batch: int = 32) -> Tensor:
    """(n, 3, h, w) in [-1, 1] -> (n, 4, h/8, w/8) float32 on the CPU: the posterior's mean."""
    device = next(vae.parameters()).device

    @torch.no_grad()
    def encode_part(part: Tensor) -> Tensor:
        part = part.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            latents: Tensor = vae.encode(part).latent_dist.mode().float().cpu()
        return latents

    return torch.cat(in_parallel(encode_part, pixels.split(batch)))


def object_cells(drawing: Drawing) -> NDArray[np.bool_]:
    """The latent cells that an object touches, and their neighbours: (side/8, side/8) bool."""
    side = len(drawing.image)
    covered = np.zeros((side, side), np.float32)
    for mask in drawing.masks:
        covered = np.maximum(covered, mask)
    cells = covered.reshape(side // 8, 8, side // 8, 8).max(axis=(1, 3)) > 0
    grown = np.pad(cells, 1)
    near = [np.roll(grown, (y, x), axis=(0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    either: NDArray[np.bool_] = np.logical_or.reduce(near)
    return either[1:-1, 1:-1]


class LatentPool:
    """Chunks of a world's latents, token ids and object cells, kept on disk for a resumed run.

    Chunk ``c`` holds the scenes ``c·size … (c+1)·size - 1`` of the world's seed: what it contains
    does not depend on when it is drawn.
    """

    def __init__(
        self,
        folder: Path,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        world: World,
        seed: int,
        size: int,
    ) -> None:
        self.folder, self.vae, self.tokenizer = folder / world.name, vae, tokenizer
        self.world, self.seed, self.size = world, seed, size
        self.chunk: Callable[[int], Chunk] = lru_cache(None)(self._chunk)

    def batch(self, size: int, chunks: int, generator: torch.Generator) -> Chunk:
        """A random batch of the first ``chunks`` chunks, in float32 and int64."""
        places = torch.randint(chunks * self.size, (size,), generator=generator).tolist()
        found = [(self.chunk(place // self.size), place % self.size) for place in places]
        latents = torch.stack([chunk[0][row] for chunk, row in found]).float()
        tokens = torch.stack([chunk[1][row] for chunk, row in found]).long()
        objects = torch.stack([chunk[2][row] for chunk, row in found]).float()
        return latents, tokens, objects

    def _chunk(self, number: int) -> Chunk:
        path = self.folder / f"{number:04d}.npz"
        if not path.exists():
            scenes = [
                draw_scene(self.seed, number * self.size + i, self.world.mix)
                for i in range(self.size)
            ]
            log.info("drawing and encoding chunk %d of %s", number, self.world.name)
            parts, objects = [], []
            for start in range(0, self.size, 512):
                drawings = [render(scene, self.world.side) for scene in scenes[start : start + 512]]
                parts.append(encode(self.vae, to_tensor(np.stack([d.image for d in drawings]))))
                objects += [object_cells(drawing) for drawing in drawings]
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part.npz")
            np.savez(
                unfinished,
                latents=torch.cat(parts).half().numpy(),
                objects=np.stack(objects),
                tokens=tokenise(self.tokenizer, [s.caption for s in scenes])
                .to(torch.int16)
                .numpy(),
            )
            os.replace(unfinished, path)
        stored = np.load(path)
        return (
            torch.from_numpy(stored["latents"]),
            torch.from_numpy(stored["tokens"]),
            torch.from_numpy(stored["objects"]),
        )
