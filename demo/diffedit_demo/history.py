"""The pictures of a session: a tree, since one can go back and edit on from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A picture that was opened or made.

    Attributes:
        id: counted from 0 in the session; never another's, also when it has been removed.
        parent: the picture it was made from; None: opened, or made from nothing.
        file: the picture itself, in full depth.
        shown: a copy that a browser can show.
        title: what the page calls it.
        workflow: what made it, as YAML; empty for what was opened.
        size: (width, height) of the picture.
        origin: the picture that was opened, from which this one came by edits.
    """

    id: int
    parent: int | None
    file: Path
    shown: Path
    title: str
    workflow: str
    size: tuple[int, int]
    origin: int


@dataclass
class History:
    """All pictures of a session, and the one that is being edited."""

    nodes: dict[int, Node] = field(default_factory=dict)
    current: int | None = None
    _next: int = 0
    _came: dict[int, int] = field(default_factory=dict)  # parent -> the child last gone to

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def now(self) -> Node | None:
        """The picture being edited."""
        return None if self.current is None else self.nodes[self.current]

    def add(
        self, file: Path, shown: Path, title: str, size: tuple[int, int], workflow: str = "",
        parent: int | None = None,
    ) -> Node:  # fmt: skip
        """A new picture, and go there."""
        number, self._next = self._next, self._next + 1
        origin = number if parent is None else self.nodes[parent].origin
        self.nodes[number] = Node(number, parent, file, shown, title, workflow, size, origin)
        return self.go(number)

    def remove(self, number: int) -> Node:
        """Take a picture out; what was made of it follows on what it was made of.

        Whoever stood on it stands on that one then, or on the newest.

        Raises:
            KeyError: there is no such picture.
        """
        gone = self.nodes.pop(number)
        for one in [node for node in self if node.parent == number]:
            self.nodes[one.id] = replace(one, parent=gone.parent)
        self._came = {
            parent: child for parent, child in self._came.items() if number not in (parent, child)
        }
        if self.current == number:
            newest = max(self.nodes, default=None)
            self.current = newest if gone.parent is None else gone.parent
        return gone

    def go(self, number: int) -> Node:
        """Edit that picture from now on.

        Raises:
            KeyError: there is no such picture.
        """
        node = self.nodes[number]
        self.current = number
        if node.parent is not None:
            self._came[node.parent] = number
        return node

    def undo(self) -> Node | None:
        """Back to the picture that the present one was made from, if there is one."""
        now = self.now
        if now is None or now.parent is None:
            return None
        self._came[now.parent] = now.id
        self.current = now.parent
        return self.nodes[now.parent]

    def redo(self) -> Node | None:
        """Forward again, on the branch that was last stood on."""
        if self.current is None or self.current not in self._came:
            return None
        return self.go(self._came[self.current])

    @property
    def can_redo(self) -> bool:
        """Whether there is a way forward."""
        return self.current in self._came
