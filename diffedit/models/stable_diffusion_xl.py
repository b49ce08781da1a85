"""Stable Diffusion XL and its refiner (Podell et al. 2023, arXiv:2307.01952).

A UNet as of Stable Diffusion, which is told more: what a second text encoder makes of the prompt as
a whole, and the sizes of the picture that a training example was cut from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ControlNetUnionModel
from torch import Tensor

from diffedit.errors import ModelError
from diffedit.models import loading
from diffedit.models.clip import RAGGED, Clip
from diffedit.models.protocol import Conditioning
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.models.unet_controls import MODES

#: The beauty, by a predictor's score, that the refiner is told of what it is to paint, and of what
#: guidance leads it away from.
AESTHETIC, UNAESTHETIC = 6.0, 2.5


class StableDiffusionXL(StableDiffusion):
    """The `LatentModel` of Stable Diffusion XL: base, inpainting (9 channels) and refiner."""

    family: ClassVar[str] = "stable-diffusion-xl"
    sized = True
    networks: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "text_encoder_2")
    control_nets: ClassVar[tuple[type, ...]] = (
        *StableDiffusion.control_nets,
        ControlNetUnionModel,
    )
    modes: ClassVar[Mapping[str, int]] = MODES
    kinship: ClassVar[tuple[str, ...]] = (*StableDiffusion.kinship, "addition_embed_type")

    def _ready(self) -> None:
        super()._ready()
        if self.vae.config.force_upcast and self._vae_dtype != torch.float32:
            self.vae.to(torch.float32)  # its activations overflow half precision
        self._settle("text_encoder", "text_encoder_2")
        settings = self.pipe.config
        self.scored = bool(settings.get("requires_aesthetics_score"))
        #: Whether it was trained without a prompt as zeros, not as an empty text.
        self.zeros = bool(settings.get("force_zeros_for_empty_prompt"))
        pooled = self.pipe.text_encoder_2.config.projection_dim
        wanted = self.unet.add_embedding.linear_1.in_features - pooled
        given = (5 if self.scored else 6) * self.unet.config.addition_time_embed_dim
        if wanted != given:
            raise ModelError(
                f"{self.source}: this UNet takes {wanted} numbers about sizes where its pipeline"
                f" gives {given}: requires_aesthetics_score in model_index.json is wrong"
            )

    def _lora_options(self) -> Mapping[str, Any]:
        return {"unet_config": self.unet.config}  # blocks have numbers of their own elsewhere

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        """Embed prompts.

        Returns:
            ``text``: ``(prompts, tokens, d)`` of all text encoders side by side; ``pooled``:
            ``(prompts, p)`` of the second; ``sizes``: ``(prompts, 6 or 5)``, heights before widths:
            of the original, the cut's upper left corner, and of the cut (or a score).
        """
        width, height = size
        end = [UNAESTHETIC if negative else AESTHETIC] if self.scored else [height, width]
        made = []
        for prompt in prompts:
            text, whole = self._read(self._parse(prompt))
            filler: Callable[[], Mapping[str, Tensor]] | None = self._filler()
            if negative and self.zeros and not prompt:
                text, whole, filler = torch.zeros_like(text), torch.zeros_like(whole), None
            sizes = torch.tensor([[height, width, 0, 0, *end]], dtype=text.dtype)
            said = {"text": text, "pooled": whole, "sizes": sizes.to(self.device)}
            made.append(Conditioning(said, RAGGED, filler))
        return Conditioning.stack(made)

    def _plain(self, text: str) -> tuple[Tensor, ...]:
        made, _, whole, _ = self.pipe.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False
        )
        return made, whole

    def _clips(self) -> list[Clip]:
        names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        return [Clip(self.pipe, *both, layer=-2) for both in names if getattr(self.pipe, both[1])]

    def _told(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        said = {key: value.to(dtype) for key, value in conditioning.tensors.items()}
        more = {"text_embeds": said["pooled"], "time_ids": said["sizes"]}
        return {"encoder_hidden_states": said["text"], "added_cond_kwargs": more}


class Family:
    """How Stable Diffusion XL is recognised and loaded."""

    name = StableDiffusionXL.family
    carries = StableDiffusionXL.carries
    sometimes = StableDiffusionXL.sometimes

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named StableDiffusionXL…."""
        return str(config.get("_class_name", "")).startswith("StableDiffusionXL")

    def load(self, source: str, **options: Any) -> StableDiffusionXL:
        """Load from a diffusers folder, a hub id, or a single .safetensors file."""
        from diffusers import StableDiffusionXLImg2ImgPipeline

        # Of all pipelines of the family, the one that has whatever base and refiner have.
        pipe = loading.components(StableDiffusionXLImg2ImgPipeline, source, **options)
        return StableDiffusionXL(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "StableDiffusionXL"]
