"""The parts of a latent-diffusion model, loaded for training, and new ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit.errors import InputError, ModelError
from diffedit.models.loading import EMBEDDED, TINY, components
from diffedit.training.kernels import quick
from diffedit.training.text import HIDDEN


@dataclass(slots=True)
class Parts:
    """What a model consists of; weights in float32, nothing trainable, in evaluation mode."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: Any


def load(source: str, device: torch.device) -> Parts:
    """The parts of the model at ``source``: "tiny", a diffusers folder or a hub id.

    Raises:
        ModelError: nothing is there, or it is of another family than Stable Diffusion 1 and 2.
    """
    where = str(EMBEDDED) if source == TINY else os.path.expanduser(source)  # noqa: PTH111
    options = {"device": device, "dtype": torch.float32, "revision": None, "variant": None}
    pipeline = components(StableDiffusionPipeline, where, **options)
    unet = pipeline.unet
    other = unet is None or unet.config.in_channels != pipeline.vae.config.latent_channels
    if other or unet.config.addition_embed_type is not None:  # XL's wants more than a text
        raise ModelError(f"{source}: training takes text-to-image models of Stable Diffusion 1, 2")
    for module in (pipeline.vae, pipeline.text_encoder, unet):
        module.requires_grad_(False).eval().to(device)
    quick(pipeline.vae, pipeline.text_encoder, unet)
    pipeline.vae.to(memory_format=torch.channels_last)
    return Parts(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, unet, pipeline.scheduler)


def new_unet(
    widths: tuple[int, ...], *, plain_levels: int, sample_size: int, hidden: int = HIDDEN
) -> UNet2DConditionModel:
    """A ``UNet2DConditionModel`` of random weights.

    The ``plain_levels`` finest levels have no attention; all others have cross-attention, without
    which at the finer of them the words reach only the coarse ones, and shapes are not learnt.

    Args:
        widths: channels per level, the finest first; multiples of 16.
        plain_levels: how many levels are convolutions only.
        sample_size: the native side in latent cells.
        hidden: width of the text embeddings.
    """
    if any(width % 16 for width in widths) or not 0 <= plain_levels < len(widths):
        raise InputError(
            f"widths {list(widths)} with {plain_levels} plain levels: should be multiples of 16,"
            " and fewer plain levels than levels"
        )
    kinds = [level < plain_levels for level in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple("DownBlock2D" if p else "CrossAttnDownBlock2D" for p in kinds),
        up_block_types=tuple("UpBlock2D" if p else "CrossAttnUpBlock2D" for p in kinds[::-1]),
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=hidden,
        # diffusers reads this as the number of heads: 32 channels to a head at every level.
        attention_head_dim=tuple(max(1, width // 32) for width in widths),
        norm_num_groups=32 if all(width % 32 == 0 for width in widths) else 16,
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction down to zero terminal signal (Lin et al. 2023, arXiv:2305.08891)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )
