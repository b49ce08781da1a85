"""Painters for the gates out of diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image


class PipelinePainter:
    """``StableDiffusionPipeline`` and, where a mask is given, its inpainting sibling."""

    def __init__(
        self, folder: Path, *, guidance: float = 5.0, rescale: float = 0.0, steps: int = 20
    ) -> None:
        self.text2image = StableDiffusionPipeline.from_pretrained(folder)
        self.inpaint = StableDiffusionInpaintPipeline(
            **self.text2image.components, requires_safety_checker=False
        )
        for pipeline in (self.text2image, self.inpaint):
            pipeline.set_progress_bar_config(disable=True)
        self.guidance, self.rescale, self.steps = guidance, rescale, steps

    def __call__(
        self, image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
    ) -> Image.Image:
        """A picture of ``image``'s size, or the model's own; see :class:`Painter`."""
        generator = torch.Generator().manual_seed(seed)
        common = {
            "prompt": prompt,
            "guidance_scale": self.guidance,
            "num_inference_steps": self.steps,
            "generator": generator,
        }
        if image is None or mask is None:
            made = self.text2image(**common, guidance_rescale=self.rescale)
        else:
            width, height = image.size
            made = self.inpaint(
                **common, image=image, mask_image=mask, width=width, height=height, strength=1.0
            )
        picture: Image.Image = made.images[0]
        return picture
