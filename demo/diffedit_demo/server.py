"""The web server around the page: who may ask for what, and how much of it.

    Headers     every answer, refusals too, tells the browser what the page may do
    Hosts       400  a name that is not ours: a foreign page whose name was pointed at this machine
    Origins     403  a request that another site's page makes
    Routes      404  all of Gradio that this page does not need
    Visitors         a cookie says which browser asks; 429 for those who ask for too many
    Rates       429  uploads, jobs and log-ins in a burst
    Bodies      413, 408  too much, or too slowly, counted as it comes in
    Uploads     415, 507  what is no picture and no workflow, by its first bytes; moved to its owner
    Calls       400, 403, 404, 429, 503  jobs: sessions, files and functions of others; full queues
    Files       403  files of others

They stand in this order, outermost first. Each is plain ASGI: a wrapper that gathers an answer, as
Starlette's `BaseHTTPMiddleware` does, would hold back the events that a running job sends. None of
them decodes a picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from diffedit.errors import InputError
from diffedit_demo.sessions import ForeignPath, QuotaError, Sessions, check_paths

# Read when gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if TYPE_CHECKING:
    import fastapi
    import gradio as gr

__all__ = ["Options", "app", "is_loopback", "listen", "serve"]

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
UPLOAD = f"{API}/upload"
JSON_BYTES = 1 << 20
WORKFLOW_BYTES = 1 << 20
#: A whole body must be in by then; a photo of 50 MB comes in at 170 KB/s.
BODY_SECONDS = 300.0
#: And something must come as often as this.
SILENCE_SECONDS = 20.0
HEADER_SECONDS = 10.0
#: How long the rest of a refused request is read and thrown away.
DRAIN_SECONDS = 5.0
HEADER_BYTES = 16 << 10
CONNECTIONS = 256

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


@dataclass(frozen=True)
class Options:
    """What `diffedit demo` was told.

    Attributes:
        port: the one that is served, never 0.
        allow_hosts: names besides those of this machine under which the page may be asked for.
        users: name -> password; empty where nobody has to log in.
        models: ids and folders offered besides the embedded model.
        max_upload: bytes that one upload may bring.
        max_jobs: jobs that may wait altogether.
        max_jobs_each: jobs of one visitor that may wait.
        max_pages_each: pages of one visitor that may be open.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    allow_hosts: tuple[str, ...] = ()
    users: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    mcp: bool = False
    max_upload: int = 50 << 20
    max_jobs: int = 64
    max_jobs_each: int = 16
    max_pages_each: int = 64

    @property
    def address(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def app(
    blocks: gr.Blocks,
    options: Options,
    sessions: Sessions,
    look: Mapping[str, Any] | None = None,
) -> fastapi.FastAPI:
    """The page as an application: Gradio mounted at "/", guarded.

    ``GRADIO_TEMP_DIR`` must have been `sessions.root` before `blocks` was built: a component keeps
    the folder that it found.

    Args:
        look: what else `gr.mount_gradio_app` takes: theme, style sheet, texts.

    Raises:
        RuntimeError: it was not.
    """
    import fastapi
    import gradio as gr

    if Path(os.environ.get("GRADIO_TEMP_DIR", "")).resolve() != sessions.root:
        raise RuntimeError("GRADIO_TEMP_DIR must be the sessions' root before the page is built")
    # Otherwise a POST to /run passes the queue. Calling `queue` would undo what the page chose.
    blocks.api_open = False
    blocks._queue.max_size = min(blocks._queue.max_size or options.max_jobs, options.max_jobs)
    blocks.state_session_capacity = 4 * options.max_pages_each
    gate = Gate(blocks, options, sessions)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        cleaning = asyncio.create_task(gate.keep_clean())
        try:
            yield
        finally:
            cleaning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cleaning

    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    outer.state.gate = gate
    gr.mount_gradio_app(
        outer,
        blocks,
        "/",
        server_name=options.host,
        server_port=options.port,
        footer_links=[],
        run_history=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        auth=list(options.users) or None,
        show_error=False,
        max_file_size=options.max_upload,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=options.mcp,
        **(look or {}),
    )
    outer.state.gradio = outer.routes[-1].app  # type: ignore[attr-defined]
    # Mounted, Gradio never learns that it runs, and checks no path in any payload.
    blocks.has_launched = True
    for middleware in reversed(
        (Headers, Hosts, Origins, Routes, Visitors, Rates, Bodies, Uploads, Calls, Files)
    ):
        outer.add_middleware(middleware, gate=gate)
    return outer


# -- what the middlewares share --------------------------------------------------------------------


@dataclass(frozen=True)
class Visitor:
    """Who asks: a browser, by its cookie, or all programs of one address.

    Attributes:
        key: never shown to anybody.
        page: it has opened the page, so that it holds a cookie of this process.
    """

    key: str
    page: bool

    @property
    def uploads(self) -> str:
        """The session that holds its uploads; no client can name it, for the colon."""
        return f"uploads:{self.key}"


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


@dataclass
class Gate:
    """What is known about visitors, and what of Gradio must be asked."""

    blocks: gr.Blocks
    options: Options
    sessions: Sessions
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _open: dict[str, int] = field(default_factory=dict, repr=False)
    _told: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        from gradio.data_classes import _StaticFiles

        root = self.sessions.root
        # Pictures that components were built with: everybody's.
        self._public = {str(path) for path in root.rglob("*") if path.is_file()}
        self._static = _StaticFiles
        self._path = re.compile(rb'"path": ?"(' + re.escape(str(root).encode()) + rb'/[^"\\]+)"')

    # -- who --

    def cookie(self, scope: Scope) -> str:
        """The name of the cookie. Cookies do not tell ports apart, two servers must."""
        return f"diffedit-{(scope.get('server') or ('', 0))[1]}"

    def new_cookie(self) -> str:
        """A value that only this process can have made; nothing needs to remember it."""
        token = secrets.token_urlsafe(18)
        return f"{token}.{self._sign(token)}"

    def visitor(self, scope: Scope) -> Visitor:
        """Who asks."""
        jar = SimpleCookie()
        with contextlib.suppress(CookieError):
            jar.load(header(scope, b"cookie") or "")
        morsel = jar.get(self.cookie(scope))
        token, _, signed = (morsel.value if morsel else "").partition(".")
        if token and hmac.compare_digest(signed.encode(), self._sign(token).encode()):
            return Visitor(f"page:{token}", page=True)
        return Visitor(f"address:{address(scope)}", page=False)

    def _sign(self, token: str) -> str:
        return hmac.new(self._key, token.encode(), hashlib.sha256).hexdigest()

    # -- whose --

    def owns(self, visitor: Visitor, path: str | Path) -> bool:
        """Whether a visitor may name a file: their own, one they were told of, or everybody's."""
        text = str(path)
        if (visitor.key, text) in self._told or text in self._public:
            return True
        if any(text == str(one) for one in self._static.all_paths):
            return True
        return self.sessions.owns(visitor.key, path)

    def tell(self, visitor: Visitor, data: bytes) -> None:
        """Remember the files that an answer names: who was told of one may ask for it.

        Gradio writes pictures that an event returns into a folder that is nobody's.
        """
        for found in self._path.finditer(data):
            self._told[visitor.key, found[1].decode(errors="replace")] = None
        while len(self._told) > 20_000:
            self._told.popitem(last=False)

    def claim(self, visitor: Visitor, session_hash: object) -> None:
        """Bind a session to whoever uses it first.

        Raises:
            Refused: it is another's, or the visitor has too many at work.
        """
        if not isinstance(session_hash, str) or not re.fullmatch(r"[\w-]{1,64}", session_hash):
            raise Refused(400, "no session of that name")
        if session_hash not in self.sessions:
            self._make_place(visitor)
        if not self.sessions.claim(session_hash, visitor.key):
            raise Refused(403, "this session is somebody else's")

    @contextlib.contextmanager
    def opened(self, session_hash: str) -> Iterator[None]:
        """While a page is open, its session stays."""
        self._open[session_hash] = self._open.get(session_hash, 0) + 1
        try:
            yield
        finally:
            self._open[session_hash] -= 1
            if not self._open[session_hash]:
                del self._open[session_hash]
            self.sessions.touch(session_hash)

    def _make_place(self, visitor: Visitor) -> None:
        mine = [key for key in self.sessions.of(visitor.key) if key != visitor.uploads]
        if len(mine) < self.options.max_pages_each:
            return
        idle = next((key for key in mine if not self.pending(key)), None)
        if idle is None:
            raise Refused(429, "too many pages at work at once; close some", wait=10)
        self.forget([idle])

    # -- Gradio's queue --

    def pending(self, session_hash: str) -> int:
        """Jobs of a session whose end nobody has heard of yet."""
        return len(self.blocks._queue.pending_event_ids_session.get(session_hash, ()))

    def waiting(self, visitor: Visitor) -> int:
        """Jobs of a visitor that have not begun."""
        mine = self.sessions.of(visitor.key)
        queues = self.blocks._queue.event_queue_per_concurrency_id.values()
        return sum(event.session_hash in mine for queue in queues for event in queue.queue)

    def function(self, session_hash: str | None, at: object) -> Any:
        """The function of that number, on the page or rendered for one session; None if none."""
        if not isinstance(at, int) or isinstance(at, bool):
            return None
        state = self.blocks.state_holder.session_data.get(session_hash or "")
        known = state.blocks_config.fns if state else {}
        return known.get(at) or self.blocks.fns.get(at)

    def named(self, name: str) -> Any:
        """The function of that API name; None if none, or if it is private."""
        found = (one for one in self.blocks.fns.values() if one.api_name == name)
        return next((one for one in found if one.api_visibility != "private"), None)

    # -- cleaning --

    def forget(self, hashes: list[str]) -> None:
        """Remove sessions, and what Gradio keeps of them for ever."""
        queue = self.blocks._queue
        for session_hash in hashes:
            self.sessions.close(session_hash)
            for event in queue.pending_event_ids_session.pop(session_hash, ()):
                queue.event_ids_to_events.pop(event, None)
            queue.pending_messages_per_session.pop(session_hash, None)
            self.blocks.state_holder.session_data.pop(session_hash, None)
            self.blocks.state_holder.time_last_used.pop(session_hash, None)

    async def keep_clean(self) -> None:
        """Look every half minute for what nobody needs any more."""
        while True:
            await asyncio.sleep(30)
            try:
                self.forget(await asyncio.to_thread(self._sweep))
            except Exception:
                log.exception("clean-up failed")

    def _sweep(self) -> list[str]:
        for session_hash in list(self._open):
            # A page that is open keeps its files, and those it was given, however long it rests.
            owner = self.sessions.owner_of(session_hash)
            self.sessions.touch(session_hash)
            self.sessions.touch(f"uploads:{owner}")
        limit = time.time() - max(self.sessions.keep_seconds, BODY_SECONDS)
        for place in self.sessions.root.iterdir():
            if place.name in self.sessions.folders():
                continue
            for file in (place, *place.rglob("*")):
                with contextlib.suppress(OSError):
                    old = file.is_file() and file.stat().st_mtime < limit
                    if old and str(file) not in self._public:
                        file.unlink()
            with contextlib.suppress(OSError):
                place.rmdir()  # refuses one that is not empty
        return self.sessions.sweep()


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


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value, None without one or with several."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None


def address(scope: Scope) -> str:
    """The client's address, without its port."""
    return (scope.get("client") or ("?", 0))[0]


# -- the middlewares -------------------------------------------------------------------------------


class Middleware:
    """Pure ASGI: `handle` either passes a request on or raises `Refused`."""

    def __init__(self, app: App, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # a WebSocket is not answered, the page needs none
            try:
                await self.handle(scope, receive, send)
            except Refused as refused:
                if refused.status != 408:
                    await self._drain(scope)
                await refused.answer(send)

    async def _drain(self, scope: Scope) -> None:
        """Read a little of what still comes: who is hung up on while sending sees no answer."""
        request: _Request | None = scope.get("diffedit.request")
        most = 2 * self.gate.options.max_upload
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while request is not None and not request.over and most > 0:
                    most -= len((await request()).get("body", b""))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class _Request:
    """The `receive` of a request, which knows whether all of it has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.over = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.over = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class Headers(Middleware):
    """Says to the browser what the page may do, on whatever is answered.

    Without it a picture could be read as a script, the page be framed and clicked through, and
    anything that got into it could talk to the world.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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

        request = scope["diffedit.request"] = _Request(receive)
        await self.app(scope, request, sending)


class Hosts(Middleware):
    """Lets only this server's own names in.

    A page of another site can have its name resolve to 127.0.0.1 after it was loaded; its requests
    then count as same-origin, and only the name tells.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._known(header(scope, b"host"), scope):
            raise Refused(400, "this server does not go by that name (see --allow-host)")
        await self.app(scope, receive, send)

    def _known(self, host: str | None, scope: Scope) -> bool:
        options = self.gate.options
        if host is None:
            return False
        name, _, port = host.lower().rpartition(":") if _has_port(host) else (host.lower(), "", "")
        name = name.strip("[]")
        if name in {one.lower() for one in options.allow_hosts} and port in ("", str(options.port)):
            return True
        if host.lower() in {one.lower() for one in options.allow_hosts}:
            return True
        own = {options.host.lower().strip("[]")} - {"0.0.0.0", "::"}
        if is_loopback(options.host) or not own:
            own |= {"localhost", "127.0.0.1", "::1"}
        # Nobody can make a browser send a bare address under another name.
        own.add(str((scope.get("server") or ("", 0))[0]))
        return name in own and (port or "80") == str(options.port)


def _has_port(host: str) -> bool:
    return ":" in host.rpartition("]")[2]


class Origins(Middleware):
    """Refuses what pages of other sites ask for.

    A browser sends their forms and multipart uploads without asking first, and they fill the disk
    or start jobs although the answer stays hidden.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        site = header(scope, b"sec-fetch-site")
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        if origins:
            # On a read as well: Gradio would allow the other site to see the answer.
            if len(origins) > 1 or not self._own(origins[0].decode("latin-1"), scope):
                raise Refused(403, "asked for by the page of another site")
        elif not reads and site not in (None, "same-origin", "none"):
            raise Refused(403, "asked for by the page of another site")
        if reads and site in ("cross-site", "same-site"):
            # A link to the page is fine, a picture or a script of ours in another page is not.
            opened = header(scope, b"sec-fetch-mode") == "navigate"
            if not opened or header(scope, b"sec-fetch-dest") not in (None, "document"):
                raise Refused(403, "asked for by the page of another site")
        await self.app(scope, receive, send)

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

    _page = re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login|logout)/?"
        r"|/(assets|static|svelte)/[^\\]+"
    )
    _read = re.compile(
        rf"{API}/(info|app_id|startup-events|theme\.css|user|login_check|queue/data|queue/status"
        r"|upload_progress|heartbeat/[\w-]{1,64}|call/(v2/)?[\w.-]+/[\w-]{1,64})/?"
        rf"|{API}/file=.+|{API}/custom_component/[\w-]+/client/\w+/[\w.-]+"
    )
    _write = re.compile(
        rf"{API}/(queue/join|call/(v2/)?[\w.-]+|run/[\w.-]+|api/[\w.-]+|cancel|reset|upload"
        r"|component_server)/?|/login/?"
    )
    _mcp = re.compile(rf"{API}/mcp(/.*)?")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            known = self._page.fullmatch(path) or self._read.fullmatch(path)
        else:
            known = self._write.fullmatch(path) if method in ("POST", "OPTIONS") else None
        if self.gate.options.mcp and self._mcp.fullmatch(path):
            known = self._mcp.fullmatch(path)
        if not known:
            raise Refused(404, "there is no such page")
        await self.app(scope, receive, send)


