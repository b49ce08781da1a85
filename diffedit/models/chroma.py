"""Chroma (Lodestone Rock 2025): Flux without distilled guidance, with one text encoder.

What Flux learns from the pooled prompt and a guidance scale, a small network makes of the timestep.
Guidance is classifier-free, and what only fills up the text is hidden from attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffedit.models import loading
from diffedit.models.flux import Flux
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput
from diffedit.prompts import tell_unread


class Chroma(Flux):
    """The `LatentModel` of Chroma. It has no control networks."""

    family: ClassVar[str] = "chroma"
    carries: ClassVar[frozenset[str]] = frozenset({"lora", "shared_attention"})
    sometimes: ClassVar[frozenset[str]] = frozenset()
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    control_nets: ClassVar[tuple[type, ...]] = ()

    _roles = PipelineModel._roles

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
            ``text``: ``(prompts, tokens, d)`` of T5; ``shown``: ``(prompts, tokens)``, 1 where a
            token says something, and for the first one that only fills up.
        """
        made = [
            self.pipe.encode_prompt(text, device=self.device, do_classifier_free_guidance=False)
            for text in prompts
        ]
        for prompt, (text, *_) in zip(prompts, made, strict=True):
            tell_unread(prompt, self.pipe.tokenizer, text.shape[1])
        texts, shown = [one[0] for one in made], [one[2] for one in made]
        return Conditioning({"text": torch.cat(texts), "shown": torch.cat(shown)})

    def _told(self, x: ModelInput, dtype: torch.dtype, guided: bool) -> dict[str, Any]:
        """What is wanted and where, and which tokens are shown."""
        shown = x.conditioning.tensors["shown"].bool()
        height, width = x.latents.shape[2:]
        picture = shown.new_ones(len(shown), height * width // self.folded)
        # diffusers adds ones and zeros to the scores, which hides nothing (its issue 12116).
        return self._placed(x, dtype) | {"attention_mask": torch.cat([shown, picture], dim=1)}


class Family:
    """How Chroma is recognised and loaded."""

    name = Chroma.family
    carries = Chroma.carries
    sometimes = Chroma.sometimes
    half = "bfloat16"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named Chroma…."""
        return str(config.get("_class_name", "")).startswith("Chroma")

    def load(self, source: str, **options: Any) -> Chroma:
        """Load from a diffusers folder or a hub id."""
        from diffusers import ChromaPipeline

        pipe = loading.components(ChromaPipeline, source, **options)
        return Chroma(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Chroma", "Family"]
