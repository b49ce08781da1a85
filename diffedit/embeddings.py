"""Prompts that have been read: what a text encoder made is kept, and not made again."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffedit.guard import version
from diffedit.models.protocol import Conditioning, LatentModel

#: How many are kept, and how many bytes of them; they lie where the denoiser computes.
MOST, BYTES = 128, 64 * 2**20


class _Kept(NamedTuple):
    """A conditioning, the writes to its tensors that are counted, and its size in bytes."""

    made: Conditioning
    versions: tuple[int, ...]
    size: int


class Embeddings:
    """Conditioning by what it depends on; that which was used longest ago goes first.

    What another state of a model's text encoders made is let go: whoever loads weights into them,
    casts, moves or hooks them between two passes gets what they make now.

    Args:
        most: how many are kept.
        size: how many bytes they may take together.
    """

    def __init__(self, most: int = MOST, size: int = BYTES) -> None:
        self.most, self.size = most, size
        self._kept: OrderedDict[tuple[int, Hashable], _Kept] = OrderedDict()
        #: By a model's id, which stays its own while the model is held here.
        self._states: dict[int, tuple[LatentModel, list[_Part]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What is kept takes so many."""
        return sum(one.size for one in self._kept.values())

    @contextmanager
    def of(self, model: LatentModel) -> Iterator[None]:
        """While inside, `model` is in one state but for what the edits of a pass change in it.

        What they changed is undone when this ends; weights that were written to and put back are
        those that they were.
        """
        known, state = self._states.get(id(model)), _state(model.readers())
        if known is None or not _same(known[1], state):
            self._let_go(model)
        self._states[id(model)] = model, state
        yield
        self._states[id(model)] = model, _state(model.readers())

    def get(self, model: LatentModel, key: Hashable, make: Callable[[], Conditioning]) -> Any:
        """What was made of `key` by this model, or else what `make` makes.

        Its tensors must not be written to; what was is made again.
        """
        found = self._kept.get((id(model), key))
        if found is not None and found.versions == _versions(found.made):
            self._kept.move_to_end((id(model), key))
            return found.made
        made = make()
        if id(model) in self._states:
            size = sum(tensor.nbytes for tensor in made.tensors.values())
            self._kept[id(model), key] = _Kept(made, _versions(made), size)
            while len(self._kept) > self.most or self.bytes > self.size:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._states.clear()

    def _let_go(self, model: LatentModel) -> None:
        for key in [key for key in self._kept if key[0] == id(model)]:
            del self._kept[key]


def told(pictures: Sequence[Tensor]) -> Hashable:
    """What stands for pictures in a key: shapes and digests of their values."""
    return tuple(
        (tuple(one.shape), hashlib.sha256(one.contiguous().cpu().numpy().data).hexdigest())
        for one in pictures
    )


def _versions(made: Conditioning) -> tuple[int, ...]:
    return tuple(version(tensor) for tensor in made.tensors.values())


# A module with what hangs on it, or one of its tensors: by weak reference, as an id may return.
_Part = tuple[Any, tuple[Hashable, ...]]


def _state(modules: Iterable[torch.nn.Module]) -> list[_Part]:
    """By what one can tell that text encoders are as they were."""
    found: list[_Part] = []
    for module in modules:
        for part in module.modules():
            own = part.__dict__
            hung = tuple(tuple(own[name]) for name in ("_forward_hooks", "_forward_pre_hooks"))
            found.append((weakref.ref(part), (*hung, part.training, own.get("forward"))))
            for tensors in (own["_parameters"], own["_buffers"]):
                found += [
                    (weakref.ref(one), (one.data_ptr(), version(one)))
                    for one in tensors.values()
                    if one is not None
                ]
    return found


def _same(before: Sequence[_Part], now: Sequence[_Part]) -> bool:
    # By identity: tensors compare value by value.
    return len(before) == len(now) and all(
        was() is one() and facts == others
        for (was, facts), (one, others) in zip(before, now, strict=True)
    )


__all__ = ["Embeddings", "told"]
