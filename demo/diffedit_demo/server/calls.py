"""Jobs and files: each for its own session alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from diffedit_demo.server.asgi import (
    API,
    UPLOAD,
    Answer,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    header,
    replayed,
)
from diffedit_demo.server.gate import Gate, Visitor
from diffedit_demo.server.middleware import Middleware
from diffedit_demo.sessions import ForeignPath, check_paths


class Calls(Middleware):
    """Checks every job before Gradio sees it: its session, its function, its files, its place.

    What Gradio calls private it only leaves out of the documentation: whoever sends the number of
    a function starts it.
    """

    _result = re.compile(rf"{API}/call/(v2/)?[\w.-]+/(?P<event>[\w-]+)")
    _beat = re.compile(rf"{API}/heartbeat/(?P<session>[\w-]+)")

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(f"{API}/") or scope["path"].rstrip("/") == UPLOAD:
            await self.app(scope, receive, send)
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await self._read(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor, path = scope["diffedit.visitor"], scope["path"].rstrip("/")
        if found := self._beat.fullmatch(path):
            self.gate.claim(visitor, found["session"])
            with self.gate.opened(found["session"]):
                await self.app(scope, receive, send)
            return
        asked: str | None = None
        if path == f"{API}/queue/data":
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=16)
            asked = query.get("session_hash", [""])[-1]
        elif found := self._result.fullmatch(path):
            asked = found["event"]
        if asked is not None:
            if self.gate.sessions.owner_of(asked) not in (None, visitor.key):
                raise Refused(403, "this session is somebody else's")
            send = self._listening(visitor, send)
        await self.app(scope, receive, send)

    def _listening(self, visitor: Visitor, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body":
                self.gate.tell(visitor, message.get("body", b""))
            await send(message)

        return sending

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor, path = scope["diffedit.visitor"], scope["path"].rstrip("/")
        data = _json(scope, (await receive()).get("body", b""))
        try:
            data = check_paths(_Theirs(self.gate, visitor), data, self.gate.sessions.root)
        except ForeignPath as error:
            raise Refused(403, str(error)) from None
        way, _, name = path.removeprefix(f"{API}/").rpartition("/")
        if not path.startswith(f"{API}/mcp"):
            if not isinstance(data, dict):
                raise Refused(400, "a request is a JSON object")
            self._check(visitor, way, name, data)
        # What was checked is what is passed on, not what another parser might make of the bytes.
        body = json.dumps(data).encode()
        scope["headers"] = [
            *(one for one in scope["headers"] if one[0] not in _FRAMING),
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        receive = replayed(body, receive)
        if way not in ("call", "call/v2"):
            await self.app(scope, receive, self._listening(visitor, send))
            return
        # The job's number is its session, and the caller's alone.
        answer = Answer()
        await self.app(scope, receive, answer)
        if answer.status == 200 and data.get("session_hash") is None:
            self.gate.claim(visitor, json.loads(answer.body)["event_id"])
        await answer.send(send)

    def _check(self, visitor: Visitor, way: str, name: str, data: dict[str, Any]) -> None:
        session = data.get("session_hash")
        match way, name:
            case "call/v2", _:  # the arguments by name, and nothing else
                self._check_place(visitor, self._named(name))
                return
            case "call", _:
                if session is not None:
                    self.gate.claim(visitor, session)
                self._check_place(visitor, self._named(name))
            case (("run" | "api"), _):
                if session is not None:
                    self.gate.claim(visitor, session)
                if data.get("fn_index") is not None:
                    self._numbered(visitor, data)
                else:
                    self._named(name)
            case "queue", "join":
                self.gate.claim(visitor, session)
                self._check_place(visitor, self._numbered(visitor, data))
            case "", "cancel":
                self.gate.claim(visitor, session)
                self._check_cancel(data)
            case "", "component_server":
                self.gate.claim(visitor, session)
        # Never the client's to say: results of a batch, and somebody's token.
        for key in ("batched", "oauth_token", "simple_format"):
            data.pop(key, None)

    def _named(self, name: str) -> Any:
        function = self.gate.named(name)
        if function is None:
            raise Refused(404, "there is no endpoint of that name")
        return function

    def _numbered(self, visitor: Visitor, data: dict[str, Any]) -> Any:
        function = self.gate.function(data.get("session_hash"), data.get("fn_index"))
        if function is None:
            raise Refused(404, "there is no function of that number")
        if function.api_visibility == "private" and not visitor.page:
            raise Refused(403, "this function is the page's own")
        return function

    def _check_cancel(self, data: dict[str, Any]) -> None:
        event = self.gate.blocks._queue.event_ids_to_events.get(str(data.get("event_id")))
        if event is not None and event.session_hash != data["session_hash"]:
            raise Refused(403, "this job is somebody else's")

    def _check_place(self, visitor: Visitor, function: Any) -> None:
        options = self.gate.options
        pending = sum(map(self.gate.pending, self.gate.sessions.of(visitor.key)))
        if self.gate.waiting(visitor) >= options.max_jobs_each or pending >= 256:
            raise Refused(429, f"{options.max_jobs_each} of your jobs wait already", wait=5)
        if self.gate.line(function) >= options.max_jobs:
            # Gradio's own answer, with when to come back.
            raise Refused(503, f"{options.max_jobs} jobs wait already, try again soon", wait=10)


_FRAMING = {b"content-length", b"content-type", b"transfer-encoding", b"content-encoding"}


@dataclass(frozen=True)
class _Theirs:
    gate: Gate
    visitor: Visitor

    def owns(self, path: str | Path) -> bool:
        return self.gate.owns(self.visitor, path)


def _json(scope: Scope, body: bytes) -> Any:
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "a request is JSON; files go to /upload")
    try:
        return json.loads(body or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "not JSON") from None


def _no_number(name: str) -> None:
    raise ValueError(name)


class Files(Middleware):
    """Gives a session's files to that session.

    An address that cannot be guessed ends up in a history, a log or a screenshot.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, found, path = scope["path"].partition(f"{API}/file=")
        if found and not self.gate.owns(scope["diffedit.visitor"], path):
            raise Refused(403, "not a file of this session")
        await self.app(scope, receive, send)
