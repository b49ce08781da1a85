"""Runs of the workspace: cancelled at any moment, side by side, and with plugins of others."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from diffedit import Workflow
from diffedit.images import Picture, save_picture
from tests.demo.conftest import served, visited
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
    varies,
    workflow_of,
)
from tests.laws.photographs import photograph


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


def test_a_full_queue_turns_a_run_away_and_nothing_else(
    browser: Browser, extended: str, photo: Path
) -> None:
    programs = [httpx.Client(base_url=extended, timeout=60) for _ in range(2)]
    programs[1].get("/config")  # gets a cookie, and is another visitor then
    taken = 0
    with visited(browser, extended, faults=("503",)) as page:
        varies(page, photo)
        for client in programs:
            first: dict[str, Any] = {"data": [None, "dawdle", "x", {"seconds": 9}, None, 0, 1]}
            rest: dict[str, Any] = {"data": [None, "", "x", {}, None, 0, 1]}
            for body in (first, *[rest] * 20):
                body["data"] = [*body["data"][:7], 1.0, "", ""]
                taken += client.post("/gradio_api/call/edit", json=body).status_code == 200
        assert 24 <= taken <= 26
        starts(page)
        expect(page.locator("#status [role=alert]")).to_contain_text("Too many", timeout=WAIT)
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
        opens(page, photo)  # waits for nobody
        expect(page.locator("#history img")).to_have_count(2)
        deadline = time.monotonic() + 60
        while programs[0].post("/gradio_api/call/plugins", json={"data": []}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(1)
        runs(page)
    for client in programs:
        client.close()


class Breakable:
    """A way to a server that can be cut, as a network is."""

    def __init__(self) -> None:
        self.target = ("127.0.0.1", 0)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.cut = threading.Event()
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.cut.is_set():
                client.close()
                continue
            server = socket.create_connection(self.target)
            self.open += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(1 << 16):
                go.sendall(data)
        for one in (come, go):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def breaks(self) -> None:
        self.cut.set()
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mends(self) -> None:
        self.cut.clear()

    def close(self) -> None:
        self.breaks()
        self.listener.close()


def test_a_connection_that_breaks_ends_the_run_and_nothing_is_lost(
    browser: Browser, photo: Path
) -> None:
    """Gradio loads the page again then: picture, history and stack are those of before."""
    way = Breakable()
    with served("--allow-host", way.name) as address:
        way.target = ("127.0.0.1", int(address.rpartition(":")[2]))
        expected = ("ERR_", "network error", "Connection errored out", "onnection")
        with visited(browser, f"http://{way.name}", faults=expected) as page:
            varies(page, photo)
            runs(page)
            page.get_by_role("button", name="Keep").click()
            expect(page.locator("#history img")).to_have_count(2)
            adds(page, "style")
            field(page, "image").select_option("result:0")
            quick(page, 1000)
            starts(page)
            status(page, re.compile(r"step \d+ of"))
            page.evaluate("window.before = true")
            way.breaks()
            page.wait_for_timeout(1000)
            way.mends()
            page.wait_for_function("!window.before && window.diffedit?.composer", timeout=WAIT)
            expect(page.locator("#history img")).to_have_count(2, timeout=WAIT)
            expect(page.locator("#undo")).to_be_enabled()
            expect(field(page, "image")).to_have_value("result:0")
            quick(page, 2)
            runs(page)
    way.close()


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
