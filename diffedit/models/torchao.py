"""Denoisers whose weights torchao has quantised, in ``.safetensors`` files as diffusers saves them.

diffusers reads them, and torchao computes with them: here is told beforehand whether it can. A file
holds a weight as several tensors, and its header says which and of what kind; older versions wrote
pickles, which are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffedit.errors import ModelError
from diffedit.models.files import Tensor, check_weights, header

METHOD = "torchao"
#: The oldest version whose weights are not pickles.
OLDEST = "0.16.0"
#: Its kinds that hold a number for each of a weight's, and a scale for each block of them.
_KINDS = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
_COMPUTING = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Weight:
    """A quantised weight in a file.

    Attributes:
        name: of the parameter.
        tensors: how the tensors that it consists of end.
        block: numbers to a side that share a scale.
        dtype: that it is made to for computing.
    """

    name: str
    tensors: Sequence[str]
    block: Sequence[int]
    dtype: torch.dtype

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the tensors that it consists of in a file, when it has this one."""
        module, _, leaf = self.name.rpartition(".")
        fits = len(shape) == len(self.block)
        blocks = tuple(n // b for n, b in zip(shape, self.block, strict=True)) if fits else ()
        return {
            f"{module}._{leaf}_{one}".removeprefix("."): shape if one == "qdata" else blocks
            for one in self.tensors
        }


def check(
    settings: Path,
    files: Sequence[Path],
    found: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse what torchao would not read, or would fill up; reads no weights.

    Args:
        settings: the network's config.json, for messages.
        files: of its weights.
        found: the tensors that these hold.
        wanted: the shapes of its parameters, as its configuration makes them.

    Raises:
        ModelError: names the file and what is wrong.
    """
    if not _installed():
        raise ModelError(
            f"{settings}: its weights are quantised by torchao, of which {OLDEST} or newer is not"
            " installed: pip install 'diffedit[torchao]'"
        )
    held = {one.name: one for file in files for one in _weights(file)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted.items():
        shapes |= held[name].shapes(shape) if name in held else {name: shape}
    check_weights(files[0] if len(files) == 1 else settings.parent, found, shapes)


def computing(files: Sequence[Path]) -> torch.dtype:
    """The type that quantised weights are made to for computing: that which they were saved in.

    Raises:
        ModelError: a file does not say it.
    """
    kinds = {one.dtype for file in files for one in _weights(file)}
    if len(kinds) != 1:
        raise ModelError(f"{files[0]}: does not say of its weights how torchao has quantised them")
    return kinds.pop()


def _installed() -> bool:
    from diffusers.utils import is_torchao_available, is_torchao_version

    return bool(is_torchao_available() and is_torchao_version(">=", OLDEST))


def _weights(file: Path) -> list[_Weight]:
    """What a file says of its quantised weights."""
    from safetensors import safe_open

    header(file)  # or it is refused here
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    named = _json(metadata.get("tensor_names", "[]"))
    listed = {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()
    made = []
    for name, text in metadata.items():
        said = _json(text)
        if name == "tensor_names" or not isinstance(said, dict) or said.get("_type") == "Tensor":
            continue
        made.append(_weight(file, name, said))
        if name not in listed:
            raise ModelError(f"{file}: says how {name} is quantised, and not that it holds it")
    return made


def _weight(file: Path, name: str, said: Mapping[str, Any]) -> _Weight:
    kind, data, tensors = (said.get(key) for key in ("_type", "_data", "_tensor_data_names"))
    if kind not in _KINDS:
        raise ModelError(
            f"{file}: its {name} is a {kind} of torchao, which diffedit does not read (it reads"
            f" {', '.join(_KINDS)})"
        )
    data = data if isinstance(data, dict) else {}
    block, dtype = data.get("block_size"), data.get("dtype")
    block, tensors = (one if isinstance(one, list) else [] for one in (block, tensors))
    tensors = [str(one) for one in tensors]
    computed = _COMPUTING.get(str(dtype.get("_data"))) if isinstance(dtype, dict) else None
    sized = all(type(one) is int and one > 0 for one in block)
    if computed is None or not block or not sized or not {"qdata", "scale"} <= {*tensors}:
        raise ModelError(f"{file}: what it says of how its {name} is quantised is not whole")
    return _Weight(name, tensors, block, computed)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # "format": "pt" and the like


__all__ = ["METHOD", "check", "computing"]
