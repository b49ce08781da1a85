"""Where models compute, and in which type: what people call them, and what they get unasked."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffedit.errors import ModelError, nearest
from diffedit.models.files import first_line

if TYPE_CHECKING:
    import torch

    from diffedit.models.protocol import LatentModel, ModelFamily

log = logging.getLogger(__name__)

#: Types in which the denoiser's weights are held only; see `holding.narrow`.
NARROW = {"float8": "float8_e4m3fn", "fp8": "float8_e4m3fn"}
_ROOM = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?", re.IGNORECASE)
_DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
           "bfloat16": "bfloat16", "bf16": "bfloat16"}  # fmt: skip


def chosen(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first accelerator there is, else the CPU.

    Raises:
        ModelError: it cannot be used here.
    """
    import torch

    here = ["cuda"] if torch.cuda.is_available() else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    here += ["cpu"]
    if device is None:
        return torch.device(here[0])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:  # that of torch names all that it was ever built for
        raise ModelError(f"no device {str(device)!r} (known: {', '.join(here)})") from error
    try:
        torch.empty(1, device=found)
    except Exception as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used here ({first_line(error)})"
        ) from error
    return found


def named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of that name, or as it was given.

    Raises:
        ModelError: there is none.
    """
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}{nearest(dtype, {*_DTYPES, *NARROW})}")
    return getattr(torch, _DTYPES[dtype])  # type: ignore[no-any-return]


def room(said: int | str) -> int:
    """So many bytes: a number of them, or a text such as "6GB" or "5.5 GiB".

    Raises:
        ModelError: it is no such thing.
    """
    found = _ROOM.fullmatch(str(said).strip())
    if found is None or isinstance(said, bool):
        raise ModelError(f"max_memory {said!r}: needs bytes, or a size such as '6GB' or '500MB'")
    number, unit, binary = found.groups()
    if unit is None and 0 < float(number) < 1_000_000:
        raise ModelError(f"max_memory {said!r}: so few bytes hold nothing; say '{number}GB'")
    step = 1024 if binary else 1000
    return int(float(number) * step ** ("kmgt".index(unit.lower()) + 1 if unit else 0))


def fitting(
    source: str | os.PathLike[str], on: torch.device, load: Callable[..., LatentModel]
) -> LatentModel:
    """Load a model; what is too large for the device once more, its weights in main memory.

    Args:
        source: the model, for people.
        load: loads it; takes ``room``, the bytes of weights that may lie on the device.

    Raises:
        ModelError: there is no memory for it so either.
    """
    from diffedit.memory import exhausted, let_go

    def attempt(**less: int) -> LatentModel:
        try:
            return load(**less)
        except ModelError:
            raise
        except Exception as error:  # of what a family sets up
            if exhausted(error):
                raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error
            raise

    try:
        return attempt()
    except ModelError as error:
        if on.type == "cpu" or not exhausted(error):
            raise
        let_go(error)
    log.warning(
        "%s: more than fits into the memory of %s: its weights stay in main memory until they are"
        " needed, which is slower (max_memory says how much room there is)",
        source,
        on,
    )
    return attempt(room=0)


def usual(family: ModelFamily, on: torch.device) -> torch.dtype:
    """What a family computes in where nobody says otherwise."""
    import torch

    if on.type == "cpu":
        return torch.float32
    # What was trained in bfloat16 overflows float16; old devices have nothing else.
    old = on.type == "cuda" and not torch.cuda.is_bf16_supported()
    half = "float16" if old else getattr(family, "half", "float16")
    return getattr(torch, half)  # type: ignore[no-any-return]
