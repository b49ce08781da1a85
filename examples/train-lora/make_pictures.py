"""Draws the pictures that `style.yaml` trains on: ``python examples/train-lora/make_pictures.py``.

Twenty blueprints, each a PNG with a .txt beside it that says what it shows and not how it is drawn.
They stand for a folder of your own pictures in one style. The model has seen no blueprint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from diffedit.models.loading import EMBEDDED
from diffedit.training.world.source import Drawn

HERE = Path(__file__).resolve().parent


def native_side() -> int:
    """The side of the embedded model's pictures, in pixels."""
    sides: list[int] = json.loads((EMBEDDED / "diffedit.json").read_text("utf-8"))["sides"]
    return sides[0]


def main() -> None:
    """Write the pictures and their captions to a folder."""
    parser = argparse.ArgumentParser(description="Draw pictures in one style, with captions.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "pictures")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--side", type=int, default=native_side(), help="in pixels")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn({"rich": 1.0}, options.count, options.side, style="blueprint")
    for number in range(options.count):
        example = drawn[number]
        file = options.folder / f"{number:02d}.png"
        Image.fromarray(example.image).save(file)
        file.with_suffix(".txt").write_text(example.caption + "\n", "utf-8")


if __name__ == "__main__":
    main()
