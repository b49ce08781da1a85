"""Flux.1 in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel

from diffedit import testing
from diffedit.models.flux import Flux
from tests.families.stable_diffusion_3 import sd3_pipeline
from tests.families.tiny import TEXT, Tiny, t5_tokenizer, text_settings


def flux_pipeline(
    *,
    in_channels: int = 16,
    seed: int = 0,
    guidance_embeds: bool = True,
    kind: type[DiffusionPipeline] = FluxPipeline,
) -> DiffusionPipeline:
    """Random components of Flux.1, about half a million weights.

    Args:
        in_channels: to a latent cell.
        kind: its pipeline, which says whether it is Kontext.
    """
    small: Any = sd3_pipeline(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        transformer = FluxTransformer2DModel(
            in_channels=4 * in_channels,
            out_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        clip = CLIPTextModel(text_settings())
    pipe = kind(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small.vae,
        text_encoder=clip.eval().requires_grad_(False),
        tokenizer=testing.tiny_tokenizer(),
        text_encoder_2=small.text_encoder_3,
        tokenizer_2=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _net(transformer: Any) -> Any:
    return FluxControlNetModel.from_transformer(
        transformer,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=transformer.config.attention_head_dim,
        num_attention_heads=transformer.config.num_attention_heads,
        load_weights_from_transformer=False,
    )


FLUX = Tiny(
    "flux",
    flux_pipeline,
    Flux,
    {
        "text2img": "FluxPipeline",
        "img2img": "FluxImg2ImgPipeline",
        "distilled": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
        "inpaint model": "FluxFillPipeline",
        "instruct": "FluxKontextPipeline",
        "instruct, true guidance": "FluxKontextPipeline",
        "instruct inpaint": "FluxKontextInpaintPipeline",
        "control": "FluxControlNetPipeline",
        "control, true guidance": "FluxControlNetPipeline",
        "control img2img": "FluxControlNetImg2ImgPipeline",
        "control inpaint": "FluxControlNetInpaintPipeline",
        "hint model": "FluxControlPipeline",
        "hint model img2img": "FluxControlImg2ImgPipeline",
    },
    inpaint_channels=96,
    hint="control_image",
    predicts="flow_prediction",
    channels=16,
    nets=_net,
    instructed={"kind": FluxKontextPipeline},
)
