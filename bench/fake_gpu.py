"""A GPU that nobody has: torch's fake tensors have a place and a size there, and no values.

What lies where is exact, computing across devices is refused, and the memory of the device is what
its tensors would take, without what kernels need for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")


@contextmanager
def gpu() -> Iterator[None]:
    """While inside, a GPU can be had, whose tensors have a place and a size but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def networks(pipe: Any) -> list[nn.Module]:
    return [one for one in pipe.components.values() if isinstance(one, nn.Module)]


def bytes_on(device: str, pipe: Any) -> int:
    """What its weights take there."""
    found = {id(t): t for one in networks(pipe) for t in one.parameters()}
    return sum(one.nbytes for one in found.values() if one.device.type == device)


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


#: What brings a tensor from one device to another.
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Memory(TorchDispatchMode):
    """The bytes on the GPU, the most there were, an end to them, and those that travelled there."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.used, self.most, self.copied = size, 0, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_storage(one)._cdata for one in _tensors((args, kwargs))}
        came = any(one.device.type == "cpu" for one in _tensors((args, kwargs)))
        for tensor in _tensors(made):
            if came and func in _COPIES and tensor.device.type == "cuda":
                self.copied += tensor.nbytes
            storage = _storage(tensor)
            if tensor.device.type == "cuda" and storage._cdata not in given | self.seen:
                self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if self.size is not None and self.used + size > self.size:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.seen.add(key)
        self.used += size
        self.most = max(self.most, self.used)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.used -= size
