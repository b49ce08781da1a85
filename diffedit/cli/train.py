"""``diffedit train``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from diffedit.cli import quiet_libraries, verbose_option


def _show_schema(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from diffedit.training import config as files

        click.echo(json.dumps(files.schema(), indent=2))
        context.exit()


@click.command(short_help="Train or fine-tune a part of a model on your pictures.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from the checkpoints of an earlier run.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop after this long, so that --resume goes on.",
)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_schema,
    help="Print the JSON schema of the file, for editors, and stop.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what it needs, then stop.")
@verbose_option
def train(config: Path, resume: bool, max_minutes: float | None, dry_run: bool) -> None:
    """Train as CONFIG (a YAML file) says: denoiser, autoencoder, ControlNet, LoRA, word, few steps.

    Checkpoints, curves and sample grids go to the file's 'out' folder while it runs, the result to
    the folder 'model' in it. SIGTERM writes a checkpoint and stops (exit code 3); Ctrl-C stops at
    once, with the last checkpoint kept.
    """
    from diffedit.training import config as files
    from diffedit.training.stages import run

    trainings = files.load(config)
    quiet_libraries()
    with _told():
        finished = run(trainings, resume=resume, max_minutes=max_minutes, dry_run=dry_run, say=_say)
    if not finished and not dry_run:
        raise click.exceptions.Exit(3)


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


@contextmanager
def _told() -> Iterator[None]:
    """Tell at once what a training says of itself: it may run for days."""

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _say(self.format(record))

    logger, handler = logging.getLogger("diffedit.training"), Tell()
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(level)
