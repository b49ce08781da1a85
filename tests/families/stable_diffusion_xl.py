"""Stable Diffusion XL in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffedit import testing
from diffedit.models.stable_diffusion_xl import StableDiffusionXL
from tests.families.stable_diffusion import unet_net
from tests.families.tiny import TEXT, Tiny, text_settings


def xl_pipeline(
    *,
    in_channels: int = 4,
    prediction_type: str = "epsilon",
    seed: int = 0,
    refiner: bool = False,
    upcast: bool = True,
    width: int = TEXT,
    **scheduler: Any,
) -> StableDiffusionXLImg2ImgPipeline:
    """Random components of Stable Diffusion XL, about 1.5 M weights.

    Args:
        upcast: whether the autoencoder wants float32; the pipeline for instructions cannot.
        refiner: with one text encoder, and an aesthetic score in the place of a size.
        width: of the second text encoder, which in truth is wider than the first.
    """
    small: Any = testing.tiny_pipeline(seed=seed)
    small.vae.register_to_config(force_upcast=upcast)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        unet = UNet2DConditionModel(
            sample_size=testing.NATIVE // 8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width if refiner else TEXT + width,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + width,
        )
        first = CLIPTextModel(text_settings())
        second = CLIPTextModelWithProjection(text_settings(hidden_size=width, projection_dim=width))
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": prediction_type,
        # Of other schedulers; the real configuration says them too.
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=small.vae,
        text_encoder=None if refiner else first.eval().requires_grad_(False),
        text_encoder_2=second.eval().requires_grad_(False),
        tokenizer=None if refiner else testing.tiny_tokenizer(),
        tokenizer_2=testing.tiny_tokenizer(),
        unet=unet.eval().requires_grad_(False),
        scheduler=EulerDiscreteScheduler.from_config({**settings, **scheduler}),
        requires_aesthetics_score=refiner,
        force_zeros_for_empty_prompt=not refiner,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SDXL = Tiny(
    "stable-diffusion-xl",
    xl_pipeline,
    StableDiffusionXL,
    {
        "text2img": "StableDiffusionXLPipeline",
        "img2img": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "inpaint model": "StableDiffusionXLInpaintPipeline",
        "v": "StableDiffusionXLPipeline",
        "instruct": "StableDiffusionXLInstructPix2PixPipeline",
        "pag": "StableDiffusionXLPAGPipeline",
        "control": "StableDiffusionXLControlNetPipeline",
        "control img2img": "StableDiffusionXLControlNetImg2ImgPipeline",
        "control inpaint": "StableDiffusionXLControlNetInpaintPipeline",
        "control of holes": "StableDiffusionXLControlNetInpaintPipeline",
    },
    nets=unet_net,
    instructed={"in_channels": 8, "upcast": False},
)
