"""Whose turn it is in a process: loading changes what holds for all of its threads.

While diffusers loads a network the default type of new tensors is the network's, and while it or
peft makes empty layers ``torch.nn.Module`` itself is another. A run in another thread would compute
with that, and two that overlap would put back what the other had put there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Many run at a time, or one loads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._loader: int | None = None
        self._own = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While inside, no other thread loads. Those that wait to load come first."""
        if self._runs or self._loader == threading.get_ident():
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._loader is None and not self._waiting)
            self._running += 1
        self._own.runs = True
        try:
            yield
        finally:
            self._own.runs = False
            self._add(-1)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While inside, no other thread loads or runs; within a run that run waits."""
        me = threading.get_ident()
        if self._loader == me:
            yield
            return
        runs = int(self._runs)
        with self._changed:
            self._waiting += 1
            # Two runs that wait to load must not wait for each other.
            self._running -= runs
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._loader is None and not self._running)
                self._loader = me
            except BaseException:  # Ctrl-C
                self._running += runs
                raise
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._loader = None
                self._running += runs
                self._changed.notify_all()

    @property
    def _runs(self) -> bool:
        return getattr(self._own, "runs", False)

    def _add(self, count: int) -> None:
        with self._changed:
            self._running += count
            self._changed.notify_all()


#: Of this process.
turns = Turns()

__all__ = ["Turns", "turns"]
