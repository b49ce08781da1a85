"""A real server, started as a person starts it, and a real browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


# No longer than a module: Playwright's event loop runs on in the thread that tests share.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium."""
    found = shutil.which("chromium")
    assert found, "chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def served(*options: str, path: Path | None = None) -> Iterator[str]:
    """`diffedit demo` on a free port; its address.

    Args:
        path: a folder of distributions that are installed besides.
    """
    command = [sys.executable, "-m", "diffedit", "demo", "--port", "0", "--device", "cpu", *options]
    environment = os.environ | ENVIRONMENT
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(path), os.environ.get("PYTHONPATH")))
        )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("http://"), f"no address but {line!r}"
        yield line
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The workspace with the embedded model."""
    with served() as found:
        yield found


@contextmanager
def visited(
    browser: Browser, address: str, *, faults: tuple[str, ...] = (), **context: object
) -> Iterator[Page]:
    """A page of its own; afterwards: no error in its console, nothing asked of another host.

    Args:
        faults: what errors may say that the test brings about.
    """
    wrong: list[str] = []
    visitor = browser.new_context(
        **{"viewport": {"width": 1440, "height": 900}, "locale": "en-GB", **context}  # type: ignore[arg-type]
    )
    page = visitor.new_page()
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    loads: list[Page] = []
    page.on("load", lambda loaded: loads.append(loaded))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith((address, "data:", "blob:")) else wrong.append(asked.url)
        ),
    )
    page.goto(address)
    page.locator("#add-pass").wait_for()
    yield page
    visitor.close()
    if len(loads) > 1:  # Chromium broke off what the page still read; Gradio's client says so
        faults = (*faults, "BodyStreamBuffer was aborted", "Connection errored out")
    assert [said for said in wrong if not any(one in said for one in faults)] == []


PLUGIN = """
import time
from typing import ClassVar, Literal

from pydantic import Field

from diffedit import Contribution, Edit, Preprocessor, Run, hookimpl


class Dawdle(Edit):
    \"\"\"Take one's time before anything happens.\"\"\"

    name: ClassVar[str] = "dawdle"
    version: ClassVar[str] = "1.0.0"

    seconds: float = Field(1.5, ge=0, le=10, description="How long")
    mood: Literal["calm", "bored"] = "calm"

    def contribute(self, run: Run) -> Contribution:
        made = run.preprocess("dawdling")
        made(self.seconds)
        return Contribution()


def load(weights):
    return time.sleep


@hookimpl
def register_edits():
    return [Dawdle]


@hookimpl
def register_preprocessors():
    return [Preprocessor("dawdling", load, "Take one's time")]
"""


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two distributions as pip leaves them: one that works, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    modules = {"slow_edits": PLUGIN, "broken_edits": "import no_such_module_anywhere"}
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source, "utf-8")
        about = folder / f"{module}-1.0.dist-info"
        about.mkdir()
        said = f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n"
        (about / "METADATA").write_text(said, "utf-8")
        (about / "entry_points.txt").write_text(f"[diffedit]\n{module} = {module}\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def extended(third_party: Path) -> Iterator[str]:
    """A workspace in an environment with plugins of others."""
    with served(path=third_party) as found:
        yield found


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The workspace, just opened."""
    with visited(browser, address) as found:
        yield found


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph, 160x128."""
    from diffedit.images import Picture, save_picture
    from tests.laws.photographs import photograph

    picture = Picture(photograph("rgb8", (160, 128), "coffee"))
    return save_picture(picture, tmp_path_factory.mktemp("photo") / "photo.png")
