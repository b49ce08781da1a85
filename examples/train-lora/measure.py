"""How often a style is recognised, before and after: ``python examples/train-lora/measure.py``.

The same prompts and the same noise go through diffusers' own pipeline without and with the LoRA,
and ``diffedit.training.styles`` judges the pictures. No prompt is a caption of the training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from make_pictures import HERE
from PIL import Image

from diffedit.models.loading import EMBEDDED
from diffedit.training.card import history
from diffedit.training.styles import StyleJudge
from diffedit.training.world.source import HELD_OUT, Drawn

SHOWN = (
    *("a red heart", "a yellow star on a green background", "a blue ring on a white background"),
    *("an orange cross", "a purple diamond on a gray background", "a pink triangle"),
)
"""Prompts that the picture shows; they are counted too."""

STYLE = "blueprint"


def prompts(count: int, folder: Path) -> list[str]:
    """``count`` prompts of held-out scenes, none of which is a caption in ``folder``."""
    seen = {file.read_text("utf-8").strip() for file in folder.glob("*.txt")}
    scenes = Drawn({"rich": 1.0}, 4 * count + 64, 16, seed=HELD_OUT, style=STYLE)
    words = (*SHOWN, *(scenes.scene(index).caption for index in range(len(scenes))))
    return list(dict.fromkeys(said for said in words if said not in seen))[:count]


def drawn(
    pipeline: StableDiffusionPipeline, asked: Sequence[str], steps: int, guidance: float
) -> list[npt.NDArray[np.uint8]]:
    """A picture of each prompt; the noise of prompt ``i`` is that of seed ``i``."""
    made = []
    for start in range(0, len(asked), 8):
        some = list(asked[start : start + 8])
        seeds = range(start, start + len(some))
        images = pipeline(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        made += [np.asarray(image) for image in images]
    return made


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    z = 1.959964
    p, middle = hits / count, (hits + z * z / 2) / (count + z * z)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / count / 2) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(judge: StyleJudge, pictures: list[npt.NDArray[np.uint8]]) -> dict[str, object]:
    """How often the style is the likeliest, with its interval, and its mean probability."""
    found = judge.probabilities(pictures)
    hits = sum(max(said, key=said.__getitem__) == STYLE for said in found)
    low, high = wilson(hits, len(found))
    return {
        "recognised": round(hits / len(found), 3),
        "interval": [round(low, 3), round(high, 3)],
        "probability": round(sum(said[STYLE] for said in found) / len(found), 3),
        "n": len(found),
    }


def digest(folder: Path) -> str:
    """A name for all weights in a folder: any change of any of them changes it."""
    said = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        said.update(file.relative_to(folder).as_posix().encode())
        said.update(file.read_bytes())
    return said.hexdigest()[:12]


def main() -> None:
    """Print the figures as JSON; write the picture if one is asked for."""
    parser = argparse.ArgumentParser(description="Measure a style LoRA before and after.")
    parser.add_argument("lora", nargs="?", type=Path, default=HERE / "runs" / "blueprint" / "model")
    parser.add_argument("--model", default=str(EMBEDDED), help="a diffusers folder or hub id")
    parser.add_argument("--pictures", type=Path, default=HERE / "pictures")
    parser.add_argument("--count", type=int, default=64, help="how many prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--write", type=Path, help="a picture of the first prompts, as PNG")
    parser.add_argument("--json", type=Path, help="the figures, with all that made them")
    options = parser.parse_args()
    asked = prompts(options.count, options.pictures)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    how = {"steps": options.steps, "guidance": options.guidance}
    before = drawn(pipeline, asked, **how)
    pipeline.load_lora_weights(options.lora)
    after = drawn(pipeline, asked, **how)
    judge = StyleJudge.load()
    said = {"before": figures(judge, before), "after": figures(judge, after)}
    print(json.dumps(said, indent=2))
    if options.json is not None:
        made_by = {
            "lora": digest(options.lora),
            "model": digest(Path(options.model)),
            "training": history(options.lora.parent),
            "prompts": asked,
            **how,
            **{name: version(name) for name in ("diffedit", "diffusers", "peft", "torch")},
        }
        options.json.write_text(json.dumps(said | {"made by": made_by}, indent=1) + "\n", "utf-8")
    if options.write is not None:
        count = len(SHOWN)
        rows = [np.concatenate(row[:count], axis=1) for row in (before, after)]
        Image.fromarray(np.concatenate(rows)).save(options.write, optimize=True)


if __name__ == "__main__":
    main()
