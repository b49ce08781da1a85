"""Models by hub id: what a repository holds, the few files of it that are needed, and its cache.

The cache is huggingface_hub's own (``HF_HOME``), in its layout, so that other programs find what is
there, and diffedit what they have downloaded. No pickle and no code is ever fetched.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from diffedit.errors import ModelError
from diffedit.models.download import File, StoppedError, UnreachableError, ask, fetch, utils
from diffedit.models.files import first_line, is_pickle, read_json, unsafe, variant_of
from diffedit.models.parts import STEMS, named
from diffedit.models.turns import turns

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
#: Where the commits of revisions are kept of which a part is here.
_PART = "diffedit"
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: A LoRA of a model's own.
_LORA = re.compile(r"lora/[^/]+/(pytorch_lora_weights\.safetensors|diffedit\.json)")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: Files that say what a part is, beside its weights.
_SETTINGS = frozenset({".json", ".txt", ".model", ".jinja"})
_WORKERS = 4
#: Bytes that nobody waits for.
_SMALL = 2**20


def could_be(source: str) -> bool:
    """Whether a source has the form of a hub id: ``owner/name``, or ``owner/name@revision``."""
    name, _, revision = source.partition("@")
    up = ".." in revision.split("/") or revision.startswith("/")
    return _NAME.fullmatch(name) is not None and ".." not in name and "--" not in name and not up


@dataclass(frozen=True)
class Repository:
    """A model on the hub at a commit, or what is here of it.

    Attributes:
        name: ``owner/name``.
        revision: as it was asked for.
        commit: that it is.
        files: of it, by path; None: the hub could not be asked.
    """

    name: str
    revision: str
    commit: str
    files: Mapping[str, File] | None

    @property
    def folder(self) -> Path:
        """Where what was fetched of this commit lies."""
        return _cache(self.name) / "snapshots" / self.commit

    def read(self, path: str) -> dict[str, Any]:
        """A JSON file of it.

        Raises:
            ModelError: there is none.
        """
        self.fetch([path])
        return read_json(self.folder / path)

    def model(self, variant: str | None = None, weights: frozenset[str] | None = None) -> Path:
        """Fetch what a model needs, and nothing else.

        Args:
            variant: of the weights that is preferred, such as "fp16".
            weights: parts whose weights are wanted; None: of all.

        Raises:
            UnsafeWeights: its weights are pickles.
            ModelError: it is no model, or cannot be fetched.
        """
        if self.files is None:
            return self.folder
        wanted = [path for path in ("model_index.json", "diffedit.json") if path in self.files]
        index = self.read("model_index.json")
        nets = {str(PurePosixPath(path).parent) for path in self.files if _of_control(path)}
        for part in sorted({*named(index), *nets}):
            if weights is None or part in weights:
                wanted += self._part(f"{part}/", variant)
            else:
                wanted += [p for p in self.files if p.startswith(f"{part}/") and _is_setting(p)]
        if weights is None:
            wanted += [path for path in self.files if _LORA.fullmatch(path)]
        # What lacks weights is no version that could be used offline.
        return self._complete(wanted) if weights is None else self.fetch(wanted)

    def settings(self) -> Path:
        """Fetch what it says of itself: the model card and its configurations."""
        wanted = re.compile(r"README\.md|diffedit\.json|model_index\.json|[^/]+/[^/]*config\.json")
        return self.fetch([path for path in self.files or () if wanted.fullmatch(path)])

    def network(self, part: str = "") -> Path:
        """Fetch what one network needs, such as a control network; raises as `model`.

        Args:
            part: of a model, such as "vae/"; "": it is a repository of its own.
        """
        if self.files is None:
            return self.folder / part
        found = self._part(part, None)
        inside = [path for path in found if "/" not in path.removeprefix(part)]
        wanted = [f"{part}config.json", *(path for path in inside if "safetensors" in path)]
        # A part is no version that could be used offline.
        return (self.fetch(wanted) if part else self._complete(wanted)) / part

    def has(self, path: str) -> bool:
        """Whether it has a file, as far as can be told."""
        return (self.folder / path).is_file() if self.files is None else path in self.files

    @property
    def top(self) -> list[str]:
        """Names of the files that lie in no folder of it; of those that are here, offline."""
        if self.files is None:
            return sorted(one.name for one in self.folder.iterdir() if one.is_file())
        return [path for path in self.files if "/" not in path]

    def fetch(self, paths: Iterable[str]) -> Path:
        """Have files in `folder`.

        Raises:
            ModelError: it has no such file, or cannot be fetched.
        """
        paths = list(paths)
        if self.files is None:
            if lost := [path for path in paths if not (self.folder / path).is_file()]:
                raise ModelError(
                    f"{self.name}: {lost[0]} is not here, and the hub cannot be asked for it"
                )
            return self.folder
        if lost := [path for path in paths if path not in self.files]:
            settings = lost[0] in ("model_index.json", "config.json")
            raise ModelError(
                f"{self.name}: has no {lost[0]} on the hub"
                + (", so it is no model's folder" if settings else "")
            )
        missing = {path: file for path in paths if not self._has(file := self.files[path])}
        try:
            if missing:
                self._download(list(missing.values()))
        except OSError as error:
            raise ModelError(
                f"{self.name}: cannot be kept in {_cache(self.name)} ({first_line(error)})"
            ) from error
        self._note(_PART)
        return self.folder

    def code(self) -> list[str]:
        """The files of it that are programs; they are not fetched."""
        return sorted(path for path in self.files or () if path.endswith(".py"))

    def _part(self, prefix: str, variant: str | None) -> list[str]:
        """What is needed of a folder: its settings, and its weights once."""
        assert self.files is not None
        names = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        found = [name for name in names if _is_setting(name)]
        held: list[str] = []
        for kind, stem in ((k, s) for k in (variant, None) for s in STEMS.values()):
            held = held or _weights(names, stem, kind)
        if not held and len(kinds := {variant_of(n) for n in names if _weighs(n)} - {None}) == 1:
            for stem in STEMS.values():
                held = held or _weights(names, stem, *kinds)
        if not held:
            pickles = sorted(name for name in names if is_pickle(name))
            others = sorted(name for name in names if name.endswith(".safetensors"))
            if pickles and not others:
                raise unsafe(f"{self.name}: {prefix}{pickles[0]}")
            if others and prefix:
                raise ModelError(
                    f"{self.name}: {prefix} has no weights but {', '.join(others)}: say which with"
                    " variant"
                )
        return [prefix + name for name in (*found, *held)]

    def _has(self, file: File) -> bool:
        place = self.folder / file.path
        return place.is_file() and place.stat().st_size == file.size

    def _complete(self, paths: list[str]) -> Path:
        """All of them, and only then what is here is what the revision is."""
        self.fetch(paths)
        self._note()
        return self.folder

    def _note(self, kind: str = "") -> None:
        """Keep which commit the revision is, for when the hub cannot be asked."""
        ref = _cache(self.name) / "refs" / kind / self.revision
        if self.revision == self.commit or _read(ref) == self.commit:
            return
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.{os.getpid()}")
            new.write_text(self.commit, "utf-8")
            new.replace(ref)
        except OSError as error:  # a cache that may only be read is as good while there is a hub
            log.debug("%s: %s", ref, error)

    def _download(self, missing: list[File]) -> None:
        from tqdm.auto import tqdm

        stop, lock = threading.Event(), threading.Lock()
        total = sum(file.size for file in missing)
        # None: no bar where stderr is no terminal.
        quiet = True if total < _SMALL else None
        bar = tqdm(desc=self.name, total=total, unit="B", unit_scale=True, disable=quiet)

        def told(more: int) -> None:
            with lock:
                bar.update(more)

        with turns.aside(), bar, ThreadPoolExecutor(_WORKERS) as pool:
            tasks = [pool.submit(self._get, file, told, stop) for file in missing]
            try:
                for task in as_completed(tasks):  # the first that fails stops the others
                    task.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _get(self, file: File, told: Any, stop: threading.Event) -> None:
        from huggingface_hub import constants

        if stop.is_set():
            raise StoppedError
        blob = _cache(self.name) / "blobs" / file.digest
        lock = _cache(self.name).parent / ".locks" / _cache(self.name).name / f"{file.digest}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        url = f"{constants.ENDPOINT}/{self.name}/resolve/{self.commit}/{quote(file.path)}"
        with _alone(lock, stop):
            if blob.is_file() and blob.stat().st_size == file.size:
                told(file.size)
            else:
                fetch(file, url, blob, what=self.name, told=told, stop=stop)
            _link(blob, self.folder / file.path)


def find(source: str, revision: str | None = None, *, part: bool = False) -> Repository:
    """Ask the hub for a model, or take what is here of it when there is no network.

    Args:
        source: ``owner/name``, or ``owner/name@revision``.
        revision: a branch, a tag or a commit; None: what the source says, else "main".
        part: single files are wanted, so that offline it need not be here as a whole.

    Raises:
        ModelError: there is no such model or revision, or the hub cannot be asked and nothing is
            here.
    """
    from huggingface_hub import constants

    name, _, pinned = source.partition("@")
    if pinned and revision and pinned != revision:
        raise ModelError(f"{source}: names one revision where {revision!r} is asked for")
    revision = revision or pinned or "main"
    if re.search(r"[\\:\0]", revision) or not all(part.strip(".") for part in revision.split("/")):
        raise ModelError(f"{source}: {revision!r} is no name of a branch, a tag or a commit")
    place = quote(revision, safe="")
    try:
        said = ask(f"{constants.ENDPOINT}/api/models/{name}/revision/{place}?blobs=true", source)
    except UnreachableError as error:
        return _here(source, name, revision, str(error), part)
    try:
        commit = str(said["sha"])
        files = [file for one in said["siblings"] if (file := _file(one)) is not None]
        if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision):
            raise ValueError(commit)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{source}: {constants.ENDPOINT} answers something that lists no model's files"
            f" ({type(error).__name__}: {error})"
        ) from error
    return Repository(name, revision, commit, {file.path: file for file in files})


def _here(source: str, name: str, revision: str, why: str, part: bool) -> Repository:
    """What was downloaded of a model before."""
    from huggingface_hub import constants

    refs = _cache(name) / "refs"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        partly = _read(refs / _PART / revision) if part else None
        commit = partly or _read(refs / revision) or revision
    found = Repository(name, revision, commit, None)
    offline = constants.HF_HUB_OFFLINE
    if not _COMMIT.fullmatch(commit) or not found.folder.is_dir():
        asked = "may not be asked (HF_HUB_OFFLINE is set)" if offline else "could not be asked"
        why = "" if offline else f" ({constants.ENDPOINT}: {why})"
        raise ModelError(f"{source}: no such folder here, and the hub {asked} for it{why}")
    if not offline:
        log.warning(
            "%s: the hub could not be asked (%s), so what was downloaded last is used: commit %s",
            source, why, commit,
        )  # fmt: skip
    return found


def origin(folder: str | Path) -> tuple[str, str] | None:
    """The hub id and the commit of a folder in the cache; None: it is another folder."""
    place = Path(folder)
    owner = place.parent.parent.name
    if place.parent.name != "snapshots" or not owner.startswith("models--"):
        return None
    return owner.removeprefix("models--").replace("--", "/"), place.name


def _file(said: Mapping[str, Any]) -> File | None:
    """A file as the hub lists it; its path and digest will be paths here.

    Returns:
        None: its name is none that every system has; such a file is as good as not there.

    Raises:
        ValueError: it leads elsewhere, or its digest is none.
    """
    path, large = str(said["rfilename"]), said.get("lfs")
    digest = str(large["sha256"] if large else said["blobId"])
    size = int(large["size"] if large else said["size"])
    inside = PurePosixPath(path)
    if inside.is_absolute() or ".." in re.split(r"[\\/]", path) or not path:
        raise ValueError(f"a file called {path!r}")
    if re.search(r"[\\:\0]", path):
        return None
    if not _DIGEST.fullmatch(digest) or size < 0:
        raise ValueError(f"{path!r} with the checksum {digest!r}")
    return File(path, size, digest)


def _weights(names: Iterable[str], stem: str, variant: str | None) -> list[str]:
    """The weights of a variant: one file, or shards with their index."""
    dotted = re.escape(f".{variant}") if variant else ""
    whole = [name for name in names if re.fullmatch(rf"{stem}{dotted}\.safetensors", name)]
    shards = rf"{stem}({dotted}-\d+-of-\d+|-\d+-of-\d+{dotted})\.safetensors"
    index = rf"{stem}\.safetensors\.index{dotted}\.json"
    return whole or [name for name in names if re.fullmatch(f"{shards}|{index}", name)]


def _weighs(name: str) -> bool:
    return name.endswith(".safetensors") and name.startswith(tuple(STEMS.values()))


def _is_setting(name: str) -> bool:
    return PurePosixPath(name).suffix in _SETTINGS and ".index." not in name


def _of_control(path: str) -> bool:
    return re.fullmatch(r"controlnet/([^/]+/)?config\.json", path) is not None


def _read(ref: Path) -> str | None:
    return ref.read_text("utf-8").strip() if ref.is_file() else None


def _cache(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


@contextmanager
def _alone(lock: Path, stop: threading.Event) -> Iterator[None]:
    """While inside, no other process downloads the same; waiting ends when it is to stop."""
    from filelock import Timeout

    while True:
        held = utils().WeakFileLock(lock, timeout=1)
        try:
            held.__enter__()
            break
        except Timeout:
            if stop.is_set():
                raise StoppedError from None
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def _link(blob: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f"{place.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:  # a file system without symbolic links
        new.hardlink_to(blob)
    new.replace(place)  # another process may be reading the one before


__all__ = ["Repository", "could_be", "find", "origin"]
