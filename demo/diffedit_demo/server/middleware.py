"""What the middlewares have in common: any of them may refuse, and the client hears why."""

from __future__ import annotations

from diffedit_demo.server.asgi import App, Receive, Refused, Scope, Send
from diffedit_demo.server.gate import Gate


class Middleware:
    """Pure ASGI: `_handle` either passes a request on or raises `Refused`."""

    def __init__(self, app: App, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or answer why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # a WebSocket is not answered, the page needs none
            try:
                await self._handle(scope, receive, send)
            except Refused as refused:
                if refused.status != 408:
                    await scope["diffedit.request"].drain(2 * self.gate.options.max_upload)
                await refused.answer(send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError
