"""Measures a finished model and writes its card: ``python -m diffedit.training.report --help``.

The gates run through diffusers' pipelines here; :func:`gates` takes any painter, so that the same
figures can be made through diffedit's Editor and put beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffedit.training.card import card
from diffedit.training.cases import inpaintings, kept_photographs, single_objects
from diffedit.training.evaluate import (
    Figures,
    Painter,
    autoencoder_quality,
    generation,
    inpainting,
    judge_accuracy,
)
from diffedit.training.painters import PipelinePainter
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import RICH, SIMPLE, draw_scene
from diffedit.training.world.source import HELD_OUT

log = logging.getLogger(__name__)

PROMPTS = 240
"""Pictures from nothing that the generation gate makes."""

EDITS = 128
"""Inpaintings that each of the two inpainting gates makes."""


def gates(paint: Painter, *, prompts: int = PROMPTS, edits: int = EDITS) -> dict[str, Figures]:
    """The generation gate and the inpainting gates on drawn backgrounds and kept photographs."""
    figures: dict[str, Figures] = {}
    if prompts:
        figures["generation"] = generation(paint, single_objects(prompts))
        log.info("generation: %s", figures["generation"])
    if edits:
        figures["inpainting_drawn"] = inpainting(paint, inpaintings(edits, "drawn"))
        log.info("inpainting_drawn: %s", figures["inpainting_drawn"])
        figures["inpainting_photos"] = inpainting(paint, inpaintings(edits, "photos"))
        log.info("inpainting_photos: %s", figures["inpainting_photos"])
    return figures


def autoencoder(folder: Path) -> dict[str, Figures]:
    """The autoencoder's PSNR in dB and the judges' own accuracy on what it reconstructs."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    side = int(vae.config.get("sample_size") or 128)
    scenes = [render(draw_scene(HELD_OUT, i, RICH), side).image for i in range(64)]
    return {
        "autoencoder": {
            "scenes_side": side,
            "scenes_db": autoencoder_quality(vae, scenes),
            "photos_db": autoencoder_quality(vae, kept_photographs(256)),
        },
        "judges": judge_accuracy(vae, SIMPLE),
    }


def history(work: Path) -> dict[str, object]:
    """What the checkpoints in ``work`` tell of the training: steps, hours, losses, validations."""
    told: dict[str, object] = {}
    for name in ("vae", "denoiser"):
        state = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)
        told[name] = {
            "steps": len(state["losses"]),
            "minutes": round(state["seconds"] / 60),
            "figures": [[step, figures] for step, figures in state["figures"]],
        }
    return told


def add_engine(
    folder: Path, name: str, paint: Painter, *, prompts: int = PROMPTS, edits: int = EDITS
) -> dict[str, Figures]:
    """Run the gates through another engine's ``paint`` and put the figures into the card.

    ``name`` heads the table's rows; figures of the same name are replaced.
    """
    path = folder / "figures.json"
    figures = json.loads(path.read_text("utf-8")) if path.exists() else {}
    made = gates(paint, prompts=prompts, edits=edits)
    figures.setdefault("engines", {})[name] = made
    write(folder, figures)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: writes ``figures.json`` and ``README.md`` into the model's folder."""
    parser = argparse.ArgumentParser(prog="python -m diffedit.training.report")
    parser.add_argument("--model", type=Path, required=True, help="the diffusers folder to judge")
    parser.add_argument("--work", type=Path, help="the training's work folder, for its history")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rescale", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--edits", type=int, default=EDITS)
    parser.add_argument(
        "--card-only", action="store_true", help="write the card anew, judge nothing"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = options.model / "figures.json"
    figures: dict[str, object] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if options.work is not None:
        figures["training"] = history(options.work)
    if not options.card_only:
        settings = {k: getattr(options, k) for k in ("guidance", "rescale", "steps")}
        figures["sampling"] = settings
        figures |= autoencoder(options.model)
        painter = PipelinePainter(options.model, **settings)
        figures |= gates(painter, prompts=options.prompts, edits=options.edits)
    write(options.model, figures)
    return 0


def write(folder: Path, figures: Mapping[str, object]) -> None:
    """Write ``figures.json`` and the model card made from it into ``folder``."""
    text = json.dumps(figures, indent=1, sort_keys=True) + "\n"
    (folder / "figures.json").write_text(text, "utf-8")
    (folder / "README.md").write_text(card(figures), "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
