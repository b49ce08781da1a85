"""The mask canvas in a real browser: what is painted is what arrives in Python."""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

gr = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from diffedit_demo.canvas import (  # noqa: E402
    TEXTS,
    Canvas,
    CanvasData,
    Painted,
    Refused,
    Shown,
    flushed,
)
from gradio.data_classes import FileData  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Page  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH, HEIGHT = 320, 240

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
    runs: queue.Queue[Arrived] = field(default_factory=queue.Queue)
    opened: queue.Queue[tuple[str, str]] = field(default_factory=queue.Queue)
    painted: queue.Queue[tuple[str, ...]] = field(default_factory=queue.Queue)


def photograph(folder: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    rng = np.random.default_rng(7)
    path = folder / f"photo-{size[0]}.png"
    Image.fromarray(rng.integers(90, 160, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def serve(app: App, folder: Path) -> Any:
    """A page with a canvas, a note and Run."""
    shown = photograph(folder)

    def opened(given: Painted) -> Shown | Refused:
        assert given.upload
        app.opened.put((given.name, hashlib.sha256(given.upload.read_bytes()).hexdigest()))
        try:
            with Image.open(given.upload) as image:
                size = image.size
                copy = image.convert("I").point(lambda value: value / 256).convert("L")
        except OSError:
            return Refused(f"{given.name} is no picture")
        copy.thumbnail((160, 160))
        copy.save(folder / "display.png")
        return Shown(
            picture=folder / "display.png",
            name=given.name,
            width=size[0],
            height=size[1],
            revision=given.revision + 1,
        )

    def run(note: str, given: Painted) -> str:
        images = {name: Image.open(path) for name, path in given.masks.items()}
        masks = {name: np.asarray(image) for name, image in images.items()}
        app.runs.put(Arrived(masks, given, note, {image.mode for image in images.values()}))
        return ", ".join(sorted(masks)) or "none"

    def soften() -> Shown:
        return Shown(
            picture=shown, name="photo", width=2 * WIDTH, height=2 * HEIGHT, feather=24, revision=1
        )

    with gr.Blocks() as blocks:
        canvas = Canvas(Shown(picture=shown, name="photo", width=2 * WIDTH, height=2 * HEIGHT))
        note = gr.Textbox(label="Note")
        button = gr.Button("Run")
        soft = gr.Button("Soften")
        gr.Textbox(label="Output")
        canvas.opened(opened, canvas, canvas, show_progress="hidden")
        canvas.painted(
            lambda given: app.painted.put(given.painted), canvas, None, show_progress="hidden"
        )
        button.click(run, [note, canvas], gr.Textbox(label="Masks"), js=flushed(1))
        soft.click(soften, None, canvas, show_progress="hidden")
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
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Bench:
    """A page with the canvas, driven by surface pixels."""

    def __init__(self, app: App, context: BrowserContext) -> None:
        self.app = app
        for waiting in (app.runs, app.opened, app.painted):
            while not waiting.empty():
                waiting.get()
        self.uploads = 0
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(app.url)
        self.page.wait_for_function("window.diffedit?.canvas?.state().surface?.width === 320")

    def _requested(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.hostname or "")
        self.uploads += parts.path.endswith("/upload")

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate("diffedit.canvas.state()")
        return found

    def choose(self, **choice: Any) -> None:
        self.page.evaluate("choice => diffedit.canvas.choose(choice)", choice)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=TEXTS[name], exact=True).click()

    def client(self, x: float, y: float) -> tuple[float, float]:
        found = self.page.evaluate("([x, y]) => diffedit.canvas.clientAt(x, y)", [x, y])
        return found["x"], found["y"]

    def drag(self, points: Points, steps: int = 6) -> None:
        self.page.mouse.move(*self.client(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.client(*point), steps=steps)
        self.page.mouse.up()

    def run(self) -> Arrived:
        self.page.get_by_role("button", name="Run", exact=True).click()
        return self.app.runs.get(timeout=15)

    def mask(self, layer: str = "A") -> Mask:
        """The layer as the browser has it."""
        side = self.state()["surface"]
        found = self.page.evaluate(
            "([name, w, h]) => Array.from({length: w * h}, (_, i) =>"
            " diffedit.canvas.maskAt(name, i % w, Math.floor(i / w)))",
            [layer, side["width"], side["height"]],
        )
        return np.array(found, np.uint8).reshape(side["height"], side["width"])


@pytest.fixture
def bench(app: App, browser: Browser) -> Iterator[Bench]:
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        bench = Bench(app, context)
        yield bench
        assert not bench.errors
        assert bench.hosts == {"127.0.0.1"}


@pytest.fixture
def phone(app: App, browser: Browser) -> Iterator[Bench]:
    with browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, device_scale_factor=3
    ) as context:
        bench = Bench(app, context)
        yield bench
        assert not bench.errors


def near(points: Points, radius: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> NDArray[Any]:
    """How far outside a thick polyline each pixel's centre is (negative within)."""
    xs, ys = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    least = np.full(xs.shape, np.inf)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        length = np.hypot(x1 - x0, y1 - y0) or 1
        along = np.clip(((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / length**2, 0, 1)
        least = np.minimum(
            least, np.hypot(xs - x0 - along * (x1 - x0), ys - y0 - along * (y1 - y0))
        )
    return least - radius


def assert_stroke(mask: Mask, points: Points, size: float) -> None:
    """White within the stroke and black outside, up to one pixel at its edge."""
    away = near(points, size / 2, (mask.shape[1], mask.shape[0]))
    assert (mask[away < -1] == 255).all()
    assert (mask[away > 1] == 0).all()


ZIGZAG: Points = [(40, 40), (200, 60), (90, 180), (280, 200)]


def test_what_the_mouse_paints_arrives(bench: Bench) -> None:
    bench.choose(size=24)
    bench.drag(ZIGZAG)
    arrived = bench.run()
    assert arrived.modes == {"L"}
    assert list(arrived.masks) == ["A"]
    assert_stroke(arrived.masks["A"], ZIGZAG, 24)
    assert set(np.unique(arrived.masks["A"])) == {0, 255}
