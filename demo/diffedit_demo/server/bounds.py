"""Who asks, how often, and how much comes with it: visitors, their rates, and bodies."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict

from diffedit_demo.server.asgi import (
    BODY_SECONDS,
    UPLOAD,
    App,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    address,
    header,
    replayed,
)
from diffedit_demo.server.gate import Gate
from diffedit_demo.server.middleware import Middleware

JSON_BYTES = 1 << 20
#: Something of a body must come as often as this.
SILENCE_SECONDS = 20.0


class Buckets:
    """Token buckets, the least recently used of which are forgotten."""

    def __init__(self, burst: float, per_second: float, most: int = 4096) -> None:
        self.burst = burst
        self.per_second = per_second
        self.most = most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now: float | None = None) -> float:
        """Take one. 0 if there was one, else the seconds until there is."""
        now = time.monotonic() if now is None else now
        left, then = self._left.pop(key, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.per_second)
        wait = 0.0 if left >= 1 else (1 - left) / self.per_second
        self._left[key] = (left if wait else left - 1, now)
        while len(self._left) > self.most:
            self._left.popitem(last=False)
        return wait


class Visitors(Middleware):
    """Knows who asks: gives every browser that opens the page a cookie, and finds it again.

    The hash that Gradio calls a session is chosen by the client, and shown in addresses.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        super().__init__(app, gate)
        self._new = Buckets(burst=60, per_second=1)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor = scope["diffedit.visitor"] = self.gate.visitor(scope)
        # The cookie is not sent along when a link on another site is followed: it may be there.
        # The page's style sheet is asked for by the page itself, and tells.
        linked = header(scope, b"sec-fetch-site") in ("cross-site", "same-site")
        # `gradio_client` takes the cookies that come with /config; agents' calls all come from the
        # one client inside, which has to see what agents without a cookie have uploaded.
        agents = header(scope, b"x-gradio-user") == "mcp"
        opens = scope["method"] == "GET" and (
            (scope["path"] == "/" and not linked)
            or scope["path"] == "/theme.css"
            or (scope["path"].rstrip("/") == "/config" and not agents)
        )
        if visitor.page or not opens:
            await self.app(scope, receive, send)
            return
        if wait := self._new.take(address(scope)):
            raise Refused(429, "too many new pages, wait a little", wait)
        cookie = f"{self.gate.cookie(scope)}={self.gate.new_cookie()}"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                mark = (b"set-cookie", f"{cookie}; HttpOnly; SameSite=Strict; Path=/".encode())
                headers = [*message.get("headers", ()), mark, (b"cache-control", b"no-store")]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sending)


class Rates(Middleware):
    """Slows down whoever asks for much at once, so that the others are still served.

    A visitor with a cookie has a bucket of its own: programs on the same machine that have none
    share one, and do not use up a person's.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        super().__init__(app, gate)
        # A form sends an event at every key that is pressed.
        self._jobs = Buckets(burst=120, per_second=20)
        self._uploads = Buckets(burst=30, per_second=1)
        self._logins = Buckets(burst=10, per_second=0.2)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            path, key = scope["path"].rstrip("/"), scope["diffedit.visitor"].key
            if path == UPLOAD:
                wait = self._uploads.take(key)
            elif path == "/login":  # passwords are tried here, with a new cookie each time
                wait = self._logins.take(address(scope))
            else:
                wait = self._jobs.take(key)
            if wait:
                raise Refused(429, f"too many requests, wait {math.ceil(wait)} s", wait)
        await self.app(scope, receive, send)


class Bodies(Middleware):
    """Bounds what a request brings: bytes, counted as they come, and the time they take.

    Gradio bounds each file by itself but not their number, and JSON not at all.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/") == UPLOAD
        options = self.gate.options
        limit = options.max_form if upload else JSON_BYTES
        line = f"more than {(options.max_upload if upload else JSON_BYTES) >> 20} MB at once"
        declared = header(scope, b"content-length")
        if declared is not None and (not declared.isdecimal() or int(declared) > limit):
            raise Refused(413, line)
        read = _Bounded(receive, limit, line)
        if upload:
            await self.app(scope, read, send)
            return
        body, more = b"", True
        while more:
            message = await read()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await self.app(scope, replayed(body, receive), send)


class _Bounded:
    """A `receive` that counts."""

    def __init__(self, receive: Receive, limit: int, line: str) -> None:
        self._receive = receive
        self._left = limit
        self._line = line
        self._until = time.monotonic() + BODY_SECONDS
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client has gone
            return await self._receive()
        wait = min(SILENCE_SECONDS, self._until - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(wait, 0.01))
        except TimeoutError:
            raise Refused(408, "the request came too slowly") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                raise Refused(413, self._line)
        return message
