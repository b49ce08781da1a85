"""The socket, and the uvicorn server on it, with limits for slow and for silent clients."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffedit.errors import InputError

if TYPE_CHECKING:
    import fastapi

HEADER_SECONDS = 10.0
HEADER_BYTES = 16 << 10
CONNECTIONS = 256


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        InputError: the port is in use, or the name is not this machine's.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family, backlog=128)
        # Connections inherit it. asyncio sets it only for sockets that say that they are TCP, which
        # these do not; and without it each answer waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
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
