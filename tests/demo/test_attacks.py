"""Attacks on the real page over HTTP: each refused with a status, and the next honest user served.

What the guards do in detail is tested in `test_server`, on a page made for it.
"""

from __future__ import annotations

import io
import json
import re
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.demo.steps import WAIT, chooses, field, opens, paints, quick, runs, starts, status

API = "/gradio_api"
PLACES = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "file:" + "//" + "/etc/passwd",
    "/proc/self/environ",
)


class Visitor:
    """A browser without a screen: it has opened the page and holds its cookie."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=60)
        shown = self.http.get("/", headers={"accept": "text/html"})
        assert shown.status_code == 200
        self.session = uuid.uuid4().hex[:12]
        self.functions = self.http.get("/config").json()["dependencies"]

    def join(self, number: int, data: list[Any], **more: Any) -> httpx.Response:
        """Start a function; whoever asks too often waits, as the answer says."""
        body = {"fn_index": number, "data": data, "session_hash": self.session}
        for _ in range(20):
            answer = self.http.post(f"{API}/queue/join", json=body | more)
            if answer.status_code != 429:
                break
            time.sleep(int(answer.headers["retry-after"]))
        return answer

    def upload(self, name: str, data: bytes) -> httpx.Response:
        return self.http.post(f"{API}/upload", files={"files": (name, data)})


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    made = Visitor(address)
    yield made
    made.http.close()


def file(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def is_refusal(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert "Traceback" not in answer.text
    assert len(answer.text) < 1000


@pytest.mark.parametrize("place", PLACES)
def test_no_endpoint_of_the_page_takes_a_place_on_the_machine(visitor: Visitor, place: str) -> None:
    """In every argument of every function, in each form that a file may come in."""
    tried = 0
    for one in visitor.functions:
        count = max(1, len(one["inputs"]))
        for at in range(count):
            for value in (
                file(place),
                {"upload": file(place)},
                {"masks": {"A": file(place)}, "painted": ["A"]},
                {"stack": "{}", "files": {"own:x": file(place)}},
                [file(place)],
            ):
                data: list[Any] = [None] * count
                data[at] = value
                is_refusal(visitor.join(one["id"], data), 403)
                tried += 1
    assert tried > 50


def test_a_picture_of_another_session_is_not_taken_by_the_canvas(address: str) -> None:
    mine, theirs = Visitor(address), Visitor(address)
    sent = theirs.upload("theirs.png", picture())
    (path,) = sent.json()
    opened = next(one for one in mine.functions if any("opened" in str(t) for t in one["targets"]))
    for value in ({"upload": file(path)}, {"masks": {"A": file(path)}, "painted": ["A"]}):
        is_refusal(mine.join(opened["id"], [value]), 403)
    answer = theirs.join(opened["id"], [{"upload": file(path), "name": "theirs.png"}])
    assert answer.status_code == 200


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def test_functions_of_the_page_are_not_for_those_who_never_opened_it(
    address: str, visitor: Visitor
) -> None:
    stranger = httpx.Client(base_url=address, timeout=60)
    private = [one for one in visitor.functions if one.get("api_visibility") == "private"]
    assert len(private) >= 8
    for one in private:
        body = {"fn_index": one["id"], "data": [], "session_hash": uuid.uuid4().hex[:12]}
        is_refusal(stranger.post(f"{API}/queue/join", json=body), 403)


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"host": "evil.example"}])
def test_other_sites_and_other_names_are_refused(visitor: Visitor, headers: dict[str, str]) -> None:
    answer = visitor.http.post(f"{API}/queue/join", json={}, headers=headers)
    is_refusal(answer, 400, 403)


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("page.html", b"<script>alert(1)</script>", 415),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", 415),
        ("innocent.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        ("large.png", b"\x89PNG\r\n\x1a\n" + bytes(60 << 20), 413),
    ],
)
def test_uploads_that_are_no_pictures_or_too_large(
    visitor: Visitor, name: str, data: bytes, status: int
) -> None:
    is_refusal(visitor.upload(name, data), status)


def bomb() -> bytes:
    """A PNG of a few KB that says it is 60,000 pixels to a side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, check = len(content), zlib.crc32(kind + content)
        return size.to_bytes(4, "big") + kind + content + check.to_bytes(4, "big")

    head = (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, content) for kind, content in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    )


