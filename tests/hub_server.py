"""A hub on this machine, in the HTTP layout of the real one, and its faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Files that the real hub keeps outside git, and redirects to.
LARGE = (".safetensors", ".bin", ".ckpt", ".pth")


@dataclass
class Hub:
    """What a server holds, what it was asked, and what it does wrong.

    Attributes:
        url: of it.
        repositories: by name, with their revisions: commits, branches, tags.
        asked: method, path and range of every request.
        wrong: files that come with another byte.
        cut: files that end so many bytes after the first, with the connection.
        elsewhere: files that are handed over to another server.
    """

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)

    def push(self, name: str, folder: Path, more: Mapping[str, bytes] | None = None) -> str:
        """Commit a folder to the main branch; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        } | dict(more or {})
        told = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})
        commit = hashlib.sha1(told.encode()).hexdigest()
        revisions = self.repositories.setdefault(name, {})
        revisions[commit] = revisions["main"] = files
        return commit

    def commit(self, name: str, revision: str) -> str:
        """The commit that a revision is."""
        revisions = self.repositories[name]
        same = (key for key, files in revisions.items() if files is revisions[revision])
        return next(key for key in same if len(key) == 40)

    def fetched(self) -> list[str]:
        """The files that were asked for, in alphabetical order."""
        marks = (path.partition("/resolve/")[2] for _, path, _ in self.asked)
        return sorted({mark.partition("/")[2] for mark in marks if mark})


@contextmanager
def serving(hub: Hub | None = None) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine while inside."""
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(path: str, data: bytes) -> str:
    """What the hub calls a file's content."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """What answers the requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                self.api("/".join(parts[2:4]), parts[4:])
            elif parts[0] == "large":
                name, path = "/".join(parts[1:3]), "/".join(parts[4:])
                self.send(
                    path, hub.repositories[name][parts[3]][path], self.linked(name, parts[3], path)
                )
            elif len(parts) < 5 or parts[2] != "resolve":
                self.answer(404, {})
            else:
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def api(self, name: str, rest: list[str]) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            if not self.known(name, revision):
                return
            commit, files = hub.commit(name, revision), hub.repositories[name][revision]
            listed = [self.listed(path, data) for path, data in files.items()]
            if rest[:1] == ["tree"]:
                self.answer(200, [{"type": "file", **one} for one in listed])
                return
            siblings: list[dict[str, Any]] = []
            for one in listed:
                sibling = {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
                if large := one.get("lfs"):
                    sibling["lfs"] = {"sha256": large["oid"], **large}
                siblings.append(sibling)
            self.answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings})

        def listed(self, path: str, data: bytes) -> dict[str, Any]:
            said: dict[str, Any] = {"path": path, "size": len(data)}
            said["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.endswith(LARGE):
                said["lfs"] = {"oid": digest(path, data), "size": len(data), "pointerSize": 130}
            return said

        def resolve(self, name: str, revision: str, path: str) -> None:
            if not self.known(name, revision):
                return
            files = hub.repositories[name][revision]
            if path not in files:
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
                return
            data, commit = files[path], hub.commit(name, revision)
            said = self.linked(name, commit, path)
            if path.endswith(LARGE):
                base = hub.elsewhere.get(path, hub.url)
                said["Location"] = f"{base}/large/{name}/{commit}/{path}"
                self.answer(302, {}, said)
            else:
                self.send(path, data, said)

        def linked(self, name: str, commit: str, path: str) -> dict[str, str]:
            data = hub.repositories[name][commit][path]
            etag = f'"{digest(path, data)}"'
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
            said = {"X-Repo-Commit": commit, "ETag": etag}
            return said | linked if path.endswith(LARGE) else said

        def known(self, name: str, revision: str) -> bool:
            if name not in hub.repositories:
                self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
            elif revision not in hub.repositories[name]:
                self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            else:
                return True
            return False

        def answer(self, status: int, said: Any, headers: Mapping[str, str] | None = None) -> None:
            body = json.dumps(said).encode()
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
            begin = 0
            if said := self.headers.get("Range"):
                begin = int(said.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if said else 200)
            headers = {**headers, "Content-Length": str(len(data) - begin)}
            if said:
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if path in hub.wrong:
                data = data[:-1] + bytes([data[-1] ^ 1])
            stop = max(hub.cut.get(path, len(data)), begin)
            self.wfile.write(data[begin:stop])
            if stop < len(data):
                self.wfile.flush()
                self.close_connection = True

    return Handler
