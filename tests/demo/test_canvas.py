"""The mask canvas in a real browser: what is painted is what arrives in Python."""

from __future__ import annotations

import base64
import hashlib
import os
import queue
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

gr = pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from gradio.data_classes import FileData  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402

from diffedit_demo import canvas as canvas_module  # noqa: E402
from diffedit_demo.canvas import (  # noqa: E402
    Canvas,
    CanvasData,
    Painted,
    Refused,
    Shown,
)
from diffedit_demo.components import flushed  # noqa: E402
from diffedit_demo.texts import CANVAS  # noqa: E402

SAID = CANVAS["en"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH, HEIGHT = 320, 240
TWICE = {"width": 2 * WIDTH, "height": 2 * HEIGHT}
"""The pictures of these tests pretend to be copies of originals twice as large."""

Mask = NDArray[np.uint8]
Points = list[tuple[float, float]]


@dataclass
class Arrived:
    """What a run's handler saw."""

    masks: dict[str, Mask]
    painted: Painted
    note: str
    modes: set[str]


@dataclass
class App:
    """The little page, and what reached its handlers."""

    url: str = ""
    revision: int = 1
    runs: queue.Queue[Arrived] = field(default_factory=queue.Queue)
    opened: queue.Queue[tuple[str, str]] = field(default_factory=queue.Queue)
    painted: queue.Queue[tuple[str, ...]] = field(default_factory=queue.Queue)

    def forget(self) -> None:
        for waiting in (self.runs, self.opened, self.painted):
            while not waiting.empty():
                waiting.get()


def photograph(folder: Path) -> Path:
    rng = np.random.default_rng(7)
    path = folder / "photo.png"
    Image.fromarray(rng.integers(90, 160, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    return path


def serve(app: App, folder: Path) -> Any:
    """A page with a canvas, a note, Run, and buttons that give the canvas another value."""
    shown = photograph(folder)

    def opened(given: Painted) -> Shown | Refused:
        assert given.upload
        app.opened.put((given.name, hashlib.sha256(given.upload.read_bytes()).hexdigest()))
        try:
            with Image.open(given.upload) as image:
                (width, height), copy = image.size, image.convert("I").point(lambda v: v / 256)
        except OSError:
            return Refused(f"{given.name} is broken")
        copy.convert("L").resize((160, 160 * height // width)).save(folder / "display.png")
        app.revision += 1
        picture = folder / "display.png"
        return Shown(
            picture=picture, name=given.name, width=width, height=height, revision=app.revision
        )

    def painted(given: Painted) -> None:
        app.painted.put(given.painted)

    def run(note: str, given: Painted) -> str:
        images = {name: Image.open(path) for name, path in given.masks.items()}
        masks = {name: np.asarray(image) for name, image in images.items()}
        app.runs.put(Arrived(masks, given, note, {image.mode for image in images.values()}))
        return f"ran {note}"

    def soften() -> Shown:
        return Shown(picture=shown, name="photo", feather=24, revision=app.revision, **TWICE)

    def another() -> Shown:
        app.revision += 1
        return Shown(picture=shown, name="photo", revision=app.revision, **TWICE)

    with gr.Blocks() as blocks:
        canvas = Canvas(Shown(picture=shown, name="photo", **TWICE))
        note = gr.Textbox(label="Note")
        button = gr.Button("Run")
        soft, again = gr.Button("Soften"), gr.Button("Another")
        outcome = gr.Textbox(label="Outcome")
        canvas.opened(opened, canvas, canvas, show_progress="hidden")
        canvas.painted(painted, canvas, trigger_mode="multiple")
        # "once" would lose a click before the browser has heard of the last run's end.
        button.click(
            run, [note, canvas], outcome, js=flushed({"canvas": 1}), trigger_mode="multiple"
        )
        soft.click(soften, None, canvas, show_progress="hidden")
        again.click(another, None, canvas, show_progress="hidden")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks.queue().launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True
    )
    app.url = f"http://127.0.0.1:{port}/"
    return blocks


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App()
    blocks = serve(app, tmp_path_factory.mktemp("app"))
    yield app
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Bench:
    """A page with the canvas, driven by pixels of its surface."""

    def __init__(self, app: App, context: BrowserContext) -> None:
        self.app = app
        self._uploads = 0
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(app.url)
        self.page.wait_for_function("window.diffedit?.canvas?.state().surface")
        self.cdp = context.new_cdp_session(self.page)

    def _requested(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.hostname or "")
        self._uploads += parts.path.endswith("/upload")

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def begin(self) -> None:
        """The first picture, nothing painted, the same tool: cheaper than another page."""
        self.page.mouse.move(0, 0)
        state = self.state()
        if state["surface"] != {"width": WIDTH, "height": HEIGHT} or state["feather"]:
            self.another()
        self.page.evaluate(
            """() => {
                const canvas = diffedit.canvas;
                for (const layer of ["D", "C", "B", "A"]) {
                    canvas.choose({layer, tool: "brush", size: 24});
                    while (canvas.state().layers[layer].undo) canvas.undo();
                }
                document.activeElement?.blur();
            }"""
        )
        self.click(SAID["fit"])
        self.app.forget()
        self._uploads = 0

    def another(self) -> None:
        """Ask the server for another picture, and wait until it is shown."""
        before = self.state()["revision"]
        self.click("Another")
        self.page.wait_for_function(
            "before => { const {revision, surface} = diffedit.canvas.state();"
            " return revision > before && surface?.width === 320 }",
            arg=before,
        )

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate("diffedit.canvas.state()")
        return found

    def choose(self, **choice: Any) -> None:
        self.page.evaluate("choice => diffedit.canvas.choose(choice)", choice)

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def uploads(self) -> int:
        """How many files were sent since the test began."""
        self.page.evaluate("0")  # Playwright hears of requests only while it waits for something
        return self._uploads

    def surface(self) -> Any:
        return self.page.locator(".diffedit-canvas [role=img]")

    def key(self, key: str) -> None:
        self.page.keyboard.press(key)

    def client(self, x: float, y: float) -> tuple[float, float]:
        found = self.page.evaluate("([x, y]) => diffedit.canvas.clientAt(x, y)", [x, y])
        return found["x"], found["y"]

    def drag(self, points: Points, button: Any = "left") -> None:
        self.page.mouse.move(*self.client(*points[0]))
        self.page.mouse.down(button=button)
        for place in [self.client(*point) for point in points[1:]]:
            self.page.mouse.move(*place, steps=5)
        self.page.mouse.up(button=button)

    def touch(self, *fingers: Points) -> None:
        """Put fingers down one after the other, move them together, lift them."""
        places = [[self.client(*point) for point in path] for path in fingers]
        down: list[dict[str, float]] = []
        for finger, path in enumerate(places):
            down.append({"x": path[0][0], "y": path[0][1], "id": finger})
            self._touches("touchStart", down)
        for step in range(1, len(places[0])):
            down = [
                {"x": path[step][0], "y": path[step][1], "id": finger}
                for finger, path in enumerate(places)
            ]
            self._touches("touchMove", down)
        self._touches("touchEnd", [])

    def _touches(self, kind: str, points: list[dict[str, float]]) -> None:
        self.cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def run(self) -> Arrived:
        self.click("Run")
        return self.app.runs.get(timeout=15)

    def mask(self, layer: str = "A") -> Mask:
        """The layer as the browser has it."""
        side = self.state()["surface"]
        found: str = self.page.evaluate(
            "([name, w, h]) => { let text = '';"
            " for (let i = 0; i < w * h; i++)"
            " text += String.fromCharCode(diffedit.canvas.maskAt(name, i % w, Math.floor(i / w)));"
            " return text }",
            [layer, side["width"], side["height"]],
        )
        values = np.frombuffer(found.encode("latin-1"), np.uint8)
        return values.reshape(side["height"], side["width"])

    def alerts(self, text: str | re.Pattern[str]) -> None:
        """Wait until the line of trouble says so; what it said before may still stand there."""
        line = self.page.locator(".diffedit-canvas [role=alert]")
        expect(line).to_have_text(text)
        expect(line).to_be_visible()


@pytest.fixture(scope="module")
def desk(app: App, browser: Browser) -> Iterator[Bench]:
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        yield Bench(app, context)


@pytest.fixture
def bench(desk: Bench) -> Iterator[Bench]:
    desk.begin()
    yield desk
    errors, desk.errors = desk.errors, []
    assert not errors
    assert desk.hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def pocket(app: App, browser: Browser) -> Iterator[Bench]:
    viewport: Any = {"width": 390, "height": 844}
    with browser.new_context(viewport=viewport, has_touch=True, device_scale_factor=3) as context:
        yield Bench(app, context)


@pytest.fixture
def phone(pocket: Bench) -> Iterator[Bench]:
    pocket.begin()
    yield pocket
    assert not pocket.errors


def outside(points: Points, radius: float, shape: Sequence[int] = (HEIGHT, WIDTH)) -> NDArray[Any]:
    """How far each pixel's centre is from a thick polyline; negative within it."""
    ys, xs = np.mgrid[: shape[0], : shape[1]] + 0.5
    least = np.full(xs.shape, np.inf)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        square = (x1 - x0) ** 2 + (y1 - y0) ** 2 or 1
        along = np.clip(((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / square, 0, 1)
        away = np.hypot(xs - x0 - along * (x1 - x0), ys - y0 - along * (y1 - y0))
        least = np.minimum(least, away)
    return least - radius


def assert_stroke(mask: Mask, points: Points, size: float) -> None:
    """White within the stroke and black outside, but for one pixel at its edge."""
    away = outside(points, size / 2, mask.shape)
    assert (mask[away < -1] == 255).all()
    assert (mask[away > 1] == 0).all()


def box(left: int, top: int, right: int, bottom: int) -> Mask:
    """White in a rectangle whose last column and row are given, too."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : bottom + 1, left : right + 1] = 255
    return mask


ZIGZAG: Points = [(40, 40), (200, 60), (90, 180), (280, 200)]
LINE: Points = [(50, 120), (250, 120)]


def test_what_the_mouse_paints_arrives(bench: Bench) -> None:
    bench.drag(ZIGZAG)
    arrived = bench.run()
    assert arrived.modes == {"L"}
    assert list(arrived.masks) == ["A"]
    assert arrived.painted.painted == ("A",)
    assert_stroke(arrived.masks["A"], ZIGZAG, 24)
    assert set(np.unique(arrived.masks["A"])) == {0, 255}


def test_what_a_finger_paints_arrives(phone: Bench) -> None:
    path: Points = [(30 + 4 * step, 60 + 2 * step) for step in range(40)]
    phone.touch(path)
    assert_stroke(phone.run().masks["A"], path, 24)


def test_two_fingers_zoom_and_paint_nothing(phone: Bench) -> None:
    before = phone.state()["zoom"]
    left: Points = [(140 - 5 * step, 120) for step in range(9)]
    right: Points = [(180 + 5 * step, 120) for step in range(9)]
    phone.touch(left, right)
    assert phone.state()["zoom"] == pytest.approx(3 * before, rel=0.05)
    assert not phone.mask().any()
    phone.touch([(160, 120), (170, 130)])
    assert_stroke(phone.mask(), [(160, 120), (170, 130)], 24)


def test_a_stroke_arrives_with_the_run_right_after_it(bench: Bench) -> None:
    for turn in range(6):
        at = 30.0 + 40 * turn
        note = bench.page.get_by_label("Note")
        note.fill("")
        note.press_sequentially(f"turn {turn}")
        places = [bench.client(at, 30), bench.client(at, 200)]
        button = bench.page.get_by_role("button", name="Run", exact=True).bounding_box()
        assert button
        mouse = bench.page.mouse
        mouse.move(*places[0])
        mouse.down()
        mouse.move(*places[1])
        mouse.up()
        mouse.click(button["x"] + 20, button["y"] + 10)
        arrived = bench.app.runs.get(timeout=15)
        assert arrived.note == f"turn {turn}"
        assert arrived.masks["A"][100, int(at)] == 255
    assert bench.uploads() == 6


def test_an_unchanged_mask_is_not_sent_again(bench: Bench) -> None:
    bench.drag(LINE)
    first = bench.run()
    second = bench.run()
    assert bench.uploads() == 1
    assert (first.masks["A"] == second.masks["A"]).all()
    bench.choose(layer="B")
    bench.drag(ZIGZAG)
    third = bench.run()
    assert bench.uploads() == 2
    assert third.painted.active == "B"
    assert (third.masks["A"] == first.masks["A"]).all()
    assert_stroke(third.masks["B"], ZIGZAG, 24)
    bench.click(SAID["clear"])
    assert list(bench.run().masks) == ["A"]
    assert bench.uploads() == 2


def test_the_eraser_takes_away_all_that_the_brush_left(bench: Bench) -> None:
    bench.drag(LINE)
    bench.choose(tool="eraser")
    bench.drag(LINE)
    assert not bench.mask().any()


def test_undo_and_redo(bench: Bench) -> None:
    bench.drag(LINE)
    first = bench.mask()
    bench.drag(ZIGZAG)
    both = bench.mask()
    bench.key("Control+z")
    assert (bench.mask() == first).all()
    bench.click(SAID["undo"])
    assert not bench.mask().any()
    bench.click(SAID["redo"])
    bench.key("Control+Shift+Z")
    assert (bench.mask() == both).all()
    bench.click(SAID["undo"])
    bench.drag([(20, 20), (30, 20)])
    assert bench.state()["layers"]["A"] | {"share": 0} == {
        "share": 0,
        "painted": True,
        "undo": 2,
        "redo": 0,
    }


def test_every_step_comes_back_as_it_was(bench: Bench) -> None:
    """A random walk through 400 steps, among them some that are costly enough for snapshots."""
    script = (Path(canvas_module.__file__).parent / "canvas.js").read_text("utf-8")
    pure = script.partition("const say =")[0] + "return Layer"
    found = bench.page.evaluate(
        """(pure) => {
            const layer = new (new Function(pure)())(40, 30);
            let seed = 1;
            const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
            const action = () => {
                const value = 255 * random(2);
                const points = [random(40), random(30), random(4) ? 3 : 320];
                const [left, top] = [random(40), random(30)];
                const box = {left, top, right: left + random(9), bottom: top + random(9)};
                if (random(8) === 0) return {kind: "invert"};
                if (random(2)) return {kind: "box", value, box};
                while (points.length < 60) points.push(random(40), random(30), points[2]);
                return {kind: "stroke", value, points};
            };
            const look = () => String(layer.raster.data);
            const past = [look()], wrong = [];
            let least = 1000, snapshots = 0;
            for (let turn = 0; turn < 400; turn++) {
                const back = Math.min(layer.done, turn % 40 > 36 ? random(20) : 0);
                for (let i = 0; i < back; i++) {
                    layer.go(layer.done - 1);
                    if (look() !== past.at(-2 - i)) wrong.push([turn, i]);
                }
                if (random(2)) for (let i = 0; i < back; i++) layer.go(layer.done + 1);
                else past.length -= back;
                if (look() !== past.at(-1)) wrong.push([turn]);
                const before = layer.done;
                layer.commit(action());
                past.push(look());
                if (layer.done <= before) least = Math.min(least, layer.done);
                snapshots = Math.max(snapshots, layer.snapshots.size);
            }
            return {wrong, least, snapshots};
        }""",
        pure,
    )
    assert found["wrong"] == []
    assert 100 <= found["least"] < 140
    assert 3 < found["snapshots"] <= 17


def test_fill_invert_and_clear(bench: Bench) -> None:
    bench.drag(LINE)
    stroke = bench.mask()
    bench.key("i")
    assert (bench.mask() == 255 - stroke).all()
    bench.click(SAID["clear"])
    assert not bench.mask().any()
    bench.click(SAID["fill"])
    assert (bench.mask() == 255).all()
    for _ in range(3):
        bench.click(SAID["undo"])
    assert (bench.mask() == stroke).all()


def test_rectangle(bench: Bench) -> None:
    bench.click(SAID["rectangle"])
    bench.drag([(250.5, 190.5), (40.5, 30.5)])
    assert (bench.mask() == box(40, 30, 250, 190)).all()
    bench.page.keyboard.down("Alt")
    bench.drag([(100.5, 100.5), (120.5, 130.5)])
    bench.page.keyboard.up("Alt")
    assert (bench.mask() == box(40, 30, 250, 190) - box(100, 100, 120, 130)).all()


def test_lasso(bench: Bench) -> None:
    corners: Points = [(60, 40), (260, 60), (220, 200), (150, 110), (50, 180)]
    bench.key("l")
    bench.drag([*corners, corners[0]])
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = np.zeros(xs.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        crosses = (y0 <= ys) != (y1 <= ys)
        inside ^= crosses & (xs < x0 + (ys - y0) * (x1 - x0) / (y1 - y0))
    edge = outside([*corners, corners[0]], 1)
    mask = bench.mask()
    assert (mask[inside & (edge > 0)] == 255).all()
    assert (mask[~inside & (edge > 0)] == 0).all()


def test_painting_hits_the_right_pixels_after_zooming_and_panning(bench: Bench) -> None:
    before = bench.state()["zoom"]
    pointer = bench.client(200, 90)
    bench.page.mouse.move(*pointer)
    bench.page.mouse.wheel(0, -500)
    bench.page.wait_for_function("old => diffedit.canvas.state().zoom > 1.5 * old", arg=before)
    assert bench.client(200, 90) == pytest.approx(pointer, abs=1)  # wheels have whole pixels
    bench.choose(size=10)
    path: Points = [(190, 80), (215, 95), (195, 100)]
    bench.drag(path)
    bench.page.keyboard.down("Space")
    bench.drag([(200, 90), (180, 80)])
    bench.page.keyboard.up("Space")
    assert bench.client(180, 80) != pytest.approx(pointer, abs=20)
    moved = bench.client(200, 90)
    bench.drag([(200, 90), (210, 95)], button="middle")
    assert bench.client(200, 90) != pytest.approx(moved, abs=5)
    assert_stroke(bench.mask(), path, 10)
    bench.key("0")
    assert bench.state()["zoom"] == before
    bench.click(SAID["zoomIn"])
    assert bench.state()["zoom"] == pytest.approx(1.25 * before)
    bench.key("-")
    assert bench.state()["zoom"] == pytest.approx(before)


def test_a_pens_pressure_sets_the_width(bench: Bench) -> None:
    bench.choose(size=40)
    for kind, x, force in (
        ("mousePressed", 60.0, 0.25),
        ("mouseMoved", 120.0, 0.25),
        ("mouseMoved", 250.0, 0.75),
        ("mouseReleased", 250.0, 0.75),
    ):
        across, down = bench.client(x, 120)
        event = {"type": kind, "x": across, "y": down, "button": "left", "buttons": 1}
        event |= {"clickCount": 1, "pointerType": "pen", "force": force}
        bench.cdp.send("Input.dispatchMouseEvent", event)
    widths = (bench.mask() > 0).sum(axis=0)
    assert widths[90] == pytest.approx(10, abs=1)
    assert widths[185] == pytest.approx(20, abs=2)
    assert widths[249] == pytest.approx(30, abs=1)


def test_a_rectangle_by_keyboard_alone(bench: Bench) -> None:
    bench.surface().focus()
    for key in ["ArrowRight", "ArrowRight", "Shift+ArrowUp", "Enter"]:
        bench.key(key)
    for key in ["Shift+ArrowRight", "Shift+ArrowRight", "ArrowLeft", "Shift+ArrowDown"]:
        bench.key(key)
    assert not bench.mask().any()
    bench.key("Escape")
    bench.key("Enter")
    for key in ["Home", "PageUp", "Enter"]:
        bench.key(key)
    assert (bench.mask() == box(0, 0, WIDTH // 2 + 21, HEIGHT // 2)).all()


def test_the_surface_says_what_it_shows(bench: Bench) -> None:
    surface = bench.surface()
    assert surface.get_attribute("aria-label") == "photo, 640 × 480 pixels, 0 % masked in mask A"
    bench.choose(tool="rectangle")
    bench.drag([(0.5, 0.5), (159.5, 239.5)])
    said = "photo, 640 × 480 pixels, 50 % masked in mask A"
    assert surface.get_attribute("aria-label") == said
    bench.page.wait_for_function(
        "text => document.querySelector('.diffedit-canvas .unseen').textContent === text",
        arg=said,
    )
    bench.choose(layer="C")
    assert "0 % masked in mask C" in (surface.get_attribute("aria-label") or "")


def test_every_tool_is_a_named_button_in_a_toolbar_that_arrows_walk(bench: Bench) -> None:
    toolbar = bench.page.get_by_role("toolbar", name=SAID["tools"])
    buttons = toolbar.get_by_role("button").all()
    assert len(buttons) == 15
    for button in buttons:
        assert button.get_attribute("aria-label")
        assert button.get_attribute("title")
    stops = [button for button in buttons if button.get_attribute("tabindex") == "0"]
    assert len(stops) == 1
    buttons[0].focus()
    focused = "document.activeElement.getAttribute('aria-label')"
    walk = []
    for key in ["ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home"]:
        bench.key(key)
        walk.append(bench.page.evaluate(focused))
    open_, brush, eraser = SAID["open"], SAID["brush"], SAID["eraser"]
    assert walk == [brush, eraser, "Mask D", open_, "Mask D", open_]
    bench.key("ArrowRight")
    bench.key("ArrowRight")
    bench.key("Enter")
    assert bench.state()["tool"] == "eraser"
    assert buttons[2].get_attribute("aria-pressed") == "true"
    assert buttons[1].get_attribute("aria-pressed") == "false"


def test_keys_are_shortcuts_only_while_no_text_is_typed(bench: Bench) -> None:
    bench.page.get_by_label("Note").press_sequentially("eril]")
    assert bench.state() | {"zoom": 0} == bench.state() | {"zoom": 0, "tool": "brush", "size": 24}
    assert not bench.mask().any()
    bench.surface().focus()
    for key, tool in {"e": "eraser", "r": "rectangle", "l": "lasso", "b": "brush"}.items():
        bench.key(key)
        assert bench.state()["tool"] == tool
    bench.key("]")
    assert bench.state()["size"] > 24
    bench.key("[")
    bench.key("[")
    assert bench.state()["size"] < 24


def heard(bench: Bench, painted: tuple[str, ...]) -> bool:
    """Wait until the page hears of these; what was on its way before may come first."""
    while bench.app.painted.get(timeout=15) != painted:
        pass
    return True


def test_the_page_hears_when_a_layer_is_painted_or_empty_again(bench: Bench) -> None:
    bench.drag(LINE)
    assert heard(bench, ("A",))
    bench.drag(ZIGZAG)
    bench.choose(layer="C")
    bench.drag(LINE)
    assert heard(bench, ("A", "C"))
    bench.click(SAID["undo"])
    assert heard(bench, ("A",))
    assert bench.app.painted.empty()
    bench.another()
    assert heard(bench, ())
    assert not bench.mask().any()
    assert bench.uploads() == 0


def deep(path: Path) -> Path:
    """A 16-bit grey PNG."""
    ramp = np.linspace(0, 65535, 500 * 300).reshape(300, 500)
    Image.fromarray(ramp.astype(np.uint16)).save(path)
    return path


def assert_opened(bench: Bench, path: Path) -> None:
    """The bytes arrived, and the copy is shown."""
    name, digest = bench.app.opened.get(timeout=15)
    assert name == path.name
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    bench.page.wait_for_function("diffedit.canvas.state().surface.width === 160")
    label = bench.surface().get_attribute("aria-label") or ""
    assert label.startswith(f"{path.name}, 500 × 300 pixels")
    assert bench.state()["surface"] == {"width": 160, "height": 96}


def test_opening_by_button_keeps_the_bytes_and_drops_the_strokes(
    bench: Bench, tmp_path: Path
) -> None:
    path = deep(tmp_path / "deep.png")
    bench.drag(LINE)
    with bench.page.expect_file_chooser() as chooser:
        bench.click(SAID["open"])
    chooser.value.set_files(path)
    assert_opened(bench, path)
    assert not bench.mask().any()
    assert bench.uploads() == 1
    bench.choose(size=10)
    bench.drag([(20, 20), (140, 80)])
    arrived = bench.run()
    assert arrived.masks["A"].shape == (96, 160)
    assert_stroke(arrived.masks["A"], [(20, 20), (140, 80)], 10)
    assert arrived.painted.upload is None


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_opening_by_drop_and_paste(bench: Bench, tmp_path: Path, way: str) -> None:
    path = deep(tmp_path / f"{way}.png")
    bench.page.evaluate(
        """([way, name, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            const target = document.querySelector(".diffedit-canvas");
            const event = way === "drop"
                ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
            target.dispatchEvent(event);
        }""",
        [way, path.name, base64.b64encode(path.read_bytes()).decode()],
    )
    assert_opened(bench, path)


def give(bench: Bench, name: str, path: Path) -> None:
    bench.page.locator(f".diffedit-canvas input[data-name={name}]").set_input_files(path)


def test_what_is_no_picture_leaves_the_old_one(bench: Bench, tmp_path: Path) -> None:
    bench.drag(LINE)
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    give(bench, "picture", text)
    bench.alerts("notes.txt is not a picture that can be opened")
    assert bench.uploads() == 0
    text = text.rename(tmp_path / "fake.png")
    give(bench, "picture", text)
    bench.page.get_by_text("fake.png is broken").wait_for()
    assert bench.state()["surface"] == {"width": WIDTH, "height": HEIGHT}
    assert_stroke(bench.run().masks["A"], LINE, 24)
    give(bench, "mask", text)
    bench.alerts("fake.png is not a picture that can be opened")


def test_an_upload_that_fails_is_said_and_nothing_runs(bench: Bench, tmp_path: Path) -> None:
    bench.page.route("**/upload*", lambda route: route.abort())
    try:
        give(bench, "picture", deep(tmp_path / "deep.png"))
        bench.alerts(re.compile(r"^deep\.png could not be sent"))
        bench.drag(LINE)
        bench.click("Run")
        bench.page.get_by_text("The mask could not be sent").wait_for()
        time.sleep(0.3)
        assert bench.app.runs.empty()
    finally:
        bench.page.unroute("**/upload*")
    assert_stroke(bench.run().masks["A"], LINE, 24)
    bench.errors.clear()


def test_a_mask_from_a_file_is_its_luminance_on_the_surface(bench: Bench, tmp_path: Path) -> None:
    picture = np.zeros((480, 640, 3), np.uint8)
    picture[:, 320:] = 255
    picture[240:, :320] = (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "mask.png")
    give(bench, "mask", tmp_path / "mask.png")
    bench.page.wait_for_function("diffedit.canvas.state().layers.A.painted")
    mask = bench.run().masks["A"]
    assert (mask[:, 164:] == 255).all()
    assert (mask[:116, :156] == 0).all()
    assert (abs(mask[124:, :156].astype(int) - 29) <= 1).all()
    bench.click(SAID["undo"])
    assert not bench.mask().any()


def test_the_server_sets_the_feather_and_the_strokes_stay(bench: Bench) -> None:
    bench.drag(LINE)
    first = bench.run()
    bench.click("Soften")
    bench.page.wait_for_function("diffedit.canvas.state().feather === 24")
    bench.page.wait_for_function("document.querySelector('.feather').width === 320")
    bench.page.wait_for_function(
        "document.querySelector('.feather').getContext('2d').getImageData(150, 133, 1, 1).data[3]"
    )
    # 24 pixels of the original are 12 of the surface.
    fading = bench.page.evaluate(
        "() => { const context = document.querySelector('.feather').getContext('2d');"
        " return Array.from({length: 40}, (_, i) =>"
        " context.getImageData(150, 120 + i, 1, 1).data[3]) }"
    )
    assert fading[:11] == [0] * 11
    assert fading[13:23] == sorted(fading[13:23], reverse=True)
    assert fading[13] > 100 > fading[19] > 20
    assert fading[25:] == [0] * 15
    second = bench.run()
    assert (second.masks["A"] == first.masks["A"]).all()
    assert bench.uploads() == 1


def test_every_text_of_the_script_is_there() -> None:
    script = (Path(canvas_module.__file__).parent / "canvas.js").read_text("utf-8")
    icons = script[
        script.index("const ICONS = {") : script.index("};", script.index("const ICONS"))
    ]
    used = set(re.findall(r'say\("(\w+)', script))
    used |= set(re.findall(r"^  (\w+):", icons, re.MULTILINE)) | {"layer", "layerPainted"}
    assert used == set(SAID)


def test_python_takes_only_layers_that_there_are() -> None:
    canvas = Canvas()
    file = FileData(path="/nowhere/mask-A.png")
    given = canvas.preprocess(CanvasData(masks={"A": file}, painted=["A"], revision=3))
    assert given == Painted(masks={"A": Path(file.path)}, painted=("A",), revision=3)
    assert canvas.preprocess(None) == Painted()
    for wrong in (
        CanvasData(mask="E"),
        CanvasData(masks={"../A": file}),
        CanvasData(painted=["<b>"]),
    ):
        with pytest.raises(gr.Error, match="no such mask"):
            canvas.preprocess(wrong)


def test_events_are_the_two_and_no_stub_is_written() -> None:
    assert not list(Path(canvas_module.__file__).parent.glob("*.pyi"))
    with gr.Blocks():
        canvas = Canvas()
        gr.on([canvas.opened, canvas.painted], lambda: None)
        with pytest.raises(AttributeError, match="no attribute 'stroke'"):
            canvas.stroke  # noqa: B018