def test_a_decompression_bomb_is_refused_and_what_was_open_stays(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    opens(page, photo)
    evil = tmp_path / "bomb.png"
    evil.write_bytes(bomb())
    chooses(page, evil, page.get_by_role("button", name="Open a picture").click)
    expect(page.locator("#canvas [role=alert]")).to_contain_text("64 million pixels", timeout=WAIT)
    assert page.locator("#history img").count() == 1
    paints(page)
    quick(page, 2)
    runs(page)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("passes: [{prompt: x, steps: 1000000000}]", "steps is 1000000000"),
        ("passes: [{prompt: x, edits: [no_such_edit]}]", "no edit 'no_such_edit'"),
        ("passes: [{edits: [style: {image: /etc/passwd}]}]", "is a file's name"),
        ("a: &a [x, x]\nb: &b [*a, *a]\npasses: *b", "passes"),
        ("passes: " + "[" * 5000, r"nest|deep|recurs|expected"),
    ],
)
def test_workflows_that_mean_harm_are_refused_and_the_next_one_is_opened(
    page: Page, tmp_path: Path, said: str, why: str
) -> None:
    evil = tmp_path / "w.yaml"
    evil.write_text(said, "utf-8")
    page.get_by_role("button", name=re.compile("^Workflow")).click()
    button = page.get_by_role("button", name="Open a workflow")
    chooses(page, evil, button.click)
    expect(page.locator("#status [role=alert]")).to_contain_text(re.compile(why), timeout=WAIT)
    good = tmp_path / "good.yaml"
    good.write_text("passes: [{prompt: a red circle, steps: 2}]\nsize: [64, 64]", "utf-8")
    chooses(page, good, button.click)
    status(page, "Nothing was run")
    assert field(page, "prompt").input_value() == "a red circle"
    runs(page)


def test_a_stack_that_no_page_makes_is_refused(page: Page, photo: Path) -> None:
    """What the composer sends is the visitor's to write: a billion steps, a path for a picture."""
    opens(page, photo)
    for wrong in (
        {"prompt": "x", "steps": 10**9},
        {"prompt": "x", "steps": 2, "unknown": 1},
    ):
        passes = [{"uid": "p", "enabled": True, "values": wrong, "edits": []}]
        page.evaluate(
            """(stack) => {
              const { composer } = window.diffedit;
              composer.real ??= composer.flush;
              composer.flush = async () => ({ ...(await composer.real()), stack });
            }""",
            json.dumps({"settings": {}, "passes": passes}),
        )
        starts(page)
        expect(page.locator("#status [role=alert]")).to_contain_text("Not run", timeout=WAIT)
    page.evaluate("window.diffedit.composer.flush = window.diffedit.composer.real")
    page.locator("#preset-vary").click()
    quick(page, 2)
    runs(page)


@pytest.mark.slow
def test_a_thousand_jobs_leave_the_next_visitor_his_turn(
    address: str, page: Page, photo: Path
) -> None:
    program = httpx.Client(base_url=address, timeout=60)
    body: dict[str, Any] = {"data": [None, "", "x", {}, None, 0, 1, 5.0, "", ""]}
    answers = [program.post(f"{API}/call/edit", json=body).status_code for _ in range(1000)]
    assert set(answers) <= {200, 429, 503}
    assert 1 <= answers.count(200) <= 24
    opens(page, photo)
    page.locator("#preset-vary").click()
    quick(page, 2)
    runs(page)
