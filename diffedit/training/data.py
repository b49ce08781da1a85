"""Where examples come from: a folder of pictures, captioned rows, or any other :class:`Source`.

What a user can have got wrong (an empty folder, missing captions, a row without its picture) is
said when a source is made, before any model is loaded; it opens no picture for that. A picture
that cannot be decoded raises :class:`~diffedit.errors.ImageError` where it is asked for;
:func:`check` leaves all of those out, names them and counts them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from diffedit.errors import ImageError, InputError
from diffedit.images import Picture, open_picture
from diffedit.training.threads import in_parallel

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

SUFFIXES = frozenset(
    [
        ".apng",
        ".bmp",
        ".dib",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".png",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""The files of a folder that count as pictures: every format that :mod:`diffedit.images` reads."""

_NARROWEST = 20  # sides of 1 to more than this are no picture, and scaled up they fill the memory
_HASHED = 256 * 2**20  # bytes of files up to which a source is known by their content


@dataclass(frozen=True, eq=False, slots=True)
class Phrase:
    """Words of a caption, and where in the picture stands what they say.

    Attributes:
        words: as the caption has them, once.
        where: (h, w) float in [0, 1].
    """

    words: str
    where: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A picture and what is known of it.

    Attributes:
        image: (h, w, 3) uint8.
        caption: what it shows; may be empty.
        name: what messages call it.
        hint: (h, w, 3) uint8, a ControlNet's hint for it; one with holes has them as a fourth.
        weight: (h, w) float in [0, 1], how much each pixel counts in the loss; None counts as 1.
        phrases: what is known of where the caption's words stand.
    """

    image: Pixels
    caption: str
    name: str
    hint: Pixels | None = None
    weight: npt.NDArray[np.floating[Any]] | None = None
    phrases: tuple[Phrase, ...] = ()


class Source(Protocol):
    """Examples by number, the same each time, in whatever order and process they are asked for.

    A source can be pickled. Asked for a picture that cannot be read, it raises ``ImageError`` with
    a message of the form ``name (why)``. A source that shows each picture in several ``views`` has
    them in rounds: example ``i`` is picture ``i % (len / views)``.
    """

    @property
    def name(self) -> str:
        """What messages call the source."""

    @property
    def digest(self) -> str:
        """Of all that decides what the examples are; the same in every run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class Views:
    """How pictures are framed: ``count`` views of each, drawn from ``(seed, example's number)``.

    A random ``crop`` slides along the longer side; with ``zoom`` > 1 the picture is first enlarged
    by a random factor in [1, zoom]. ``flip`` mirrors every second view, by chance: not for captions
    that say left or right.
    """

    count: int = 1
    crop: Literal["centre", "random"] = "centre"
    zoom: float = 1.0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.count} views of each picture, should be at least 1")
        if self.crop not in ("centre", "random"):
            raise InputError(f"crop {self.crop!r}, should be 'centre' or 'random'")
        if not 1 <= self.zoom <= 8 or (self.zoom > 1 and self.crop == "centre"):
            raise InputError(f"zoom {self.zoom:g}, should be 1 to 8, above 1 with crop 'random'")

    def window(
        self, size: tuple[int, int], side: int, index: int
    ) -> tuple[int, int, int, int, bool]:
        """Width and height to scale to, left and top of the (side, side) window, mirrored?"""
        rng = np.random.default_rng((self.seed, index))
        random = self.crop == "random"
        scale = side / min(size) * (rng.uniform(1, self.zoom) if random else 1)
        width, height = (max(side, round(scale * length)) for length in size)
        spare = np.array([width - side, height - side])
        left, top = rng.integers(spare + 1) if random else spare // 2
        return width, height, int(left), int(top), self.flip and bool(rng.integers(2))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    path: Path
    caption: str
    hint: Path | None = None


