"""Loading a model beside diffusers: time and most memory, each in a fresh process.

python -m bench.loading --model diffedit/models/embedded --rounds 5

Sides take turns, and a ratio is taken within each round. Clock and memory run from before the call
that loads to after it; libraries are imported before, by both sides the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench import measure

RESULTS = Path(__file__).parent / "results"
SIDES = ("diffedit", "diffusers")
#: No worse, within what a machine that others work on lets one tell.
MOST = 1.05


def loaded(side: str, model: str, dtype: str) -> dict[str, float]:
    """Load a model in this process: seconds, CPU seconds, and MiB above what was there before."""
    import torch
    from diffusers import DiffusionPipeline

    import diffedit

    # Imported when first used, and plugins are found once in a process, whatever is loaded.
    editor = diffedit.Editor
    diffedit.edits()
    began, cpu = time.perf_counter(), time.process_time()
    with measure.Peak() as peak:
        if side == "diffedit":
            made: Any = editor.load(model, device="cpu", dtype=dtype)
        else:
            # As its users load it who want what an editor has: no safety checker, no gradients.
            made = DiffusionPipeline.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            ).to("cpu")
        seconds, used = time.perf_counter() - began, time.process_time() - cpu
    assert made is not None
    return {"seconds": seconds, "cpu": used, "mib": peak.mib or 0.0}


def raced(model: str, dtype: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each side took in each round; the first, which warms the disk's cache, is left out."""
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side in SIDES if turn % 2 else reversed(SIDES):
            line = ["--side", side, "--model", model, "--dtype", dtype]
            made = subprocess.run(
                [sys.executable, "-m", "bench.loading", *line],
                capture_output=True,
                text=True,
                check=True,
                cwd=measure.ROOT,
            )
            if turn:
                taken[side].append(json.loads(made.stdout.splitlines()[-1]))
    return taken


def ratio(taken: dict[str, list[dict[str, float]]], what: str) -> float:
    """Of diffedit to diffusers: the median over the rounds."""
    ours, theirs = (taken[side] for side in SIDES)
    return median(a[what] / max(b[what], 1e-9) for a, b in zip(ours, theirs, strict=True))


def random_model(folder: Path) -> None:
    """Stable Diffusion 1.5 in its real sizes but for half the channels, 1 GB, of random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from bench.sizes import autoencoder, clip
    from diffedit import testing

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(160, 320, 640, 640),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip(768, 12, 12)),
        tokenizer=testing.tiny_tokenizer(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def table(model: str, taken: dict[str, list[dict[str, float]]]) -> str:
    """Medians of both sides, and the ratios."""
    names = {"seconds": "s", "cpu": "s of CPU", "mib": "MiB at most"}
    lines = [f"### {model}", "", "| | diffedit | diffusers | ratio | |", "|---|---|---|---|---|"]
    for what, unit in names.items():
        ours, theirs = (median(one[what] for one in taken[side]) for side in SIDES)
        value = ratio(taken, what)
        met = "no worse" if value <= MOST else "**worse**"
        lines.append(f"| {unit} | {ours:.2f} | {theirs:.2f} | {value:.2f}× | {met} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description="Loading a model, beside diffusers.")
    parser.add_argument("--model", help="a folder; default: the embedded one, and a random one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", choices=SIDES, help="load it once here, and print what it took")
    parser.add_argument("--json", type=Path, help="where to write what each round took")
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(loaded(options.side, options.model, options.dtype)))
        return []
    from diffedit.models.loading import EMBEDDED

    with tempfile.TemporaryDirectory() as place:
        models = {options.model: options.model} if options.model else {"embedded": str(EMBEDDED)}
        if not options.model:
            random_model(Path(place))
            models["random, 1 GB"] = place
        taken = {
            name: raced(where, options.dtype, options.rounds) for name, where in models.items()
        }
    tables = [table(name, one) for name, one in taken.items()]
    print("\n".join(tables), flush=True)
    if options.json:
        about = {"date": measure.today(), "commit": measure.commit(), "rounds": options.rounds}
        record = about | {"machine": measure.machine(options.dtype), "taken": taken}
        options.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return tables


if __name__ == "__main__":
    main()
