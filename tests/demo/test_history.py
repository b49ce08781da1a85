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


def test_what_is_made_of_a_picture_has_its_origin() -> None:
    history = grown()
    history.add(Path("other"), Path("other"), "other", (8, 8))
    assert [node.origin for node in history] == [0, 0, 0, 0, 4]


def test_what_was_made_of_a_removed_picture_follows_on_what_that_was_made_of() -> None:
    history = grown()
    history.go(1)
    assert history.remove(1).title == "one"
    assert [(node.id, node.parent, node.origin) for node in history] == [
        (0, None, 0), (2, 0, 0), (3, 0, 0),
    ]  # fmt: skip
    assert history.now is not None
    assert history.now.title == "photo"
    assert not history.can_redo  # it led to the picture that is gone
    with pytest.raises(KeyError):
        history.go(1)
    assert history.add(Path("new"), Path("new"), "new", (8, 8), parent=0).id == 4


def test_without_what_it_was_made_of_one_stands_on_the_newest() -> None:
    history = grown()
    history.go(0)
    history.remove(0)
    assert history.now is not None
    assert (history.now.id, history.now.parent, history.now.origin) == (3, None, 0)
    for number in (1, 2, 3):
        history.remove(number)
    assert [history.current, len(history)] == [None, 0]


def test_an_empty_history_has_nowhere_to_go() -> None:
    history = History()
    assert history.now is history.undo() is history.redo() is None
    with pytest.raises(KeyError):
        history.go(0)
