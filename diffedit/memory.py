"""Running out of memory: how it is recognised, and how what is left over is let go of."""

from __future__ import annotations

import gc
import traceback

import torch

from diffedit.errors import OutOfMemory

#: What errors say that are not of torch's own kind: MPS, the CPU's allocators, cuBLAS, cuDNN.
_SAID = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def exhausted(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, or comes of one that does.

    Libraries make other errors of it, as tokenizers do of a tensor that could not be made.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID):
        return True
    # Not what was being handled meanwhile: that may be the caller's own affair.
    return error.__cause__ is not None and exhausted(error.__cause__)


def let_go(error: BaseException) -> None:
    """Free what an error's traceback still holds on to, and what the device keeps for later."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def told(where: str, tried: str = "") -> OutOfMemory:
    """The error in one line.

    Args:
        where: what was being done.
        tried: what was given up already.
    """
    also = f", also with {tried}" if tried else ""
    return OutOfMemory(
        f"out of memory {where}{also}: take a smaller picture or region, fewer pictures at once, or"
        " a smaller dtype (float16, bfloat16)"
    )
