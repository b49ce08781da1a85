"""``diffedit plugins``."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import click

from diffedit.cli import verbose_option
from diffedit.errors import ParameterError, PluginError, nearest

if TYPE_CHECKING:
    from diffedit.edit import Edit
    from diffedit.plugins import Installed, Plugins


@click.group(short_help="List plugins and show what they provide.")
def plugins() -> None:
    """List plugins and show what they provide."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def list_(as_json: bool) -> None:
    """List the installed plugins. Imports none of them."""
    from diffedit.cli.tables import echo_json, echo_table
    from diffedit.plugins import installed

    found = installed()
    if as_json:
        echo_json([_described(one) for one in found])
        return
    rows = [(one.name, f"{one.distribution} {one.version}", one.value) for one in found]
    echo_table(("plugin", "from", "module"), rows)


@plugins.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def show(name: str | None, as_json: bool) -> None:
    """Import plugins and show their edits, parameters, preprocessors and hooks.

    NAME is a plugin's or an edit's; without it, all are shown. A plugin that cannot be loaded is
    named with the reason.
    """
    from diffedit import plugins as found
    from diffedit.cli.tables import echo_json

    loaded = found.default()
    installed = {one.name: one for one in found.installed()}
    wanted = list(installed) if name is None else [_plugin_of(name, installed, loaded)]
    reports = [_report(installed[one], loaded) for one in wanted]
    if as_json:
        echo_json(reports if name is None else reports[0])
    else:
        for number, report in enumerate(reports):
            if number:
                click.echo()
            _echo(report)
    if name is not None and "broken" in reports[0]:
        raise PluginError(wanted[0], f"could not be loaded: {reports[0]['broken']}")


def _plugin_of(name: str, installed: dict[str, Installed], loaded: Plugins) -> str:
    if name in installed:
        return name
    if name in loaded.edits:
        return loaded.owner("edit", name)
    known = {*installed, *loaded.edits}
    raise ParameterError(f"no plugin {name!r}{nearest(name, known)}")


def _described(one: Installed) -> dict[str, Any]:
    return {
        "name": one.name,
        "distribution": one.distribution,
        "version": one.version,
        "module": one.value,
    }


def _report(one: Installed, loaded: Plugins) -> dict[str, Any]:
    report = _described(one)
    if one.name in loaded.broken:
        return report | {"broken": loaded.broken[one.name]}

    def own(kind: str, names: Any) -> list[str]:
        return sorted(name for name in names if loaded.owner(kind, name) == one.name)

    plugin = loaded.manager.get_plugin(one.name)
    hooks = (loaded.manager.get_hookcallers(plugin) or []) if plugin is not None else []
    return report | {
        "edits": [_edit(loaded.edits[name]) for name in own("edit", loaded.edits)],
        "preprocessors": [
            {"name": name, "help": made.help, "weights": made.weights}
            for name in own("preprocessor", loaded.preprocessors)
            for made in [loaded.preprocessors[name]]
        ],
        "families": own("family", loaded.families),
        "hooks": sorted(hook.name for hook in hooks),
    }


def _edit(cls: type[Edit]) -> dict[str, Any]:
    from diffedit.parameters import parameters

    lines = (inspect.getdoc(cls) or "").splitlines()
    return {
        "name": cls.name,
        "version": cls.version,
        "stage": cls.stage,
        "help": lines[0] if lines else "",
        "parameters": [one.model_dump() for one in parameters(cls).values()],
    }


def _echo(report: dict[str, Any]) -> None:
    from diffedit.cli.tables import echo_table

    origin = f"{report['distribution']} {report['version']}, {report['module']}"
    click.echo(f"{click.style(report['name'], bold=True)}  ({origin})")
    if "broken" in report:
        click.echo(f"  broken: {report['broken']}")
        return
    for edit in report["edits"]:
        click.echo(f"  edit {click.style(edit['name'], bold=True)} {edit['version']}")
        click.echo(f"    {edit['help']}")
        rows = [
            (
                one["name"],
                one["allowed"],
                "required" if one["required"] else json.dumps(one["default"]),
                one["help"],
            )
            for one in edit["parameters"]
        ]
        echo_table(("parameter", "value", "default", ""), rows, indent=4)
    for made in report["preprocessors"]:
        weights = f" (weights: {made['weights']})" if made["weights"] else ""
        click.echo(f"  preprocessor {made['name']}: {made['help']}{weights}")
    for family in report["families"]:
        click.echo(f"  model family {family}")
    click.echo(f"  hooks: {', '.join(report['hooks']) or 'none'}")
