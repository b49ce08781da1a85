"""What oneDNN computes instead of MKL is what torch would have computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.profiler import profile

from diffedit.training import kernels, lora
from diffedit.training.kernels import Linear, PointwiseConv2d, mkl_is_slow, quick
from diffedit.training.parts import new_unet
from diffedit.training.threads import one_core


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """As a part of a batch is computed; with several threads torch chooses otherwise."""
    with one_core():
        yield


LORA = "pytorch_lora_weights.safetensors"

CASES = {
    "tokens": (nn.Linear(64, 512), (8, 256, 64)),
    "rows": (nn.Linear(128, 192), (512, 128)),
    "one picture's tokens": (nn.Linear(128, 256, bias=False), (1, 1024, 128)),
    "few rows": (nn.Linear(256, 256), (100, 256)),
    "few rows, made many": (nn.Linear(256, 4096), (64, 256)),
    "pixels": (nn.Conv2d(32, 48, 1), (4, 32, 16, 16)),
    "pixels of one": (nn.Conv2d(64, 16, 1, bias=False), (1, 64, 32, 32)),
    "few pixels": (nn.Conv2d(8, 8, 1), (1, 8, 4, 4)),
}


def _ours(module: nn.Module) -> nn.Module:
    ours = copy.deepcopy(module)
    ours.__class__ = Linear if isinstance(module, nn.Linear) else PointwiseConv2d
    return ours


def _ran(module: nn.Module, seen: Tensor) -> tuple[list[Tensor], set[str]]:
    """The output, all gradients, and the operations it took."""
    seen = seen.clone().requires_grad_()
    with profile() as told:
        made = module(seen)
        weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
        grads = torch.autograd.grad((made * weight).sum(), [seen, *module.parameters()])
    return [made, *grads], {event.key for event in told.key_averages()}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_torchs_own(case: str) -> None:
    plain, shape = CASES[case]
    seen = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, _ = _ran(plain, seen)
    found, operations = _ran(_ours(plain), seen)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 2e-6 * other.norm()
    assert ("aten::mkldnn_convolution" in operations) == (not case.startswith("few"))
    assert not any("dilated" in name for name in operations)  # torch's own for what oneDNN refuses


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_keep_their_layout(layout: torch.memory_format) -> None:
    seen = torch.randn(4, 32, 16, 16).to(memory_format=layout)
    conv = nn.Conv2d(32, 48, 1).to(memory_format=layout)
    assert _ours(conv)(seen).is_contiguous(memory_format=layout)


def test_tokens_in_any_order_of_memory() -> None:
    linear, seen = nn.Linear(64, 64), torch.randn(8, 64, 256).transpose(1, 2)
    torch.testing.assert_close(_ours(linear)(seen), linear(seen), rtol=1e-5, atol=1e-6)


def test_other_formats_are_left_to_torch() -> None:
    linear, seen = nn.Linear(64, 512), torch.randn(2048, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, operations = _ran(_ours(linear), seen)
        expected, _ = _ran(linear, seen)
    with torch.backends.mkldnn.flags(enabled=False):
        _, without = _ran(_ours(linear), seen)
    _, double = _ran(_ours(linear.double()), seen.double())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any("conv" in name for name in operations | without | double)


def test_frozen_weights_get_no_gradient() -> None:
    linear = _ours(nn.Linear(64, 512)).requires_grad_(False)
    seen = torch.randn(2048, 64, requires_grad=True)
    linear(seen).sum().backward()
    assert seen.grad is not None
    assert all(param.grad is None for param in linear.parameters())


def test_a_denoiser_stays_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    plain = new_unet((32, 64), plain_levels=1, sample_size=32).eval()
    ours = copy.deepcopy(plain)
    before = {name: id(param) for name, param in ours.state_dict(keep_vars=True).items()}
    quick(ours)
    assert {name: id(p) for name, p in ours.state_dict(keep_vars=True).items()} == before
    assert list(before) == list(plain.state_dict())
    kinds = {type(module) for module in ours.modules()}
    assert {Linear, PointwiseConv2d} <= kinds
    assert nn.Linear not in kinds
    assert {conv.kernel_size for conv in ours.modules() if type(conv) is nn.Conv2d} == {(3, 3)}
    assert {type(processor) for processor in ours.attn_processors.values()} == {AttnProcessor}
    x, t, words = torch.randn(2, 4, 32, 32), torch.tensor([10, 500]), torch.randn(2, 24, 128)
    expected, found = (
        torch.autograd.grad(unet(x, t, words).sample.square().mean(), list(unet.parameters()))
        for unet in (plain, ours)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


def test_a_lora_of_a_quick_model_is_quick_and_is_saved_as_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    plain = new_unet((32, 64), plain_levels=1, sample_size=32)
    ours = copy.deepcopy(plain)
    quick(ours)
    targets = ["to_q", "to_v", "conv1"]
    additions = [name for name, _ in lora.add(ours, targets, 4, 4.0).named_parameters()]
    assert nn.Linear not in {type(module) for module in ours.modules()}
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: False)
    assert additions == [name for name, _ in lora.add(plain, targets, 4, 4.0).named_parameters()]
    for name, unet in (("plain", plain), ("ours", ours)):
        (tmp_path / name).mkdir()
        lora.save(tmp_path / name, copy.deepcopy(unet).half())
    files = [load_file(tmp_path / name / LORA) for name in ("plain", "ours")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}


def test_where_mkl_is_fast_layers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: False)
    unet = new_unet((32, 64), plain_levels=1, sample_size=32)
    quick(unet)
    assert not {Linear, PointwiseConv2d} & {type(module) for module in unet.modules()}
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}


def test_an_autoencoder_keeps_its_attention() -> None:
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    before = {name: type(processor) for name, processor in vae.attn_processors.items()}
    assert AttnProcessor not in before.values()
    quick(vae)
    assert {name: type(processor) for name, processor in vae.attn_processors.items()} == before


@pytest.mark.parametrize(
    ("vendors", "capability", "slow"),
    [
        (["GenuineIntel"] * 2, "AVX512", False),
        (["AuthenticAMD"] * 2, "AVX512", True),
        (["AuthenticAMD"] * 2, "AVX2", False),
        ([], "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_mkl_is_slow_on_wide_processors_that_are_not_intels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendors: list[str] | None,
    capability: str,
    slow: bool,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if vendors is not None:
        rows = (f"processor\t: {n}\nvendor_id\t: {name}\n" for n, name in enumerate(vendors))
        cpuinfo.write_text("\n".join(rows))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert mkl_is_slow(cpuinfo) == slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    mkl_is_slow.cache_clear()
    assert not mkl_is_slow(cpuinfo)  # an ARM processor's torch, which has no MKL
    mkl_is_slow.cache_clear()
