"""Operations as a CPU trains them fastest, in place of those that torch would choose there.

Only who computes changes: a module has the same weights, names and results, but for the order in
which floats are added.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

_SMALL = 20_480
"""Numbers in an input up to which torch gives a picture's convolution to no oneDNN."""
_WORTH = 2**23
"""Multiplications from which a matrix product gains by it."""


def quick(*modules: Any) -> None:
    """Have modules on a CPU compute as it trains fastest; elsewhere they stay what they are.

    - A denoiser's attention: the fused kernel's backward costs more than the whole plain attention.
      Not an autoencoder's: of many cells at once, the plain one would take too much memory.
    - Matrix products in float32, where MKL would be slow: see :func:`mkl_is_slow`.
    """
    for module in modules:
        if next(module.parameters()).device.type != "cpu":
            continue
        if hasattr(module, "set_attn_processor") and not isinstance(module, AutoencoderKL):
            module.set_attn_processor(AttnProcessor())
        if mkl_is_slow():
            for each in module.modules():
                if type(each) is nn.Linear:
                    each.__class__ = Linear
                elif type(each) is nn.Conv2d and _pointwise(each):
                    each.__class__ = PointwiseConv2d


@cache
def mkl_is_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch multiplies float32 matrices with MKL, at half the speed of oneDNN.

    So it is on processors with AVX-512 that are not Intel's: there MKL keeps to AVX2. False where
    ``cpuinfo`` does not tell who made the processor (not Linux, not x86).
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        rows = cpuinfo.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return False
    vendors = {row.partition(":")[2].strip() for row in rows if row.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


class Linear(nn.Linear):
    """A linear layer that oneDNN computes, forward and backward: as a convolution of one row.

    The products of float32 that torch gives to oneDNN are those of convolutions.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        """(…, in) -> (…, out)."""
        if not _better(input) or input.numel() * self.out_features < _WORTH:
            return super().forward(input)
        row = input.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        made = _convolved(row, self.weight[:, :, None, None], self.bias)
        return made.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


class PointwiseConv2d(nn.Conv2d):
    """A convolution by a kernel of one pixel that oneDNN computes, forward and backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Conv2d
        """(n, in, h, w) -> (n, out, h, w)."""
        if not _better(input):
            return super().forward(input)
        return _convolved(input, self.weight, self.bias)


def _convolved(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In a thread of one core torch takes matrix products, thus MKL, for kernels of one pixel, but
    # for dilated ones. A single pixel's dilation is none.
    return F.conv2d(pixels, weight, bias, dilation=2)


def _pointwise(conv: nn.Conv2d) -> bool:
    one = set(conv.kernel_size + conv.stride) == {1} and conv.groups == 1
    return one and conv.padding in ((0, 0), "valid", "same")


def _better(input: Tensor) -> bool:  # noqa: A002
    # Other formats, and what autocast turns into them, are oneDNN's anyway.
    plain = input.dtype == torch.float32 and input.device.type == "cpu"
    return plain and input.numel() > _SMALL and not torch.is_autocast_enabled("cpu")
