"""A folder for each session: what it may hold, whose file is whose, and that nothing stays behind.

Gradio keeps every upload in one folder under the hash of its contents, shared by all sessions and
all programs of the user. Here each session has a folder of its own with a name nobody can guess,
uploads are moved into it, and a path counts only for the session that owns it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from diffedit.errors import InputError, OutputError

__all__ = [
    "ForeignPath",
    "Owner",
    "QuotaError",
    "Session",
    "Sessions",
    "check_paths",
    "own_root",
]

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
_DEEPEST = 64
_LINGER_SECONDS = 30.0


class QuotaError(InputError):
    """A session holds as much as it may, and nothing in it can be dropped."""


class ForeignPath(InputError):
    """A payload names a file that is not the sender's."""


class Owner(Protocol):
    """Whoever files belong to."""

    def owns(self, path: str | Path) -> bool:
        """Whether that file is theirs."""
        ...


class Session:
    """The files of one session. Made by `Sessions`, whose lock and quota it shares."""

    def __init__(self, sessions: Sessions, owner: str) -> None:
        self.owner = owner
        self._sessions = sessions
        self._folder = sessions.root / secrets.token_hex(16)
        self._pinned: set[Path] = set()
        self._retired: dict[Path, float] = {}
        self._closed = False
        self.touched = time.monotonic()

    @property
    def folder(self) -> Path:
        """Where its files lie; nobody else's, and made when it is first asked for.

        Raises:
            InputError: the session has ended.
        """
        with self._sessions.lock:
            if self._closed:
                raise InputError("this session has ended, reload the page")
            self.touched = time.monotonic()
            self._folder.mkdir(mode=0o700, exist_ok=True)
            return self._folder

    @property
    def used(self) -> int:
        """Bytes that its files take."""
        return sum(entry.size for entry in self._entries())

    def add(self, source: Path | bytes, suffix: str, *, pinned: bool = False) -> Path:
        """Keep a copy of a file, or these bytes, under a name nobody can guess.

        When the quota is reached, the oldest files that are not pinned go first.

        Args:
            suffix: such as ``.png``.
            pinned: it is not dropped to make room, only when the session ends.

        Raises:
            QuotaError: there is no room, even after dropping what may be dropped.
            InputError: the session has ended.
        """
        with self._sessions.lock:
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            target = self._place(size, suffix)
            try:
                if isinstance(source, bytes):
                    target.write_bytes(source)
                else:
                    shutil.copyfile(source, target)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
            return self._kept(target, pinned)

    def take(self, source: Path, suffix: str, *, pinned: bool = False) -> Path:
        """Move a file of the same file system into the session; otherwise as `add`."""
        with self._sessions.lock:
            target = self._place(source.stat().st_size, suffix)
            source.replace(target)
            return self._kept(target, pinned)

    def owns(self, path: str | Path) -> bool:
        """Whether `path` names a file in the folder; a link that leads out of it does not."""
        try:
            given = Path(path)
            if not given.is_absolute():
                return False
            real = given.resolve(strict=True)
            return real.is_file() and real.is_relative_to(self._folder.resolve())
        except (OSError, RuntimeError, ValueError):
            return False

    def pin(self, path: Path) -> None:
        """Keep a file until `unpin` or the end of the session, however full it gets.

        Raises:
            ForeignPath: the file is not in this session.
        """
        if not self.owns(path):
            raise ForeignPath("that file is not in this session")
        with self._sessions.lock:
            self._retired.pop(path.resolve(), None)
            self._pinned.add(path.resolve())

    def unpin(self, path: Path) -> None:
        """Allow a file to be dropped when room is needed."""
        with self._sessions.lock:
            self._pinned.discard(path.resolve())

    def remove(self, path: Path) -> None:
        """Delete a file of this session; of others', and when it is gone already, nothing."""
        with self._sessions.lock:
            if self.owns(path):
                path.unlink(missing_ok=True)
            self._pinned.discard(path.resolve())

    def retire(self, path: Path) -> None:
        """Delete a file of this session once a page that still shows it has had time to read it.

        A page asks for its pictures one after another; one that goes before it is read ends as a
        broken answer. Until then it is the first to go when room is needed.
        """
        with self._sessions.lock:
            if self.owns(path):
                self._retired[path.resolve()] = time.monotonic()
            self._pinned.discard(path.resolve())

    def _sweep(self, now: float) -> None:
        for path, since in list(self._retired.items()):
            if now - since >= _LINGER_SECONDS:
                path.unlink(missing_ok=True)
                del self._retired[path]

    def _kept(self, target: Path, pinned: bool) -> Path:
        target.chmod(0o600)
        if pinned:
            self._pinned.add(target)
        return target

    def _place(self, size: int, suffix: str) -> Path:
        if not _SUFFIX.fullmatch(suffix):
            raise InputError(f"{suffix!r} is no file suffix such as '.png'")
        folder = self.folder
        self._sessions.make_room(self, size)
        return folder / f"{secrets.token_hex(12)}{suffix}"

    def _entries(self) -> Iterator[_Entry]:
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    about = path.lstat()
                    pinned, retired = path in self._pinned, path in self._retired
                    yield _Entry(path, about.st_size, about.st_mtime_ns, pinned, retired)

    def _close(self) -> None:
        self._closed = True
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    made: int
    pinned: bool
    retired: bool


