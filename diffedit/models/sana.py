"""Sana (Xie et al. 2024, arXiv:2410.10629): high resolution at a cost linear in the pixels.

A deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733) leaves few tokens, usually one
for 32 by 32 pixels. The denoiser is a transformer trained as a rectified flow (Esser et al. 2024,
arXiv:2403.03206); the text, read by a language model, comes in by cross-attention.

Attention cannot be shared with a reference: among the picture's tokens it is linear, ``relu(q) (sum
of relu(k) v^T)``, so there are no scores that a term could bias, and no call of torch's attention
to listen to. `style` is therefore not carried.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import SanaControlNetModel
from torch import Tensor

from diffedit.errors import ModelError
from diffedit.models import loading
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.prompts import tell_unread
from diffedit.schedule import flow_calls_kept


class Sana(PipelineModel):
    """The `LatentModel` of Sana and Sana-1.5.

    Attributes:
        instruction: what the language model is told before a prompt, which it was trained with.
    """

    family: ClassVar[str] = "sana"
    carries: ClassVar[frozenset[str]] = frozenset({"control", "lora"})
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    patch = 0
    control_nets: ClassVar[tuple[type, ...]] = (SanaControlNetModel,)
    kinship: ClassVar[tuple[str, ...]] = (
        "num_attention_heads", "attention_head_dim", "caption_channels",
    )  # fmt: skip

    native: ClassVar[int] = 32
    kept = staticmethod(flow_calls_kept)

    def _ready(self) -> None:
        super()._ready()
        # It is stored with no model: diffusers has it as the default of an argument.
        told = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"]
        self.instruction: Sequence[str] = told.default

    @property
    def compat_dtype(self) -> torch.dtype:
        """Latents are float32, whatever the denoiser computes in."""
        return torch.float32

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        """Embed prompts; what guidance leads away from stands without the instruction.

        Returns:
            ``text``: ``(prompts, tokens, d)`` of the language model's last layer; ``shown``:
            ``(prompts, tokens)``, 1 where a token says something.
        """
        told = None if negative else self.instruction
        made = [
            self.pipe.encode_prompt(
                text, False, device=self.device, complex_human_instruction=told
            )[:2]
            for text in prompts
        ]
        for prompt, (text, _) in zip(prompts, made, strict=True):
            self._tell_unread(prompt.strip().lower(), text.shape[1], told)  # as it is read
        return Conditioning(
            {
                "text": torch.cat([text for text, _ in made]),
                "shown": torch.cat([shown for _, shown in made]),
            }
        )

    def _tell_unread(self, prompt: str, tokens: int, told: Sequence[str] | None) -> None:
        """Warn of what is not read: of a prompt with an instruction as many tokens less one."""
        before = "\n".join(told or ())
        said = len(self.pipe.tokenizer.encode(before)) - 2 if told else 0
        tell_unread(prompt, self.pipe.tokenizer, said + tokens, before + prompt)

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a ControlNet, which sees the hint as latents."""
        blocks = net(
            x.latents.to(net.dtype),
            timestep=x.timestep.expand(len(x.rows)),
            controlnet_cond=self._shown(hint, len(x.rows)).to(net.dtype),
            conditioning_scale=weight,
            return_dict=False,
            **self._told(x, net.dtype),
        )[0]
        return Residuals(tuple(blocks))

    def _told(self, x: ModelInput, dtype: torch.dtype) -> dict[str, Tensor]:
        """The text, for the denoiser and its control networks."""
        said = x.conditioning.tensors
        return {
            "encoder_hidden_states": said["text"].to(dtype),
            "encoder_attention_mask": said["shown"],
        }

    def predict(self, x: ModelInput) -> Tensor:
        """The transformer's raw output (the velocity) for every row, in the type of the latents."""
        self._rows = x.rows
        places = x.residuals.places if x.residuals else ()
        output = self.denoiser(
            self._seen(x),
            timestep=x.timestep.expand(len(x.rows)) * self.denoiser.config.timestep_scale,
            controlnet_block_samples=tuple(place.to(self.dtype) for place in places) or None,
            return_dict=False,
            **self._told(x, self.dtype),
        )[0]
        return cast(Tensor, output[:, : self.channels].to(x.latents.dtype))


class Family:
    """How Sana is recognised and loaded."""

    name = Sana.family
    carries = Sana.carries
    sometimes = Sana.sometimes
    half = "bfloat16"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named Sana…, but not those for video."""
        named = str(config.get("_class_name", ""))
        return named.startswith("Sana") and not ("Video" in named or "WM" in named)

    def load(self, source: str, **options: Any) -> Sana:
        """Load from a diffusers folder or a hub id.

        Raises:
            ModelError: it is Sana-Sprint (Chen et al. 2025, arXiv:2503.09641), whose noise levels
                are angles, which a `Schedule` does not know.
        """
        from diffusers import SanaPipeline

        named = loading.class_name(source, options)
        if "Sprint" in named:
            raise ModelError(f"{source}: Sana-Sprint is not supported yet; Sana and Sana-1.5 are")
        if options["dtype"] == torch.float16:  # its range is too narrow for all but the denoiser
            wider = dict.fromkeys(("text_encoder", "vae"), torch.bfloat16)
            options["dtype"] = {"default": torch.float16, **wider}
        pipe = loading.components(SanaPipeline, source, **options)
        return Sana(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "Sana"]
