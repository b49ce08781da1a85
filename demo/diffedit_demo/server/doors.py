"""The head of a request: under which name, from whose page, and for what the server is asked.

No body is read here, and it does not matter who asks.
"""

from __future__ import annotations

import re
from typing import ClassVar
from urllib.parse import urlsplit

from diffedit_demo.server.asgi import (
    API,
    Message,
    Receive,
    Refused,
    Request,
    Scope,
    Send,
    header,
)
from diffedit_demo.server.middleware import Middleware
from diffedit_demo.server.options import is_loopback

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio starts from inline scripts
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"permissions-policy",
        b"camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    ),
)


class Headers(Middleware):
    """Says to the browser what the page may do, on whatever is answered.

    Without it a picture could be read as a script, the page be framed and clicked through, and
    anything that got into it could talk to the world.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_file = scope["path"].startswith(f"{API}/file=")
        # A file opened by itself is not a page, whatever is in it.
        policy = "default-src 'none'; frame-ancestors 'none'; sandbox" if is_file else POLICY
        ours = [*HEADERS, (b"content-security-policy", policy.encode())]
        if is_file:
            ours.append((b"cache-control", b"private, no-cache"))
        names = {name for name, _ in ours}
        # Gradio builds addresses from these, and keeps some of them for everybody.
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if not name.startswith((b"x-forwarded-", b"x-gradio-server"))
        ]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [one for one in message.get("headers", ()) if one[0].lower() not in names]
                message = {**message, "headers": [*kept, *ours]}
            await send(message)

        request = scope["diffedit.request"] = Request(receive)
        await self.app(scope, request, sending)


class Hosts(Middleware):
    """Lets only this server's own names in.

    A page of another site can have its name resolve to 127.0.0.1 after it was loaded; its requests
    then count as same-origin, and only the name tells.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._known(header(scope, b"host"), scope):
            raise Refused(400, "this server does not go by that name (see --allow-host)")
        await self.app(scope, receive, send)

    def _known(self, host: str | None, scope: Scope) -> bool:
        options = self.gate.options
        if host is None:
            return False
        host = host.lower()
        name, port = host, ""
        if ":" in host.rpartition("]")[2]:  # those of an IPv6 address stand in brackets
            name, _, port = host.rpartition(":")
        name = name.strip("[]")
        allowed = {one.lower() for one in options.allow_hosts}
        if host in allowed or (name in allowed and port in ("", str(options.port))):
            return True
        own = {options.host.lower().strip("[]")} - {"0.0.0.0", "::"}
        if is_loopback(options.host) or not own:
            own |= {"localhost", "127.0.0.1", "::1"}
        # Nobody can make a browser send a bare address under another name.
        own.add(str((scope.get("server") or ("", 0))[0]))
        return name in own and (port or "80") == str(options.port)


class Origins(Middleware):
    """Refuses what pages of other sites ask for.

    A browser sends their forms and multipart uploads without asking first, and they fill the disk
    or start jobs although the answer stays hidden.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._foreign(scope):
            raise Refused(403, "asked for by the page of another site")
        await self.app(scope, receive, send)

    def _foreign(self, scope: Scope) -> bool:
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        site = header(scope, b"sec-fetch-site")
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        if origins:
            # On a read as well: Gradio would allow the other site to see the answer.
            if len(origins) > 1 or not self._own(origins[0].decode("latin-1"), scope):
                return True
        elif not reads and site not in (None, "same-origin", "none"):
            return True
        if reads and site in ("cross-site", "same-site"):
            # A link to the page is fine, a picture or a script of ours in another page is not.
            opened = header(scope, b"sec-fetch-mode") == "navigate"
            return not opened or header(scope, b"sec-fetch-dest") not in (None, "document")
        return False

    def _own(self, origin: str, scope: Scope) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == (header(scope, b"host") or "").lower()
        except ValueError:
            return False


class Routes(Middleware):
    """Answers only what the page, `gradio_client` and an MCP client need.

    Gradio also has a proxy, a code editor, recordings, deep links that copy a session to disk, run
    history, and a page of statistics; what is not there needs no guard.
    """

    _read = re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login|logout)/?"
        r"|/(assets|static|svelte)/[^\\]+"
        rf"|{API}/(info|app_id|startup-events|theme\.css|user|login_check|queue/data|queue/status"
        r"|upload_progress|heartbeat/[\w-]{1,64}|call/(v2/)?[\w.-]+/[\w-]{1,64})/?"
        rf"|{API}/file=.+|{API}/custom_component/[\w-]+/client/\w+/[\w.-]+"
    )
    _write = re.compile(
        rf"{API}/(queue/join|call/(v2/)?[\w.-]+|run/[\w.-]+|api/[\w.-]+|cancel|reset|upload"
        r"|component_server)/?|/login/?"
    )
    _mcp = re.compile(rf"{API}/mcp(/.*)?")
    _methods: ClassVar = {"GET": _read, "HEAD": _read, "POST": _write, "OPTIONS": _write}

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, known = scope["path"], self._methods.get(scope["method"])
        if not (known and known.fullmatch(path)) and not (
            self.gate.options.mcp and self._mcp.fullmatch(path)
        ):
            raise Refused(404, "there is no such page")
        await self.app(scope, receive, send)
