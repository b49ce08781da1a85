"""The workspace as a person uses it: a real browser, a real server, the embedded model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from diffedit import Workflow
from diffedit.cli import cli
from diffedit.images import open_picture

WAIT = 120_000


def opens(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open a picture").click()
    chooser.value.set_files(file)
    expect(page.locator("#status")).to_contain_text(file.name, timeout=WAIT)


def paints(page: Page, *, at: tuple[float, float] = (0.4, 0.4), by: float = 0.2) -> None:
    """A zigzag with the mouse; places are fractions of the canvas."""
    surface = page.locator("#canvas canvas").last
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
    """Add an edit to a pass by its button."""
    # A click on a form that is being drawn anew is lost.
    page.wait_for_timeout(1000)
    before = page.locator(".act-remove").count()
    page.get_by_role("button", name=f"+ {edit}", exact=True).nth(place).click()
    expect(page.locator(".act-remove")).to_have_count(before + 1)


def field(page: Page, name: str, place: int = 0) -> Locator:
    return page.locator(f"[id^=field-][id$='.{name}']").nth(place).locator("input, textarea").first


def quick(page: Page, steps: int = 4) -> None:
    """Few steps in every pass: what is tested is the page."""
    for place in range(page.locator("[id^=field-][id$='.steps']").count()):
        wanted = field(page, "steps", place)
        if not wanted.is_visible():
            named = page.locator("[id^=field-][id$='.steps']").nth(place).get_attribute("id")
            assert named is not None
            uid = named.removeprefix("field-").removesuffix(".steps")
            page.locator(f"#more-{uid} button").first.click()
        wanted.fill(str(steps))


def runs(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#status")).to_contain_text("Done in", timeout=WAIT)


def downloads(page: Page, name: str, to: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    download.value.save_as(to)
    return to


def count_previews(page: Page) -> None:
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


@pytest.mark.slow
def test_the_whole_story(page: Page, photo: Path, tmp_path: Path) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("a yellow star")
    adds(page, "style")
    page.locator("#add-pass").click()
    expect(page.get_by_label("Pass 2")).to_be_visible()
    adds(page, "img2img", 1)
    field(page, "prompt", -1).fill("a red circle")
    quick(page, 5)
    count_previews(page)
    runs(page)
    assert page.evaluate("window.previews.size") >= 3

    # Compare: the slider moves the line, holding shows the picture before.
    share = page.locator("#viewer .share")
    share.fill("20")
    expect(page.locator("#viewer .viewer")).to_have_attribute("style", re.compile("20%"))
    page.locator("#viewer .hold").focus()
    page.keyboard.down("Space")
    expect(page.locator("#viewer .hold")).to_have_attribute("aria-pressed", "true")
    page.keyboard.up("Space")
    expect(page.locator("#viewer .hold")).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#changes")).to_contain_text("pixels changed")

    # The picture and the workflow as files: both say what was done.
    picture = downloads(page, "Download the picture", tmp_path / "made.png")
    with Image.open(picture) as opened:
        text: str = opened.text["diffedit"]  # type: ignore[attr-defined]
    page.get_by_role("button", name=re.compile("^Workflow")).click()
    file = downloads(page, "Download the workflow", tmp_path / "workflow.yaml")
    assert file.read_text("utf-8") == text
    workflow = Workflow.load(file)
    assert [[edit.name for edit in one.edits] for one in workflow.passes] == [
        ["inpaint", "style"],
        ["img2img"],
    ]

    # Back, forward again, and on another branch.
    history = page.locator("#history img")
    page.get_by_role("button", name="Keep").click()
    expect(history).to_have_count(2)
    page.get_by_role("button", name="Undo", exact=True).last.click()
    expect(page.get_by_role("button", name="Redo", exact=True).last).to_be_enabled()
    page.get_by_role("button", name="Redo", exact=True).last.click()
    expect(page.get_by_role("button", name="Redo", exact=True).last).to_be_disabled()
    page.get_by_role("button", name="Undo", exact=True).last.click()
    page.locator("#seed input").fill("3")
    runs(page)
    page.get_by_role("button", name="Keep").click()
    expect(history).to_have_count(3)

    # The same file, run by the command line, gives the same pixels.
    out = tmp_path / "out.png"
    said = CliRunner().invoke(
        cli, ["run", str(file), str(photo), "-o", str(out), "--device", "cpu"]
    )
    assert said.exit_code == 0, said.output
    assert (open_picture(out).pixels == open_picture(picture).pixels).all()


def test_what_is_wrong_stands_beside_its_field_and_the_next_run_works(
    page: Page, photo: Path
) -> None:
    opens(page, photo)
    field(page, "prompt").fill("a yellow star")
    page.get_by_role("button", name="Run", exact=True).click()
    alert = page.locator("#status [role=alert]")
    expect(alert).to_contain_text("nothing is painted on mask A", timeout=WAIT)
    paints(page)
    quick(page, 2)
    runs(page)
    expect(page.locator("#changes")).to_contain_text("None of those is further than 8 px")


def test_cancelling_ends_the_run_and_the_next_one_works(page: Page, photo: Path) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("a yellow star")
    quick(page, 400)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"step \d+ of 400"), timeout=WAIT)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled", timeout=WAIT)
    field(page, "steps").fill("2")
    runs(page)


def test_every_installed_edit_has_its_form(page: Page) -> None:
    import diffedit

    for name, cls in diffedit.edits().items():
        adds(page, name)
        for parameter, info in cls.model_fields.items():
            if info.json_schema_extra == {"advanced": True}:
                continue
            expect(page.locator(f"[id^=field-][id$='.{parameter}']").last).to_be_attached()


def test_moving_and_switching_off_is_what_the_engine_runs(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("first")
    page.locator("#add-pass").click()
    expect(page.get_by_label("Pass 2")).to_be_visible()
    field(page, "prompt", 1).fill("second")
    adds(page, "img2img", 1)
    page.wait_for_timeout(1000)
    page.locator(".act-up").nth(2).click()  # pass 2: behind pass 1 and its inpaint
    expect(field(page, "prompt")).to_have_value("second")
    page.get_by_label("Pass 2").uncheck()
    quick(page, 3)
    runs(page)
    page.get_by_role("button", name=re.compile("^Workflow")).click()
    workflow = Workflow.load(downloads(page, "Download the workflow", tmp_path / "w.yaml"))
    said: list[Any] = [(one.prompt, [e.name for e in one.edits]) for one in workflow.passes]
    assert said == [("second", ["img2img"])]
