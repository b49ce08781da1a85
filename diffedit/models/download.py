"""Files over HTTP: resumed where they broke off, checked against their checksums, from known hosts.

huggingface_hub's own download checks no checksum, follows redirects to any host, and begins anew
when a process was ended; its client, with proxies and tokens, serves here too.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffedit.errors import ModelError
from diffedit.models.files import first_line

#: Further hosts that the hub may hand downloads over to, separated by commas.
HOSTS = "DIFFEDIT_HUB_HOSTS"
#: Domains of the public hub, which keeps large files on other hosts of its own.
_PUBLIC = ("huggingface.co", "hf.co")
_REDIRECTS, _TIMEOUT = 5, 15.0
#: How often in a row a download may bring nothing before it is given up; seconds before the second.
_TRIES, _PAUSE = 4, 0.2
_CHUNK = 2**20
#: Bytes of an answer that lists files.
_LONGEST = 2**26
#: Answers that may be others in a moment.
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


class UnreachableError(Exception):
    """The hub cannot be asked: there is no network, or it has a fault."""


class StoppedError(Exception):
    """Somebody has asked the downloads to stop."""


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        path: in the repository.
        size: in bytes.
        digest: 64 hexadecimal digits are the SHA-256 of its bytes, 40 the SHA-1 that git has.
    """

    path: str
    size: int
    digest: str


def utils() -> Any:
    """huggingface_hub's helpers, which it exports without saying so."""
    return importlib.import_module("huggingface_hub.utils")


def ask(url: str, what: str) -> Any:
    """The JSON that the hub answers.

    Args:
        what: is asked for, for messages.

    Raises:
        UnreachableError: there is no answer.
        ModelError: it refuses.
    """
    try:
        with _opened(url, what) as answer:
            said = _limited(answer)
            if answer.status_code in _LATER:
                raise UnreachableError(f"it answers {answer.status_code}")
            if answer.status_code != 200:
                raise _refusal(answer, what)
            return json.loads(said)
    except (ModelError, UnreachableError):
        raise
    except ValueError as error:
        raise ModelError(f"{url}: answers no JSON ({first_line(error)})") from error
    except Exception as error:  # of the HTTP library, whichever serves huggingface_hub
        raise UnreachableError(first_line(error)) from error


def _limited(answer: Any) -> bytes:
    """What the hub answers, as far as it is a list of files."""
    said = bytearray()
    for chunk in answer.iter_bytes():
        said += chunk
        if len(said) > _LONGEST:
            raise ModelError(f"{answer.url}: answers more than {_LONGEST} bytes")
    return bytes(said)


