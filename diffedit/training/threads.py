"""Threads that each keep to one core: faster than threads inside every operation.

Where other work competes for the cores, OpenMP's threads wait for each other at the end of every
small operation, and do so busily; threads that share out whole parts of a batch do not.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def cores() -> int:
    """How many parts run side by side."""
    return min(8, os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,))


def in_parallel(function: Callable[[_Item], _Made], items: Iterable[_Item]) -> list[_Made]:
    """``function`` of every item, in the items' order, on one core each. Not to be nested."""
    return list(_pool().map(function, items))


def shares(items: Iterable[_Item], size: Callable[[_Item], int]) -> list[list[_Item]]:
    """One list for each core, of much the same size in all: the largest first, to whom has least.

    Dealt out in turn instead, weights would all come to one core and biases to the next.
    """
    made: list[list[_Item]] = [[] for _ in range(cores())]
    sizes = [0] * len(made)
    for item in sorted(items, key=size, reverse=True):
        least = sizes.index(min(sizes))
        made[least].append(item)
        sizes[least] += size(item)
    return made


@cache
def keep_memory() -> bool:
    """Have the C library keep freed memory for the next tensors; whether it does (glibc).

    By default large blocks go back to the system at once, and every step of a training has their
    pages zeroed and mapped again, which on a CPU takes about a tenth of its time. Holds for the
    process: each of its threads keeps as much as it once had.
    """
    try:
        option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return False
    # M_MMAP_THRESHOLD at its greatest and M_TRIM_THRESHOLD. The heaps of threads, of 64 MiB each,
    # go back when they are empty, trimmed or not, unless M_TOP_PAD is as much. (One arena for all
    # threads, M_ARENA_MAX, does that too, but they wait for each other there: a tenth slower.)
    return all(option(*pair) for pair in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20)))


@contextmanager
def one_core() -> Iterator[None]:
    """The calling thread's own operations keep to one core for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
