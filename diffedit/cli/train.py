"""``diffedit train``."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from diffedit.cli import verbose_option


@click.command(short_help="Train or fine-tune a part of a model on your pictures.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from the checkpoints of an earlier run.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop after this long, so that --resume goes on.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what it needs, then stop.")
@verbose_option
def train(config: Path, resume: bool, max_minutes: float | None, dry_run: bool) -> None:
    """Train as CONFIG (a YAML file) says: an autoencoder, denoiser, ControlNet, LoRA, new words.

    Checkpoints, curves and sample grids go to the file's 'out' folder while it runs, the result to
    the folder 'model' in it. Ctrl-C or SIGTERM keep the last checkpoint.
    """
    from diffedit.training import config as files
    from diffedit.training.stages import run

    trainings = files.load(config)
    # What a training says of itself is what its user came to see.
    logging.getLogger("diffedit.training").setLevel(logging.INFO)
    finished = run(
        trainings,
        resume=resume,
        max_minutes=max_minutes,
        dry_run=dry_run,
        say=lambda line: click.echo(line, err=True),
    )
    if not finished and not dry_run:
        raise click.exceptions.Exit(3)
