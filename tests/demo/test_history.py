"""Going back, forward again, and on another branch."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffedit_demo.history import History


def grown() -> History:
    """0 opened; 1 made of 0; 2 made of 1; back to 0; 3 made of 0."""
    history = History()
    for title, parent in (("photo", None), ("one", 0), ("two", 1)):
        history.add(Path(title), Path(title), title, (8, 8), parent=parent)
    history.go(0)
    history.add(Path("three"), Path("three"), "three", (8, 8), parent=0)
    return history


def test_undo_goes_to_what_it_was_made_from_and_redo_along_the_branch_last_stood_on() -> None:
    history = grown()
    assert history.now is not None
    assert history.now.title == "three"
    assert history.redo() is None
    first = history.undo()
    assert first is not None
    assert first.title == "photo"
    assert history.undo() is None
    again = history.redo()
    assert again is not None
    assert again.title == "three"
    history.go(2)
    history.undo()
    history.undo()
    titles = [node.title for node in (history.redo(), history.redo()) if node]
    assert titles == ["one", "two"]
    assert history.redo() is None


def test_the_path_leads_from_the_opened_picture() -> None:
    history = grown()
    assert [node.title for node in history.path()] == ["photo", "three"]
    history.go(2)
    assert [node.title for node in history.path()] == ["photo", "one", "two"]


def test_an_empty_history_has_nowhere_to_go() -> None:
    history = History()
    assert history.now is history.undo() is history.redo() is None
    with pytest.raises(IndexError):
        history.go(0)
