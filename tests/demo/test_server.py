"""The server, attacked over HTTP: a clear status for each attack, nothing left, the next served."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from diffedit import Editor
from diffedit.cli import cli, main
from diffedit_demo import server as serving
from diffedit_demo.command import demo, read_users
from diffedit_demo.server import Options, bounds, doors, listen, listening
from diffedit_demo.sessions import Sessions

MB = 1 << 20
API = "/gradio_api"
#: Making one takes longer than most of the tests.
TRUST = ssl.create_default_context()


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def page(sessions: Sessions) -> Any:
    """A small page: functions that take files, one that streams, one that is private."""

    def measure(path: str | None) -> str:
        return "nothing" if path is None else f"{Path(path).stat().st_size} bytes"

    def count(steps: float, progress: gr.Progress = gr.Progress()) -> Iterator[str]:  # noqa: B008
        for at in range(int(steps)):
            progress((at, int(steps)))
            yield f"step {at}"
            time.sleep(0.25)

    def keep(request: gr.Request) -> str:
        return str(sessions[request.session_hash].add(png(1), ".png"))

    def draw() -> Any:
        return Image.new("RGB", (8, 8))

    with gr.Blocks() as blocks:
        file, image, canvas = gr.File(), gr.Image(type="filepath"), gr.JSON()
        steps, text, made, drawn = gr.Number(2), gr.Textbox(), gr.File(), gr.Image()
        button = gr.Button()
        one: Any = {"concurrency_id": "model", "concurrency_limit": 1}
        button.click(measure, file, text, api_name="file")
        button.click(measure, image, text, api_name="image")
        button.click(lambda value: str(value), canvas, text, api_name="canvas")
        button.click(count, steps, text, api_name="count", **one)
        button.click(keep, None, made, api_name="keep")
        button.click(draw, None, drawn, api_name="draw")
        button.click(lambda: "ran", None, text, api_name="secret", api_visibility="private")
        button.click(lambda: "now", None, text, api_name="direct", queue=False)
    return blocks


class Live:
    """The server on a free port, in a thread."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.sessions = Sessions(root, quota_bytes=4 * MB)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        told = {"max_upload": MB, "max_jobs": 12, "max_jobs_each": 4, "max_pages_each": 8}
        self.options = Options(port=self.port, **(told | changes))
        self.blocks = page(self.sessions)
        self.names = {fn.api_name: at for at, fn in self.blocks.fns.items()}
        self.app = serving.app(self.blocks, self.options, self.sessions)
        ready = threading.Event()
        self.server = listening.server(self.app, ready.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        assert ready.wait(20)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()

    def program(self, **more: Any) -> httpx.Client:
        """A client without a cookie."""
        return httpx.Client(base_url=self.options.address, timeout=20, verify=TRUST, **more)

    def browser(self) -> httpx.Client:
        """A client that has opened the page."""
        gate = self.app.state.gate
        name = gate.cookie({"server": ("", self.port)})
        return self.program(cookies={name: gate.new_cookie()})

    def left(self) -> set[Path]:
        return {path for path in self.sessions.root.rglob("*") if path.is_file()}

    def join(
        self, client: httpx.Client, name: str, *data: Any, session: str = ""
    ) -> httpx.Response:
        body = {
            "fn_index": self.names[name],
            "data": list(data),
            "session_hash": session or uuid.uuid4().hex[:12],
        }
        return client.post(f"{API}/queue/join", json=body)

    def run(self, client: httpx.Client, name: str, *data: Any, session: str = "") -> dict[str, Any]:
        """A job from its start to its end: the message that ends it."""
        session = session or uuid.uuid4().hex[:12]
        joined = self.join(client, name, *data, session=session)
        assert joined.status_code == 200, joined.text
        for message in self.listen(client, session):
            if message["msg"] == "process_completed":
                return message
        raise AssertionError("no end")

    def listen(self, client: httpx.Client, session: str) -> Iterator[dict[str, Any]]:
        with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def upload(
        self, client: httpx.Client, data: bytes, name: str = "photo.png", **more: Any
    ) -> httpx.Response:
        return client.post(f"{API}/upload", files={"files": (name, data)}, **more)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("root").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        made = Live(root)
        yield made
        made.stop()


def fields(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def refused(response: httpx.Response, status: int, words: str = "") -> None:
    """One clear line, and nothing of this machine in it."""
    assert response.status_code == status, (response.status_code, response.text)
    line = response.json()["detail"]
    assert words in line
    assert "\n" not in line
    assert "Traceback" not in line
    assert response.headers["content-security-policy"]


# -- an honest client ------------------------------------------------------------------------------


def test_a_page_uploads_runs_and_gets_its_result(live: Live) -> None:
    with live.browser() as client:
        data = png()
        answer = live.upload(client, data)
        assert answer.status_code == 200
        (path,) = answer.json()
        assert Path(path).suffix == ".png"
        assert Path(path).read_bytes() == data
        for name in ("file", "image"):
            done = live.run(client, name, fields(path))
            assert done["success"], done
            assert done["output"]["data"] == [f"{len(data)} bytes"]
        served = client.get(f"{API}/file={path}")
        assert served.content == data
        assert served.headers["content-type"] == "image/png"
        assert "sandbox" in served.headers["content-security-policy"]
        assert "private" in served.headers["cache-control"]


def test_what_a_job_made_is_served_to_its_page_alone(live: Live) -> None:
    with live.browser() as client, live.browser() as other, live.program() as program:
        for name in ("keep", "draw"):
            done = live.run(client, name)
            assert done["success"], done
            url = done["output"]["data"][0]["url"].partition(live.options.address)[2]
            assert client.get(url).status_code == 200
            for stranger in (other, program):
                refused(stranger.get(url), 403, "not a file of this session")


def test_the_page_makes_no_copies_of_what_a_session_keeps(live: Live) -> None:
    with live.browser() as client:
        before = len(live.left())
        live.run(client, "keep")
        assert len(live.left()) == before + 1


def test_programs_call_by_name(live: Live) -> None:
    with live.program() as client:
        (path,) = live.upload(client, png()).json()
        started = client.post(f"{API}/call/file", json={"data": [fields(path)]})
        assert started.status_code == 200, started.text
        event = started.json()["event_id"]
        with live.browser() as other:
            refused(other.get(f"{API}/call/file/{event}"), 403, "somebody else's")
        assert f"{len(png())} bytes" in client.get(f"{API}/call/file/{event}").text
        assert client.post(f"{API}/run/direct", json={"data": []}).json()["data"] == ["now"]


def test_gradios_own_client_works(live: Live, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "photo.png").write_bytes(png(3))
    client = Client(live.options.address, verbose=False, analytics_enabled=False)
    try:
        photo = handle_file(tmp_path / "photo.png")
        assert client.predict(photo, api_name="/file") == f"{len(png(3))} bytes"
        made = client.predict(api_name="/keep")
        assert Path(made).read_bytes() == png(1)
        assert list(client.submit(3, api_name="/count")) == ["step 0", "step 1", "step 2"]
    finally:
        client.close()


def test_events_come_as_they_are_made(live: Live) -> None:
    with live.browser() as client:
        live.join(client, "count", 5, session="stream")
        came = [(message["msg"], time.monotonic()) for message in live.listen(client, "stream")]
        steps = [when for what, when in came if what == "process_generating"]
        assert len(steps) >= 4
        assert came[-1][1] - steps[0] > 0.7  # 5 steps of 0.25 s


def test_a_closed_tab_frees_the_queue(live: Live) -> None:
    with live.browser() as client, live.browser() as next_one:
        live.join(client, "count", 100, session="closing")
        for message in live.listen(client, "closing"):
            if message["msg"] == "process_generating":
                break
        client.close()
        start = time.monotonic()
        assert live.run(next_one, "count", 1)["success"]
        assert time.monotonic() - start < 2


# -- headers, names and origins --------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/config", "/none", f"{API}/upload", f"{API}/file=/etc/passwd"]
)
def test_every_answer_has_its_headers(live: Live, path: str) -> None:
    with live.program() as client:
        headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "camera=()" in headers["permissions-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert len(headers.get_list("content-security-policy")) == 1
    assert "server" not in headers


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(live: Live) -> None:
    with live.program() as client:
        mark = client.get("/").headers["set-cookie"]
        assert "HttpOnly" in mark
        assert "SameSite=Strict" in mark
        assert f"diffedit-{live.port}=" in mark
        assert "set-cookie" not in client.get("/").headers  # it has one
        client.cookies.clear()
        client.cookies.set(f"diffedit-{live.port}", "made-up.0123")
        assert "set-cookie" in client.get("/").headers


def test_a_link_on_another_site_does_not_replace_the_cookie(live: Live) -> None:
    with live.program() as client:
        followed = client.get(
            "/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        )
        assert followed.status_code == 200
        assert "set-cookie" not in followed.headers
        # A browser without one gets it with what the page itself asks for.
        assert "set-cookie" in client.get("/theme.css").headers


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:PORT",
        "127.0.0.1:1",
        "127.0.0.1",
        "127.0.0.1.evil.example:PORT",
        "",
    ],
)
def test_foreign_names_are_refused(live: Live, host: str) -> None:
    with live.program() as client:
        answer = client.get("/config", headers={"host": host.replace("PORT", str(live.port))})
    refused(answer, 400, "name")


def test_own_names_are_not(live: Live) -> None:
    with live.program() as client:
        for host in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]"):
            answer = client.get("/config", headers={"host": f"{host}:{live.port}"})
            assert answer.status_code == 200, host


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nHost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nX: " + b"x" * 900_000,
        b"nonsense\r\n\r\n",
    ],
    ids=["no host", "no host 1.0", "two hosts", "long", "nonsense"],
)
def test_requests_that_are_none(live: Live, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.port), 5) as raw:
        raw.sendall(request_.replace(b"PORT", str(live.port).encode()))
        raw.settimeout(5)
        answer = raw.recv(4096)
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer), answer


