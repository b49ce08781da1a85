"""Which row of a batch is what: branch x item, and references beside them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowKey:
    """One row of a call of the denoiser.

    Attributes:
        branch: the prediction it belongs to ("positive", "negative", or a contributed name).
        item: the picture of the batch, counted from 0.
        reference: the name of the reference it shows; None for the canvas itself.
        negative: whether guidance leads away from it.
    """

    branch: str
    item: int
    reference: str | None = None
    negative: bool = False


@dataclass(frozen=True)
class RowMap:
    """The rows of a call, in order."""

    keys: tuple[RowKey, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def canvas(self) -> list[int]:
        """Indices of the rows that show the canvas."""
        return [i for i, key in enumerate(self.keys) if key.reference is None]

    def of_branch(self, branch: str) -> list[int]:
        """Indices of one branch's canvas rows, in item order."""
        return [
            i for i, key in enumerate(self.keys) if key.branch == branch and key.reference is None
        ]

    def beside(self, reference: str) -> list[int]:
        """For every row, which row shows `reference` in the same branch and item."""
        at = {(k.branch, k.item): i for i, k in enumerate(self.keys) if k.reference == reference}
        return [at[key.branch, key.item] for key in self.keys]

    def index_beside(self, reference: str, device: torch.device) -> torch.Tensor:
        """`beside` as a tensor ``(rows,)`` for indexing on a device."""
        return index_on(tuple(self.beside(reference)), device)

    def is_canvas(self, device: torch.device) -> torch.Tensor:
        """Which rows show the canvas, ``(rows,)`` bool."""
        return index_on(tuple(int(key.reference is None) for key in self.keys), device).bool()

    @property
    def apart(self) -> list[list[int]]:
        """Indices of rows that can be predicted by themselves: a picture and its references."""
        keys = [(key.branch, key.item) for key in self.keys]
        return [[i for i, key in enumerate(keys) if key == one] for one in dict.fromkeys(keys)]

    def only(self, indices: Sequence[int]) -> RowMap:
        """Some of the rows, in the order given."""
        return RowMap(tuple(self.keys[i] for i in indices))


@functools.lru_cache(maxsize=256)
def index_on(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Indices as a tensor, copied once: indexing with a list makes a GPU wait each time."""
    return torch.tensor(indices, device=device)
