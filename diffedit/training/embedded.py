"""Makes the embedded model again: ``python -m diffedit.training.embedded --out DIR``.

Three stages, each resumable: the autoencoder, the tokenizer, the denoiser with its text encoder.
``DIR/work`` holds drawn pictures and checkpoints, ``DIR/model`` the folder that ships.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffedit.training.autoencoder import AutoencoderTask, to_tensor
from diffedit.training.denoiser import DenoiserTask, Phase
from diffedit.training.export import export, fold_statistics
from diffedit.training.latents import World
from diffedit.training.loop import Settings, train
from diffedit.training.pool import scene_picture
from diffedit.training.scenes import PLAIN, SIMPLE, draw_scene
from diffedit.training.text import build_tokenizer

log = logging.getLogger(__name__)

PLAIN_128 = World("plain-128", PLAIN, 128)
SIMPLE_128 = World("simple-128", SIMPLE, 128)

PHASES = (
    Phase(0, ((SIMPLE_128, 1.0),)),
    # By now colours are learnt and shapes are not: they need the clearest examples.
    Phase(1100, ((PLAIN_128, 0.8), (SIMPLE_128, 0.2))),
    # At the first rate the weights wander too far from step to step to hold a fine outline.
    Phase(1720, ((PLAIN_128, 0.8), (SIMPLE_128, 0.2)), rate=0.4),
    Phase(1920, ((PLAIN_128, 0.8), (SIMPLE_128, 0.2)), rate=0.5, focus=0.5, floor=0.7),
    Phase(
        2500, ((PLAIN_128, 0.9), (SIMPLE_128, 0.1)), rate=0.5, focus=0.5, floor=0.7, backdrop=0.2
    ),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the weights, besides the machine's arithmetic."""

    seed: int = 0
    vae_steps: int = 920
    steps: int = 4300
    side: int = 128
    phases: tuple[Phase, ...] = PHASES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when the model is finished, 3 when it is to be resumed."""
    parser = argparse.ArgumentParser(prog="python -m diffedit.training.embedded")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--max-minutes", type=float, help="stop, resumably, after this long")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="of the denoiser")
    parser.add_argument(
        "--export", action="store_true", help="only write the model as the checkpoint has it"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = replace(Recipe(), steps=options.steps)
    until = None if options.max_minutes is None else time.monotonic() + 60 * options.max_minutes
    return make(
        options.out,
        recipe,
        resume=options.resume or options.export,
        until=until,
        device=options.device,
        only_export=options.export,
    )


def make(
    out: Path,
    recipe: Recipe,
    *,
    resume: bool,
    until: float | None,
    device: str,
    only_export: bool = False,
) -> int:
    """All stages; ``until`` is a time of ``time.monotonic()``."""
    work = out / "work"
    vae = _autoencoder(work, recipe, resume=resume, until=until, device=device)
    if vae is None:
        return 3
    tokenizer = _tokenizer(work, recipe, resume=resume)
    task = DenoiserTask(work, vae, tokenizer, recipe.phases, seed=recipe.seed, device=device)
    settings = Settings(
        steps=0 if only_export else recipe.steps,
        seed=recipe.seed,
        minutes=_minutes_left(until),
        decay=0.5,
    )
    report, ema = train(task, settings, work / "denoiser.pt", resume=resume)
    for name, module in task.modules.items():
        module.load_state_dict(ema.shadow[name])
        module.to("cpu")
    export(out / "model", vae.cpu(), task.text_encoder, tokenizer, task.unet, side=recipe.side)
    log.info("%s holds the model after %d steps", out / "model", report.step)
    return 0 if report.step >= recipe.steps else 3


def _minutes_left(until: float | None) -> float | None:
    return None if until is None else (until - time.monotonic()) / 60


def _autoencoder(
    work: Path, recipe: Recipe, *, resume: bool, until: float | None, device: str
) -> AutoencoderKL | None:
    """The finished autoencoder with its statistics folded in; ``None`` if time ran out before."""
    done = work / "vae"
    if resume and done.exists():
        return AutoencoderKL.from_pretrained(done).to(device, memory_format=torch.channels_last)
    task = AutoencoderTask(work, seed=recipe.seed, device=device)
    settings = Settings(
        steps=recipe.vae_steps, seed=recipe.seed, minutes=_minutes_left(until), validate_every=250
    )
    report, ema = train(task, settings, work / "vae.pt", resume=resume)
    if report.step < recipe.vae_steps:
        return None
    task.vae.load_state_dict(ema.shadow["vae"])
    fold(task.vae, seed=recipe.seed)
    task.vae.save_pretrained(done)
    return task.vae


def _tokenizer(work: Path, recipe: Recipe, *, resume: bool) -> CLIPTokenizer:
    """The captions' tokenizer; a resumed run keeps the one that its stored batches used."""
    done = work / "tokenizer"
    if resume and done.exists():
        kept: CLIPTokenizer = CLIPTokenizer.from_pretrained(done)
        return kept
    captions = (
        draw_scene(recipe.seed, i, world.mix).caption
        for phase in recipe.phases
        for world, _ in phase.worlds
        for i in range(6000)
    )
    return build_tokenizer(captions, done)


@torch.no_grad()
def fold(vae: AutoencoderKL, *, seed: int, count: int = 512) -> None:
    """Fold the latent statistics of ``count`` drawn scenes into ``vae``."""
    device = next(vae.parameters()).device
    pictures = [scene_picture(i, seed=seed, side=128, mix=SIMPLE) for i in range(count)]
    moments = []
    for part in to_tensor(np.stack(pictures)).split(32):
        posterior = vae.encode(part.to(device, memory_format=torch.channels_last)).latent_dist
        moments.append(posterior.parameters.cpu())
    fold_statistics(vae, torch.cat(moments).to(device))


if __name__ == "__main__":
    raise SystemExit(main())
