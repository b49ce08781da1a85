"""Which number format the forward and backward passes use: fp32, bf16 or fp16.

Half the bits are half the memory, but they are faster only where the device multiplies them in
hardware. A CPU that does not emulates bf16, which was measured at 15 to 20 times slower than fp32.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from diffedit.errors import InputError, nearest

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""x86: VDPBF16PS, TDPBF16PS. ARM: FEAT_BF16 (``BFDOT``, ``BFMMLA``). Names as Linux gives them."""


def resolve(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The number format that ``precision`` means on ``device``.

    ``auto`` is bf16 where the device multiplies it in hardware; otherwise fp16 on CUDA (with a
    gradient scaler: its smallest normal number is 6e-5) and fp32 elsewhere.

    Raises:
        InputError: an unknown precision or device, CUDA that is not there, or fp16 on a CPU.
    """
    device = _device(device)
    if precision != "auto" and precision not in _DTYPES:
        raise InputError(
            f"precision {precision!r} is unknown{nearest(precision, ['auto', *_DTYPES])}"
        )
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 does not train on a CPU, should be auto, bf16 or fp32")
    if precision == "auto":
        if multiplies_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision == "bf16" and device.type in ("cpu", "cuda") and not multiplies_bf16(device):
        _warn_once(
            f"precision bf16: this {device.type.upper()} has no hardware for it and emulates it, "
            "which can be 15 to 20 times slower; use precision auto"
        )
    return _DTYPES[precision]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether ``device`` has hardware for products of bf16 matrices, as far as can be told."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            # By default, torch counts emulation as support.
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_multiplies_bf16()


@cache
def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether every core says so in ``cpuinfo``; False where there is no such file (not Linux)."""
    try:
        text = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return False
    rows = (line.partition(":") for line in text.splitlines())
    cores = [set(value.split()) for key, _, value in rows if key.strip() in ("flags", "Features")]
    return bool(cores) and all(flags & _CPU_FLAGS for flags in cores)


def _device(device: torch.device | str) -> torch.device:
    try:
        made = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown, should be cpu, cuda or cuda:0") from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {made}: this machine has no CUDA device, should be cpu")
    return made


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
