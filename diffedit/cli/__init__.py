"""The command line. Commands import what they need when they run, so that help comes at once.

Exit codes: 0 done; 2 the user's input is wrong (one line on stderr); 3 stopped on request, to be
resumed; 130 cancelled; 1 all else.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from diffedit import __version__
from diffedit.errors import DiffeditError, InputError, nearest

__all__ = ["cli", "main"]

log = logging.getLogger(__name__)

_COMMANDS = {
    "edit": "diffedit.cli.edit:edit",
    "models": "diffedit.cli.models:models",
    "schedulers": "diffedit.cli.schedulers:schedulers",
    "plugins": "diffedit.cli.plugins:plugins",
    "run": "diffedit.cli.edit:run",
    "train": "diffedit.cli.train:train",
}


class Commands(click.Group):
    """diffedit's commands, and those of plugins; a plugin's are looked for when one is called."""

    _asked = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's own commands, and those that plugins have added so far."""
        return sorted({*_COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, if need be from a plugin."""
        if name in _COMMANDS:
            module, _, attribute = _COMMANDS[name].partition(":")
            found: click.Command = getattr(importlib.import_module(module), attribute)
            return found
        if name not in self.commands and not ctx.resilient_parsing:
            self._ask_plugins()
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, or suggest the nearest."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            if name.startswith("-"):
                ctx.fail(f"no option {name!r}, see 'diffedit --help'")
            ctx.fail(f"no command {name!r}{nearest(name, self.list_commands(ctx))}")
        return name if command else None, command, args[1:]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Click would answer Ctrl-C with an empty line of its own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None

    def _ask_plugins(self) -> None:
        if self._asked:
            return
        self._asked = True
        from diffedit import plugins

        manager = plugins.default().manager
        for name, plugin in manager.list_name_plugin():
            others = [other for other in manager.get_plugins() if other is not plugin]
            try:
                manager.subset_hook_caller("register_commands", others)(cli=self)
            except Exception as error:
                log.warning("plugin %r: its commands were left out: %s", name, error)


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(dict)["verbose"] = True


def verbose_option(command: Any) -> Any:
    """Add ``--verbose``."""
    return click.option(
        "-v",
        "--verbose",
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_be_verbose,
        help="Show what libraries say, and a traceback when something unexpected fails.",
    )(command)


def quiet_libraries() -> None:
    """Keep diffusers and transformers quiet, and their bars away, unless ``--verbose`` is given."""
    context = click.get_current_context(silent=True)
    if context is not None and (context.find_root().obj or {}).get("verbose"):
        return
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Edit images with latent diffusion: one sampling loop, and edits that combine.",
    epilog="'diffedit demo' opens the workspace in the browser. Installed plugins may add commands,"
    " too: 'diffedit plugins list'.",
)
@click.version_option(__version__, prog_name="diffedit", message="%(prog)s %(version)s")
@verbose_option
def cli() -> None:
    """The group of all commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return its exit code."""
    said = list(sys.argv[1:] if arguments is None else arguments)
    state: dict[str, Any] = {}
    # Known before click parses: errors in the arguments themselves are handled as well.
    quiet = not {"-v", "--verbose", "--debug"} & set(said)
    with _hushed(quiet) as notes:
        code, text = _run(said, state, quiet)
        if code != 2 or not quiet:  # an error in the input is told in one line
            for note in notes:
                click.echo(f"diffedit: {note}", err=True)
        if text:
            click.echo(text, err=True)
        return code


def _run(arguments: list[str], state: dict[str, Any], quiet: bool) -> tuple[int, str]:
    """The exit code, and what to say on stderr."""
    try:
        code = cli.main(arguments, prog_name="diffedit", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return (130, _cancelled()) if code == 130 else (code if isinstance(code, int) else 0, "")
    except click.exceptions.Exit as stop:
        return stop.exit_code, ""
    except SystemExit as stop:  # a plugin's command
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None), ""
    except (KeyboardInterrupt, click.Abort):
        return 130, _cancelled()
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2, error.format_message()
        return 2, _said(error.format_message(), quiet)
    except InputError as error:
        return 2, _said(str(error), quiet)
    except DiffeditError as error:
        return 1, _said(str(error), quiet)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except Exception as error:
        hint = " (run again with --debug for the traceback)" if quiet else ""
        return 1, _said(f"{type(error).__name__}: {error}{hint}", quiet)


def _cancelled() -> str:
    # A terminal has "^C" on this line.
    return f"{chr(10) * sys.stderr.isatty()}diffedit: cancelled"


def _said(message: str, quiet: bool) -> str:
    line = "diffedit: " + " ".join(message.split())
    return line if quiet else f"{traceback.format_exc()}{line}"


@contextlib.contextmanager
def _hushed(quiet: bool) -> Iterator[list[str]]:
    """Keep libraries quiet, and collect diffedit's own warnings."""
    notes: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in notes:
                notes.append(record.getMessage())

    handler: logging.Handler = Collect(logging.WARNING) if quiet else logging.StreamHandler()
    logger = logging.getLogger("diffedit")
    if quiet:
        for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # Where torchao is installed diffusers imports it, and torch has something to say to it.
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
