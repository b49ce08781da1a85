"""What a user sees of a training is true, complete, and survives a kill and a full disk."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from diffedit.errors import InputError
from diffedit.training import logbook
from diffedit.training.logbook import Logbook, chart, grid

SVG = "{http://www.w3.org/2000/svg}"


class Clock:
    """Shows the seconds that were put on it."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Importing it takes seconds; only one test needs it."""
    if not request.node.name.startswith("test_tensorboard"):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def _picture(value: int, height: int = 16, width: int = 16) -> logbook.Picture:
    return np.full((height, width, 3), value, np.uint8)


def _run(folder: Path, first: int, last: int, **options: Any) -> None:
    """Steps ``first`` to ``last``, each of a second; step k has loss 1/k."""
    clock = Clock()
    with Logbook(folder, step=first - 1, clock=clock, **options) as log:
        for k in range(first, last + 1):
            clock.seconds += 1
            log.step(k, 1 / k, 1e-3, 8)


# -- the log -------------------------------------------------------------------------------------


def test_every_step_is_a_line_at_once(tmp_path: Path) -> None:
    clock = Clock()
    log = Logbook(tmp_path, clock=clock)
    for k in (1, 2):
        clock.seconds += 0.5
        log.step(k, 1 / 3, 5e-4, 32)
        assert _lines(tmp_path)[-1] == {"step": k, "loss": 1 / 3, "rate": 5e-4, "seconds": k / 2}
    log.figures(2, {"psnr": 24.5, "loss": 0.25})
    assert _lines(tmp_path)[-1] == {"step": 2, "psnr": 24.5, "loss (figure)": 0.25, "seconds": 1.0}
    log.pictures(2, [("a red circle", _picture(9))])
    assert _lines(tmp_path)[-1]["samples"] == "samples/000002.png"
    assert _lines(tmp_path)[-1]["titles"] == ["a red circle"]
    assert len(_lines(tmp_path)) == 4
    log.close()


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    _run(tmp_path / "whole", 1, 10)
    _run(tmp_path / "parts", 1, 7)
    (tmp_path / "parts/log.jsonl").open("a").write('{"step": 8, "loss": 0.1')  # a kill
    _run(tmp_path / "parts", 5, 10)  # the last checkpoint was of step 4
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 3, "lo', b'{"step": 3', b"\x00\x00\x00", b"\xff\xfe", b"[3]", b'{"loss": 1}'],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    _run(tmp_path, 1, 2)
    good = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(good + torn)
    Logbook(tmp_path, step=5).close()
    assert (tmp_path / "log.jsonl").read_bytes() == good


def test_a_whole_last_line_that_lacks_its_end_is_kept(tmp_path: Path) -> None:
    _run(tmp_path, 1, 2)
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes()[:-1])
    _run(tmp_path, 3, 3)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_figures_and_samples_beyond_the_resumed_step_are_dropped_too(tmp_path: Path) -> None:
    with Logbook(tmp_path) as log:
        for k in (1, 2):
            log.step(k, 0.5, 1e-3, 1)
            log.figures(k, {"psnr": float(k)})
            log.pictures(k, [("x", _picture(k))])
    Logbook(tmp_path, step=1).close()
    assert {line["step"] for line in _lines(tmp_path)} == {1}
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "samples at step 1" in page
    assert "step 2" not in page


def test_starting_anew_keeps_the_old_log_aside(tmp_path: Path) -> None:
    with Logbook(tmp_path) as log:
        log.figures(0, {"psnr": 8.0})  # before the first step
        log.step(1, 0.5, 1e-3, 1)
    old = (tmp_path / "log.jsonl").read_bytes()
    _run(tmp_path, 1, 1)
    assert [line["step"] for line in _lines(tmp_path)] == [1]
    assert (tmp_path / "log.before.jsonl").read_bytes() == old


def test_what_is_no_number_is_null_and_json_stays_valid(tmp_path: Path) -> None:
    with Logbook(tmp_path) as log:
        log.step(1, float("nan"), 1e-3, 1)
        log.step(2, 0.5, 1e-3, 1)
        log.figures(2, {"fid": float("inf")})
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert [line.get("loss", 0) for line in lines] == [None, 0.5, 0]
    assert lines[2]["fid"] is None


