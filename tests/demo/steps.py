"""What a person does on the page, as functions for tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

WAIT = 120_000


def chooses(page: Page, file: Path, act: Callable[[], object]) -> None:
    """Do what makes the browser ask for a file, and give it this one."""
    with page.expect_file_chooser() as chooser:
        act()
    chooser.value.set_files(file)


def opens(page: Page, file: Path) -> None:
    chooses(page, file, page.get_by_role("button", name="Open a picture").click)
    expect(page.locator("#status")).to_contain_text(file.name, timeout=WAIT)


def paints(page: Page, *, at: tuple[float, float] = (0.4, 0.4), by: float = 0.2) -> None:
    """A zigzag with the mouse; places are fractions of the canvas."""
    surface = page.locator("#canvas canvas").last
    surface.scroll_into_view_if_needed()
    box = surface.bounding_box()
    assert box is not None
    x = box["x"] + box["width"] * at[0]
    y = box["y"] + box["height"] * at[1]
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(12):
        page.mouse.move(x + box["width"] * by * step / 12, y + (step % 4) * 14)
    page.mouse.up()


def adds(page: Page, edit: str, place: int = 0) -> None:
    """Add an edit to a pass by its button, which for a rare one is folded away."""
    button = page.locator(f".add-{edit}").nth(place)
    if not button.is_visible():
        page.locator("#composer details:not([open]) > summary", has_text="More edits").nth(
            place
        ).click()
    button.click()


def field(page: Page, name: str, place: int = 0) -> Locator:
    """The control of a parameter: the `place`-th of that name on the page."""
    shown = page.locator(f"#composer [id^='control-'][id$='.{name}']")
    return shown.nth(place) if place >= 0 else shown.last


def unfolds(page: Page, control: Locator) -> Locator:
    """Open what hides a control."""
    if not control.is_visible():
        control.locator("xpath=ancestor::details").locator("summary").first.click()
    return control


def quick(page: Page, steps: int = 4) -> None:
    """Few steps in every pass: what is tested is the page."""
    for place in range(page.locator("[id^='control-'][id$='.steps']").count()):
        unfolds(page, field(page, "steps", place)).fill(str(steps))


def varies(page: Page, photo: Path, steps: int = 2) -> None:
    """Make ready for a run that needs no mask."""
    opens(page, photo)
    page.locator("#preset-vary").click()
    field(page, "prompt").fill("a red circle")
    quick(page, steps)


def starts(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def runs(page: Page) -> None:
    """Run, and wait until another picture than before is shown."""
    shown = "document.querySelector('#viewer .after')?.getAttribute('src')"
    before = page.evaluate(shown)
    starts(page)
    page.wait_for_function(f"before => ({shown} ?? before) !== before", arg=before, timeout=WAIT)
    status(page, "Done in")


def stack(page: Page) -> dict[str, Any]:
    """What the composer holds."""
    found: dict[str, Any] = page.evaluate("window.diffedit.composer.stack()")
    return found


def downloads(page: Page, name: str, to: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    download.value.save_as(to)
    return to


def count_previews(page: Page) -> None:
    """Keep every preview that is shown in `window.previews`."""
    page.evaluate(
        """() => {
          window.previews = new Set();
          const seen = () => {
            const now = document.querySelector("#viewer .preview")?.getAttribute("src");
            if (now) window.previews.add(now);
          };
          new MutationObserver(seen).observe(
            document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )


def workflow_of(picture: Path) -> str:
    """The workflow in a picture that the page made."""
    from PIL import Image

    with Image.open(picture) as opened:
        text: str = opened.text["diffedit"]  # type: ignore[attr-defined]
    return text


def status(page: Page, said: str | re.Pattern[str]) -> None:
    expect(page.locator("#status")).to_contain_text(said, timeout=WAIT)
