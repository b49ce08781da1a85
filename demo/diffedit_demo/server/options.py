"""What `diffedit demo` was told, for those who build the page and those who guard it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What `diffedit demo` was told.

    Attributes:
        port: the one that is served, never 0.
        allow_hosts: names besides those of this machine under which the page may be asked for.
        users: name -> password; empty where nobody has to log in.
        models: ids and folders offered besides the embedded model.
        max_upload: bytes that one upload may bring.
        max_jobs: jobs that may wait in each line: for the model, for the pictures of desks, …
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
    max_memory: str | None = None
    low_memory: bool = False
    mcp: bool = False
    max_upload: int = 50 << 20
    max_jobs: int = 24
    max_jobs_each: int = 16
    max_pages_each: int = 64

    @property
    def address(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def max_form(self) -> int:
        """Bytes of a whole upload: boundaries and headers of the form come on top of its files."""
        return self.max_upload + (16 << 10)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
