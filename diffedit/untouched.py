"""Holds a model to the state it was in, and names the plugin that left it changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffedit.errors import PluginError
from diffedit.guard import constituents, tensors_in, version, wrapped


class Untouched:
    """Holds modules to the state they were in, weights included; a context manager.

    What differs at the end is put back. Weights are copied only when they are written to inside
    `watching`: a copy of a whole model would cost more than most passes.

    Args:
        modules: what must stay as it is.
        owner: whom to blame when it did not.
        within: holds the same modules, for longer.

    Raises:
        PluginError: on leaving, when something was left behind and no other error is under way.
    """

    def __init__(
        self, modules: Iterable[torch.nn.Module], owner: str, within: Untouched | None = None
    ) -> None:
        self.owner = owner
        self.modules = [m for part in modules for m in part.modules()]
        self.state = [_structure(module) for module in self.modules]
        held = {
            id(t): t
            for module in self.modules
            for kept in (module._parameters, module._buffers)
            for t in kept.values()
            if t is not None
        }
        #: What quantised weights wrap, and could wrap another in its place.
        self.wrapped = [(t, name, part) for t in held.values() for name, part in wrapped(t)]
        self.grads = [(t, t.requires_grad) for t in held.values()]
        held = {id(part): part for t in held.values() for part in constituents(t)}
        # An alias, made by .data, keeps the old storage alive when a plugin swaps it for another.
        self.weights = [(t, t.data) for t in held.values()]
        self.within = within
        self.began = {key: version(tensor) for key, tensor in held.items()}
        self.versions = dict(self.began)
        self.copies: dict[int, Tensor] = {}

    def watching(self) -> TorchDispatchMode:
        """While inside, a weight is copied before it is first written to."""
        return _CopyOnWrite({_storage(data): data for _, data in self.weights}, self.copies)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        left = self._put_back()
        if left and error is None:
            raise PluginError(
                self.owner, f"left the model changed ({', '.join(left)}); it was put back"
            )

    def _put_back(self) -> list[str]:
        """Restore everything; says what had to be."""
        left: dict[str, None] = {}
        for module, was in zip(self.modules, self.state, strict=True):
            now = _structure(module)
            if now.keys() == was.keys() and all(_same(now[key], was[key]) for key in was):
                continue
            for key in now.keys() | was.keys():
                if key in was and key in now and _same(now[key], was[key]):
                    continue
                left[key.strip("_")] = None
                if key in _HOOKS and key not in was:
                    module.__dict__[key].clear()
                elif key not in was:
                    del module.__dict__[key]
                elif isinstance(was[key], dict):
                    held = module.__dict__.setdefault(key, type(was[key])())
                    held.clear()
                    held.update(was[key])
                else:
                    module.__dict__[key] = was[key]
        for tensor, grad in self.grads:
            if tensor.requires_grad != grad:
                tensor.requires_grad_(grad)
                left["requires_grad"] = None
        for whole, name, part in self.wrapped:
            if getattr(whole, name) is not part:
                setattr(whole, name, part)
                left["weights"] = None
        for tensor, data in self.weights:
            if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                tensor.data = data
                left["weights"] = None
            copy = self.copies.get(_storage(data))
            if copy is None:
                if version(tensor) != self.versions[id(tensor)]:
                    left["weights, which cannot be put back: load the model again"] = None
            elif not torch.equal(copy, data):
                with torch.no_grad():
                    data.copy_(copy)
                left["weights"] = None
            # Now it is as it was at the beginning: writes since then are no concern of the outer.
            outer = self.within.versions if self.within else {}
            if outer.get(id(tensor)) == self.began[id(tensor)]:
                outer[id(tensor)] = version(tensor)
        return list(left)


def _structure(module: torch.nn.Module) -> dict[str, Any]:
    """What a module consists of: parts, weights, hooks if it has any, mode, how it attends."""
    own = module.__dict__
    kept = {key: own[key].copy() for key in _PARTS}
    kept |= {key: own[key].copy() for key in _HOOKS if own.get(key)}
    kept |= {key: own[key] for key in ("training", "forward", "processor") if key in own}
    return kept


_PARTS = ("_parameters", "_buffers", "_modules")
_HOOKS = frozenset(
    key
    for key, value in torch.nn.Module().__dict__.items()
    if "_hook" in key and isinstance(value, dict)
)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a is b


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _CopyOnWrite(TorchDispatchMode):
    def __init__(self, weights: Mapping[int, Tensor], copies: dict[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.copies = weights, copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        for argument, value in zip(func._schema.arguments, args, strict=False):
            given[argument.name] = value
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for whole in tensors_in(given.get(argument.name)):
                    for tensor in constituents(whole):
                        where = _storage(tensor)
                        if where in self.weights and where not in self.copies:
                            self.copies[where] = self.weights[where].clone()
        return func(*args, **(kwargs or {}))
