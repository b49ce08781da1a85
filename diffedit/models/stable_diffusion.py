"""Stable Diffusion 1 and 2: UNets with text cross-attention, 4 channels or 9 (inpainting).

A diffusers pipeline serves as a bundle of components and loaders; it is never called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter
from torch import Tensor

from diffedit.models import loading
from diffedit.models.autoencoded import HINTS
from diffedit.models.clip import RAGGED, Clip, read
from diffedit.models.control import InMode, OfHoles, own_control
from diffedit.models.ip_adapter import Places, of_unet
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.models.textual_inversion import Word, load_word, read_as, teach
from diffedit.models.unet_controls import check_adapter, features, residuals
from diffedit.prompts import Prompt, parse


class StableDiffusion(PipelineModel):
    """The `LatentModel` of the Stable-Diffusion UNet family (epsilon and v-prediction)."""

    family: ClassVar[str] = "stable-diffusion"
    carries: ClassVar[frozenset[str]] = frozenset(
        {
            "control",
            "image_prompt",
            "lora",
            "prompt_weights",
            "shared_attention",
            "textual_inversion",
        }
    )
    sometimes: ClassVar[frozenset[str]] = frozenset(
        {"embedded_guidance", "inpaint_control", "instructions", "mask_channels"}
    )
    networks: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    control_nets: ClassVar[tuple[type, ...]] = (ControlNetModel, T2IAdapter)
    kinship: ClassVar[tuple[str, ...]] = ("cross_attention_dim", "block_out_channels")

    def _ready(self) -> None:
        super()._ready()
        self.unet: Any = self.denoiser
        self._felt: list[tuple[Any, ...]] = []
        if self.unet.config.time_cond_proj_dim is not None:
            self.capabilities |= {"embedded_guidance"}
        if self._leads_into_holes():
            self.capabilities |= {"inpaint_control"}

    def _leads_into_holes(self) -> bool:
        """Whether a control network for inpainting came with a model that is shown no mask."""
        own = own_control(self.source, "inpaint", named=True)
        if own is None or "mask" in self.roles:
            return False
        return bool(loading.network_class(str(own)) == ControlNetModel.__name__)

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        """Embed prompts with the text encoder: ``text`` is ``(prompts, tokens, d)``."""
        made = [{"text": self._read(self._parse(text))[0]} for text in prompts]
        return Conditioning.stack([Conditioning(one, RAGGED, self._filler()) for one in made])

    def _parse(self, text: str) -> Prompt:
        """A prompt with the words that encoders were taught as their tokenizer has them."""
        tokenizer = getattr(self.pipe, self._clips()[0].tokenizer)
        return parse(read_as(tokenizer, text))

    def _read(self, prompt: Prompt) -> tuple[Tensor, ...]:
        """What the text encoders make of a prompt; diffusers' own way, where that can read it."""
        return read(self._clips(), prompt) or self._plain(prompt.text)

    def _plain(self, text: str) -> tuple[Tensor, ...]:
        """What they make of a plain text; the rest of a long one is left out."""
        return (self.pipe.encode_prompt(text, self.device, 1, False)[0],)

    def _clips(self) -> list[Clip]:
        return [Clip(self.pipe, "tokenizer", "text_encoder")]

    def load_textual_inversion(self, source: str, token: str | None = None) -> Word:
        """Read a word; see `models.textual_inversion.load_word`."""
        return load_word(self.pipe, self._readers(), source, token)

    def add_textual_inversion(self, word: Word) -> Callable[[], None]:
        """Have the text encoders know a word; returns what has them forget."""
        return teach(self.pipe, self._readers(), word)

    def _readers(self) -> dict[str, str]:
        return {clip.encoder: clip.tokenizer for clip in self._clips()}

    def _filler(self) -> Callable[[], Mapping[str, Tensor]]:
        """What stands at the end of a prompt beside a longer one: empty texts."""
        return functools.cache(lambda: {"text": self._plain("")[0]})

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a ControlNet, a T2I-Adapter, or a union of ControlNets."""
        net = super().load_control(source, kind)
        if isinstance(net, T2IAdapter):
            check_adapter(str(source), net, self.unet)
        return net

    def in_mode(self, net: Any, kind: str, mode: int | None) -> Any:
        """Of a union the network that is meant, and whether one is for inpainting."""
        if kind == "inpaint" and mode is None and isinstance(net, ControlNetModel):
            return OfHoles(net)
        return super().in_mode(net, kind, mode)

    def control_roles(self, net: Any) -> frozenset[str]:
        """One for inpainting is told where the picture is to change."""
        return frozenset({"hole"} if isinstance(net, OfHoles) else ())

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a control network on the rows of `x`; see `models.unet_controls`."""
        if not isinstance(net, T2IAdapter):
            dtype = (net.net if isinstance(net, InMode | OfHoles) else net).dtype
            return residuals(net, x, hint, weight, self._told(x.conditioning, dtype))
        felt = self._features(net, hint, weight)
        return Residuals(inside=tuple(one.expand(len(x.rows), -1, -1, -1) for one in felt))

    def forget(self) -> None:
        """Let go of what was kept for a pass."""
        super().forget()
        self._felt = []

    def _features(self, net: T2IAdapter, hint: Tensor, weight: float) -> tuple[Tensor, ...]:
        """What a T2I-Adapter makes of a hint, once."""
        for *known, made in self._felt:
            if known[0] is net and known[1] is hint and known[2] == weight:
                return cast(tuple[Tensor, ...], made)
        felt = features(net, hint, weight)
        self._felt = [(net, hint, weight, felt), *self._felt[: HINTS - 1]]
        return felt

    def _looks(self) -> Places:
        return of_unet(self.unet)

    def _told(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments by which UNets and ControlNets learn what is wanted."""
        return {"encoder_hidden_states": conditioning.tensors["text"].to(dtype)}

    def predict(self, x: ModelInput) -> Tensor:
        """The UNet's raw output for every row, in the type of the latents."""
        self._rows = x.rows
        places = x.residuals.places if x.residuals else None
        # The UNet empties the list.
        inside = list(x.residuals.inside) or None if x.residuals else None
        output = self.unet(
            self._seen(x),
            x.timestep,
            **self._told(x.conditioning, self.dtype),
            timestep_cond=self._guidance(x),
            down_block_additional_residuals=places[:-1] if places else None,
            mid_block_additional_residual=places[-1] if places else None,
            down_intrablock_additional_residuals=inside,
            return_dict=False,
        )[0]
        return cast(Tensor, output.to(x.latents.dtype))

    def _guidance(self, x: ModelInput) -> Tensor | None:
        if x.guidance is None:
            return None
        scale = torch.full((len(x.rows),), x.guidance - 1)
        size = self.unet.config.time_cond_proj_dim
        made = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=size)
        return cast(Tensor, made.to(self.device, self.dtype))


class Family:
    """How Stable Diffusion 1 and 2 are recognised and loaded."""

    name = StableDiffusion.family
    carries = StableDiffusion.carries
    sometimes = StableDiffusion.sometimes

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named StableDiffusion…, but not XL, 3, or the upscalers."""
        named = str(config.get("_class_name", ""))
        other = ("XL", "3", "Upscale", "GLIGEN", "Depth", "Video", "UnCLIP", "Image")
        return named.startswith("StableDiffusion") and not any(word in named for word in other)

    def load(self, source: str, **options: Any) -> StableDiffusion:
        """Load from a diffusers folder, a hub id, or a single .safetensors file."""
        unwanted = {"safety_checker": None, "requires_safety_checker": False}
        pipe = loading.components(StableDiffusionPipeline, source, **options, **unwanted)
        return StableDiffusion(loading.resting(pipe), source, loading.sizes(source))
