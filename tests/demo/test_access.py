"""Access: contrast, names and roles in both themes and sizes, the keyboard, touch, and a phone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.demo.conftest import visited
from tests.demo.steps import adds, field, opens, paints, quick, runs, starts

DESK: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
}


def findings(page: Page) -> list[str]:
    """What axe-core calls serious or critical, with where it is."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.fixture
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where screenshots go: a folder that CI keeps, if it names one."""
    folder = Path(os.environ.get("DIFFEDIT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_nothing_serious_is_found(
    browser: Browser, address: str, photo: Path, kept: Path, size: str, scheme: str
) -> None:
    screen = DESK if size == "desk" else PHONE
    with visited(browser, address, color_scheme=scheme, **screen) as page:
        opens(page, photo)
        for edit in ("controlnet", "style"):
            adds(page, edit)
        for summary in page.locator("#composer .more > summary").all():
            summary.click()
        page.locator("[id^='control-'][id$='.steps']").first.fill("0")
        starts(page)
        expect(page.locator("#status [role=alert]")).to_be_visible(timeout=60_000)
        page.screenshot(path=kept / f"{size}-{scheme}-edit.png", full_page=True)
        assert findings(page) == []
        page.locator("#preset-paint").click()
        paints(page)
        quick(page, 2)
        runs(page)
        page.screenshot(path=kept / f"{size}-{scheme}-result.png")
        assert findings(page) == []


def test_a_finger_paints_on_a_phone_and_run_is_always_at_hand(
    browser: Browser, address: str, photo: Path
) -> None:
    with visited(browser, address, **PHONE) as page:
        opens(page, photo)
        surface = page.locator("#canvas canvas").last
        surface.scroll_into_view_if_needed()
        box = surface.bounding_box()
        assert box is not None
        stood = page.evaluate("window.scrollY")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        session = page.context.new_cdp_session(page)
        for kind, move in (("touchStart", 0), *(("touchMove", k) for k in range(10, 60, 10))):
            points = [{"x": x + move, "y": y}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        share = page.evaluate("window.diffedit.canvas.state().layers.A.share")
        assert share > 0.005
        assert page.evaluate("window.scrollY") == stood  # it painted, and did not scroll
        field(page, "prompt").fill("a yellow star")
        quick(page, 2)
        run = page.get_by_role("button", name="Run", exact=True)
        for place in ("0", "document.body.scrollHeight"):
            page.evaluate(f"window.scrollTo(0, {place})")
            expect(run).to_be_in_viewport(ratio=1)
        # Nothing is wider than the screen.
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # Run was pressed far below the picture; what it makes is brought into view.
        runs(page)
        expect(page.locator("#viewer .after")).to_be_in_viewport()


def test_the_keyboard_reaches_everything(page: Page, photo: Path) -> None:
    """From the top with Tab alone: each control of the page gets the focus, and shows it."""
    opens(page, photo)
    wanted = {"Open a picture", "Run", "Add a pass", "Move inpaint up", "Remove inpaint"}
    page.evaluate("document.activeElement?.blur()")
    seen: set[str] = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                """() => {
                  const one = document.activeElement;
                  return one.getAttribute("aria-label") || one.textContent.trim();
                }"""
            )
        )
    assert wanted <= seen
