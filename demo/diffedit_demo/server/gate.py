"""What is known: who asks, whose a session and a file are, and what Gradio has at work."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit_demo.server.asgi import BODY_SECONDS, Refused, Scope, address, header
from diffedit_demo.server.options import Options
from diffedit_demo.sessions import Sessions

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)


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

    def line(self, function: Any) -> int:
        """Jobs that have not begun and wait for the same as that function does."""
        queues = self.blocks._queue.event_queue_per_concurrency_id
        found = queues.get(function.concurrency_id)
        return len(found.queue) if found else 0

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
        # A page that is open keeps its files, and those it was given, however long it rests.
        owners = {self.sessions.owner_of(session_hash) for session_hash in list(self._open)}
        for session_hash in (*self._open, *(f"uploads:{owner}" for owner in owners)):
            self.sessions.touch(session_hash)
        kept = self._public | {path for owner, path in list(self._told) if owner in owners}
        limit = time.time() - max(self.sessions.keep_seconds, BODY_SECONDS)
        for place in self.sessions.root.iterdir():
            if place.name in self.sessions.folders():
                continue
            for file in (place, *place.rglob("*")):
                with contextlib.suppress(OSError):
                    old = file.is_file() and file.stat().st_mtime < limit
                    if old and str(file) not in kept:
                        file.unlink()
            with contextlib.suppress(OSError):
                place.rmdir()  # refuses one that is not empty
        return self.sessions.sweep()
