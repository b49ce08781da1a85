"""Stable Diffusion 3 in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from diffedit import testing
from diffedit.models.stable_diffusion_3 import StableDiffusion3
from tests.families.tiny import TEXT, Tiny, t5_encoder, t5_tokenizer, text_settings


def sd3_pipeline(
    *, in_channels: int | None = None, seed: int = 0, dynamic: bool = False
) -> StableDiffusion3Pipeline:
    """Random components of Stable Diffusion 3, about half a million weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=testing.NATIVE,
            shift_factor=0.0609,
            scaling_factor=1.5305,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        transformer = SD3Transformer2DModel(
            sample_size=testing.NATIVE // 8,
            patch_size=2,
            in_channels=in_channels or 16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        clips = [CLIPTextModelWithProjection(text_settings(projection_dim=TEXT)) for _ in range(2)]
        t5 = t5_encoder()
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=flow,
        vae=vae.eval().requires_grad_(False),
        text_encoder=clips[0].eval().requires_grad_(False),
        tokenizer=testing.tiny_tokenizer(),
        text_encoder_2=clips[1].eval().requires_grad_(False),
        tokenizer_2=testing.tiny_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _net(transformer: Any) -> Any:
    return SD3ControlNetModel.from_transformer(
        transformer, num_layers=2, num_extra_conditioning_channels=0
    )


SD3 = Tiny(
    "stable-diffusion-3",
    sd3_pipeline,
    StableDiffusion3,
    {
        "text2img": "StableDiffusion3Pipeline",
        "img2img": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
        "inpaint model": "StableDiffusion3InpaintPipeline",
        "control": "StableDiffusion3ControlNetPipeline",
    },
    frozenset({"euler_karras", "dpmpp_2m", "heun", "unipc"}),
    33,
    "control_image",
    "flow_prediction",
    16,
    _net,
)