def fetch(
    file: File,
    url: str,
    target: Path,
    *,
    what: str,
    told: Callable[[int], object] = lambda more: None,
    stop: threading.Event | None = None,
) -> None:
    """Download a file; `target` holds it whole and checked, or is not there.

    What a broken download has brought is kept beside it, ending in ``.incomplete``.

    Args:
        told: is called with so many bytes more (or less) that are there.
        stop: once set, this raises `StoppedError` soon.

    Raises:
        ModelError: it broke off, it is refused, or it is not what the hub says.
    """
    partial = target.with_name(f"{target.name}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    resumed = partial.stat().st_size
    told(resumed)
    failed = 0
    while (had := partial.stat().st_size) < file.size:
        try:
            _append(file, url, partial, what, told, stop or threading.Event())
            why = "the connection was closed"
        except (ModelError, StoppedError):
            raise
        except Exception as error:  # of the HTTP library, or of the connection
            why = first_line(error)
        has = partial.stat().st_size
        failed = 0 if has > had else failed + 1
        if failed == _TRIES:
            raise ModelError(
                f"{what}: the download of {file.path} broke off at {has} of {file.size} bytes"
                f" ({why}); run it again to go on from there"
            )
        if has < file.size:
            time.sleep(_PAUSE * 2**failed)
    if _digest(partial, file) != file.digest:
        told(-partial.stat().st_size)
        partial.unlink()
        if resumed:  # what was there may have been of another file
            fetch(file, url, target, what=what, told=told, stop=stop)
            return
        raise ModelError(
            f"{what}: {file.path} came with other bytes than the hub says (its checksum or size"
            " differs); it was thrown away: try again, and if that does not help, tell its owner"
        )
    partial.replace(target)


def _append(
    file: File,
    url: str,
    partial: Path,
    what: str,
    told: Callable[[int], object],
    stop: threading.Event,
) -> None:
    """Get what is missing, or what comes of it."""
    had = partial.stat().st_size
    of = f"{what}: {file.path}"
    with _opened(url, of, {"Range": f"bytes={had}-"} if had else {}) as answer:
        status = answer.status_code
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {had}-")
        if status in _LATER:
            raise UnreachableError(f"the hub answers {status}")
        if status not in (200, 206):
            raise _refusal(answer, of)
        whole = status == 200 or not goes_on
        if status == 206 and whole:
            raise UnreachableError("the hub answers with another part")
        told(-had if whole else 0)
        has = 0 if whole else had
        with partial.open("wb" if whole else "ab") as out:
            for chunk in answer.iter_bytes():
                if stop.is_set():
                    raise StoppedError
                out.write(chunk)
                has += len(chunk)
                told(len(chunk))
                if has > file.size:  # as the checksum will say
                    return


def _digest(path: Path, file: File) -> str:
    with path.open("rb") as data:
        if len(file.digest) == 64:
            return hashlib.file_digest(data, "sha256").hexdigest()
        made = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while chunk := data.read(_CHUNK):
            made.update(chunk)
        return made.hexdigest()


@contextmanager
def _opened(url: str, what: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The hub's answer, and of hosts that it hands over to."""
    library = utils()
    client = library.get_session()
    said = {**library.build_hf_headers(library_name="diffedit"), "Accept-Encoding": "identity"}
    request = client.build_request("GET", url, headers=said | (headers or {}), timeout=_TIMEOUT)
    for _ in range(_REDIRECTS):
        answer = client.send(request, stream=True, follow_redirects=False)
        try:
            if answer.next_request is None:
                yield answer
                return
            # For another host it is without the token.
            request = answer.next_request
        finally:
            answer.close()
        _check_host(request.url, what)
    raise ModelError(f"{what}: {url} is handed over from place to place without end")


def _check_host(url: Any, what: str) -> None:
    """Refuse a redirect, of what is asked for, to a host that nobody has named.

    Raises:
        ModelError: names it, and those that may serve.
    """
    from huggingface_hub import constants

    home = utils().get_session().build_request("GET", constants.ENDPOINT).url
    netloc = url.netloc.decode()
    if netloc == home.netloc.decode() and url.scheme in (home.scheme, "https"):
        return
    further = [one.strip() for one in os.environ.get(HOSTS, "").split(",") if one.strip()]
    if netloc in further or (url.host in further and url.scheme == "https"):
        return
    public = any(_within(home.host, domain) for domain in _PUBLIC)
    if public and url.scheme == "https" and any(_within(url.host, one) for one in _PUBLIC):
        return
    known = [home.netloc.decode(), *(f"*.{one}" for one in _PUBLIC if public), *further]
    raise ModelError(
        f"{what}: the hub hands it over to {url.scheme}://{netloc}, which may not serve it;"
        f" {', '.join(known)} may, and what the variable {HOSTS} names"
    )


def _within(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")


def _refusal(answer: Any, what: str) -> ModelError:
    code, status = answer.headers.get("X-Error-Code", ""), answer.status_code
    if code == "RevisionNotFound":
        return ModelError(f"{what}: the hub has it, but no such revision of it")
    if code == "GatedRepo" or status == 403:
        return ModelError(
            f"{what}: its owner wants terms to be agreed to: do so on its page on the hub, and log"
            " in with 'hf auth login'"
        )
    if code == "RepoNotFound" or status in (401, 404):
        return ModelError(
            f"{what}: no such folder here, and none of this name on the hub, or it is private (log"
            " in with 'hf auth login')"
        )
    return ModelError(f"{what}: the hub refuses, with status {status}")


__all__ = ["File", "StoppedError", "UnreachableError", "ask", "fetch", "utils"]