FOREIGN = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://localhost.evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_are_refused(live: Live, headers: dict[str, str]) -> None:
    with live.browser() as client:
        before = live.left()
        refused(live.upload(client, png(), headers=headers), 403, "another site")
        body = {"fn_index": 0, "data": [None], "session_hash": "x"}
        refused(client.post(f"{API}/queue/join", json=body, headers=headers), 403, "another site")
        refused(client.get("/config", headers=headers), 403, "another site")
        assert live.left() == before


def test_the_page_itself_is_not(live: Live) -> None:
    own = {"origin": live.options.address, "sec-fetch-site": "same-origin"}
    with live.browser() as client:
        assert live.upload(client, png(), headers=own).status_code == 200
        assert client.get("/config", headers={"sec-fetch-site": "none"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/redoc",
        "/openapi.json",
        f"{API}/openapi.json",
        "/monitoring",
        "/monitoring/summary",
        "/monitoring/x",
        f"{API}/runs",
        f"{API}/deep_link?session_hash=x",
        "/gradio_api/deep_link",
        f"{API}/proxy=http://127.0.0.1:1/",
        f"{API}/file/etc/passwd",
        f"{API}/token",
        f"{API}/dev/reload",
        f"{API}/vibe-code",
        f"{API}/profiling/traces",
        f"/{API}/app_id",
        "/../etc/passwd",
    ],
)
def test_what_the_page_does_not_need_is_not_there(live: Live, path: str) -> None:
    with live.browser() as client:
        refused(client.get(path), 404)
        refused(client.post(path, json={}), 404)


