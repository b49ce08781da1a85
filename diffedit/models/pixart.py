"""PixArt-α (Chen et al. 2023, arXiv:2310.00426) and PixArt-Σ (Chen et al. 2024, arXiv:2403.04692).

Transformers over the picture's tokens with text cross-attention, trained as ordinary diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from diffedit.models import loading
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput
from diffedit.prompts import tell_unread


class PixArt(PipelineModel):
    """The `LatentModel` of PixArt-α and PixArt-Σ. It has no control networks."""

    family: ClassVar[str] = "pixart"
    carries: ClassVar[frozenset[str]] = frozenset({"shared_attention"})
    sized = True
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    patch = 0

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
            token says something; ``sizes``: ``(prompts, 2)``, height and width; ``ratio``:
            ``(prompts, 1)``, height over width.
        """
        made = [self.pipe.encode_prompt(text, False, device=self.device)[:2] for text in prompts]
        for prompt, (text, _) in zip(prompts, made, strict=True):
            tell_unread(prompt.lower(), self.pipe.tokenizer, text.shape[1])  # as it is read
        width, height = size
        sizes = torch.tensor([[height, width]]).to(self.device, made[0][0].dtype)
        return Conditioning(
            {
                "text": torch.cat([text for text, _ in made]),
                "shown": torch.cat([shown for _, shown in made]),
                "sizes": sizes.repeat(len(prompts), 1),
                "ratio": torch.full_like(sizes[:, :1], height / width).repeat(len(prompts), 1),
            }
        )

    def predict(self, x: ModelInput) -> Tensor:
        """The transformer's raw output for every row, without the variance that it may learn."""
        self._rows = x.rows
        said = x.conditioning.tensors
        taken = self.denoiser.config.sample_size == 128  # α at 1024 px is told of sizes
        output = self.denoiser(
            self._seen(x),
            encoder_hidden_states=said["text"],
            encoder_attention_mask=said["shown"],
            timestep=x.timestep.expand(len(x.rows)),
            added_cond_kwargs={
                "resolution": said["sizes"] if taken else None,
                "aspect_ratio": said["ratio"] if taken else None,
            },
            return_dict=False,
        )[0]
        return cast(Tensor, output[:, : self.channels].to(x.latents.dtype))


class Family:
    """How PixArt is recognised and loaded."""

    name = PixArt.family
    carries = PixArt.carries
    sometimes = PixArt.sometimes

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named PixArt…."""
        return str(config.get("_class_name", "")).startswith("PixArt")

    def load(self, source: str, **options: Any) -> PixArt:
        """Load from a diffusers folder or a hub id, with the class that the folder names."""
        import diffusers

        named = loading.class_name(source, options)
        pipe = loading.components(getattr(diffusers, named), source, **options)
        return PixArt(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "PixArt"]
