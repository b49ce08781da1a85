"""The pictures of a session: a tree, since one can go back and edit on from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A picture that was opened or made.

    Attributes:
        id: counted from 0 in the session.
        parent: the picture it was made from; None: opened, or made from nothing.
        file: the picture itself, in full depth.
        shown: a copy that a browser can show.
        title: what the page calls it.
        workflow: what made it of its parent, as YAML; empty for what was opened.
        size: (width, height) of the picture.
    """

    id: int
    parent: int | None
    file: Path
    shown: Path
    title: str
    workflow: str
    size: tuple[int, int]


@dataclass
class History:
    """All pictures of a session, and the one that is being edited."""

    nodes: list[Node] = field(default_factory=list)
    current: int | None = None
    _came: dict[int, int] = field(default_factory=dict)  # parent -> the child last gone to

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

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
        node = Node(len(self.nodes), parent, file, shown, title, workflow, size)
        self.nodes.append(node)
        return self.go(node.id)

    def go(self, number: int) -> Node:
        """Edit that picture from now on.

        Raises:
            IndexError: there is no such picture.
        """
        if not 0 <= number < len(self.nodes):
            raise IndexError(number)
        self.current = number
        node = self.nodes[number]
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

    def path(self) -> list[Node]:
        """From the first picture to the present one."""
        found: list[Node] = []
        node = self.now
        while node is not None:
            found.insert(0, node)
            node = None if node.parent is None else self.nodes[node.parent]
        return found
