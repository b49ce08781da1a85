"""How fast the drawn world is drawn: scenes a second of one core, with all that is known of them.

python -m bench.scenes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench import measure
from diffedit.training.world.scenes import MIXES
from diffedit.training.world.source import Drawn

RESULTS = Path(__file__).parent / "results"


def rate(world: str, side: int, count: int, first: int = 0) -> float:
    """Scenes a second of CPU time: picture, caption, masks, depth."""
    drawn = Drawn({world: 1.0}, count, side, first=first)
    began = time.process_time()
    for index in range(count):
        _ = drawn[index]
    return count / (time.process_time() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write to `bench/results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--count", type=int, default=100, help="scenes of each world in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = {
        world: [
            rate(world, options.side, options.count, number * options.count)
            for number in range(options.rounds)
        ]
        for world in MIXES
    }
    for world, rates in found.items():
        print(
            f"{world}: {median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f}) a second of a core"
        )
    about = {"side": options.side, "count": options.count, "machine": measure.machine("float32")}
    path = options.out / f"{measure.today()}-{measure.commit()}-scenes.json"
    path.write_text(json.dumps(about | {"scenes a CPU second": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
