"""What a user sees of a training, in one folder and on the terminal.

log.jsonl is the truth: ``{"step", "loss", "rate", "seconds"}`` for every step; figures and names
of sample grids in lines of their own. From it are drawn curve.png, samples/000500.png (made after
500 steps) and index.html, which needs neither scripts nor a network. tensorboard/ holds the same
where that is installed. What a full disk does not take is told once; the training goes on.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffedit.errors import InputError

log = logging.getLogger(__name__)

Picture = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Curve = dict[int, float]  # step -> value

_OWN = ("step", "loss", "rate", "seconds", "samples", "titles")
_GRIDS = 12
"""Sample grids that the page contains; older ones it links to."""
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}
<title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:24px auto;padding:0 12px;
color:#222}}svg,img{{max-width:100%;height:auto}}table{{border-collapse:collapse;display:block;
overflow:auto}}td,th{{padding:2px 12px 2px 0;text-align:left;border-bottom:1px solid #eee;
vertical-align:top}}figure{{margin:0 0 24px}}</style></head><body><h1>{title}</h1><p>{state}</p>
{body}</body></html>"""


class Logbook:
    """Keeps the log of one training; a context manager, which closes it.

    Args:
        folder: of this training alone; made if it is not there.
        step: steps done before, as the checkpoint says. What the log has beyond is dropped, so
            that no curve is doubled; at 0 an older log is kept as ``log.before.jsonl``.
        steps: steps of the whole training.
        settings: shown on the page.
        active: False in every process but one, where nothing is to be written or shown.
        every: seconds between two drawings of curve and page, and between two lines of progress.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        steps: int | None = None,
        settings: Mapping[str, object] | None = None,
        active: bool = True,
        every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.steps, self.settings = folder, steps, settings or {}
        self.active, self.every, self._clock = active, every, clock
        self.done = self._first = step
        self._closing, self._entries, self._told = ExitStack(), list[dict[str, Any]](), False
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._open(folder / "log.jsonl", step)
        self._board = _tensorboard(folder / "tensorboard", step)
        if self._board is not None:
            self._closing.callback(self._board.close)
        self._bar = self._closing.enter_context(
            tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty())
        )
        if not self._bar.disable:
            loggers = [x for x in (logging.root, logging.getLogger("diffedit")) if x.handlers]
            self._closing.enter_context(logging_redirect_tqdm(loggers))
        self._began = self._shown = self._drawn = clock()
        self._before = max((float(e.get("seconds") or 0) for e in self._entries), default=0.0)
        self._recent = deque([(self._began, 0, math.nan)], maxlen=51)

    def step(self, step: int, loss: float, rate: float, samples: int) -> None:
        """Step number ``step`` (from 1) is done, with its loss, learning rate and batch size."""
        if not self.active:
            return
        self.done, now = step, self._clock()
        self._append({"step": step, "loss": _finite(loss), "rate": _finite(rate)})
        self._scalars(step, {"loss": loss, "rate": rate})
        self._recent.append((now, samples, loss))
        losses = [x for _, _, x in self._recent if math.isfinite(x)] or [math.nan]
        speed = sum(n for _, n, _ in list(self._recent)[1:]) / max(1e-9, now - self._recent[0][0])
        told = f"loss {np.mean(losses):.4f}, rate {rate:.1e}, {speed:.1f} samples/s"
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and (now - self._shown >= self.every or step == self.steps):
            self._shown = now
            left = ((self.steps or step) - step) * (now - self._began) / (step - self._first)
            log.info("%s, %s, %s left", self._where(), told, tqdm.format_interval(left))
        if now - self._drawn >= self.every:
            self._draw("running")

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name, measured after ``step`` steps."""
        if not self.active:
            return
        named = {f"{k} (figure)" if k in _OWN else k: float(v) for k, v in figures.items()}
        self._append({"step": step, **{name: _finite(value) for name, value in named.items()}})
        self._scalars(step, {f"figures/{name}": value for name, value in named.items()})
        log.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in named.items()))
        self._draw("running")

    def pictures(self, step: int, pictures: Sequence[tuple[str, Picture]]) -> None:
        """Pictures (h, w, 3) uint8 with their titles, made after ``step`` steps."""
        if not self.active or not pictures:
            return
        sheet, name = grid(pictures), f"samples/{step:06d}.png"
        with self._forgiving():
            _replace(self.folder / name, _png(sheet))
            self._append({"step": step, "samples": name, "titles": [t for t, _ in pictures]})
            if self._board is not None:
                self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        self._draw("running")

    def close(self, state: str | None = None) -> None:
        """Draw everything a last time, with ``state`` on the page; afterwards nothing is taken."""
        if self.active:
            over = self.steps is not None and self.done >= self.steps
            self._draw(state or ("finished" if over else "stopped"))
            self.active = False
            self._closing.close()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception)
        self.close(f"failed: {type(error).__name__}: {error}" if failed else None)

    def _open(self, path: Path, step: int) -> None:
        before = path.read_bytes() if path.exists() else b""
        if before and step == 0:
            os.replace(path, path.with_name("log.before.jsonl"))
            log.info("%s: starts anew, the old one is kept as log.before.jsonl", path)
            before = b""
        self._entries = [e for e in map(_entry, before.split(b"\n")) if e and e["step"] <= step]
        after = b"".join(map(_line, self._entries))
        if after != before:
            _replace(path, after)
        # Unbuffered: a line is with the system before the next step begins, whatever happens then.
        self._file = self._closing.enter_context(path.open("ab", buffering=0))
        self._torn = False

    def _append(self, entry: dict[str, Any]) -> None:
        entry["seconds"] = round(self._before + self._clock() - self._began, 3)
        self._entries.append(entry)
        with self._forgiving():
            line = b"\n" * self._torn + _line(entry)
            self._torn = True
            self._torn = self._file.write(line) != len(line)

    def _scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._forgiving():
            for name, value in scalars.items() if self._board is not None else ():
                self._board.add_scalar(name, value, step)

    def _where(self) -> str:
        return f"step {self.done}" + (f" of {self.steps}" if self.steps is not None else "")

    def _draw(self, state: str) -> None:
        curves = _curves(self._entries)
        sheet = chart(curves)
        with self._forgiving():
            _replace(self.folder / "curve.png", sheet.png())
            _replace(self.folder / "index.html", self._page(state, curves, sheet).encode())
        self._drawn = self._clock()

    def _page(self, state: str, curves: Mapping[str, Curve], sheet: Sheet) -> str:
        spent = tqdm.format_interval(self._entries[-1].get("seconds", 0) if self._entries else 0)
        names = [name for name in curves if name not in ("loss", "rate")]
        measured = sorted({step for name in names for step in curves[name]}, reverse=True)
        rows = [
            [s, *(f"{curves[n][s]:.4g}" if s in curves[n] else "" for n in names)] for s in measured
        ]
        settings = [
            [k, v if isinstance(v, str) else json.dumps(v, default=str)]
            for k, v in self.settings.items()
        ]
        grids = {e["step"]: e for e in self._entries if "samples" in e}
        newest = sorted(grids.values(), key=lambda e: -e["step"])
        parts = [sheet.svg()]
        parts += ["<h2>Figures</h2>", _table([["step", *names], *rows])] * bool(rows)
        parts += ["<h2>Samples</h2>"] * bool(newest)
        parts += [self._figure(entry, whole=i < _GRIDS) for i, entry in enumerate(newest)]
        parts += ["<h2>Settings</h2>", _table(settings)] * bool(settings)
        return _PAGE.format(
            refresh='<meta http-equiv="refresh" content="60">' if state == "running" else "",
            title=escape(f"Training in {self.folder.resolve().name}"),
            state=escape(f"{state}, {self._where()}, {spent}"),
            body="\n".join(parts),
        )

    def _figure(self, entry: Mapping[str, Any], *, whole: bool) -> str:
        path, told = self.folder / entry["samples"], f"step {entry['step']}"
        if not path.exists():
            return ""
        if not whole:
            return f'<p><a href="{escape(entry["samples"])}">{told}</a></p>'
        data = base64.b64encode(path.read_bytes()).decode()
        titles = "<br>".join(escape(title) for title in entry["titles"])
        caption = f"<details><summary>{told}</summary>{titles}</details>"
        image = f'<img src="data:image/png;base64,{data}" alt="samples at {told}">'
        return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                log.warning("%s: cannot be written (%s); the training goes on", self.folder, error)
            self._told = True