class Visitors(Middleware):
    """Knows who asks: gives every browser that opens the page a cookie, and finds it again.

    The hash that Gradio calls a session is chosen by the client, and shown in addresses.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        super().__init__(app, gate)
        self._new = Buckets(burst=60, per_second=1)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/") == UPLOAD
        # The boundaries and headers of a form come on top of the file.
        limit = self.gate.options.max_upload + (16 << 10) if upload else JSON_BYTES
        line = f"more than {(self.gate.options.max_upload if upload else limit) >> 20} MB at once"
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


class Uploads(Middleware):
    """Keeps pictures and workflows, by what is in them, and gives each to its owner alone.

    Gradio stores whatever comes under the hash of its contents: who can guess a file can name it,
    and two sessions with the same picture share one file.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        super().__init__(app, gate)
        self._running = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].rstrip("/") != UPLOAD or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        refused: list[Refused] = []
        gone = False

        async def reading() -> Message:
            nonlocal gone
            try:
                message = await receive()
            except Refused as error:
                refused.append(error)  # Gradio's own error handlers stand in between
                raise
            gone = gone or message["type"] == "http.disconnect"
            return message

        self._running += 1
        answer = Answer()
        try:
            await self.app(scope, reading, answer)
        except Exception:
            if not refused and not gone:
                raise
        finally:
            self._running -= 1
            self._remove_parts()
        if refused:
            raise refused[0]
        if answer.status == 200:
            answer.body = json.dumps(self._moved(scope["diffedit.visitor"], answer)).encode()
        await answer.send(send)

    def _moved(self, visitor: Visitor, answer: Answer) -> list[str]:
        stored = [Path(path) for path in json.loads(answer.body)]
        self.gate.blocks.upload_file_set.difference_update(map(str, stored))
        try:
            # All or nothing: a form with one bad file is refused as a whole.
            kinds = [kind_of(path) for path in stored]
            self.gate.sessions.claim(visitor.uploads, visitor.key)
            session = self.gate.sessions[visitor.uploads]
            return [str(session.take(path, kind)) for path, kind in zip(stored, kinds, strict=True)]
        except QuotaError as error:
            raise Refused(507, str(error)) from None
        finally:
            for path in stored:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def _remove_parts(self) -> None:
        """Remove what uploads that were broken off, and fields nobody asked for, have left."""
        late = time.time() - BODY_SECONDS
        for part in self.gate.sessions.root.glob("tmp*"):
            with contextlib.suppress(OSError):
                if not self._running or part.stat().st_mtime < late:
                    part.unlink()


