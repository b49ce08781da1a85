"""The models that benchmarks run on, each as one set of components that both sides share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from diffedit import Editor
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.testing import tiny_pipeline, tiny_tokenizer

#: tiny: the embedded model; random: 35 M parameters of random weights; nano: for smoke tests.
MODELS = ("tiny", "random", "nano")


def editor(name: str, dtype: str = "float32") -> Editor:
    """An editor on the CPU; its components are ``.model.pipe``."""
    if name == "tiny":
        return Editor.load(device="cpu", dtype=dtype)
    pipe: Any = random_pipeline() if name == "random" else tiny_pipeline()
    return Editor(StableDiffusion(pipe.to(dtype=getattr(torch, dtype)), f"{name} (random weights)"))


def peer(cls: Any, made: Editor) -> Any:
    """A diffusers pipeline on the very components of an editor, with a scheduler of its own."""
    parts = dict(made.model.pipe.components)  # type: ignore[attr-defined]
    parts["scheduler"] = copy.deepcopy(parts["scheduler"])
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Like Stable Diffusion 1.5 in small: 4 levels, f = 8, native 256 px, UNet 35 M, VAE 4 M."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 128, 256, 384),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=256,
            attention_head_dim=(2, 4, 8, 12),  # the number of heads, each of 32
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 128, 128),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=16,
            sample_size=256,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=514,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=8,
                max_position_embeddings=77,
                bos_token_id=512,
                eos_token_id=513,
                pad_token_id=513,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        text_encoder=text.eval().requires_grad_(False),
        tokenizer=tiny_tokenizer(),
        unet=unet.eval().requires_grad_(False),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
