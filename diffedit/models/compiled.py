"""A denoiser whose steps torch compiles when they are first made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Compiled:
    """Holds a denoiser's compiled forward in place of its own, until it is set aside.

    Transformers are compiled block by block: their blocks are alike, so that one compilation
    serves all of them, in seconds instead of minutes. UNets are compiled whole, as they are
    launched in many small pieces.

    Args:
        denoiser: of diffusers.
        mode: of `torch.compile`: "default", "reduce-overhead" (CUDA graphs), "max-autotune".
    """

    def __init__(self, denoiser: torch.nn.Module, mode: str = "default") -> None:
        repeated = set(getattr(denoiser, "_repeated_blocks", None) or ())
        blocks = [part for part in denoiser.modules() if type(part).__name__ in repeated]
        # A UNet's repeated blocks are its attention only.
        whole = not blocks or hasattr(denoiser, "down_blocks")
        self.parts = [denoiser] if whole else blocks
        #: CUDA graphs write every result to the same place.
        self.reused = mode in {"reduce-overhead", "max-autotune"}
        for part in self.parts:
            part.forward = self._once(torch.compile(part.forward, mode=mode))

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if not self.reused:
            return forward

        def stepped(*args: Any, **kwargs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return _kept(forward(*args, **kwargs))

        return stepped

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While inside, the denoiser runs as it is written: what listens to its parts is heard."""
        held = [(part, part.__dict__.pop("forward", None)) for part in self.parts]
        try:
            yield
        finally:
            for part, forward in held:
                if forward is not None:  # else it was aside already
                    part.forward = forward


def _kept(made: Any) -> Any:
    """Copies of the tensors in a result, which the next call would write over."""
    if isinstance(made, Tensor):
        return made.clone()
    if isinstance(made, tuple | list):
        return type(made)(_kept(one) for one in made)
    return made
