"""From trained modules to the diffusers folder that ships."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from diffedit.training.files import whole_folder
from diffedit.training.parts import Parts
from diffedit.training.text import save_tokenizer

SHARD = "15MB"
"""Largest weight file: hosts of repositories dislike bigger ones."""


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, moments: Tensor) -> None:
    """Give the latents mean 0 and standard deviation 1 per channel, inside ``vae``'s own weights.

    ``moments`` are the encoder's output for a sample of pictures, (n, 8, h, w): means and
    log-variances. ``quant_conv`` then subtracts and divides, ``post_quant_conv`` undoes it, and
    ``scaling_factor`` is 1, which every pipeline understands.
    """
    means = moments[:, :4]
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    into, back = vae.quant_conv, vae.post_quant_conv
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.weight[:4] /= std.view(-1, 1, 1, 1)
    into.bias[4:] -= 2 * std.log()
    back.bias += (back.weight * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    back.weight *= std.view(1, -1, 1, 1)


def export(
    folder: Path,
    parts: Parts,
    *,
    side: int,
) -> None:
    """Write a Stable Diffusion folder in fp16 safetensors, native size ``side`` pixels.

    ``folder`` is replaced as a whole and is never seen half written. A model card that stands in it
    is kept. The parts stay in the precision that they have.
    """
    vae, text_encoder, unet = (
        copy.deepcopy(module).to("cpu", torch.float16).eval()
        for module in (parts.vae, parts.text_encoder, parts.unet)
    )
    unet.register_to_config(sample_size=side // 8)
    vae.register_to_config(sample_size=side)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_folder(folder) as made:
        pipeline.save_pretrained(made, safe_serialization=True, max_shard_size=SHARD)
        save_tokenizer(parts.tokenizer, made / "tokenizer")
        # Objects come out whole at the size of the training only; a picture that is there already
        # may be worked on at more, and keeps more detail then.
        sizes = {"sides": [side, side], "whole": 4 * side}
        (made / "diffedit.json").write_text(json.dumps(sizes) + "\n", "utf-8")
        for config in made.rglob("config.json"):
            # Where the weights came from is a folder of the machine that made them.
            edit_json(config, _name_or_path=None)
        # transformers takes the dtype of the file unless the configuration names one; a pipeline
        # loaded without ``torch_dtype`` would then be half fp16 and half fp32, and fail.
        edit_json(made / "text_encoder" / "config.json", dtype="float32", torch_dtype=None)
        card = folder / "README.md"
        if card.exists():
            shutil.copy2(card, made / "README.md")


def edit_json(config: Path, **changes: str | None) -> None:
    """Set entries of a JSON file; ``None`` removes one."""
    values = json.loads(config.read_text("utf-8")) | changes
    kept = {key: value for key, value in values.items() if key not in changes or value is not None}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", "utf-8")