@dataclass
class Sessions:
    """The sessions of a process, by the hash that the client gives; safe to use from any thread.

    A hash is only a key: a client chooses it, so `claim` says who it belongs to, and no path is
    made from it.

    Attributes:
        root: folder in which the sessions' folders lie, nobody else's to read.
        quota_bytes: what all sessions of one owner may hold together.
        total_bytes: what all sessions may hold together.
        keep_seconds: a session that is not used for so long is removed by `sweep`.
    """

    root: Path
    quota_bytes: int = 512 << 20
    total_bytes: int = 8 << 30
    keep_seconds: float = 3600
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _by_hash: dict[str, Session] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __getitem__(self, session_hash: str | None) -> Session:
        """The session of that hash, made if need be.

        Raises:
            InputError: no hash.
        """
        with self.lock:
            session = self._by_hash.get(self._key(session_hash))
            if session is None:
                session = self._made(session_hash, owner="")
            session.touched = time.monotonic()
            return session

    def __contains__(self, session_hash: str) -> bool:
        return session_hash in self._by_hash

    def __len__(self) -> int:
        return len(self._by_hash)

    def claim(self, session_hash: str, owner: str) -> bool:
        """Give a session to an owner. False if it is another's.

        Raises:
            InputError: no hash, or one that no page would make.
        """
        with self.lock:
            session = self._by_hash.get(self._key(session_hash))
            if session is None:
                session = self._made(session_hash, owner)
            session.touched = time.monotonic()
            if not session.owner:
                session.owner = owner
            return session.owner == owner

    def owner_of(self, session_hash: str) -> str | None:
        """Who claimed a session; None if nobody did."""
        session = self._by_hash.get(session_hash)
        return session.owner or None if session else None

    def of(self, owner: str) -> dict[str, Session]:
        """An owner's sessions by their hashes, the one that rested longest first."""
        with self.lock:
            mine = [(key, one) for key, one in self._by_hash.items() if one.owner == owner]
        return dict(sorted(mine, key=lambda pair: pair[1].touched))

    def touch(self, session_hash: str) -> None:
        """Count a session, if there is one, as used just now."""
        with self.lock:
            if session_hash in self._by_hash:
                self._by_hash[session_hash].touched = time.monotonic()

    def folders(self) -> set[str]:
        """The names of the sessions' folders."""
        with self.lock:
            return {one._folder.name for one in self._by_hash.values()}

    def owns(self, owner: str, path: str | Path) -> bool:
        """Whether a file lies in a session of that owner."""
        return any(session.owns(path) for session in self.of(owner).values())

    def close(self, session_hash: str) -> None:
        """Remove a session and its files; nothing when there is none."""
        with self.lock:
            session = self._by_hash.pop(session_hash, None)
            if session is not None:
                session._close()

    def move(self, old: str, new: str) -> bool:
        """Go on with an owner's old session under a new hash, in place of what it had there.

        Returns:
            Whether there was one, and both are the same owner's.
        """
        with self.lock:
            kept, made = self._by_hash.get(old), self._by_hash.get(new)
            if kept is None or made is None or kept is made or not kept.owner:
                return False
            if kept.owner != made.owner:
                return False
            made._close()
            self._by_hash[new] = self._by_hash.pop(old)
            return True

    def sweep(self, now: float | None = None) -> list[str]:
        """Close the sessions that were not used for `keep_seconds`, and delete what was retired.

        Args:
            now: as `time.monotonic` counts.

        Returns:
            Their hashes.
        """
        now = time.monotonic() if now is None else now
        with self.lock:
            old = [
                key for key, one in self._by_hash.items() if now - one.touched >= self.keep_seconds
            ]
            for key in old:
                self.close(key)
            for session in self._by_hash.values():
                session._sweep(now)
        return old

    def make_room(self, session: Session, size: int) -> None:
        """Drop the oldest files that are not pinned until `size` bytes fit.

        What was retired goes first, then the session's own files before those of its owner's other
        sessions, and nothing goes when all of it would not be enough.

        Raises:
            QuotaError: they do not fit.
        """
        with self.lock:
            theirs = self.of(session.owner).values() if session.owner else [session]
            entries = [
                (not file.retired, one is not session, file.made, file)
                for one in theirs
                for file in one._entries()
            ]
            over = sum(entry.size for *_, entry in entries) + size - self.quota_bytes
            all_used = sum(one.used for one in self._by_hash.values())
            over = max(over, all_used + size - self.total_bytes)
            if over <= 0:
                return
            going: list[Path] = []
            for *_, entry in sorted(entries, key=lambda item: item[:3]):
                if over > 0 and not entry.pinned:
                    going.append(entry.path)
                    over -= entry.size
            if over > 0:
                quota = self.quota_bytes / (1 << 20)
                raise QuotaError(
                    f"no room for another {size / (1 << 20):.1f} MB: a session may keep"
                    f" {quota:g} MB; remove pictures from its history"
                )
            for path in going:
                path.unlink(missing_ok=True)

    def _made(self, session_hash: str | None, owner: str) -> Session:
        session = self._by_hash[self._key(session_hash)] = Session(self, owner)
        return session

    @staticmethod
    def _key(session_hash: str | None) -> str:
        if not session_hash or len(session_hash) > 128:
            raise InputError("no session, reload the page")
        return session_hash


