"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206).

Transformers over the tokens of text and picture together, trained as rectified flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import SD3ControlNetModel
from torch import Tensor

from diffedit.attention import Layout
from diffedit.models import loading
from diffedit.models.clip import token_weights, weighted
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.prompts import Prompt, parse, tell_unread
from diffedit.schedule import flow_calls_kept


class StableDiffusion3(PipelineModel):
    """The `LatentModel` of Stable Diffusion 3 and 3.5: plain, and for inpainting (33 channels)."""

    family: ClassVar[str] = "stable-diffusion-3"
    carries: ClassVar[frozenset[str]] = frozenset(
        {"control", "lora", "prompt_weights", "shared_attention"}
    )
    sometimes: ClassVar[frozenset[str]] = frozenset({"mask_channels"})
    networks: ClassVar[tuple[str, ...]] = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
    )  # fmt: skip
    patch = 0
    control_nets: ClassVar[tuple[type, ...]] = (SD3ControlNetModel,)
    kinship: ClassVar[tuple[str, ...]] = ("patch_size", "num_attention_heads", "attention_head_dim")

    kept = staticmethod(flow_calls_kept)
    most_shift: ClassVar[float] = 1.16

    def _ready(self) -> None:
        super()._ready()
        self._known_places(self.denoiser.config.pos_embed_max_size)
        self._settle("text_encoder", "text_encoder_2")

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
            ``text``: ``(prompts, tokens, d)``, of the CLIP encoders side by side and then of T5;
            ``pooled``: ``(prompts, p)`` of the CLIP encoders.
        """
        made = [self._read(parse(text)) for text in prompts]
        return Conditioning(
            {
                "text": torch.cat([text for text, _ in made]),
                "pooled": torch.cat([pooled for _, pooled in made]),
            }
        )

    def _read(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """What CLIP and T5 make of a prompt, whose tokens and those that fill up all are seen."""
        text, pooled = self._plain(prompt.text)
        clip = self.pipe.tokenizer_max_length
        if self.pipe.text_encoder_3 is None:
            tell_unread(prompt.text, self.pipe.tokenizer, clip)
        else:
            tell_unread(prompt.text, self.pipe.tokenizer_3, text.shape[1] - clip)
        if prompt.weighted:
            weights = token_weights(self.pipe.tokenizer, prompt, clip)
            rest = text.shape[1] - len(weights)
            t5 = self.pipe.tokenizer_3
            weights += token_weights(t5, prompt, rest) if t5 else [1.0] * rest
            text = weighted(text, self._plain("")[0], weights)
        return text, pooled

    def _plain(self, text: str) -> tuple[Tensor, Tensor]:
        made, _, pooled, _ = self.pipe.encode_prompt(
            text, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return made, pooled

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a ControlNet, which sees the hint as latents."""
        bare = net.config.force_zeros_for_pooled_projection
        pooled = x.conditioning.tensors["pooled"].to(net.dtype)
        text = x.conditioning.tensors["text"].to(net.dtype)
        shown = self._shown(hint, len(x.rows), 0.0 if bare else None)
        blocks = net(
            hidden_states=x.latents.to(net.dtype),
            timestep=x.timestep.expand(len(x.rows)),
            encoder_hidden_states=None if net.config.joint_attention_dim is None else text,
            pooled_projections=torch.zeros_like(pooled) if bare else pooled,
            controlnet_cond=shown.to(net.dtype),
            conditioning_scale=weight,
            return_dict=False,
        )[0]
        return Residuals(tuple(blocks))

    def _layout(self, given: Mapping[str, Any], tokens: int) -> Layout:
        """The picture's tokens come first, and the text's after them, where both attend."""
        picture = int(given["hidden_states"].shape[1])
        return Layout(None if picture == tokens else slice(0, picture))

    def predict(self, x: ModelInput) -> Tensor:
        """The transformer's raw output (the velocity) for every row, in the type of the latents."""
        self._rows = x.rows
        places = list(x.residuals.places) if x.residuals else None
        output = self.denoiser(
            hidden_states=self._seen(x),
            timestep=x.timestep.expand(len(x.rows)),
            encoder_hidden_states=x.conditioning.tensors["text"],
            pooled_projections=x.conditioning.tensors["pooled"],
            block_controlnet_hidden_states=places or None,
            return_dict=False,
        )[0]
        return cast(Tensor, output.to(x.latents.dtype))


class Family:
    """How Stable Diffusion 3 is recognised and loaded."""

    name = StableDiffusion3.family
    carries = StableDiffusion3.carries
    sometimes = StableDiffusion3.sometimes

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named StableDiffusion3…."""
        return str(config.get("_class_name", "")).startswith("StableDiffusion3")

    def load(self, source: str, **options: Any) -> StableDiffusion3:
        """Load from a diffusers folder or a hub id."""
        from diffusers import StableDiffusion3Pipeline

        pipe = loading.components(StableDiffusion3Pipeline, source, **options)
        return StableDiffusion3(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "StableDiffusion3"]
