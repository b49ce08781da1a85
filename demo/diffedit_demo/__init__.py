"""The workspace: edit in the browser. It knows edits only as the plugin manager names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffedit import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``diffedit demo``."""
    from diffedit_demo.command import demo

    cli.add_command(demo)
