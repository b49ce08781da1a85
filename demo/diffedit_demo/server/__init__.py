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

`doors` asks for the name and the address, `bounds` for who and how much, `uploads` and `calls` for
whose. `gate` knows the visitors and Gradio, `listening` the sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit_demo.server.bounds import Bodies, Rates, Visitors
from diffedit_demo.server.calls import Calls, Files
from diffedit_demo.server.doors import Headers, Hosts, Origins, Routes
from diffedit_demo.server.gate import Gate
from diffedit_demo.server.listening import listen, serve
from diffedit_demo.server.options import Options, is_loopback
from diffedit_demo.server.uploads import Uploads
from diffedit_demo.sessions import Sessions

# Read when gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if TYPE_CHECKING:
    import fastapi
    import gradio as gr

__all__ = ["Options", "app", "is_loopback", "listen", "serve"]


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
    blocks._queue.max_size = None  # it would count all jobs as one line; `Calls` knows better
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
        # `Bodies` counts the form as a whole and so comes first: Gradio's own answer is no JSON.
        max_file_size=options.max_form,
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