def check_paths(owner: Owner, payload: Any, root: Path | None = None) -> Any:
    """Check that a payload names no file but its sender's.

    Args:
        owner: who sent it; a `Session` will do.
        payload: any JSON-like value.
        root: folder that holds all sessions: a string anywhere in the payload that names something
            in it is checked too.

    Returns:
        The payload, with paths in the place of the server's own addresses of files, and without the
        addresses beside paths: what was checked is all that is left to be used.

    Raises:
        ForeignPath: it names another file, an address, or nests deeper than any form does.
    """
    return _checked(owner.owns, payload, None if root is None else str(root), _DEEPEST)


def _checked(owns: Callable[[str], bool], value: Any, root: str | None, depth: int) -> Any:
    if depth == 0:
        raise ForeignPath(f"nests deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            # Gradio takes every such object for a file; `url` it only makes, never needs.
            path = _local(value["path"])
            if not owns(path):
                raise ForeignPath(f"{_short(path)!r} is not a file of this session, upload it")
            value = {key: one for key, one in value.items() if key != "url"} | {"path": path}
        return {
            key: one
            if key == "path" and isinstance(one, str)
            else _checked(owns, one, root, depth - 1)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_checked(owns, one, root, depth - 1) for one in value]
    if isinstance(value, str) and root is not None and root in unquote(value):
        path = _local(value)
        if not owns(path):
            raise ForeignPath(f"{_short(path)!r} is not a file of this session")
    return value


def _local(path: str) -> str:
    """The path in an address that this server gave for a file; else what was given."""
    before, found, after = path.partition("/gradio_api/file=")
    return unquote(after) if found and (not before or before.startswith("http")) else path


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextlib.contextmanager
def own_root(parent: Path | None = None) -> Iterator[Path]:
    """A folder for all files of this process, removed at the end; those of dead ones go first.

    Args:
        parent: where such folders lie. By default one of the user's own in the temporary folder.

    Raises:
        OutputError: `parent` is a link, another user's, or others can write to it.
    """
    parent = parent or Path(tempfile.gettempdir(), f"diffedit-demo-{os.getuid()}")
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = parent.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        # Anybody may make a folder of that name in /tmp, and would own what is in it.
        raise OutputError(f"{parent} is not a folder that only this user can write to: remove it")
    with (parent / "lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # no folder is made while leftovers are looked for
        for folder in parent.iterdir():
            if folder.is_dir() and not folder.is_symlink() and not _alive(folder):
                shutil.rmtree(folder, ignore_errors=True)
        root = Path(tempfile.mkdtemp(prefix="run-", dir=parent)).resolve()
        held = (root / "pid").open("w")  # closed, and by that unlocked, at the very end
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        held.write(str(os.getpid()))
        held.flush()
        files = root / "files"
        files.mkdir(mode=0o700)
        yield files
    finally:
        shutil.rmtree(root, ignore_errors=True)
        held.close()


def _alive(folder: Path) -> bool:
    """Whether the process that made a folder still holds its lock; the kernel lets go of it."""
    try:
        with (folder / "pid").open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
