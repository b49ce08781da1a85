"""Uploads: what is kept of them, and whose it is then."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from diffedit_demo.server.asgi import (
    BODY_SECONDS,
    UPLOAD,
    Answer,
    App,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
)
from diffedit_demo.server.gate import Gate, Visitor
from diffedit_demo.server.middleware import Middleware
from diffedit_demo.sessions import QuotaError


class Uploads(Middleware):
    """Keeps pictures and workflows, by what is in them, and gives each to its owner alone.

    Gradio stores whatever comes under the hash of its contents: who can guess a file can name it,
    and two sessions with the same picture share one file.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        super().__init__(app, gate)
        self._running = 0

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_bytes().decode("utf-8-sig")
            if "\0" not in text and not text.lstrip().startswith("<"):
                return suffix
    raise Refused(415, "neither a picture (PNG, JPEG, WebP, TIFF, BMP, GIF) nor a workflow (YAML)")
