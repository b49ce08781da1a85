"""Makes the documentation's picture of the workspace: ``python docs/screenshot.py``.

A real browser opens `diffedit demo`, the example photograph and its mask, and runs one pass with
the embedded model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parent
PHOTO = DOCS.parent / "examples" / "coffee.png"
MASK = DOCS.parent / "examples" / "coffee-mask.png"
PROMPT, SEED = "a yellow star", 6


def edit(page: Page) -> None:
    """Open the photograph and its mask, and run."""
    for button, file in (("Open a picture", PHOTO), ("Mask from a file", MASK)):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name=button).click()
        chooser.value.set_files(file)
        page.wait_for_function("document.querySelector('#canvas img')")
        page.wait_for_timeout(1000)
    page.locator("[id^='control-'][id$='.prompt']").fill(PROMPT)
    page.locator("[id^='control-'][id$='.seed']").fill(str(SEED))
    page.locator("[id^='control-'][id$='.feather']").fill("6")
    page.locator("#run").click()
    page.wait_for_function(
        "document.querySelector('#status').textContent.includes('Done in')", timeout=600_000
    )
    page.wait_for_timeout(1000)


def main() -> None:
    """Write docs/workspace.png."""
    command = [sys.executable, "-m", "diffedit", "demo", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1440, "height": 900}, locale="en-GB")
            page.goto(address)
            page.locator("#add-pass").wait_for()
            edit(page)
            page.screenshot(path=DOCS / "workspace.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
    with Image.open(DOCS / "workspace.png") as shown:
        shown.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(
            DOCS / "workspace.png", optimize=True
        )


if __name__ == "__main__":
    main()