class _Files:
    """Pictures in files, each (side, side, 3): orientation applied, alpha laid over white."""

    def __init__(self, name: str, entries: Sequence[_Entry], side: int, views: Views) -> None:
        if side < 8:
            raise InputError(f"{name}: a side of {side} pixels, should be at least 8")
        self.name, self.side, self.options = name, side, views
        self.entries = tuple(entries)
        self.views = views.count
        files = [path for e in self.entries for path in (e.path, e.hint) if path is not None]
        stats = [path.stat() for path in files]
        # Content where it is quickly read: a copy on another machine is then the same source.
        by_content = sum(stat.st_size for stat in stats) <= _HASHED
        marks: list[Any] = [
            hashlib.sha256(path.read_bytes()).hexdigest() if by_content else stat.st_mtime_ns
            for path, stat in zip(files, stats, strict=True)
        ]
        known = [[e.name, e.caption, e.hint is not None] for e in self.entries]
        sizes = [stat.st_size for stat in stats]
        self.digest = _digest(["files 1", side, astuple(views), known, sizes, marks])

    def __len__(self) -> int:
        return self.views * len(self.entries)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} holds {len(self)} examples, not one at {index}")
        entry = self.entries[index % len(self.entries)]
        picture = _open(entry.path, entry.name)
        hint = None if entry.hint is None else _open(entry.hint, f"{entry.name}, its hint")
        ratio = picture.size[0] / picture.size[1]
        if hint is not None and not 0.98 < hint.size[0] / hint.size[1] / ratio < 1.02:
            sizes = "{}x{}, of its hint {}x{}".format(*picture.size, *hint.size)
            raise ImageError(f"{entry.name} (sides of {sizes}: should be of one shape)")
        window = self.options.window(picture.size, self.side, index)
        return Example(
            _framed(picture, self.side, *window),
            entry.caption,
            entry.name,
            None if hint is None else _framed(hint, self.side, *window),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Folder(_Files):
    """All pictures in and below a folder, sorted by name; hidden files are left out.

    Args:
        path: the folder.
        side: of the examples, in pixels.
        caption: ``"name"``, the file's (underscores are spaces, a counter such as ``_003`` or
            `` (2)`` at the end is dropped), ``".txt"`` (a text file of the picture's name beside
            it), or a text for all, which may be empty.
        views: how pictures are framed.

    Raises:
        InputError: no folder, no pictures in it, or pictures without a caption.
    """

    def __init__(
        self,
        path: str | Path,
        side: int,
        caption: str = "name",
        *,
        views: Views = Views(),
    ) -> None:
        root = Path(path)
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise InputError(f"{root} {what}, should be a folder of pictures")
        visible = [(p.relative_to(root), p) for p in root.rglob("*") if p.is_file()]
        found = sorted(
            (name.as_posix(), p)
            for name, p in visible
            if not any(part.startswith(".") for part in name.parts)
        )
        pictures = [(name, p) for name, p in found if p.suffix.lower() in SUFFIXES]
        others = [name for name, p in found if p.suffix.lower() not in SUFFIXES]
        kinds = ", ".join(sorted(SUFFIXES))
        if not pictures:
            seen = f" but {len(others)} other files such as {others[0]}" if others else ""
            raise InputError(f"{root} holds no pictures{seen}, should hold some of {kinds}")
        unread = [n for n in others if (mimetypes.guess_type(n)[0] or "").startswith("image/")]
        if unread:
            log.warning(
                "%s: left out %d files such as %s: not %s", root, len(unread), unread[0], kinds
            )
        entries = [_Entry(name, p, _caption(p, caption)) for name, p in pictures]
        if caption in ("name", ".txt") and (bare := [e for e in entries if not e.caption]):
            lack = "no words in their names" if caption == "name" else "no .txt with a caption"
            raise InputError(
                f"{root}: {len(bare)} of {len(entries)} pictures have {lack}, such as "
                f"{bare[0].name}; caption may be 'name', '.txt' or one text for all"
            )
        super().__init__(root.resolve().name, entries, side, views)


class Captioned(_Files):
    """The rows of a ``.jsonl`` or ``.parquet`` file: ``image``, ``caption``, perhaps ``hint``.

    ``image`` and ``hint`` are paths of pictures from the file's folder; ``text`` is another name of
    ``caption``, and ``file_name`` of ``image``. Either all rows have a hint or none.

    Raises:
        InputError: no such file, a row that is none (named with its line), a missing picture.
    """

    def __init__(self, path: str | Path, side: int, *, views: Views = Views()) -> None:
        file = Path(path)
        if not file.is_file():
            raise InputError(f"{file} is not a file, should be .jsonl or .parquet")
        if file.suffix.lower() not in (".jsonl", ".parquet"):
            raise InputError(f"{file}: should be .jsonl or .parquet")
        rows = _parquet(file) if file.suffix.lower() == ".parquet" else _jsonl(file)
        entries = [_entry(file, where, row) for where, row in rows]
        if not entries:
            raise InputError(f"{file} holds no rows, should hold one for each picture")
        bare = [entry.name for entry in entries if entry.hint is None]
        if 0 < len(bare) < len(entries):
            raise InputError(
                f"{file}: {len(bare)} of {len(entries)} rows lack a 'hint', such as that of "
                f"{bare[0]}; either all have one or none"
            )
        super().__init__(file.name, entries, side, views)


class Subset:
    """Some examples of a source; ``skipped`` says which pictures were left out, and why."""

    def __init__(
        self,
        source: Source,
        rows: npt.NDArray[np.int64],
        views: int = 1,
        skipped: Sequence[str] = (),
    ) -> None:
        self.source, self.rows, self.views = source, rows, views
        self.skipped = tuple(skipped)
        self.name = source.name
        of_rows = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        self.digest = _digest(["subset 1", source.digest, of_rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} holds {len(self)} examples, not one at {index}")
        return self.source[int(self.rows[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def views_of(source: Source) -> int:
    """How many views of each picture a source has."""
    return int(getattr(source, "views", 1))


def split(source: Source, held_out: int, seed: int = 0) -> tuple[Subset, Subset]:
    """Part a source in two by chance: all views of the rest, one view of ``held_out`` pictures.

    Raises:
        InputError: fewer pictures than are to be held out, or none left.
    """
    views = views_of(source)
    count = len(source) // views
    if not 0 <= held_out < count:
        raise InputError(
            f"{source.name}: cannot hold out {held_out} of {count} pictures, should be 0 to "
            f"{count - 1}"
        )
    order = np.random.default_rng(seed).permutation(count).astype(np.int64)
    held, kept = np.sort(order[:held_out]), np.sort(order[held_out:])
    rows = (np.arange(views, dtype=np.int64)[:, None] * count + kept).reshape(-1)
    return Subset(source, rows, views), Subset(source, held)


def check(source: Source) -> Subset:
    """Open every picture once; return the examples that can be read, and what was skipped.

    Raises:
        InputError: no picture can be read.
    """
    views = views_of(source)
    count = len(source) // views

    def fault(index: int) -> str | None:
        try:
            source[index]
        except ImageError as error:
            return str(error)
        return None

    faults = in_parallel(fault, range(count))
    skipped = [why for why in faults if why is not None]
    log_skipped(source, skipped)
    if len(skipped) == count:
        raise none_left(source, skipped)
    sound = np.array([row for row, why in enumerate(faults) if why is None], np.int64)
    rows = (np.arange(views, dtype=np.int64)[:, None] * count + sound).reshape(-1)
    return Subset(source, rows, views, skipped)


def none_left(source: Source, skipped: Sequence[str]) -> InputError:
    """The error of a source without a picture that can be read."""
    return InputError(f"{source.name}: none of its pictures can be read, such as {skipped[0]}")


def log_skipped(source: Source, skipped: Sequence[str]) -> None:
    """Warn of the pictures that were left out: how many, of how many, which and why."""
    if skipped:
        count, more = len(source) // views_of(source), len(skipped) - 8
        named = ", ".join(skipped[:8]) + (f" and {more} more" if more > 0 else "")
        log.warning("%s: skipped %d of %d pictures: %s", source.name, len(skipped), count, named)


def _digest(what: list[Any]) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _open(path: Path, name: str) -> Picture:
    try:
        picture = open_picture(path)
    except ImageError as error:
        why = str(error).replace(str(path), "").lstrip(": '").removeprefix("is ")
        raise ImageError(f"{name} ({why})") from error
    if max(picture.size) > _NARROWEST * min(picture.size):
        sides = "{}x{}".format(*picture.size)
        raise ImageError(f"{name} (sides of {sides}, more than 1 to {_NARROWEST})")
    return picture


def _framed(
    picture: Picture, side: int, width: int, height: int, left: int, top: int, flip: bool
) -> Pixels:
    pixels = picture.resized((width, height)).pixels[top : top + side, left : left + side]
    part = Picture(pixels)
    rgb = part.rgb()
    if part.has_alpha:  # what lies under transparent pixels is often black, and never meant
        alpha = part.pixels[..., -1:].astype(np.float32) / np.float32(part.max_value)
        rgb = rgb * alpha + (np.float32(1) - alpha)
    made = (rgb * 255).round().astype(np.uint8)
    return np.ascontiguousarray(made[:, ::-1] if flip else made)


def _caption(path: Path, caption: str) -> str:
    if caption == "name":
        stem = re.sub(r"([_-]\d+|\s*\(\d+\))$", "", path.stem).replace("_", " ")
        return " ".join(stem.split()) if re.search(r"[^\W\d_]", stem) else ""
    if caption != ".txt":
        return caption
    beside = path.with_suffix(".txt")
    try:
        return " ".join(beside.read_text("utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{beside} cannot be read as UTF-8 text ({error})") from error


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}, line {number}: not JSON ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"{file}: reading parquet needs pyarrow, install it with pip install 'diffedit[train]'"
        ) from None
    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{file} is not a parquet file ({str(error).splitlines()[0]})") from error
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _entry(file: Path, where: str, row: Any) -> _Entry:
    if not isinstance(row, Mapping):
        raise InputError(f"{file}, {where}: should be an object with 'image' and 'caption'")

    def text(*keys: str) -> str | None:
        value = next((row[key] for key in keys if row.get(key) is not None), None)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{file}, {where}: {keys[0]!r} should be text, is {value!r:.40}")
        return value

    image, caption, hint = text("image", "file_name"), text("caption", "text"), text("hint")
    if image is None or caption is None:
        lacking = "image" if image is None else "caption"
        raise InputError(f"{file}, {where}: lacks {lacking!r}, has {', '.join(map(repr, row))}")
    for given in (image, hint):
        if given is not None and not (file.parent / given).is_file():
            raise InputError(f"{file}, {where}: {file.parent / given} does not exist")
    return _Entry(image, file.parent / image, caption, None if hint is None else file.parent / hint)
