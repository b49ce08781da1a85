"""Pictures drawn beforehand: drawing is dearer than training on a small machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffedit.training.backdrops import Pixels, backdrop
from diffedit.training.scenes import RICH, SIMPLE, Mix, draw_scene, render

log = logging.getLogger(__name__)

_CHUNK = 256


def vae_picture(index: int, *, seed: int, side: int) -> Pixels:
    """Picture ``index`` of the autoencoder's world, (side, side, 3): half scenes, half photos."""
    kind = index % 8
    if kind < 4:
        return render(draw_scene(seed, index, RICH if kind % 2 else SIMPLE), side).image
    name = "crop" if kind < 7 else "leaves" if index % 16 < 8 else "clouds"
    black = (0, 0, 0)
    return backdrop(name, black, black, seed * 7_368_787 + index, side).round().astype(np.uint8)


def scene_picture(index: int, *, seed: int, side: int, mix: Mix) -> Pixels:
    """Scene ``index`` of the world ``seed``, (side, side, 3)."""
    return render(draw_scene(seed, index, mix), side).image


def pool(path: Path, count: int, draw: Callable[[int], Pixels], side: int) -> NDArray[np.uint8]:
    """``draw(0) … draw(count - 1)`` as a (count, side, side, 3) array on disk, drawn once.

    The file appears when it is whole; a file of another length is drawn anew.
    """
    if path.exists():
        drawn: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        if drawn.shape == (count, side, side, 3):
            return drawn
    log.info("drawing %d pictures of %d px into %s", count, side, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npy")
    pictures = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.uint8, shape=(count, side, side, 3)
    )
    starts = range(0, count, _CHUNK)
    job = partial(_draw_chunk, count=count, draw=draw)
    if len(starts) == 1:
        pictures[:] = job(0)
    else:
        # Spawned, not forked: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(max(1, min(8, os.cpu_count() or 1))) as workers:
            for start, chunk in zip(starts, workers.imap(job, starts), strict=True):
                pictures[start : start + len(chunk)] = chunk
    pictures.flush()
    os.replace(unfinished, path)
    return pool(path, count, draw, side)


def _draw_chunk(start: int, *, count: int, draw: Callable[[int], Pixels]) -> Pixels:
    return np.stack([draw(index) for index in range(start, min(start + _CHUNK, count))])
