"""Chroma in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from diffedit.models.chroma import Chroma
from tests.families.stable_diffusion_3 import sd3_pipeline
from tests.families.tiny import TEXT, Tiny, t5_tokenizer


def chroma_pipeline(*, in_channels: int = 16, seed: int = 0) -> ChromaPipeline:
    """Random components of Chroma, about half a million weights."""
    small: Any = sd3_pipeline(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 3)
        transformer = ChromaTransformer2DModel(
            in_channels=4 * in_channels,
            out_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    pipe = ChromaPipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small.vae,
        text_encoder=small.text_encoder_3,
        tokenizer=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _mended(pipe: Any) -> None:
    # Its inpainting pipeline asks for what Chroma's configuration does not have.
    pipe.transformer.register_to_config(guidance_embeds=False)
    prepare = pipe._prepare_attention_mask

    def hiding(*args: Any, **kwargs: Any) -> torch.Tensor:
        """They add ones and zeros to scores (diffusers issue 12116); a mask is meant."""
        return prepare(*args, **kwargs).bool()  # type: ignore[no-any-return]

    pipe._prepare_attention_mask = hiding


CHROMA = Tiny(
    "chroma",
    chroma_pipeline,
    Chroma,
    {
        "text2img": "ChromaPipeline",
        "img2img": "ChromaImg2ImgPipeline",
        "inpaint": "ChromaInpaintPipeline",
    },
    predicts="flow_prediction",
    channels=16,
    long=True,
    mended=_mended,
)
