"""PixArt in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from diffedit import testing
from diffedit.models.pixart import PixArt
from tests.families.tiny import TEXT, Tiny, t5_encoder, t5_tokenizer


def pixart_pipeline(
    *,
    in_channels: int = 4,
    prediction_type: str = "epsilon",
    seed: int = 0,
    told: bool = False,
    **scheduler: Any,
) -> PixArtAlphaPipeline:
    """Random components of PixArt, about half a million weights.

    Args:
        told: of sizes, as the large one of PixArt-α is.
    """
    small = testing.tiny_pipeline(prediction_type=prediction_type, seed=seed, **scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 4)
        transformer = PixArtTransformer2DModel(
            sample_size=128 if told else testing.NATIVE // 8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=in_channels,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=2 * TEXT,
            use_additional_conditions=told,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        t5 = t5_encoder()
    pipe = (PixArtAlphaPipeline if told else PixArtSigmaPipeline)(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=small.scheduler,
        vae=small.vae,
        text_encoder=t5,
        tokenizer=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXART = Tiny(
    "pixart",
    pixart_pipeline,
    PixArt,
    {
        "text2img": "PixArtSigmaPipeline",
        "v": "PixArtSigmaPipeline",
        "told": "PixArtAlphaPipeline",
    },
)
