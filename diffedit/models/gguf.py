"""Denoisers in GGUF files (ggml's format), whose weights are held in blocks of a few bits each.

diffusers computes with them: each layer makes a copy of its weights in the type that it computes in
when it is called. A file holds nothing but the denoiser, in the layout of its makers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffedit.errors import ModelError
from diffedit.models.files import Tensor, first_line

SUFFIX = ".gguf"


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, with the shapes that they have when they are unpacked.

    Raises:
        ModelError: the package gguf is not installed, or the file is not what it says.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            f"{path}: .gguf files need the package gguf: pip install 'diffedit[gguf]'"
        ) from None
    try:
        tensors: Any = GGUFReader(path).tensors  # it maps the file, and finds what is cut off
    except Exception as error:  # whatever the reader meets in a file that lies
        raise ModelError(f"{path}: not a readable .gguf file ({first_line(error)})") from error
    return {
        one.name: Tensor(one.tensor_type.name, tuple(int(n) for n in one.shape[::-1]))
        for one in tensors
    }


def load(cls: Any, path: Path, folder: Path, name: str, dtype: Any) -> Any:
    """A denoiser with its weights as they lie in the file.

    Args:
        cls: of diffusers.
        folder: of a model whose part `name` has the configuration.
        dtype: that it computes in.
    """
    from diffusers import GGUFQuantizationConfig

    return cls.from_single_file(
        str(path),
        config=str(folder),
        subfolder=name,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    )
