"""Parts of a batch side by side, and memory that is kept between them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from diffedit.training.threads import cores, in_parallel, one_core


def test_what_is_made_side_by_side_comes_in_order_from_threads_of_one_core() -> None:
    made = in_parallel(lambda item: (item, torch.get_num_threads()), range(3 * cores()))
    assert made == [(item, 1) for item in range(3 * cores())]


def test_the_callers_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    within: list[int] = []

    def fail() -> None:
        with one_core():
            within.append(torch.get_num_threads())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert within == [1]
    assert torch.get_num_threads() == before


MAPPED = """
import ctypes, json, torch
from diffedit.training.threads import keep_memory

class Told(ctypes.Structure):  # malloc.h: struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [(f"more{n}", ctypes.c_size_t) for n in range(5)]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Told

def mapped(mib):
    before = mallinfo2().hblkhd
    block = torch.ones(mib << 18)
    return mallinfo2().hblkhd - before

# The second is larger: where blocks of one size were freed, glibc keeps the next of that size.
told = [mapped(20), keep_memory(), mapped(28), mallinfo2().arena]
print(json.dumps(told))
"""

FAULTS = """
import ctypes, json, resource, torch
from diffedit.training.threads import cores, in_parallel, keep_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: one fault is one page of 4 KiB

def work(_):
    for _ in range(4):
        blocks = [torch.ones(4 << 18) for _ in range(20)]  # freed together, a whole heap of them

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    in_parallel(work, range(cores()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()  # the threads and their heaps are there before
usual = faults()
assert keep_memory()
for _ in range(4):
    faults()
print(json.dumps([usual, min(faults() for _ in range(4))]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the options are glibc's")
def test_threads_keep_their_memory_too() -> None:
    said = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    ).stdout
    usual, kept = json.loads(said)
    assert usual >= 10_000  # pages
    assert kept <= 1_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the options are glibc's")
def test_memory_is_kept_for_the_next_tensors() -> None:
    said = subprocess.run(
        [sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True
    ).stdout
    usual, kept, after, arena = json.loads(said)
    assert usual >= 20 << 20  # asked of the system, and given back to it at once
    assert kept
    assert after == 0
    assert arena >= 28 << 20  # freed, and still there
