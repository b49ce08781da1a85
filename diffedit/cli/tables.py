"""Plain tables and JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def echo_table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate((head, *rows)):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        line = (" " * indent + "  ".join(cells)).rstrip()
        click.echo(click.style(line, dim=True) if number == 0 else line)


def echo_tree(value: Mapping[str, Any], indent: int = 0) -> None:
    """Print nested mappings, one value per line."""
    for key, inner in value.items():
        space = " " * indent
        if isinstance(inner, Mapping):
            click.echo(f"{space}{key}:")
            echo_tree(inner, indent + 2)
        elif isinstance(inner, list | tuple):
            click.echo(f"{space}{key}: {', '.join(map(str, inner))}")
        else:
            click.echo(f"{space}{key}: {inner}")