def _curves(entries: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every named number of the log by step; of two for one step the later."""
    curves: dict[str, Curve] = {"loss": {}, "rate": {}}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "seconds") and isinstance(value, float):
                curves.setdefault(name, {})[entry["step"]] = value
    return curves


def _table(rows: Iterable[Sequence[object]]) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed; curves and samples are in %s", folder.parent)
        return None
    # What an interrupted run wrote beyond `step` is hidden.
    return SummaryWriter(folder, purge_step=step + 1)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the log; ``None`` for one that a kill or a full disk has torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _replace(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


class Sheet:
    """Lines and words on white, to be had as PNG and as SVG. Positions in pixels from top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines: list[tuple[Sequence[tuple[float, float]], str, float]] = []
        self.words: list[tuple[float, float, str, str, int]] = []

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """A line through ``points``."""
        self.lines.append((points, colour, width))

    def word(self, x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> None:
        """Text on the base line ``y``; at ``x`` is its start, middle or end."""
        self.words.append((x, y, text, anchor, size))

    def svg(self) -> str:
        """An element for a page of HTML."""
        lines = [
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" '
            f'stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'
            for points, colour, width in self.lines
        ]
        words = [
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="#333">{escape(text)}</text>'
            for x, y, text, anchor, size in self.words
        ]
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(lines + words)}</svg>'

    def png(self) -> bytes:
        """Twice as many pixels as the sheet has, smoothed."""
        image = Image.new("RGB", (4 * self.width, 4 * self.height), "white")
        draw = ImageDraw.Draw(image)
        for points, colour, width in self.lines:
            scaled = [(4 * x, 4 * y) for x, y in points]
            draw.line(scaled, colour, round(4 * width), joint="curve")
        image = image.reduce(2)
        draw = ImageDraw.Draw(image)
        for x, y, text, anchor, size in self.words:
            at = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            draw.text((2 * x, 2 * y), text, "#333333", _font(2 * size), at)
        return _png(image)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu where the system has it; the font that Pillow brings draws ASCII only."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def chart(curves: Mapping[str, Curve]) -> Sheet:
    """The loss on top, learning rate and figures beneath in rows of three."""
    small = [name for name in curves if name != "loss" and curves[name]]
    sheet = Sheet(900, 350 + 190 * math.ceil(len(small) / 3))
    last = max((max(curve) for curve in curves.values() if curve), default=1)
    _panel(sheet, (60, 40, 815, 265), "loss", curves.get("loss", {}), last, smooth=True)
    for i, name in enumerate(small):
        box = (60 + 292 * (i % 3), 375 + 190 * (i // 3), 231, 115)
        _panel(sheet, box, "learning rate" if name == "rate" else name, curves[name], last)
    return sheet


def _panel(
    sheet: Sheet,
    box: tuple[int, int, int, int],
    title: str,
    curve: Curve,
    last: int,
    *,
    smooth: bool = False,
) -> None:
    """One pair of axes; a smoothed line lies over the raw one, whose rarest values are cut off."""
    left, top, width, height = box
    sheet.word(left, top - 10, title if len(title) < 28 else title[:26] + "…", size=14)
    if not curve:
        sheet.word(left + width / 2, top + height / 2, "nothing yet", "middle")
        return
    steps, values = np.array(sorted(curve)), np.array([curve[step] for step in sorted(curve)])
    means = _moving_mean(values, max(2, len(values) // 50)) if smooth else values
    told = f"{means[-1]:.4g}" + f" smoothed, {values[-1]:.4g} raw" * smooth
    sheet.word(left + width, top - 10, f"{told} at step {steps[-1]:,}" if smooth else told, "end")
    low, high = np.quantile(values, (0.005, 0.995)) if smooth else (values.min(), values.max())
    log_scale = bool(smooth and values.min() > 0 and high > 5 * low)
    scale = np.log10 if log_scale else np.asarray
    low, high = (float(scale(x)) for x in (low, high))
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1e-3
    low, high = low - pad, high + pad

    def place(x: Any, y: Any) -> list[tuple[float, float]]:
        across = left + width * np.asarray(x, float) / max(1, last)
        down = top + height * (1 - np.clip((scale(y) - low) / (high - low), 0, 1))
        return list(zip(across.tolist(), down.tolist(), strict=True))

    for tick in _ticks(low, high, max(4, height // 45), log_scale=log_scale):
        ((_, y),) = place([0], [tick])
        sheet.line([(left, y), (left + width, y)], "#e4e4e4", 1)
        sheet.word(left - 6, y + 4, f"{tick:.6g}", "end", 11)
    sheet.line([(left, top + height), (left + width, top + height)], "#888888", 1)
    for tick in _ticks(0, max(1, last), width // 90, log_scale=False):
        if tick == int(tick):
            ((x, _),) = place([tick], [values[-1]])
            sheet.line([(x, top + height), (x, top + height + 4)], "#888888", 1)
            sheet.word(x, top + height + 17, f"{tick:,.0f}", "middle", 11)
    if smooth:
        sheet.word(left + width, top + height + 33, "steps", "end", 11)
        sheet.line(place(*_thinned(steps, values, width)), "#b9d0ea", 1)
    sheet.line(place(*_thinned(steps, means, width)), "#1f5fa8", 2)
    if len(steps) == 1:
        ((x, y),) = place(steps, means)
        sheet.line([(x - 3, y), (x + 3, y)], "#1f5fa8", 4)


def _ticks(low: float, high: float, most: int, *, log_scale: bool) -> list[float]:
    """Round numbers in [low, high], which are decimal logarithms on a ``log_scale``."""
    if log_scale:
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        return [tick for tick in ticks if low <= math.log10(tick) <= high]
    unit = 10 ** math.floor(math.log10((high - low) / most))
    unit *= next(m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= most)
    return [n * unit for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def _moving_mean(values: np.ndarray[Any, Any], half: int) -> np.ndarray[Any, Any]:
    """Mean over up to ``half`` neighbours on either side."""
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    first, after = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    made: np.ndarray[Any, Any] = (sums[after] - sums[first]) / (after - first)
    return made


def _thinned(
    steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any], columns: int
) -> tuple[list[float], list[float]]:
    """At most two points for each column of pixels: its least and its greatest value."""
    if len(steps) <= 2 * columns:
        return steps.tolist(), values.tolist()
    parts = [part for part in np.array_split(np.arange(len(steps)), columns) if len(part)]
    kept = [i for p in parts for i in sorted({p[values[p].argmin()], p[values[p].argmax()]})]
    return steps[kept].tolist(), values[kept].tolist()


def grid(pictures: Sequence[tuple[str, Picture]]) -> Image.Image:
    """Pictures (h, w, 3) uint8 in about as many columns as rows, each under its title."""
    for title, picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise InputError(
                f"sample {title!r}: should be (height, width, 3) uint8, "
                f"is {picture.shape} {picture.dtype}"
            )
    side = max(max(picture.shape[:2]) for _, picture in pictures)
    zoom = max(1, math.ceil(128 / side))
    cell, columns = side * zoom, math.ceil(math.sqrt(len(pictures)))
    font = _font(13)
    titles = [
        textwrap.wrap(title, max(8, cell // 7), max_lines=3, placeholder=" …")
        for title, _ in pictures
    ]
    head = 6 + 16 * max(1, *map(len, titles))
    size = (columns * (cell + 8) + 8, math.ceil(len(pictures) / columns) * (cell + head) + 8)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (lines, (_, picture)) in enumerate(zip(titles, pictures, strict=True)):
        x, y = 8 + i % columns * (cell + 8), i // columns * (cell + head)
        draw.multiline_text((x, y + 4), "\n".join(lines), "#222222", font, spacing=2)
        image = Image.fromarray(picture)
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y + head))
    return sheet
