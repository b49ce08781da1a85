"""Runs what plugins contribute, and names the one that breaks the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffedit.errors import DiffeditError, PluginError

T = TypeVar("T")
_END = object()


class Guard:
    """Calls plugins' functions.

    Args:
        diagnosing: also check that everything they return is finite. A check per plugin and step
            would make a GPU wait, so this is on only when a pass has already gone wrong.
    """

    def __init__(self, diagnosing: bool = False) -> None:
        self.diagnosing = diagnosing

    def call(
        self,
        owner: str,
        what: str,
        function: Callable[..., T],
        *args: Any,
        lent: Sequence[Tensor] = (),
        like: Tensor | None = None,
    ) -> T:
        """Call a plugin's function.

        Args:
            owner: the edit's label.
            what: what the function is, for messages: "refine", "residuals".
            function: the function.
            args: its arguments.
            lent: tensors it may read but not write.
            like: the result must be a tensor of this one's shape.

        Raises:
            PluginError: it raised, wrote into what it was lent, or returned something unfit.
                Errors of diffedit's own pass through: they already say what is wrong.
        """
        versions = [_version(tensor) for tensor in lent]
        try:
            value = function(*args)
        except DiffeditError:
            raise
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise PluginError(owner, f"{what} raised {type(error).__name__}: {said}") from error
        if [_version(tensor) for tensor in lent] != versions:
            raise PluginError(owner, f"{what} wrote into a shared tensor; return a new one instead")
        if like is not None:
            if not isinstance(value, Tensor):
                raise PluginError(owner, f"{what} returned {type(value).__name__}, not a tensor")
            if value.shape != like.shape:
                raise PluginError(
                    owner, f"{what} returned shape {tuple(value.shape)}, not {tuple(like.shape)}"
                )
        # What was NaN when it was lent is another's doing.
        if self.diagnosing and all(_finite(tensor) for tensor in lent):
            self.check_finite(owner, what, value)
        return value

    def steps(
        self, owner: str, what: str, function: Callable[..., Any], *args: Any
    ) -> Iterator[Any]:
        """Call a plugin's function, and pass on what it yields if it is a generator."""
        made = self.call(owner, what, function, *args)
        if not isinstance(made, Iterator):
            return
        try:
            while True:
                step = self.call(owner, what, next, made, _END)
                if step is _END:
                    return
                yield step
        finally:
            if hasattr(made, "close"):
                made.close()

    def check_finite(self, owner: str, what: str, value: Any) -> None:
        """Raise `PluginError` when a tensor inside `value` is not finite."""
        for tensor in _tensors(value):
            if not _finite(tensor):
                raise PluginError(owner, f"{what} returned values that are not finite (NaN or inf)")


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
        # An alias, made by .data, keeps the old storage alive when a plugin swaps it for another.
        self.weights = [(t, t.data, t.requires_grad) for t in held.values()]
        self.versions: dict[int, int] = (
            within.versions if within else {k: _version(t) for k, t in held.items()}
        )
        self.copies: dict[int, Tensor] = {}

    def watching(self) -> TorchDispatchMode:
        """While inside, a weight is copied before it is first written to."""
        return _CopyOnWrite({_storage(data): data for _, data, _ in self.weights}, self.copies)

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
                if key not in was:
                    del module.__dict__[key]
                elif isinstance(was[key], dict):
                    held = module.__dict__.setdefault(key, type(was[key])())
                    held.clear()
                    held.update(was[key])
                else:
                    module.__dict__[key] = was[key]
        for tensor, data, grad in self.weights:
            if tensor.requires_grad != grad:
                tensor.requires_grad_(grad)
                left["requires_grad"] = None
            if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                tensor.data = data
                left["weights"] = None
            copy = self.copies.get(_storage(data))
            if copy is None:
                if _version(tensor) != self.versions[id(tensor)]:
                    left["weights, which cannot be put back: load the model again"] = None
            elif not torch.equal(copy, data):
                with torch.no_grad():
                    data.copy_(copy)
                left["weights"] = None
            self.versions[id(tensor)] = _version(tensor)
        return list(left)


def _structure(module: torch.nn.Module) -> dict[str, Any]:
    """What a module consists of: parts, weights, hooks, mode, and how it attends."""
    return {
        key: value.copy() if isinstance(value, dict) else value
        for key, value in module.__dict__.items()
        if key in _PARTS or "_hook" in key
    }


_PARTS = {"_parameters", "_buffers", "_modules", "training", "forward", "processor"}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a is b


def _version(tensor: Tensor) -> int:
    """Grows with every write; tensors made in inference mode do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


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
                for tensor in _tensors(given.get(argument.name)):
                    where = _storage(tensor)
                    if where in self.weights and where not in self.copies:
                        self.copies[where] = self.weights[where].clone()
        return func(*args, **(kwargs or {}))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    places = getattr(value, "places", None) or [
        getattr(value, name) for name in ("q", "k", "v") if hasattr(value, name)
    ]
    return [tensor for item in places for tensor in _tensors(item)]
