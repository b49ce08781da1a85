"""Whose turn it is in a process: loading changes what holds for all of its threads.

While diffusers loads a network the default type of new tensors is the network's, and while it or
peft makes empty layers ``torch.nn.Module`` itself is another. A run in another thread would compute
with that, and two that overlap would put back what the other had put there.

A thread that has a turn must not wait for another thread to get one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

Turn = Literal["running", "loading"]


class Turns:
    """Many threads run at a time, or one loads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # By the numbers of threads.
        self._running = set[int]()
        self._waiting = set[int]()
        self._loader: int | None = None

    def running(self) -> AbstractContextManager[None]:
        """While inside, no other thread loads. Those that wait to load come first."""
        return self._having("running")

    def loading(self) -> AbstractContextManager[None]:
        """While inside, no other thread loads or runs; within a run that run waits."""
        return self._having("loading")

    def aside(self) -> AbstractContextManager[None]:
        """While inside, this thread keeps nobody waiting, as for a download."""
        return self._having(None)

    @contextmanager
    def _having(self, turn: Turn | None) -> Iterator[None]:
        before = self._turn
        if before == turn or (before, turn) == ("loading", "running"):
            yield
            return
        try:
            self._take(turn)
            yield
        finally:
            self._take(before)

    @property
    def _turn(self) -> Turn | None:
        """Of this thread."""
        me = threading.get_ident()
        return "loading" if self._loader == me else "running" if me in self._running else None

    def _take(self, turn: Turn | None) -> None:
        """Give up the turn that this thread has, then wait for another.

        Two that have one and wait for another never wait for each other.
        """
        me = threading.get_ident()
        with self._changed:
            self._running.discard(me)
            if self._loader == me:
                self._loader = None
            self._changed.notify_all()
            if turn == "running":
                self._changed.wait_for(lambda: self._loader is None and not self._waiting)
                self._running.add(me)
            elif turn == "loading":
                try:
                    self._waiting.add(me)
                    self._changed.wait_for(lambda: self._loader is None and not self._running)
                    self._loader = me
                finally:
                    self._waiting.discard(me)
                    self._changed.notify_all()

    def alone(self) -> None:
        """There are no other threads any more: a process that was forked has this one only."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._running &= {me}
        self._waiting.clear()
        self._loader = self._loader if self._loader == me else None


#: Of this process.
turns = Turns()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=turns.alone)

__all__ = ["Turns", "turns"]
