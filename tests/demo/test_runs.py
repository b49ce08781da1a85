"""Runs of the workspace: cancelled at any moment, side by side, and with plugins of others."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from diffedit import Workflow
from diffedit.images import Picture, save_picture
from tests.demo.conftest import visited
from tests.demo.steps import (
    WAIT,
    adds,
    downloads,
    field,
    opens,
    quick,
    runs,
    starts,
    status,
    workflow_of,
)
from tests.laws.photographs import photograph


def varies(page: Page, photo: Path, steps: int = 2) -> None:
    """Make ready for a run that needs no mask."""
    opens(page, photo)
    page.locator("#preset").select_option("vary")
    field(page, "prompt").fill("a red circle")
    quick(page, steps)


def cancels(page: Page) -> None:
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def test_a_run_is_cancelled_in_a_preprocessor_and_the_next_one_works(
    browser: Browser, extended: str, photo: Path
) -> None:
    with visited(browser, extended) as page:
        varies(page, photo)
        adds(page, "dawdle")
        field(page, "seconds").fill("3")
        starts(page)
        status(page, re.compile("Preparing|Loading"))
        cancels(page)
        field(page, "seconds").fill("0")
        runs(page)


def test_a_run_is_cancelled_while_it_decodes_and_the_next_one_works(
    page: Page, tmp_path: Path
) -> None:
    large = save_picture(
        Picture(photograph("rgb8", (1024, 1024), "coffee")), tmp_path / "large.png"
    )
    varies(page, large, 1)
    field(page, "strength").fill("1")
    page.evaluate(
        """() => new MutationObserver(() => {
          if (!document.querySelector("#status").textContent.includes("step 1 of 1")) return;
          for (const one of document.querySelectorAll("button")) {
            if (one.textContent.trim() === "Cancel" && !one.disabled) one.click();
          }
        }).observe(document.querySelector("#status"), {subtree: true, childList: true})"""
    )
    starts(page)
    status(page, "Cancelled")
    expect(page.locator("#candidates")).not_to_be_visible()


def test_a_run_that_waits_is_cancelled_at_once_and_never_begins(
    browser: Browser, extended: str, photo: Path
) -> None:
    with visited(browser, extended) as first, visited(browser, extended) as second:
        varies(first, photo)
        adds(first, "dawdle")
        field(first, "seconds").fill("6")
        varies(second, photo)
        starts(first)
        status(first, re.compile("Preparing|Loading"))
        starts(second)
        status(second, "Waiting")
        began = time.monotonic()
        cancels(second)
        assert time.monotonic() - began < 4
        status(first, "Done in")
        expect(second.locator("#status")).to_contain_text("Cancelled")
        runs(second)


def test_two_visitors_take_turns(browser: Browser, extended: str, photo: Path) -> None:
    """Who asked first is served first, and neither sees what the other does."""
    with visited(browser, extended) as first, visited(browser, extended) as second:
        for page in (first, second):
            varies(page, photo)
        adds(first, "dawdle")
        starts(first)
        status(first, re.compile("Preparing|Loading"))
        starts(second)
        status(second, "Waiting")
        # The first visitor asks again as soon as it can, and has to wait behind the second.
        status(first, "Done in")
        field(first, "seconds").fill("6")
        starts(first)
        status(second, "Done in")
        expect(first.locator("#status")).not_to_contain_text("Done in")
        status(first, "Done in")
        for page in (first, second):
            page.get_by_role("button", name="Keep").click()
            expect(page.locator("#history img")).to_have_count(2)


def test_a_closed_tab_frees_the_queue(browser: Browser, extended: str, photo: Path) -> None:
    with visited(browser, extended) as stays:
        varies(stays, photo)
        leaves = browser.new_context(locale="en-GB").new_page()
        leaves.goto(extended)
        leaves.locator("#add-pass").wait_for()
        varies(leaves, photo, 1000)
        starts(leaves)
        status(leaves, re.compile(r"step \d+ of"))
        starts(stays)
        status(stays, "Waiting")
        leaves.context.close()
        began = time.monotonic()
        expect(stays.locator("#status")).not_to_contain_text("Waiting", timeout=WAIT)
        # Two seconds on a machine that does nothing else; tests share theirs.
        assert time.monotonic() - began < 6
        status(stays, "Done in")


def test_plugins_of_others_have_their_forms_and_broken_ones_are_named(
    browser: Browser, extended: str, photo: Path, tmp_path: Path
) -> None:
    with visited(browser, extended) as page:
        expect(page.get_by_text("The plugin broken_edits could not be loaded")).to_be_visible()
        varies(page, photo)
        adds(page, "dawdle")
        seconds = field(page, "seconds")
        assert (seconds.get_attribute("min"), seconds.get_attribute("max")) == ("0", "10")
        seconds.fill("0.5")
        field(page, "mood").select_option("bored")
        runs(page)
        made = downloads(page, "Download the picture", tmp_path / "made.png")
        text = workflow_of(made)
        assert "dawdle:" in text
        assert "mood: bored" in text
        with pytest.raises(ValueError, match="no edit 'dawdle'"):
            Workflow.from_yaml(text)  # this process has no such plugin