def test_inactive_processes_write_nothing(tmp_path: Path) -> None:
    with Logbook(tmp_path / "none", active=False) as log:
        log.step(1, 0.5, 1e-3, 1)
        log.figures(1, {"psnr": 1.0})
        log.pictures(1, [("x", _picture(1))])
    assert not (tmp_path / "none").exists()


# -- a full disk ---------------------------------------------------------------------------------


class Full(io.RawIOBase):
    """Takes ``room`` bytes, then none."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        written: int = self.file.write(part)
        return written


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_is_told_once_and_costs_a_line_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    with Logbook(tmp_path) as log:
        log.step(1, 0.5, 1e-3, 1)
        disk, log._file = log._file, Full(log._file, room)  # type: ignore[assignment]
        log.step(2, 0.4, 1e-3, 1)
        log.step(3, 0.3, 1e-3, 1)
        log._file = disk
        log.step(4, 0.2, 1e-3, 1)
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "No space left" in told[0].getMessage()
    Logbook(tmp_path, step=4).close()  # reads past what is torn
    assert [line["step"] for line in _lines(tmp_path)] == [1, 4]


def test_pictures_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Logbook(tmp_path) as log:
        log.figures(1, {"psnr": 1.0})
        before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}

        def full(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        log.figures(2, {"psnr": 2.0})
        log.pictures(2, [("x", _picture(1))])
        for path in (tmp_path / "curve.png", tmp_path / "index.html"):
            assert path.read_bytes() == before[path]
        assert not list((tmp_path / "samples").glob("[0-9]*"))


# -- the curve -----------------------------------------------------------------------------------


def _polylines(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())]
        for line in found
        if line.attrib["stroke"] == colour
    ]


def _scale(svg: str, *, log: bool) -> tuple[float, float]:
    """Slope and offset of y (pixels) over the top panel's values, read from its ticks' labels."""
    words = [
        (float(w.attrib["y"]) - 4, float(w.text or ""))
        for w in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if w.attrib["text-anchor"] == "end"
        and re.fullmatch(r"[\d.e-]+", w.text or "")
        and float(w.attrib["x"]) < 60
        and float(w.attrib["y"]) < 320
    ]
    y, values = np.array(words).T
    slope, offset = np.polyfit(np.log10(values) if log else values, y, 1)
    return float(slope), float(offset)


@pytest.mark.parametrize("log", [False, True])
def test_the_curve_lies_where_the_axes_say(log: bool) -> None:
    losses = {k: 0.1 * (101 - k if log else 10 + k / 100) for k in range(1, 101)}
    svg = chart({"loss": losses, "rate": {}}).svg()
    (raw,) = _polylines(svg, "#b9d0ea")
    slope, offset = _scale(svg, log=log)
    assert slope < 0  # more is higher
    for (x, y), (step, loss) in list(zip(raw, losses.items(), strict=True))[1:-1]:
        assert x == pytest.approx(60 + 815 * step / 100, abs=0.1)
        assert y == pytest.approx(offset + slope * (np.log10(loss) if log else loss), abs=0.3)


def test_the_smoothed_line_is_the_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).random(30)
    made = logbook._moving_mean(values, 3)
    assert made == pytest.approx([values[max(0, i - 3) : i + 4].mean() for i in range(30)])


def test_a_long_curve_is_thinned_but_keeps_its_peaks() -> None:
    steps, values = np.arange(1, 50_001), np.ones(50_000)
    values[[7, 31_234]] = 9.0, -5.0
    x, y = logbook._thinned(steps, values, 800)
    assert len(x) <= 1600
    assert x == sorted(x)
    assert dict(zip(x, y, strict=True))[8] == 9.0
    assert dict(zip(x, y, strict=True))[31_235] == -5.0


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (18.2, 28.1, False, [20, 22, 24, 26, 28]),
        (-0.3, 0.3, False, [-0.2, 0.0, 0.2]),
        (np.log10(0.06), np.log10(3), True, [0.1, 0.2, 0.5, 1, 2]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert logbook._ticks(low, high, 5, log_scale=log) == pytest.approx(ticks)


@pytest.mark.parametrize(
    "loss",
    [{}, {1: 0.5}, {1: 0.0, 2: 0.0}, {1: 0.5, 2: 0.5}, {1: -1.0, 2: 1e9}, {1: 0.0, 2: 1e-30}],
)
def test_hardly_anything_can_be_drawn_too(loss: dict[int, float]) -> None:
    sheet = chart({"loss": loss, "rate": loss, "psnr": loss})
    ElementTree.fromstring(sheet.svg())
    assert Image.open(io.BytesIO(sheet.png())).size == (2 * sheet.width, 2 * sheet.height)
    for points, _, _ in sheet.lines:
        assert np.isfinite(np.array(points)).all()


def test_the_png_shows_what_the_svg_says() -> None:
    sheet = chart({"loss": {k: 1 / k for k in range(1, 50)}, "rate": {}})
    pixels = np.asarray(Image.open(io.BytesIO(sheet.png())).convert("RGB")).astype(int)
    (smoothed,) = _polylines(sheet.svg(), "#1f5fa8")
    for x, y in smoothed[5:-5]:
        near = pixels[int(2 * y) - 1 : int(2 * y) + 2, int(2 * x)]
        assert np.abs(near - [0x1F, 0x5F, 0xA8]).sum(-1).min() < 30
    assert (pixels[:4] == 255).all()
    assert (pixels[:70, 100:300].min() < 100).all()  # the title


def test_each_figure_has_a_panel_beneath() -> None:
    curves = {"loss": {1: 1.0}, "rate": {1: 1e-3}, "a<b": {1: 2.0}, "psnr": {1: 3.0}, "fid": {}}
    words = [w.text for w in ElementTree.fromstring(chart(curves).svg()).iter(f"{SVG}text")]
    assert {"loss", "learning rate", "a<b", "psnr"} <= set(words)
    assert "fid" not in words


# -- samples -------------------------------------------------------------------------------------


def test_the_grid_holds_every_picture_under_its_title() -> None:
    rng = np.random.default_rng(0)
    pictures = [
        (title, rng.integers(0, 256, (160, 160, 3), np.uint8))
        for title in ("one", "", "3", "4", "5")
    ]
    made = np.asarray(grid(pictures))
    head = made.shape[0] // 2 - 160 - 4
    assert made.shape[1] == 3 * 168 + 8
    for i, (title, picture) in enumerate(pictures):
        x, y = 8 + 168 * (i % 3), (160 + head) * (i // 3)
        assert (made[y + head : y + head + 160, x : x + 160] == picture).all()
        assert (made[y : y + head, x : x + 160].min() < 100) == bool(title)


def test_small_pictures_are_enlarged_and_sizes_may_differ() -> None:
    made = np.asarray(grid([("", _picture(7, 32, 16)), ("", _picture(99, 8, 32))]))
    assert ((made == 7).all(-1)).sum() == 128 * 64
    assert ((made == 99).all(-1)).sum() == 32 * 128


def test_long_titles_are_cut() -> None:
    short, long = grid([("a", _picture(0))]), grid([("many words " * 50, _picture(0))])
    assert long.width == short.width
    assert long.height == short.height + 2 * 16


@pytest.mark.parametrize(
    "picture", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_what_is_no_picture_is_named(picture: Any) -> None:
    with pytest.raises(InputError, match=r"sample 'cat': should be \(height, width, 3\) uint8"):
        grid([("cat", picture)])


def test_samples_are_written_with_their_step(tmp_path: Path) -> None:
    with Logbook(tmp_path) as log:
        log.pictures(500, [("a", _picture(3))])
        log.pictures(500, [])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["000500.png"]
    with Image.open(tmp_path / "samples/000500.png") as image:
        assert image.size == grid([("a", _picture(3))]).size


# -- the page ------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags, text, and what the page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _page(folder: Path) -> _Page:
    return _Page((folder / "index.html").read_text("utf-8"))


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    with Logbook(tmp_path, steps=20, settings={"seed": 7, "model": {"widths": [8]}}) as log:
        for k in (10, 20):
            log.step(k, 0.5, 1e-3, 1)
            log.figures(k, {"psnr": 20 + k / 10})
            log.pictures(k, [("a circle", _picture(k))])
        assert "meta" in _page(tmp_path).tags
        assert 'http-equiv="refresh"' in (tmp_path / "index.html").read_text("utf-8")
    page = _page(tmp_path)
    text = "\n".join(page.texts)
    assert "finished, step 20 of 20" in text
    assert {"seed", "7", "model", '{"widths": [8]}', "22", "21"} <= set(page.texts)
    assert text.index("step 20\n") < text.rindex("step 10\n")  # newest first
    assert page.tags.count("svg") == 1
    assert page.tags.count("img") == 2
    assert "script" not in page.tags
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "refresh" not in (tmp_path / "index.html").read_text("utf-8")


def test_older_grids_are_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "_GRIDS", 1)
    with Logbook(tmp_path) as log:
        for k in (1, 2, 3):
            log.pictures(k, [("x", _picture(k))])
    loads = _page(tmp_path).loads
    assert loads[0].startswith("data:")
    assert loads[1:] == ["samples/000002.png", "samples/000001.png"]


def test_a_grid_that_the_user_deleted_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Logbook(tmp_path) as log:
        log.pictures(1, [("x", _picture(1))])
        (tmp_path / "samples/000001.png").unlink()
    assert _page(tmp_path).texts.count("stopped, step 0, 00:00") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    log = Logbook(tmp_path / "<i>", settings={bad: bad, "n": [bad]})
    log.figures(1, {bad: 1.0})
    log.pictures(1, [(bad, _picture(1))])
    with pytest.raises(RuntimeError), log:
        raise RuntimeError(bad)
    page = _page(tmp_path / "<i>")
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.texts.count(bad) >= 4
    assert any(text.startswith(f"failed: RuntimeError: {bad}, step 0") for text in page.texts)


@pytest.mark.parametrize(("steps", "last", "state"), [(3, 3, "finished"), (9, 3, "stopped")])
def test_the_page_says_how_it_ended(tmp_path: Path, steps: int, last: int, state: str) -> None:
    _run(tmp_path, 1, last, steps=steps)
    assert f"{state}, step {last} of {steps}, 00:03" in _page(tmp_path).texts


def test_the_page_is_drawn_now_and_then_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = Logbook._draw

    def draw(self: Logbook, state: str) -> None:
        drawn.append(self.done)
        real(self, state)

    monkeypatch.setattr(Logbook, "_draw", draw)
    _run(tmp_path, 1, 25, every=10.0)
    assert drawn == [10, 20, 25]


# -- the terminal --------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "diffedit")
    _run(tmp_path, 1, 25, every=10.0, steps=100)
    told = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split(",")[0] for line in told] == ["step 10 of 100", "step 20 of 100"]
    mean = np.mean([1 / k for k in range(1, 11)])
    assert told[0] == f"step 10 of 100, loss {mean:.4f}, rate 1.0e-03, 8.0 samples/s, 01:30 left"
    assert capsys.readouterr().err == ""


def test_time_left_counts_this_session_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "diffedit")
    _run(tmp_path, 51, 60, every=10.0, steps=100)
    assert caplog.messages[-1].endswith("8.0 samples/s, 00:40 left")


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(logging.INFO, "diffedit")
    mine = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger("diffedit"), "handlers", [mine])
    monkeypatch.setattr(logging.root, "handlers", [])
    clock = Clock()
    with Logbook(tmp_path, step=2, steps=4, clock=clock) as log:
        for k in (3, 4):
            clock.seconds += 1
            log.step(k, 1 / k, 1e-3, 8)
        log.figures(4, {"psnr": 1.0})
    assert terminal.getvalue().count("psnr 1") == 1  # not through a second handler as well
    assert logging.getLogger("diffedit").handlers == [mine]
    shown = terminal.getvalue().split("\r")[-1]
    assert "4/4" in shown
    assert f"loss {(1 / 3 + 1 / 4) / 2:.4f}, rate 1.0e-03, 8.0 samples/s" in shown
    assert not [message for message in caplog.messages if message.startswith("step ")]


# -- TensorBoard ---------------------------------------------------------------------------------


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    caplog.set_level(logging.INFO, "diffedit")
    _run(tmp_path, 1, 3)
    assert [m for m in caplog.messages if "ensor" in m] == [
        f"tensorboard is not installed; curves and samples are in {tmp_path}"
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_gets_scalars_and_samples_and_no_doubles(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _run(tmp_path, 1, 4)
    with Logbook(tmp_path, step=2) as log:
        log.step(3, 0.25, 1e-3, 1)
        log.figures(3, {"psnr": 24.0})
        log.pictures(3, [("x", _picture(3))])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [event.value for event in events.Scalars("figures/psnr")] == [24.0]
    (image,) = events.Images("samples")
    with Image.open(io.BytesIO(image.encoded_image_string)) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(grid([("x", _picture(3))])))
