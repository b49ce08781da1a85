"""Runs what plugins contribute, and names the one that breaks the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffedit.errors import DiffeditError, PluginError

T = TypeVar("T")


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
        versions = [tensor._version for tensor in lent]
        try:
            value = function(*args)
        except DiffeditError:
            raise
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise PluginError(owner, f"{what} raised {type(error).__name__}: {said}") from error
        if [tensor._version for tensor in lent] != versions:
            raise PluginError(owner, f"{what} wrote into a shared tensor; return a new one instead")
        if like is not None:
            if not isinstance(value, Tensor):
                raise PluginError(owner, f"{what} returned {type(value).__name__}, not a tensor")
            if value.shape != like.shape:
                raise PluginError(
                    owner, f"{what} returned shape {tuple(value.shape)}, not {tuple(like.shape)}"
                )
        if self.diagnosing:
            self.check_finite(owner, what, value)
        return value

    def check_finite(self, owner: str, what: str, value: Any) -> None:
        """Raise `PluginError` when a tensor inside `value` is not finite."""
        for tensor in _tensors(value):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise PluginError(owner, f"{what} returned values that are not finite (NaN or inf)")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    places = getattr(value, "places", None) or [
        getattr(value, name) for name in ("q", "k", "v") if hasattr(value, name)
    ]
    return [tensor for item in places for tensor in _tensors(item)]
