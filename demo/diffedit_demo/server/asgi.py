"""Requests and answers in plain ASGI: what is read of the one, and how the other is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Where Gradio's own addresses begin.
API = "/gradio_api"
UPLOAD = f"{API}/upload"
#: A whole body must be in by then; a photo of 50 MB comes in at 170 KB/s.
BODY_SECONDS = 300.0
#: How long the rest of a refused request is read and thrown away.
DRAIN_SECONDS = 5.0


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value, None without one or with several."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None


def address(scope: Scope) -> str:
    """The client's address, without its port."""
    return (scope.get("client") or ("?", 0))[0]


class Request:
    """The `receive` of a request, which knows whether all of it has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._over = False

    async def __call__(self) -> Message:
        """The next of it."""
        message = await self._receive()
        self._over = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def drain(self, most: int) -> None:
        """Read a little of what still comes: who is hung up on while sending sees no answer.

        Args:
            most: bytes after which it is enough.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._over and most > 0:
                    most -= len((await self()).get("body", b""))


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what really comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Refused(Exception):
    """A request that is not served: a status, and one line for whoever sent it."""

    def __init__(self, status: int, line: str, wait: float = 0) -> None:
        super().__init__(line)
        self.status = status
        self.wait = wait

    async def answer(self, send: Send) -> None:
        """Send it, as JSON of the form that Gradio's clients show."""
        body = json.dumps({"detail": str(self), "error": str(self)}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            # What is still to come of the request is not read.
            (b"connection", b"close"),
        ]
        if self.wait:
            headers.append((b"retry-after", str(math.ceil(self.wait)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Answer:
    """Gathers an answer, for the few that must be seen whole; all of them are short."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def __call__(self, message: Message) -> None:
        """Take the next of it, in the place of `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = list(message.get("headers", ()))
        else:
            self.body += message.get("body", b"")

    async def send(self, send: Send) -> None:
        """Pass it on."""
        kept = [one for one in self.headers if one[0].lower() != b"content-length"]
        headers = [*kept, (b"content-length", str(len(self.body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})
