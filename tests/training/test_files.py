"""What a training writes is there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from diffedit.errors import OutputError
from diffedit.training.files import whole_file, whole_folder


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "in" / "state"
    with whole_file(path) as file:
        file.write(b"old")

    def fill() -> None:
        with whole_file(path) as file:
            file.write(b"half of the n")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["state"]


def test_a_result_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "result"

    def fill() -> None:
        with whole_folder(folder) as made:
            (made / "half").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"result cannot be written \(No space"):
        fill()
    assert not folder.exists()
    for text in ("first", "second"):
        with whole_folder(folder) as made:
            (made / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == ["result", "second"]
