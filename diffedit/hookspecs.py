"""The hooks a plugin may implement.

A plugin is a module named by an entry point of the group ``diffedit``. It implements any of these
functions, marked with ``diffedit.hookimpl``; pluggy checks their arguments when it is loaded. Hooks
that return lists are called once. The order in which plugins are called means nothing: what
acts on a picture, and in which order, is decided by `diffedit.edit.canonical`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from diffedit.edit import Edit
    from diffedit.models.protocol import ModelFamily
    from diffedit.preprocessors import Preprocessor
    from diffedit.run import Run
    from diffedit.sampler import Step
    from diffedit.workflow import Pass

PROJECT = "diffedit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_edits() -> list[type[Edit]]:  # type: ignore[empty-body]
    """Edit classes this plugin provides."""


@hookspec
def register_models() -> list[ModelFamily]:  # type: ignore[empty-body]
    """Model families this plugin can load."""


@hookspec
def register_preprocessors() -> list[Preprocessor]:  # type: ignore[empty-body]
    """Preprocessors that turn a picture into a control hint."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to the command line."""


@hookspec
def pass_started(pass_: Pass, run: Run) -> None:
    """A pass begins; its edits have contributed and nothing has been drawn."""


@hookspec
def step_done(step: Step) -> None:
    """A call of the scheduler is done. Slow observers slow the run."""


@hookspec
def pass_finished(pass_: Pass, error: BaseException | None) -> None:
    """A pass ended; `error` says how, when it did not end well (a cancel is a GeneratorExit)."""
