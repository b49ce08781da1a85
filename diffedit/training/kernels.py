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
"""Numbers in a single picture up to which torch gives its convolution to no oneDNN."""
_WORTH = 2**23
"""Multiplications from which a matrix product gains by it."""


def quick(*modules: Any) -> None:
    """Have modules on a CPU compute as it trains fastest; elsewhere they stay what they are.

    - A denoiser's attention: the fused kernel's backward costs more than the whole plain attention.
      Not an autoencoder's: of many cells at once, the plain one would take too much memory.
    - Matrix products in float32: see :func:`quick_products`.
    """
    for module in modules:
        on_cpu = next(module.parameters()).device.type == "cpu"
        attends = hasattr(module, "set_attn_processor") and not isinstance(module, AutoencoderKL)
        if on_cpu and attends:
            module.set_attn_processor(AttnProcessor())
        quick_products(module)


def quick_products(module: nn.Module) -> None:
    """Give float32 products of layers on a CPU to oneDNN, where MKL would be slow with them."""
    if not mkl_is_slow() or next(module.parameters()).device.type != "cpu":
        return
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = Linear
        elif type(each) is nn.Conv2d and _pointwise(each):
            each.__class__ = PointwiseConv2d


@cache
def mkl_is_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch multiplies float32 matrices with MKL, at half the speed of oneDNN.

    So it was on AMD's with AVX-512 (torch 2.15, MKL 2024.2: 100 GFLOP/s of one core, oneDNN 230).
    MKL has its best code for Intel's own. False where ``cpuinfo`` does not tell who made the
    processor (not Linux, not x86).
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

    Of what has a backward in torch, float32 goes to oneDNN in convolutions only.
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
    # In a thread of one core torch takes matrix products, thus MKL, for kernels of one pixel unless
    # they are dilated (use_mkldnn in ATen's Convolution.cpp), which for one pixel says nothing.
    return F.conv2d(pixels, weight, bias, dilation=2)


def _pointwise(conv: nn.Conv2d) -> bool:
    one = set(conv.kernel_size + conv.stride) == {1} and conv.groups == 1
    return one and conv.padding in ((0, 0), "valid", "same")


def _better(input: Tensor) -> bool:  # noqa: A002
    # Half precision is oneDNN's anyway, where the processor has it, and others are not MKL's case.
    plain = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    there = input.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)
    return plain and there and input.numel() > _SMALL
