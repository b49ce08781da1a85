"""Networks whose weights torchao has quantised, in ``.safetensors`` files, as diffusers saves them.

diffusers reads them, and torchao computes with them: here is told beforehand whether it can. A file
holds a weight as several tensors, and says in its header which and of what kind they are; older
versions wrote pickles, which are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffedit.errors import ModelError
from diffedit.models.files import Tensor, check_weights, some

METHOD = "torchao"


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
    if find_spec(METHOD) is None:
        raise ModelError(
            f"{settings}: its weights are quantised by torchao, which is not installed:"
            " pip install 'diffedit[torchao]'"
        )
    where = files[0] if len(files) == 1 else settings.parent
    told = _told(files)
    if lost := [name for name in wanted if name not in told and name not in found]:
        raise ModelError(f"{where}: lacks {some(lost)}; it would be random numbers")
    plain = {name: shape for name, shape in wanted.items() if not _tensors(name, told.get(name))}
    check_weights(where, found, plain)
    held = (one for name in wanted.keys() - plain for one in _tensors(name, told[name]))
    if lost := [name for name in held if name not in found]:
        raise ModelError(f"{where}: lacks {some(lost)}; it would be random numbers")


def computing(files: Sequence[Path]) -> torch.dtype | None:
    """The type that quantised weights are made to for computing: that which they were saved in."""
    for said in _told(files).values():
        kind = said.get("_data", {}).get("dtype", {}) if isinstance(said, dict) else {}
        if isinstance(found := getattr(torch, str(kind.get("_data")), None), torch.dtype):
            return found
    return None


def _told(files: Sequence[Path]) -> dict[str, Any]:
    """What files say of each parameter: its class, and what that was made with."""
    from safetensors import safe_open

    told: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name, said in (opened.metadata() or {}).items():
                try:
                    told[name] = json.loads(said)
                except ValueError:
                    continue  # "format": "pt" and the like
    return told


def _tensors(name: str, said: Any) -> list[str]:
    """The tensors that a quantised parameter consists of in a file; none: it is a plain one."""
    parts = said.get("_tensor_data_names") if isinstance(said, dict) else None
    module, _, leaf = name.rpartition(".")
    return [f"{module}._{leaf}_{one}".removeprefix(".") for one in parts or ()]


__all__ = ["METHOD", "check", "computing"]
