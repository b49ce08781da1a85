"""Qwen-Image and Qwen-Image-Edit (Qwen team 2025, arXiv:2508.02324).

A transformer over the tokens of text and picture together, as in Flux, trained as a rectified flow.
A language model that sees (Qwen2.5-VL) reads the prompt, and with it the picture of an instruction;
the autoencoder is one of videos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from diffusers import QwenImageControlNetModel, QwenImagePipeline
from PIL import Image
from torch import Tensor

from diffedit.attention import Layout
from diffedit.errors import InputError
from diffedit.guidance import NEGATIVE, POSITIVE, classifier_free, kept_in_length
from diffedit.models import loading
from diffedit.models.flux import Flux, for_each_block, packed, unpacked
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.prompts import tell_unread

#: Tokens of a prompt that are read.
LONGEST = 512
#: Where a picture stands in a text.
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
#: What stands for pictures and videos there, which a prompt has to leave to them.
PADS = ("<|image_pad|>", "<|video_pad|>")


class QwenImage(Flux):
    """The `LatentModel` of Qwen-Image.

    Its configuration may ask for distilled guidance, but diffusers' transformer has no weights for
    it: guidance is classifier-free.
    """

    family: ClassVar[str] = "qwen-image"
    carries: ClassVar[frozenset[str]] = frozenset({"control", "lora", "shared_attention"})
    sometimes: ClassVar[frozenset[str]] = frozenset({"instructions", "reference_tokens"})
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    control_nets: ClassVar[tuple[type, ...]] = (QwenImageControlNetModel,)
    following: ClassVar[str] = "QwenImageEdit"
    video: ClassVar[bool] = True

    _roles = PipelineModel._roles

    def _ready(self) -> None:
        super()._ready()
        self._plus = "Plus" in type(self.pipe).__name__
        #: The components as those of Qwen-Image, which says how a prompt alone is read.
        self._plain = self.pipe
        if not isinstance(self.pipe, QwenImagePipeline):
            names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
            self._plain = QwenImagePipeline(**{name: getattr(self.pipe, name) for name in names})
        if "reference_tokens" in self.capabilities:  # the encoder's eyes, as `_settle`
            with torch.no_grad():
                self._read("", [torch.zeros(1, 3, 56, 56)])

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
            ``text``: ``(prompts, tokens, d)`` of the language model, without the words that every
            prompt is put into; ``said``: ``(prompts,)``, how many tokens say something; it stays on
            the CPU, where asking it makes no GPU wait.
        """
        made = [self._read(text, pictures) for text in prompts]
        ragged = frozenset({"text"})
        return Conditioning.stack(
            [Conditioning({"text": x, "said": torch.tensor([x.shape[1]])}, ragged) for x in made]
        )

    def _read(self, text: str, pictures: Sequence[Tensor]) -> Tensor:
        """What the language model makes of a text and the pictures that it speaks of."""
        if not pictures or "reference_tokens" not in self.capabilities:
            plain: Any = self._plain
            alone, _ = plain.encode_prompt(text, self.device, max_sequence_length=LONGEST)
            template, start = plain.prompt_template_encode, plain.prompt_template_encode_start_idx
            tell_unread(text, plain.tokenizer, start + LONGEST, template.format(text))
            return cast(Tensor, alone)
        if any(pad in text for pad in PADS):
            raise InputError(f"a prompt cannot hold {' or '.join(PADS)}")
        if self._plus:
            seen = "".join(f"Picture {number}: {SEEN}" for number in range(1, len(pictures) + 1))
        else:
            seen = SEEN * (len(pictures) - 1)  # one is in the template
        most = 384 if self._plus else 1024
        given = self.pipe.processor(
            text=[self.pipe.prompt_template_encode.format(seen + text)],
            images=[_picture(one, most) for one in pictures],
            return_tensors="pt",
        )
        # All of it: without the kinds of its tokens it does not know where in a picture they are.
        states = self.pipe.text_encoder(**given.to(self.device), output_hidden_states=True)
        read: Tensor = states.hidden_states[-1]
        return read[:, self.pipe.prompt_template_encode_start_idx :]

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """Classifier-free guidance that turns the velocity of a token and keeps its length."""
        guided = classifier_free(predictions, scale)
        if NEGATIVE not in predictions:
            return guided
        tokens = kept_in_length(packed(guided), packed(predictions[POSITIVE]))
        return unpacked(tokens, *guided.shape[2:])

    def _encoded(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        made = super()._encoded(pixels, generator)
        if "reference_tokens" in self.capabilities:
            return made
        # diffusers whitens hints in float32, and what it draws in the type of the weights.
        return made.float() if generator is None else made

    def _scaled(self, latents: Tensor) -> Tensor:
        known = self._statistics()
        assert known is not None
        mean, deviation = (one.to(latents.dtype) for one in known)
        if "reference_tokens" in self.capabilities:
            return (latents - mean) / deviation
        return (latents - mean) * (1.0 / deviation)

    def control_roles(self, net: Any) -> frozenset[str]:
        """One for inpainting takes the mask and what it leaves of the picture, and no hint."""
        return frozenset({"mask", "blackened"} if net.config.extra_condition_channels else ())

    def _control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        if not self.control_roles(net):
            shown = self._shown(hint, len(hint))
        elif "mask" in x.channels:  # of which 1 here means that a cell stays
            shown = torch.cat([x.channels["blackened"], 1 - x.channels["mask"]], dim=1)
        else:
            raise InputError(
                "this control network is one for inpainting: it needs a mask (inpaint)"
            )
        made = net(
            hidden_states=packed(x.latents).to(net.dtype),
            controlnet_cond=packed(shown).to(net.dtype).expand(len(x.rows), -1, -1),
            conditioning_scale=weight,
            **self._placed(replace(x, tokens={}), net.dtype),
            return_dict=False,
        )
        return Residuals(for_each_block(made, self.denoiser.config.num_layers))

    def _told(self, x: ModelInput, dtype: torch.dtype, guided: bool) -> dict[str, Any]:
        return self._placed(x, dtype)

    def _placed(self, x: ModelInput, dtype: torch.dtype) -> dict[str, Any]:
        """The text, the time, and the sizes of all pictures, by which tokens find their places."""
        text, said = (x.conditioning.tensors[name] for name in ("text", "said"))
        longest = int(said.max())
        shown = torch.arange(longest) < said[:, None]
        pictures = (x.latents, *x.tokens.get("reference", ()))
        sizes = [(1, *(side // self.patch for side in one.shape[2:])) for one in pictures]
        return {
            "timestep": x.timestep.expand(len(x.rows)).to(x.latents.dtype) / 1000,
            "encoder_hidden_states": text[:, :longest].to(dtype),
            "encoder_hidden_states_mask": None if shown.all() else shown.to(self.device),
            "img_shapes": [sizes] * len(x.rows),
        }

    def _layout(self, given: Mapping[str, Any], tokens: int) -> Layout:
        """The text's tokens come first, then the picture's, and references after them."""
        places, _ = given["image_rotary_emb"]
        picture = slice(self._text, self._text + self._picture)
        return Layout(picture, places=places[: self._picture])

    def _added(self, places: Sequence[Tensor]) -> dict[str, Any]:
        return {"controlnet_block_samples": list(places) or None}


def _picture(picture: Tensor, most: int) -> Image.Image:
    """A picture for the language model, as its pipelines show it: of `most` pixels squared at most.

    Args:
        picture: ``(1, 3, h, w)`` in [0, 1].
        most: the side of a square as large.
    """
    made = Image.fromarray(
        (picture[0] * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    )
    scale = most / math.sqrt(made.width * made.height)
    if scale >= 1:
        return made
    width, height = (max(1, round(scale * side / 32)) * 32 for side in made.size)
    return made.resize((width, height), Image.Resampling.LANCZOS)


class Family:
    """How Qwen-Image is recognised and loaded."""

    name = QwenImage.family
    carries = QwenImage.carries
    sometimes = QwenImage.sometimes
    half = "bfloat16"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named QwenImage…, but not those that draw layers, or of later models."""
        named = str(config.get("_class_name", ""))
        return named.startswith("QwenImage") and not any(x in named for x in ("Layered", "21"))

    def load(self, source: str, **options: Any) -> QwenImage:
        """Load from a diffusers folder or a hub id."""
        from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

        named = loading.class_name(source, options)
        kind: Any = QwenImagePipeline
        if named.startswith(QwenImage.following):
            kind = QwenImageEditPlusPipeline if "Plus" in named else QwenImageEditPipeline
        pipe = loading.components(kind, source, **options)
        return QwenImage(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "QwenImage"]
