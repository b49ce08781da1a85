"""A file of weights, as of an adapter, that somebody names: on this disk or on the hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from diffedit.errors import ModelError, nearest
from diffedit.models import hub, loading
from diffedit.models.files import is_pickle, refuse_pickles, unsafe

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def weights_file(source: str, usual: str | None = None) -> Path:
    """The file that is meant.

    Args:
        source: a ``.safetensors`` file, a folder that holds one, or one in a repository of the
            hub: ``owner/name/folder/file.safetensors``.
        usual: what such files are called: the one that is meant where a folder holds several, and
            where ``owner/name`` says no more; None: there is no such name.

    Raises:
        UnsafeWeights: it is a pickle.
        ModelError: there is none, or there are several to choose from.
    """
    if "://" in source:
        raise ModelError(
            f"{source}: an address: give a file or folder on this disk, or what the hub has as"
            " owner/name or owner/name/file.safetensors"
        )
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - a hub id is no path
    loading.check_file(path, whole=False)
    if path.is_file():
        return path
    if path.is_dir():
        if usual and (path / usual).is_file():
            return path / usual
        found = sorted(path.glob(f"*{SUFFIX}"))
        if len(found) == 1:
            return found[0]
        if not found:
            refuse_pickles(path)
            raise ModelError(f"{path}: holds no {SUFFIX} file")
        said = ", ".join(file.name for file in found)
        raise ModelError(f"{path}: holds several {SUFFIX} files: name one of {said}")
    parts = source.split("/")
    if usual and hub.could_be(source) and not source.endswith(SUFFIX):
        parts.append(usual)
    if path.parent.is_dir() and path.parent != Path():  # meant for here
        there = [one.name for one in path.parent.iterdir() if one.is_dir() or one.suffix == SUFFIX]
        raise ModelError(f"{source}: no such file or folder{nearest(path.name, there)}")
    if len(parts) < 3 or source.startswith((".", "/", "~")) or not parts[-1].endswith(SUFFIX):
        there = [one.name for one in Path().iterdir() if one.suffix == SUFFIX]
        hint = nearest(source, there) if len(parts) == 1 else ""
        raise ModelError(f"{source}: no such file or folder{hint}")
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]), usual)


def stamp(source: str) -> object:
    """What tells whether the weights in a file or folder are those that they were; None: none."""
    path = Path(os.path.abspath(os.path.expanduser(source)))  # noqa: PTH100, PTH111 - as above
    files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
    files.append((path.parent if path.is_file() else path) / "adapter_config.json")  # peft's
    told = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file), one.st_mtime_ns, one.st_size) for file, one in told] or None


def _from_hub(repository: str, name: str, usual: str | None) -> Path:
    found = hub.find(repository, part=True)
    if name != usual or found.has(name):
        return found.fetch([name]) / name
    offline = found.files is None
    others = [one for one in found.top if one.endswith(SUFFIX)]
    if len(others) == 1:
        if offline:
            log.warning("%s: takes %s, the only such file of it that is here", repository, *others)
        return found.fetch(others) / others[0]
    if not others and (pickles := [one for one in found.top if is_pickle(one)]):
        raise unsafe(f"{repository}: {pickles[0]}")
    said = f"name one of {', '.join(others)}" if others else f"nor any other {SUFFIX} file"
    where = "here, and the hub cannot be asked for it" if offline else "on the hub"
    raise ModelError(f"{repository}: has no {name} {where}: {said}")
