"""Each device trains in the format that it multiplies in hardware."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from diffedit.errors import InputError
from diffedit.training import precision
from diffedit.training.precision import Precision, cpu_multiplies_bf16, resolve


@pytest.fixture(autouse=True)
def _warnings_anew() -> Iterator[None]:
    precision._warn_once.cache_clear()
    yield
    precision._warn_once.cache_clear()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: request.param)


def _cuda(monkeypatch: pytest.MonkeyPatch, *, hardware: bool) -> None:
    """A CUDA device that emulates bf16 unless ``hardware``, as torch tells of a T4."""

    def supported(including_emulation: bool = True) -> bool:
        return hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_bf16 fsrm\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile amx_int8\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd atomics i8mm bf16 dgh\n", True),
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512bw\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd atomics\n", False),
        # The word stands in another row, or on one kind of core only.
        ("model name\t: a bf16 wonder\nbugs\t\t: bf16\nflags\t\t: fpu avx2\n", False),
        ("Features\t: fp bf16\nFeatures\t: fp\n", False),
        ("", False),
    ],
)
def test_cpu_flags(tmp_path: Path, text: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert cpu_multiplies_bf16(cpuinfo) is expected


def test_a_system_without_cpuinfo_has_no_known_bf16(tmp_path: Path) -> None:
    assert not cpu_multiplies_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("cpu", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], indirect=["cpu"]
)
@pytest.mark.usefixtures("cpu")
def test_auto_on_a_cpu(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("auto", "cpu") == dtype
    assert not caplog.records


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    _cuda(monkeypatch, hardware=hardware)
    assert resolve("auto", "cuda:0") == (torch.bfloat16 if hardware else torch.float16)
    assert resolve("fp16", "cuda") == torch.float16


@pytest.mark.parametrize("cpu", [True], indirect=True)
@pytest.mark.usefixtures("cpu")
def test_auto_on_other_devices_does_not_ask_the_cpu() -> None:
    assert resolve("auto", "mps") == torch.float32


@pytest.mark.parametrize("cpu", [False, True], indirect=True)
def test_bf16_is_given_and_warned_of_once_where_emulated(
    cpu: None, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert [resolve("bf16", "cpu") for _ in range(3)] == [torch.bfloat16] * 3
    emulated = not precision.cpu_multiplies_bf16()
    assert len(caplog.records) == emulated
    assert "15 to 20 times slower" in caplog.text or not emulated


def test_bf16_is_warned_of_on_cuda_that_emulates_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _cuda(monkeypatch, hardware=False)
    assert resolve("bf16", "cuda") == torch.bfloat16
    assert "CUDA" in caplog.text


def test_fp32_is_fp32_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch, hardware=True)
    assert resolve("fp32", "cpu") == resolve("fp32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(
    ("asked", "device", "told"),
    [
        ("fp16", "cpu", "fp16 does not train on a CPU"),
        ("fp61", "cpu", "did you mean 'fp16'"),
        ("auto", "toaster", "'toaster' is unknown"),
        ("auto", "cuda", "no CUDA device"),
    ],
)
def test_mistakes_are_told(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=told) as raised:
        resolve(cast("Precision", asked), device)
    assert "\n" not in str(raised.value)


def test_what_is_resolved_is_what_autocast_takes() -> None:
    dtype = resolve("auto", "cpu")
    made: Any = torch.zeros(2, 2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        made = made @ made
    assert made.dtype == dtype
