"""Models of full size with random weights, as both sides of a benchmark share them.

What a step costs does not depend on the weights. Networks are made on the device, in the type that
they are used in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from diffedit import testing
from diffedit.models.flux import Flux
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.models.stable_diffusion_xl import StableDiffusionXL
from tests.families import FLUX, SD, SDXL
from tests.families.tiny import t5_tokenizer

#: Of the weights.
SEED = 7


@dataclass(frozen=True)
class Size:
    """A model that is measured.

    Attributes:
        make: its components, on the current device and in the current type.
        model: its family.
        peers: pipelines of diffusers by task.
        side: of its own pictures, px.
        dtype: that it is used in.
        guidance: as both sides are given it.
        negative: whether there is a negative prompt.
    """

    make: Callable[[], Any]
    model: Callable[..., Any]
    peers: dict[str, str]
    side: int
    dtype: torch.dtype
    guidance: float
    negative: bool = True


def clip(width: int, layers: int, heads: int, **more: Any) -> CLIPTextConfig:
    """With the tests' tokenizer, which knows bytes: fewer words cost no time."""
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return CLIPTextConfig(vocab_size=514, intermediate_size=4 * width, **sizes, **ends, **more)


def autoencoder(channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=2,
        **more,
    )


_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _on_cpu(cls: Callable[..., Any], **settings: Any) -> Any:
    """Schedulers are made where users make them, of real numbers."""
    with torch.device("cpu"), unset_fake_temporarily():
        return cls(**settings)


def sd15() -> Any:
    """The settings of Stable Diffusion 1.5: a UNet of 860 M."""
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip(768, 12, 12)),
        tokenizer=testing.tiny_tokenizer(),
        scheduler=_on_cpu(DDIMScheduler, clip_sample=False, set_alpha_to_one=False, **_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """The settings of Stable Diffusion XL: a UNet of 2.6 G."""
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        vae=autoencoder(scaling_factor=0.13025, sample_size=1024, force_upcast=False),
        text_encoder=CLIPTextModel(clip(768, 12, 12)),
        text_encoder_2=CLIPTextModelWithProjection(clip(1280, 32, 20, projection_dim=1280)),
        tokenizer=testing.tiny_tokenizer(),
        tokenizer_2=testing.tiny_tokenizer(),
        scheduler=_on_cpu(EulerDiscreteScheduler, timestep_spacing="leading", **_BETAS),
    )


def flux() -> Any:
    """The settings of Flux.1 dev: a transformer of 12 G; its T5 has the width, and 2 layers."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        vae=autoencoder(
            16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            sample_size=1024,
        ),
        text_encoder=CLIPTextModel(clip(768, 12, 12)),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=128, d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64)
        ),
        tokenizer=testing.tiny_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=_on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
    )


def _sized(make: Callable[[], Any], model: Any, peer: str, *more: Any, **other: Any) -> Size:
    peers = {
        "text2img": f"{peer}Pipeline",
        "img2img": f"{peer}Img2ImgPipeline",
        "inpaint": f"{peer}InpaintPipeline",
    }
    return Size(make, model, peers, *more, **other)


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SD_, XL_ = "StableDiffusion", "StableDiffusionXL"
MODELS = {
    "sd15": _sized(sd15, StableDiffusion, SD_, 512, HALF, 7.5),
    "sdxl": _sized(sdxl, StableDiffusionXL, XL_, 1024, HALF, 5.0),
    "flux": _sized(flux, Flux, "Flux", 1024, BRAIN, 3.5, negative=False),
    # For smoke tests.
    "nano-sd15": _sized(SD.pipeline, SD.model, SD_, 64, FULL, 7.5),
    "nano-sdxl": _sized(SDXL.pipeline, SDXL.model, XL_, 64, FULL, 5.0),
    "nano-flux": _sized(FLUX.pipeline, FLUX.model, "Flux", 64, FULL, 3.5, negative=False),
}


def made(size: Size, device: torch.device) -> Any:
    """The components of a model, with random weights, where they are used."""
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            pipe = size.make()
    finally:
        torch.set_default_dtype(before)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device, size.dtype).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
