"""``diffedit demo``: the workspace in the browser."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import webbrowser
from pathlib import Path

import click

from diffedit.cli import quiet_libraries, verbose_option
from diffedit.errors import InputError


@click.command(short_help="Edit in the browser.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="NAME",
    help="Address to serve at. Any that other machines reach needs --auth.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port to serve at; 0 takes any that is free.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A folder, a .safetensors file or a hub id to offer besides the embedded model; the first"
    " is loaded at the start. May be repeated.",
)
@click.option("--device", help="cpu, cuda, mps. [default: the accelerator if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float8"]),
    help="Precision; float8 saves memory only. [default: float32 on the CPU, else the 16-bit type"
    " that the model's family was trained in]",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="What the model's weights may take on an accelerator, such as 6GB; the rest stays in main"
    " memory, which is slower. [default: all there is]",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Take less memory from the start, more slowly: predictions one after the other, large"
    " pictures in tiles.",
)
@click.option(
    "--auth",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text file of lines 'user:password', which only you can read: who may log in.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="A name under which other machines ask for the page, such as edit.example.org. May be"
    " repeated.",
)
@click.option("--mcp", is_flag=True, help="Serve agents too (MCP), at /gradio_api/mcp.")
@click.option(
    "--max-upload",
    type=click.IntRange(1, 1024),
    default=50,
    show_default=True,
    metavar="MB",
    help="What one upload may bring.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the browser.")
@verbose_option
def demo(
    host: str,
    port: int,
    models: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    max_memory: str | None,
    low_memory: bool,
    auth: Path | None,
    allow_hosts: tuple[str, ...],
    mcp: bool,
    max_upload: int,
    open_browser: bool,
) -> None:
    """Serve the workspace, and print its address. Ctrl-C ends it.

    All pictures stay on this machine. Those of a session are deleted an hour after its last use,
    and all of them when the server ends.
    """
    from diffedit_demo import server
    from diffedit_demo.sessions import Sessions, own_root

    users = read_users(auth) if auth else ()
    if not users and not server.is_loopback(host):
        raise InputError(
            f"--host {host} is reached by other machines: add --auth FILE, so that only those with"
            " a password get in"
        )
    if mcp:
        _check_mcp()
    signal.signal(signal.SIGTERM, _end)
    with server.listen(host, port) as listener, own_root() as root:
        # Before gradio is imported: components keep the folder that they find.
        os.environ["GRADIO_TEMP_DIR"] = str(root)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        options = server.Options(
            host=host,
            port=listener.getsockname()[1],
            allow_hosts=allow_hosts,
            users=users,
            models=models,
            device=device,
            dtype=dtype,
            max_memory=max_memory,
            low_memory=low_memory,
            mcp=mcp,
            max_upload=max_upload << 20,
        )
        # Libraries print to stdout as they please; it belongs to the address.
        with contextlib.redirect_stdout(sys.stderr):
            from diffedit_demo import page
            from diffedit_demo.desk import bound_pictures

            quiet_libraries()
            bound_pictures()
            sessions = Sessions(root)
            blocks = page.build((*models, "tiny"), sessions, options)
            served = server.app(blocks, options, sessions, page.look())

        def ready() -> None:
            click.echo(options.address)
            if open_browser:
                webbrowser.open(options.address)

        server.serve(served, listener, ready)


def _end(number: int, _: object) -> None:
    """End in good order, so that the pictures are deleted; unasked, Python would just stop."""
    raise SystemExit(128 + number)


def read_users(file: Path) -> tuple[tuple[str, str], ...]:
    """The names and passwords in a file.

    A file, not an option: everybody on a machine can read the command lines of its processes.

    Raises:
        InputError: it cannot be read, others can read it, or a line is no ``user:password``.
    """
    try:
        about = file.stat()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"--auth {file}: {why}") from None
    if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"--auth {file}: others can read it, run 'chmod 600 {file}' first")
    users: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, colon, password = line.partition(":")
        if not colon or not name.strip() or not password:
            # The line itself may be a password.
            raise InputError(f"--auth {file}, line {number}: should be 'user:password'")
        if name.strip() in users:
            raise InputError(f"--auth {file}, line {number}: {name.strip()!r} stands twice")
        users[name.strip()] = password
    if not users:
        raise InputError(f"--auth {file}: nobody in it, should have lines 'user:password'")
    return tuple(users.items())


def _check_mcp() -> None:
    from importlib.util import find_spec

    if find_spec("mcp") is None:
        raise InputError("--mcp needs a package that is missing: pip install 'diffedit[mcp]'")
