"""How fast diffedit is beside diffusers' own pipelines: see README.md in this folder.

python bench/speed.py --what inpaint,img2img --model tiny --rounds 5 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before anything imports torch: nothing here is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers

from bench import measure, models, races
from bench.races import Settings
from bench.report import Report, into_readme, opening, record

RESULTS = Path(__file__).parent / "results"

ON_MODELS: dict[str, Callable[[str, Settings], Report]] = {
    "inpaint": races.inpaint,
    "img2img": races.img2img,
    "nothing": races.nothing,
    "bf16": races.bf16,
    "prompts": races.prompts,
}
ALONE: dict[str, Callable[[Settings], Report]] = {"engine": races.engine, "help": races.help_}
#: Sampling steps unless told otherwise: a full-size run of `random` takes seconds per step.
STEPS = {"tiny": 10, "random": 4, "nano": 2}


def reports(options: argparse.Namespace) -> Iterator[Report]:
    """Measure what was asked for, in the order asked."""
    for what in options.what:
        if what in ALONE:
            yield ALONE[what](Settings(options.rounds, options.steps or 200, options.side))
            continue
        for model in options.model:
            steps = options.steps or STEPS[model]
            yield ON_MODELS[what](model, Settings(options.rounds, steps, options.side))


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def split(said: str) -> list[str]:
        names = said.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return split


def main(arguments: Sequence[str] | None = None) -> list[Report]:
    parser = argparse.ArgumentParser(description="Benchmarks against diffusers, side by side.")
    whats = [*ON_MODELS, *ALONE]
    parser.add_argument(
        "--what", type=_listed(whats), default=whats, help=f"of {', '.join(whats)}; default: all"
    )
    parser.add_argument(
        "--model", type=_listed(models.MODELS), default=["tiny", "random"], help="default: both"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (default 5)")
    parser.add_argument(
        "--steps",
        type=int,
        help="sampling steps (default 10; random: 4); nothing: twice",
    )
    parser.add_argument("--side", type=int, default=768, help="of the picture, px (default 768)")
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--json", type=Path, help="where to write; a .md is written beside it")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md too")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    about = {
        "date": measure.today(),
        "commit": measure.commit(),
        "seed": races.SEED,
        "rounds": options.rounds,
        "machine": measure.machine("float32"),
    }
    said = opening(about)
    print(said, flush=True)
    done: list[Report] = []
    for report in reports(options):
        done.append(report)
        print(report.markdown(), flush=True)
    text = "\n".join([said, *(report.markdown() for report in done)])
    target = options.json or RESULTS / f"{about['date']}-{str(about['commit']).strip('+')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = about | {"reports": [record(report) for report in done]}
    target.write_text(json.dumps(kept, indent=1, allow_nan=True) + "\n", "utf-8")
    target.with_suffix(".md").write_text(text, "utf-8")
    if options.readme:
        into_readme(text)
    return done


if __name__ == "__main__":
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    main()
