"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from diffedit.errors import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once it is on the disk.

    Raises:
        OSError: the disk is full, or must not be written to; ``path`` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` once all is written.

    Raises:
        OutputError: the disk is full, or must not be written to; ``folder`` is what it was.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            yield made
            for file in made.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes for the user alone
            if folder.exists():
                os.replace(folder, Path(scratch) / "old")
            os.replace(made, folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror or error})") from error