class Answer:
    """Gathers an answer, for the few that must be seen whole; all of them are short."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def __call__(self, message: Message) -> None:
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


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
)


def kind_of(path: Path) -> str:
    """The suffix that belongs to an upload, by its first bytes; nothing is decoded.

    Raises:
        Refused: 415, it is no picture that diffedit reads, and no workflow.
    """
    with path.open("rb") as file:
        head = file.read(32)
    for magic, suffix in _MAGIC:
        if head.startswith(magic):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # four reserved bytes
        return ".bmp"
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
        size = path.stat().st_size
        if size > WORKFLOW_BYTES:
            raise Refused(413, f"a workflow of more than {WORKFLOW_BYTES >> 20} MB")
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_bytes().decode("utf-8-sig")
            if "\0" not in text and not text.lstrip().startswith("<"):
                return suffix
    raise Refused(415, "neither a picture (PNG, JPEG, WebP, TIFF, BMP, GIF) nor a workflow (YAML)")


class Calls(Middleware):
    """Checks every job before Gradio sees it: its session, its function, its files, its place.

    What Gradio calls private it only leaves out of the documentation: whoever sends the number of
    a function starts it.
    """

    _call = re.compile(rf"{API}/call/(v2/)?(?P<name>[\w.-]+)/?")
    _run = re.compile(rf"{API}/(run|api)/(?P<name>[\w.-]+)/?")
    _result = re.compile(rf"{API}/call/(v2/)?[\w.-]+/(?P<event>[\w-]+)/?")
    _beat = re.compile(rf"{API}/heartbeat/(?P<session>[\w-]+)/?")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(f"{API}/") or scope["path"].rstrip("/") == UPLOAD:
            await self.app(scope, receive, send)
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await self._read(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor, path = scope["diffedit.visitor"], scope["path"].rstrip("/")
        asked: str | None = None
        if path == f"{API}/queue/data":
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=16)
            asked = query.get("session_hash", [""])[-1]
        elif found := self._result.fullmatch(path):
            asked = found["event"]
        elif found := self._beat.fullmatch(path):
            self.gate.claim(visitor, found["session"])
            with self.gate.opened(found["session"]):
                await self.app(scope, receive, send)
            return
        if asked is None:
            await self.app(scope, receive, send)
            return
        if self.gate.sessions.owner_of(asked) not in (None, visitor.key):
            raise Refused(403, "this session is somebody else's")
        await self.app(scope, receive, self._listening(visitor, send))

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
        call, run = self._call.fullmatch(path), self._run.fullmatch(path)
        if path.startswith(f"{API}/mcp"):
            pass
        elif not isinstance(data, dict):
            raise Refused(400, "a request is a JSON object")
        elif path == f"{API}/cancel":
            self._check_cancel(visitor, data)
        elif path == f"{API}/component_server":
            self.gate.claim(visitor, data.get("session_hash"))
        elif path == f"{API}/queue/join":
            self.gate.claim(visitor, data.get("session_hash"))
            self._check_function(visitor, data)
            self._check_place(visitor)
        elif call:
            if call[1] is None and data.get("session_hash") is not None:
                self.gate.claim(visitor, data["session_hash"])
            if self.gate.named(call["name"]) is None:
                raise Refused(404, "there is no endpoint of that name")
            self._check_place(visitor)
        elif run:
            if data.get("session_hash") is not None:
                self.gate.claim(visitor, data["session_hash"])
            if data.get("fn_index") is not None:
                self._check_function(visitor, data)
            elif self.gate.named(run["name"]) is None:
                raise Refused(404, "there is no endpoint of that name")
        if not path.startswith(f"{API}/mcp") and not (call and call[1]):
            # Never the client's to say: results of a batch, and somebody's token.
            for key in ("batched", "oauth_token", "simple_format"):
                data.pop(key, None)
        # What was checked is what is passed on, not what another parser might make of the bytes.
        body = json.dumps(data).encode()
        scope["headers"] = [
            *(one for one in scope["headers"] if one[0] not in _FRAMING),
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        receive = replayed(body, receive)
        if not call:
            await self.app(scope, receive, self._listening(visitor, send))
            return
        # The job's number is its session, and the caller's alone.
        answer = Answer()
        await self.app(scope, receive, answer)
        if answer.status == 200 and data.get("session_hash") is None:
            self.gate.claim(visitor, json.loads(answer.body)["event_id"])
        await answer.send(send)

    def _check_function(self, visitor: Visitor, data: dict[str, Any]) -> None:
        function = self.gate.function(data.get("session_hash"), data.get("fn_index"))
        if function is None:
            raise Refused(404, "there is no function of that number")
        if function.api_visibility == "private" and not visitor.page:
            raise Refused(403, "this function is the page's own")

    def _check_cancel(self, visitor: Visitor, data: dict[str, Any]) -> None:
        self.gate.claim(visitor, data.get("session_hash"))
        event = self.gate.blocks._queue.event_ids_to_events.get(data.get("event_id", ""))
        if event is not None and event.session_hash != data["session_hash"]:
            raise Refused(403, "this job is somebody else's")

    def _check_place(self, visitor: Visitor) -> None:
        options = self.gate.options
        pending = sum(map(self.gate.pending, self.gate.sessions.of(visitor.key)))
        if self.gate.waiting(visitor) >= options.max_jobs_each or pending >= 256:
            raise Refused(429, f"{options.max_jobs_each} of your jobs wait already", wait=5)
        most = self.gate.blocks._queue.max_size or options.max_jobs
        if len(self.gate.blocks._queue) >= most:
            # Gradio's own answer, with when to come back.
            raise Refused(503, f"{most} jobs wait already, try again soon", wait=10)


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

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, found, path = scope["path"].partition(f"{API}/file=")
        if found and not self.gate.owns(scope["diffedit.visitor"], path):
            raise Refused(403, "not a file of this session")
        await self.app(scope, receive, send)


# -- serving ---------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        InputError: the port is in use, or the name is not this machine's.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=128)
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise InputError(f"--host {host}: no address of that name") from None
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise InputError(f"cannot serve at {host}, port {port}: {why}") from None


def serve(
    app: fastapi.FastAPI, listener: socket.socket, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until Ctrl-C, which is raised again when all is put away.

    Args:
        ready: called once, when requests are answered.
    """
    server(app, ready).run(sockets=[listener])


def server(app: fastapi.FastAPI, ready: Callable[[], None] = lambda: None) -> Any:
    """The uvicorn server, with limits that keep slow and silent clients from using it up."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        """Closes connections that do not finish their headers; uvicorn waits for ever."""

        _headers_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._watch(over=True)

        def _watch(self, over: bool = False) -> None:
            answering = bool(self.cycle) and not self.cycle.response_complete
            if over or answering:
                if self._headers_due is not None:
                    self._headers_due.cancel()
                self._headers_due = None
            elif self._headers_due is None:
                self._headers_due = self.loop.call_later(HEADER_SECONDS, self._too_slow)

        def _too_slow(self) -> None:
            self._headers_due = None
            answering = bool(self.cycle) and not self.cycle.response_complete
            if not answering and not self.transport.is_closing():
                self.transport.close()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Pages that are open listen for as long as the server runs: tell Gradio that it ends,
            # and cut off the rest without a word.
            app.state.gradio.stop_event.set()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            app,
            http=Patient,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
    )