def test_the_config_tells_no_paths(live: Live) -> None:
    with live.browser() as client:
        for path in ("/config", "/", f"{API}/info"):
            text = client.get(path, headers={"x-forwarded-host": "evil.example"}).text
            for secret in (
                str(live.sessions.root),
                str(Path.home()) + "/",
                str(Path.cwd()),
                "evil",
            ):
                assert secret not in text


# -- uploads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("a.html", b"<!doctype html><script>alert(1)</script>"),
        ("a.png", b"<!doctype html><script>alert(1)</script>"),
        ("a.yaml", b"\xef\xbb\xbf  <html><script>alert(1)</script>"),
        ("a.json", b"\x80\x04\x95\x00\x01."),
        ("a.pkl", b"\x80\x04\x95."),
        ("a.png", b"\x80\x04\x95."),
        ("a.zip", b"PK\x03\x04"),
        ("a.txt", b"passes: []"),
        ("a.png", b""),
        ("a.bmp", b"BMasdfghjkl"),
        ("a.exe", b"MZ"),
    ],
)
def test_only_pictures_and_workflows_are_kept(live: Live, name: str, data: bytes) -> None:
    with live.browser() as client:
        before = live.left()
        refused(live.upload(client, data, name), 415, "neither a picture")
        good_and_bad = [("files", ("a.png", png())), ("files", (name, data))]
        refused(client.post(f"{API}/upload", files=good_and_bad), 415)
        assert live.left() == before
        assert not [path for path in live.sessions.root.rglob("*") if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("name", "suffix"), [("w.yaml", ".yaml"), ("w.YML", ".yml"), ("w.json", ".json")]
)
def test_a_workflow_is_kept(live: Live, name: str, suffix: str) -> None:
    with live.browser() as client:
        (path,) = live.upload(client, b'{"passes": []}', name).json()
        assert path.endswith(suffix)
        before = live.left()
        assert live.upload(client, b"a: " + b"x" * 2 * MB, name).status_code == 413
        assert live.left() == before


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/evil.png", "..\\evil.png", "a\0.png", "." * 300]
)
def test_a_name_is_never_a_place(live: Live, name: str) -> None:
    with live.browser() as client:
        answer = live.upload(client, png(), name)
        if answer.status_code == 200:
            (path,) = map(Path, answer.json())
            assert path.parent.parent == live.sessions.root
            assert "evil" not in path.name
        else:
            assert answer.status_code in (400, 415)


