"""``diffedit models``."""

from __future__ import annotations

from typing import Any

import click

from diffedit.cli import verbose_option


@click.group(short_help="List models and say what is known of one.")
def models() -> None:
    """List models and say what is known of one."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def list_(as_json: bool) -> None:
    """List the embedded model and the families of models that can be loaded."""
    from diffedit import plugins
    from diffedit.cli.tables import echo_json, echo_table
    from diffedit.models.loading import EMBEDDED, TINY

    loaded = plugins.default()
    there = any(EMBEDDED.glob("unet/*.safetensors"))
    families = [
        {"name": name, "plugin": loaded.owner("family", name)} for name in sorted(loaded.families)
    ]
    if as_json:
        found = {"name": TINY, "path": str(EMBEDDED), "weights": there}
        echo_json({"models": [found], "families": families})
        return
    echo_table(("model", "weights", "path"), [(TINY, "yes" if there else "missing", str(EMBEDDED))])
    click.echo()
    echo_table(("family", "plugin"), [(one["name"], one["plugin"]) for one in families])
    click.echo(
        "\nOf these families, --model takes a diffusers folder, .safetensors file or hub id."
    )


@models.command()
@click.argument("model", default="tiny")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def info(model: str, as_json: bool) -> None:
    """Say what is known of MODEL (default: the embedded one) from its files, without loading it."""
    from diffedit.cli.tables import echo_json, echo_tree
    from diffedit.models.loading import inspect

    found: dict[str, Any] = inspect(model)
    if as_json:
        echo_json(found)
    else:
        echo_tree(found)
