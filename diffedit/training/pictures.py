"""Pictures as arrays: kept on disk, turned into tensors, compared."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffedit.errors import InputError, OutputError
from diffedit.training.data import Pixels, Source
from diffedit.training.files import whole_file
from diffedit.training.threads import in_parallel

log = logging.getLogger(__name__)

_CHUNK = 256


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [-1, 1], clipped to that -> (n, h, w, 3) uint8."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    made: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return made


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of (n, 3, h, w) in [-1, 1], averaged over pictures."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
    return float((10 * torch.log10(4 / error)).mean())


def stored(folder: Path, source: Source) -> NDArray[np.uint8]:
    """All pictures of a source, (n, h, w, 3), mapped from a file in ``folder``.

    Each is drawn or decoded once; the file, named by the source's digest, appears when it is whole.

    Raises:
        InputError: the pictures differ in size.
        OutputError: the disk is full, or must not be written to.
    """
    path = folder / f"pictures-{source.digest[:16]}.npy"
    if not path.exists():
        _write(path, source)
    pictures: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return pictures


def _write(path: Path, source: Source) -> None:
    first = source[0].image.shape

    def picture(index: int) -> Pixels:
        example = source[index]
        if example.image.shape != first:
            sizes = "{1}x{0}, others {3}x{2}".format(*example.image.shape[:2], *first[:2])
            raise InputError(f"{example.name} is {sizes}: should be of one size")
        return example.image

    log.info("%s: keeping %d pictures in %s", source.name, len(source), path)
    header: dict[str, Any] = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(source), *first),
    }
    try:
        # Not through a map: a full disk would end the process instead of raising an error.
        with whole_file(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(source), _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(source)))
                for image in in_parallel(picture, chunk):
                    file.write(np.ascontiguousarray(image).tobytes())
    except OSError as error:
        raise OutputError(
            f"{path.parent}: pictures cannot be kept there ({error.strerror or error}), free some"
            " space or name another 'out'"
        ) from error