def test_two_visitors_with_the_same_picture_share_nothing(live: Live) -> None:
    with live.browser() as one, live.browser() as other:
        (mine,), (theirs,) = (live.upload(client, png()).json() for client in (one, other))
        assert mine != theirs
        for client, foreign in ((one, theirs), (other, mine)):
            refused(client.get(f"{API}/file={foreign}"), 403, "not a file of this session")


def chunks(size: int, pace: float = 0) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    yield png()
    for _ in range(size // 65536):
        yield bytes(65536)
        time.sleep(pace)
    yield b"\r\n--x--\r\n"


MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


def test_what_says_that_it_is_too_big_is_not_read(live: Live) -> None:
    with live.browser() as client:
        before = live.left()
        refused(live.upload(client, png() + bytes(2 * MB)), 413, "1 MB")
        assert live.left() == before


def test_what_is_too_big_without_saying_so_is_cut_off(live: Live) -> None:
    with live.browser() as client:
        before = live.left()
        answer = client.post(f"{API}/upload", content=chunks(3 * MB), headers=MULTIPART)
        refused(answer, 413, "1 MB")
        assert live.left() == before
        # Just within, in chunks: kept.
        answer = client.post(f"{API}/upload", content=chunks(MB // 2), headers=MULTIPART)
        assert answer.status_code == 200


def test_many_files_at_once_count_together(live: Live) -> None:
    with live.browser() as client:
        before = live.left()
        many = [("files", (f"{at}.png", png() + bytes(200_000))) for at in range(8)]
        refused(client.post(f"{API}/upload", files=many), 413, "1 MB")
        other = [("other", ("a.png", png())), ("files", ("b.png", png()))]
        assert len(client.post(f"{API}/upload", files=other).json()) == 1
        assert len(live.left()) == len(before) + 1


def test_an_upload_that_breaks_off_leaves_nothing(live: Live) -> None:
    before = live.left()
    with socket.create_connection(("127.0.0.1", live.port), 5) as raw:
        head = f"POST {API}/upload HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\n"
        raw.sendall(f"{head}Content-Type: {MULTIPART['content-type']}\r\n".encode())
        raw.sendall(b"Content-Length: 500000\r\n\r\n")
        raw.sendall(b"".join(chunks(65536 * 3))[:150_000])
        time.sleep(0.3)
        assert len(live.left()) > len(before)
    until = time.monotonic() + 5
    while live.left() != before and time.monotonic() < until:
        time.sleep(0.05)
    assert live.left() == before


def test_a_visitor_has_a_quota(live: Live) -> None:
    with live.browser() as client:
        first = Path(live.upload(client, png() + bytes(900_000)).json()[0])
        for _ in range(5):
            last = Path(live.upload(client, png() + bytes(900_000)).json()[0])
        assert last.exists()
        assert not first.exists()
        used = sum(path.stat().st_size for path in last.parent.iterdir())
        assert used <= live.sessions.quota_bytes


def test_a_burst_of_uploads_is_slowed_down(live: Live) -> None:
    with live.browser() as client, live.browser() as other:
        answers = [live.upload(client, png()) for _ in range(40)]
        late = [answer for answer in answers if answer.status_code == 429]
        assert 5 <= len(late) <= 12
        refused(late[0], 429, "wait")
        assert int(late[0].headers["retry-after"]) >= 1
        assert live.upload(other, png()).status_code == 200


# -- jobs ------------------------------------------------------------------------------------------

NOT_MINE = [
    "/etc/passwd",
    "../../../../etc/passwd",
    "file:" + "///etc/passwd",
    "http://127.0.0.1:1/x.png",
    "https://example.com/x.png",
    "ROOT",
    "OTHER",
    "SERVED",
]


@pytest.mark.parametrize("path", NOT_MINE)
def test_no_endpoint_takes_a_file_that_is_not_the_callers(live: Live, path: str) -> None:
    with live.browser() as client, live.browser() as other:
        (theirs,) = live.upload(other, png()).json()
        path = {
            "ROOT": str(live.sessions.root / ".." / "root" / "x"),
            "OTHER": theirs,
            "SERVED": f"{live.options.address}{API}/file={theirs}",
        }.get(path, path)
        payloads = (fields(path), {"path": path}, {"layers": [{"mask": fields(path)}]})
        before = live.left()
        for payload in payloads:
            for name in ("file", "image", "canvas"):
                refused(live.join(client, name, payload), 403, "not a file of this session")
                called = client.post(f"{API}/call/{name}", json={"data": [payload]})
                refused(called, 403, "not a file of this session")
            v2 = client.post(f"{API}/call/v2/file", json={"path": payload})
            refused(v2, 403, "not a file of this session")
            for run in ("run/direct", "api/direct"):
                body: dict[str, Any] = {"data": [], "event_data": payload}
                refused(client.post(f"{API}/{run}", json=body), 403)
            served = {"session_hash": "s", "component_id": 1, "fn_name": "x", "data": payload}
            refused(client.post(f"{API}/component_server", json=served), 403)
        assert client.get(f"{API}/file={path}").status_code in (403, 404)
        assert live.left() == before


def test_gradio_checks_paths_too(live: Live) -> None:
    """Mounted, it would not, unless it is told that it runs."""
    assert live.blocks.has_launched
    from gradio import processing_utils
    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError

    token = LocalContext.blocks.set(live.blocks)
    try:
        with pytest.raises(InvalidPathError):
            processing_utils._check_allowed("/etc/passwd", check_in_upload_folder=True)
    finally:
        LocalContext.blocks.reset(token)


def test_what_was_checked_is_what_gradio_gets(live: Live) -> None:
    """Of two keys of one name, a parser may take the first or the last."""
    with live.browser() as client:
        (mine,) = live.upload(client, png()).json()
        twice = f'{{"path": "/etc/passwd", "path": {json.dumps(mine)}}}'
        body = f'{{"session_hash": "twice", "fn_index": {live.names["canvas"]}, "data": [{twice}]}}'
        headers = {"content-type": "application/json"}
        assert client.post(f"{API}/queue/join", content=body, headers=headers).status_code == 200
        done = [one for one in live.listen(client, "twice") if one["msg"] == "process_completed"]
        assert done[0]["output"]["data"] == [str({"path": mine})]


def test_private_functions_are_the_pages(live: Live) -> None:
    with live.program() as program, live.browser() as client:
        refused(live.join(program, "secret"), 403, "page's own")
        for path in ("call/secret", "call/v2/secret", "run/secret", "api/secret"):
            for who in (program, client):
                refused(who.post(f"{API}/{path}", json={"data": []}), 404, "no endpoint")
        by_number = {"data": [], "fn_index": live.names["secret"]}
        refused(program.post(f"{API}/run/file", json=by_number), 403, "page's own")
        assert live.run(client, "secret")["output"]["data"] == ["ran"]


@pytest.mark.parametrize("number", [-1, 999, None, "0", 1.5, True, [], {}])
def test_functions_that_are_not_there(live: Live, number: object) -> None:
    with live.browser() as client:
        body = {"fn_index": number, "data": [], "session_hash": uuid.uuid4().hex}
        refused(client.post(f"{API}/queue/join", json=body), 404, "no function")
        refused(client.post(f"{API}/call/nothing", json={"data": []}), 404, "no endpoint")


def test_queued_functions_are_not_run_past_the_queue(live: Live) -> None:
    with live.browser() as client:
        answer = client.post(f"{API}/run/count", json={"data": [1]})
        assert answer.status_code == 404
        assert "queue" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{", b'{"data": [NaN]}', b"[" * 100_000, b"\xff\xfe", b'"x"'],
    ids=lambda body: str(body[:8]),
)
def test_bodies_that_are_no_request(live: Live, body: bytes) -> None:
    with live.browser() as client:
        headers = {"content-type": "application/json"}
        for path in ("queue/join", "call/file", "cancel", "component_server"):
            answer = client.post(f"{API}/{path}", content=body, headers=headers)
            assert 400 <= answer.status_code < 500, (path, answer.text)
        refused(client.post(f"{API}/queue/join", content=b"{}"), 415, "JSON")
        form = client.post(f"{API}/component_server", files={"files": ("a.png", png())})
        refused(form, 415, "JSON")


def test_json_is_bounded(live: Live) -> None:
    with live.browser() as client:
        refused(live.join(client, "canvas", "x" * MB), 413, "1 MB")

        def endless() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * 65536

        headers = {"content-type": "application/json"}
        answer = client.post(f"{API}/queue/join", content=endless(), headers=headers)
        refused(answer, 413, "1 MB")
        refused(client.post("/login", content=endless(), headers=headers), 413, "1 MB")


def test_a_session_is_its_first_users(live: Live) -> None:
    with live.browser() as client, live.browser() as other, live.program() as program:
        joined = live.join(client, "count", 8, session="mine").json()
        for stranger in (other, program):
            refused(live.join(stranger, "file", None, session="mine"), 403, "somebody else's")
            refused(stranger.get(f"{API}/queue/data?session_hash=mine"), 403, "somebody else's")
            refused(stranger.get(f"{API}/heartbeat/mine"), 403, "somebody else's")
            for session in ("mine", "theirs"):
                body = {"session_hash": session, "fn_index": 0, "event_id": joined["event_id"]}
                refused(stranger.post(f"{API}/cancel", json=body), 403, "somebody else's")
        body = {"session_hash": "mine", "fn_index": 0, "event_id": joined["event_id"]}
        assert client.post(f"{API}/cancel", json=body).status_code == 200
    for name in ("uploads:x", "../x", "", "x" * 200, 7):
        with live.browser() as client:
            odd = {"session_hash": name, "fn_index": 0, "data": [None]}
            refused(client.post(f"{API}/queue/join", json=odd), 400, "session")


@pytest.mark.parametrize("event", [[], {}, 7, None])
def test_a_job_that_is_no_name_is_not_cancelled(live: Live, event: object) -> None:
    with live.browser() as client:
        body = {"session_hash": uuid.uuid4().hex, "fn_index": 0, "event_id": event}
        assert client.post(f"{API}/cancel", json=body).status_code == 422


def drain(live: Live) -> None:
    queue = live.blocks._queue
    for waiting in queue.event_queue_per_concurrency_id.values():
        for event in list(waiting.queue):
            asyncio.run(queue.remove_from_queue(event._id))
    until = time.monotonic() + 10
    while any(queue.active_jobs) and time.monotonic() < until:
        time.sleep(0.05)


def test_a_visitor_queues_so_many_and_all_together_so_many(live: Live) -> None:
    clients = [live.browser() for _ in range(5)]
    try:
        statuses = [
            [live.join(client, "count", 3, session=f"q{at}") for _ in range(6)]
            for at, client in enumerate(clients)
        ]
        own = [answer for answers in statuses[:2] for answer in answers]
        late = [answer for answer in own if answer.status_code != 200]
        assert {answer.status_code for answer in late} == {429}
        refused(late[0], 429, "of your jobs wait")
        full = [answer for answer in statuses[-1] if answer.status_code == 503]
        assert full
        refused(full[0], 503, "jobs wait already")
        assert int(full[0].headers["retry-after"]) >= 1
        assert len(live.blocks._queue) <= live.options.max_jobs
        # Another line is not full: pictures are opened and kept while others wait for the model.
        with live.browser() as honest:
            assert live.run(honest, "file", None)["success"]
    finally:
        drain(live)
        for client in clients:
            client.close()


def test_gradios_own_answer_to_a_full_queue_is_a_status_too(live: Live) -> None:
    """It is what a job gets that slips in between the check and the queue."""
    with live.browser() as client:
        live.blocks._queue.max_size = 0
        try:
            answer = live.join(client, "file", None)
        finally:
            live.blocks._queue.max_size = None
        assert answer.status_code == 503
        assert "full" in str(answer.json()["detail"])


def test_a_thousand_jobs_do_no_harm(live: Live) -> None:
    queue, states = live.blocks._queue, live.blocks.state_holder
    before = live.left()
    with live.browser() as attacker, live.program() as program, live.browser() as honest:
        seen: dict[int, int] = {}
        for at in range(1000):
            client = attacker if at % 2 else program
            answer = live.join(client, "count", 2)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                assert int(answer.headers["retry-after"]) >= 1
            assert len(queue) <= 2 * live.options.max_jobs_each
        assert set(seen) <= {200, 429}, seen
        assert seen[429] > 900
        assert len(live.sessions) <= 200
        assert len(states.session_data) <= states.capacity
        assert len(queue.pending_event_ids_session) <= 200
        start = time.monotonic()
        assert live.run(honest, "file", None)["output"]["data"] == ["nothing"]
        assert time.monotonic() - start < 2
        drain(live)
        assert live.run(honest, "count", 1)["success"]
    assert live.left() == before


def test_what_nobody_listened_to_is_forgotten(live: Live) -> None:
    queue = live.blocks._queue
    with live.browser() as client:
        assert live.join(client, "file", None, session="deaf").status_code == 200
        until = time.monotonic() + 5
        while any(queue.active_jobs) and time.monotonic() < until:
            time.sleep(0.05)
        assert "deaf" in queue.pending_event_ids_session
        live.app.state.gate.forget(["deaf"])
        assert "deaf" not in queue.pending_event_ids_session
        assert "deaf" not in queue.pending_messages_per_session
        assert "deaf" not in live.sessions


# -- slow clients ----------------------------------------------------------------------------------


def test_slow_clients_are_hung_up_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(bounds, "SILENCE_SECONDS", 0.5)
    head = f"POST {API}/queue/join HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\n".encode()
    whole = head + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    for sent, answer in ((b"", b""), (b"GET / HT", b""), (head, b""), (whole, b"HTTP/1.1 408")):
        crowd = [socket.create_connection(("127.0.0.1", live.port), 5) for _ in range(8)]
        try:
            for one in crowd:
                one.sendall(sent)
            with live.browser() as honest:  # served in the meantime
                assert live.run(honest, "file", None)["success"]
            for one in crowd:
                one.settimeout(4)
                got = b""
                while part := one.recv(4096):
                    got += part
                assert got.startswith(answer)
                assert bool(got) == bool(answer)
        finally:
            for one in crowd:
                one.close()
    until = time.monotonic() + 5
    while len(live.server.server_state.connections) > 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(live.server.server_state.connections) <= 2


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_wait_for_no_acknowledgement(host: str) -> None:
    """Without it each takes 40 ms more."""
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        taken, _ = listener.accept()
        with taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_an_open_page_was_given_stays_however_old_it_is(live: Live) -> None:
    gate = live.app.state.gate
    with live.browser() as client:
        made = live.run(client, "draw", session="rests")["output"]["data"][0]
        file = Path(made["path"])
        old = time.time() - 2 * live.sessions.keep_seconds
        os.utime(file, (old, old))
        with client.stream("GET", f"{API}/heartbeat/rests") as beat:
            assert beat.status_code == 200
            gate._sweep()
            assert client.get(f"{API}/file={file}").status_code == 200
        until = time.monotonic() + 10
        while "rests" in gate._open and time.monotonic() < until:
            time.sleep(0.05)
        gate._sweep()
        assert not file.exists()


def test_buckets_fill_again_and_forget() -> None:
    buckets = bounds.Buckets(burst=2, per_second=0.5, most=3)
    assert [buckets.take("a", now=0) for _ in range(3)] == [0, 0, 2]
    assert buckets.take("a", now=1) == 1
    assert buckets.take("a", now=2.5) == 0
    for name in "bcd":
        buckets.take(name, now=3)
    assert len(buckets._left) == 3
    assert "a" not in buckets._left


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.evil", False),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert serving.is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("options", "local", "host", "known"),
    [
        (Options("0.0.0.0"), "192.168.1.2", "192.168.1.2:7860", True),
        (Options("0.0.0.0"), "192.168.1.2", "192.168.1.3:7860", False),
        (Options("0.0.0.0"), "192.168.1.2", "box.example:7860", False),
        (Options("0.0.0.0", allow_hosts=("box.example",)), "10.0.0.1", "Box.Example:7860", True),
        (Options("0.0.0.0", allow_hosts=("box.example",)), "10.0.0.1", "box.example", True),
        (Options("0.0.0.0", allow_hosts=("box.example",)), "10.0.0.1", "box.example:81", False),
        (Options("0.0.0.0", allow_hosts=("box.example:81",)), "10.0.0.1", "box.example:81", True),
        (Options("box.local"), "10.0.0.1", "box.local:7860", True),
        (Options("box.local"), "10.0.0.1", "localhost:7860", False),
        (Options("::1"), "::1", "[::1]:7860", True),
        (Options("127.0.0.1", port=80), "127.0.0.1", "localhost", True),
    ],
)
def test_the_names_of_a_wide_bind(options: Options, local: str, host: str, known: bool) -> None:
    class Gate:
        pass

    gate: Any = Gate()
    gate.options = options
    hosts = doors.Hosts(None, gate)  # type: ignore[arg-type]
    assert hosts._known(host, {"server": (local, 7860)}) is known


# -- log-in ----------------------------------------------------------------------------------------


def test_with_users_nothing_is_open_before_the_log_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path.resolve()))
    live = Live(tmp_path, users=(("me", "right"),))
    try:
        with live.browser() as client:
            before = live.left()
            for path in (
                "/config",
                f"{API}/info",
                f"{API}/queue/status",
                f"{API}/file=/etc/passwd",
            ):
                assert client.get(path).status_code in (401, 403), path
            assert live.upload(client, png()).status_code == 401
            assert live.join(client, "file", None).status_code == 401
            assert client.post(f"{API}/call/file", json={"data": [None]}).status_code == 401
            assert client.post(f"{API}/run/direct", json={"data": []}).status_code == 401
            assert live.left() == before
            wrong = [
                client.post("/login", data={"username": "me", "password": str(at)})
                for at in range(15)
            ]
            assert {answer.status_code for answer in wrong[:9]} == {400}
            refused(wrong[-1], 429, "wait")
        with live.program() as client:
            opened = []
            for _ in range(75):
                opened.append(client.get("/"))
                client.cookies.clear()
            refused(opened[-1], 429, "new pages")
            assert {answer.status_code for answer in opened[:60]} == {200}
    finally:
        live.stop()
    live = Live(tmp_path, users=(("me", "right"),))
    try:
        with live.browser() as client:
            right = client.post("/login", data={"username": "me", "password": "right"})
            assert right.status_code == 200
            assert live.run(client, "file", None)["success"]
    finally:
        live.stop()


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is there without the other plugins, which take long to import."""
    monkeypatch.setitem(cli.commands, "demo", demo)


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    file.write_text("me:right:er\n\nyou: x \n", encoding="utf-8")
    file.chmod(0o600)
    return file


def says(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says when it refuses: one line, exit code 2, nothing else."""
    assert main(["demo", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_help_comes_without_gradio() -> None:
    code = (
        "import sys; from diffedit_demo.command import demo;"
        "demo.main(['--help'], standalone_mode=False);"
        "assert not {'gradio', 'fastapi', 'uvicorn', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("host", "port", "model", "auth", "allow-host", "mcp", "max-upload", "open"):
        assert f"--{option} " in done.stdout


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_wide_bind_wants_a_password(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert "add --auth FILE" in says(capsys, "--host", host)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = says(capsys, "--port", port)
    assert f"port {port}" in line
    assert "in use" in line


def test_a_host_that_is_not_there(capsys: pytest.CaptureFixture[str], users: Path) -> None:
    assert "no address" in says(capsys, "--host", "nowhere.invalid", "--auth", users)
    line = says(capsys, "--host", "192.0.2.1", "--port", 0, "--auth", users)
    assert "cannot serve at 192.0.2.1" in line


def test_users_are_read(users: Path) -> None:
    assert read_users(users) == (("me", "right:er"), ("you", " x "))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_passwords_that_others_can_read(
    capsys: pytest.CaptureFixture[str], users: Path, mode: int
) -> None:
    users.chmod(mode)
    line = says(capsys, "--auth", users)
    assert "others can read it" in line
    assert "chmod 600" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nobody in it"),
        ("me:x\nhunter2", "line 2: should be"),
        (":hunter2", "line 1: should be"),
        ("me:", "line 1: should be"),
        ("me:hunter2\nme:b", "line 2: 'me' stands twice"),
    ],
)
def test_users_that_are_none(
    capsys: pytest.CaptureFixture[str], users: Path, text: str, words: str
) -> None:
    users.write_text(text)
    line = says(capsys, "--auth", users)
    assert words in line
    assert "hunter2" not in line
    assert "No such file" in says(capsys, "--auth", users.with_name("none"))


PAGE = """
import sys, types
import diffedit.cli
# What takes long to import, and is not asked for here.
diffedit.cli.quiet_libraries = lambda: None
page = types.ModuleType("diffedit_demo.page")
page.look = lambda: {"css": "p {}"}
def build(sources, sessions, options):
    import gradio as gr
    with gr.Blocks() as blocks:
        said = options.dtype, options.max_memory, options.low_memory
        gr.Markdown(f"models: {list(sources)}, {said}")
    return blocks
page.build = build
sys.modules["diffedit_demo.page"] = page
import diffedit_demo
diffedit_demo.page = page
diffedit_demo.register_commands(diffedit.cli.cli)
sys.exit(diffedit.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [(signal.SIGINT, 130, "diffedit: cancelled\n"), (signal.SIGTERM, 143, "")],
)
def test_the_command_serves_until_it_is_stopped(
    tmp_path: Path, stop: signal.Signals, code: int, said: str
) -> None:
    options = ["--port", "0", "--model", "one", "--model", "two", "--dtype", "float16"]
    options += ["--max-memory", "2GB", "--low-memory"]
    process = subprocess.Popen(
        [sys.executable, "-c", PAGE, "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        # What runs the tests may have been started in the background, where Ctrl-C counts nothing.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", line), line or process.communicate()[1]
        with httpx.Client(base_url=line, verify=TRUST) as client:
            components = client.get("/config").json()["components"]
            shown = [one["props"].get("value") for one in components]
            assert "models: ['one', 'two', 'tiny'], ('float16', '2GB', True)" in shown
            assert "p {}" in client.get("/").text
            answer = client.post(f"{API}/upload", files={"files": ("a.png", png())})
            assert Path(answer.json()[0]).is_relative_to(tmp_path)
            with client.stream("GET", f"{API}/heartbeat/open") as beat:  # a page is open
                assert beat.status_code == 200
                start = time.monotonic()
                process.send_signal(stop)
                out, err = process.communicate(timeout=15)
        assert (process.returncode, out, err) == (code, "", said)
        assert time.monotonic() - start < 6
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
    finally:
        process.kill()
        process.communicate()


def test_models_are_loaded_as_the_command_line_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffedit_demo import page

    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(Editor, "load", lambda source, **said: loaded.append(said))
    monkeypatch.setattr(page, "page", lambda workspace: workspace)
    said: dict[str, Any] = {"device": "cpu", "dtype": "float16"}
    said |= {"max_memory": "2GB", "low_memory": True}
    workspace: Any = page.build(("tiny",), Sessions(tmp_path), Options(**said))
    workspace.models._load("tiny")
    assert loaded == [said]
