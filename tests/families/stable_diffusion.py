"""Stable Diffusion in small."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel

from diffedit import testing
from diffedit.models.stable_diffusion import StableDiffusion
from tests.families.tiny import Tiny


def unet_net(unet: Any) -> Any:
    """A ControlNet for a UNet."""
    return ControlNetModel.from_unet(unet, conditioning_channels=3)


SD = Tiny(
    "stable-diffusion",
    testing.tiny_pipeline,
    StableDiffusion,
    {
        "text2img": "StableDiffusionPipeline",
        "img2img": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
        "inpaint model": "StableDiffusionInpaintPipeline",
        "v": "StableDiffusionPipeline",
        "instruct": "StableDiffusionInstructPix2PixPipeline",
        "pag": "StableDiffusionPAGPipeline",
        "control": "StableDiffusionControlNetPipeline",
        "control img2img": "StableDiffusionControlNetImg2ImgPipeline",
        "control inpaint": "StableDiffusionControlNetInpaintPipeline",
        "control of holes": "StableDiffusionControlNetInpaintPipeline",
    },
    nets=unet_net,
    instructed={"in_channels": 8},
)
