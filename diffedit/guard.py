"""Runs what plugins contribute, and names the one that breaks the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffedit.errors import DiffeditError, PluginError
from diffedit.memory import exhausted

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
        versions = [version(tensor) for tensor in lent]
        try:
            value = function(*args)
        except DiffeditError:
            raise
        except Exception as error:
            if exhausted(error):
                raise
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise PluginError(owner, f"{what} raised {type(error).__name__}: {said}") from error
        if [version(tensor) for tensor in lent] != versions:
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
        for tensor in tensors_in(value):
            if not _finite(tensor):
                raise PluginError(owner, f"{what} returned values that are not finite (NaN or inf)")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value: itself, a sequence, residuals, or what goes into an attention."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    names = ("q", "k", "v", "beside") if hasattr(value, "k") else ("places", "inside")
    parts = [getattr(value, name) for name in names if hasattr(value, name)]
    return [tensor for item in parts for tensor in tensors_in(item)]


def constituents(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that one consists of: itself, unless it wraps others.

    As quantised weights do: such a one has a size and a type, and no memory.
    """
    parts = [part for _, part in wrapped(tensor)]
    return [one for part in parts for one in constituents(part)] if parts else [tensor]


def wrapped(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors that one wraps, by the names that it calls them by; none: it is one itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else [(name, getattr(tensor, name)) for name in flatten()[0]]


def version(tensor: Tensor) -> int:
    """Grows with every write; tensors made in inference mode do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version
