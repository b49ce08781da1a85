"""Flux.1 (Black Forest Labs 2024): dev, schnell, Fill, which inpaints, and Kontext.

Transformers over the tokens of text and picture together, with rotary positions, trained as
rectified flows (Esser et al. 2024, arXiv:2403.03206). A token is two by two latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel
from torch import Tensor

from diffedit.attention import Beside, Layout, Transform
from diffedit.errors import ModelError
from diffedit.guidance import POSITIVE
from diffedit.models import loading
from diffedit.models.control import InMode
from diffedit.models.ip_adapter import Places
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.prompts import tell_unread
from diffedit.rows import index_on
from diffedit.schedule import flow_calls_kept


class Flux(PipelineModel):
    """The `LatentModel` of Flux.1: plain, inpainting (Fill), led by a hint (Control), or Kontext.

    Kontext follows instructions: the picture that they speak of becomes part of the sequence.

    Guidance was distilled into it: the scale is an input (dev), or there is none (schnell).
    Negative prompts act through `Pass.true_guidance`. Branches are predicted one after the other,
    as in diffusers: there is seldom more than one, and two at once need twice the memory.
    """

    family: ClassVar[str] = "flux"
    carries: ClassVar[frozenset[str]] = frozenset(
        {"control", "embedded_guidance", "image_prompt", "lora", "shared_attention"}
    )
    sometimes: ClassVar[frozenset[str]] = frozenset(
        {"instructions", "mask_channels", "reference_tokens"}
    )
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    control_nets: ClassVar[tuple[type, ...]] = (FluxControlNetModel,)
    kinship: ClassVar[tuple[str, ...]] = (
        "joint_attention_dim",
        "num_attention_heads",
        "attention_head_dim",
    )

    #: InstantX and Shakker Labs 2024, "FLUX.1-dev-ControlNet-Union".
    modes: ClassVar[Mapping[str, int]] = {
        "canny": 0, "tile": 1,
        "depth": 2, "depth_leres": 2, "depth_midas": 2, "depth_zoe": 2,
        "blur": 3, "openpose": 4, "gray": 5, "low_quality": 6,
    }  # fmt: skip

    #: How pipelines are named whose models follow instructions.
    following: ClassVar[str] = "FluxKontext"
    native: ClassVar[int] = 128
    patch = 2
    folded: ClassVar[int] = 4
    kept = staticmethod(flow_calls_kept)

    def _ready(self) -> None:
        super()._ready()
        self._text = self._picture = 0
        self._picked: tuple[Tensor, tuple[int, ...], Tensor] | None = None
        # Of the present block: see `_late`.
        self._queries: Tensor | None = None
        self._sum: Tensor | None = None
        self._settle("text_encoder")
        if type(self.pipe).__name__.startswith(self.following):
            self.capabilities |= {"instructions", "reference_tokens"}

    def _roles(self, more: int, inputs: int) -> Mapping[str, int]:
        pixels = self.cell**2
        known = {0: {}, self.channels: {"hint": self.channels}}
        known[self.channels + pixels] = {"masked": self.channels, "mask": pixels}
        if more in known:
            return known[more]
        raise ModelError(
            f"{self.source}: a denoiser of {inputs} input channels is not supported;"
            f" {self.channels}, {2 * self.channels} (Control) and"
            f" {2 * self.channels + pixels} (Fill) are"
        )

    @staticmethod
    def spacing(steps: int) -> list[float]:
        """Noise levels before the shift: even, and none is left out at the end."""
        return cast(list[float], np.linspace(1.0, 1 / steps, steps).tolist())

    def _lora_options(self) -> Mapping[str, Any]:
        return {"return_alphas": True}

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
            ``text``: ``(prompts, tokens, d)`` of T5; ``pooled``: ``(prompts, p)`` of CLIP.
        """
        made = [self.pipe.encode_prompt(text, None, device=self.device) for text in prompts]
        for prompt, (text, *_) in zip(prompts, made, strict=True):
            tell_unread(prompt, self.pipe.tokenizer_2, text.shape[1])
        return Conditioning(
            {
                "text": torch.cat([text for text, *_ in made]),
                "pooled": torch.cat([pooled for _, pooled, _ in made]),
            }
        )

    def encode(
        self,
        pixels: Tensor,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        """Encode ``(b, 3, h, w)``; pipelines that follow instructions draw no posterior."""
        if "reference_tokens" in self.capabilities:
            generator = None
        return super().encode(pixels, generator, role)

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a ControlNet; its places are those of the denoiser's blocks, one for each.

        As in diffusers it sees the prompt alone, and what it makes serves the other branches too.
        """
        keys = x.rows.keys
        positive = x.rows.of_branch(POSITIVE)
        if positive and len(positive) < len(keys):
            own = hint if len(hint) == 1 else self._of_rows(hint, tuple(positive))
            made = self._control(net, x.only(positive), own, weight)
            items = [keys[row].item for row in positive]
            pick = index_on(tuple(items.index(key.item) for key in keys), self.device)
            return made.each(lambda place: place[pick])
        return self._control(net, x, hint, weight)

    def forget(self) -> None:
        """Let go of what was kept for a pass."""
        super().forget()
        self._picked = None

    def _of_rows(self, hint: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Some rows of a hint: the same tensor at every step, so that it is encoded once."""
        if self._picked is None or self._picked[0] is not hint or self._picked[1] != rows:
            self._picked = (hint, rows, hint[index_on(rows, hint.device)])
        return self._picked[2]

    def _control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        mode: Tensor | None = None
        if isinstance(net, InMode):
            mode = torch.full((len(x.rows), 1), net.number, device=self.device)
            net = net.net
        own_eyes = net.input_hint_block is not None
        shown = 2.0 * hint - 1.0 if own_eyes else packed(self._shown(hint, len(hint)))
        double, single = net(
            hidden_states=packed(x.latents).to(net.dtype),
            controlnet_cond=shown.to(net.dtype).expand(len(x.rows), *shown.shape[1:]),
            controlnet_mode=mode,
            conditioning_scale=weight,
            **self._told(x, net.dtype, net.config.guidance_embeds),
            return_dict=False,
        )
        # Nets of any make have the same places, so that they can be added.
        nothing = [torch.zeros_like((double or single)[0])]
        config = self.denoiser.config
        return Residuals(
            (
                *for_each_block(double or nothing, config.num_layers, own_eyes),
                *for_each_block(single or nothing, config.num_single_layers),
            )
        )

    def _told(self, x: ModelInput, dtype: torch.dtype, guided: bool) -> dict[str, Any]:
        """The arguments by which transformer and ControlNets learn what is wanted, and where."""
        told = self._placed(x, dtype)
        told["pooled_projections"] = x.conditioning.tensors["pooled"].to(dtype)
        if guided and x.guidance is not None:
            told["guidance"] = torch.full((len(x.rows),), x.guidance, device=self.device)
        return told

    def _placed(self, x: ModelInput, dtype: torch.dtype) -> dict[str, Any]:
        """The text, the time, and where each token is: in which picture, and where in it."""
        text = x.conditioning.tensors["text"].to(dtype)
        places = [
            self._places(number, shown, dtype)
            for number, shown in enumerate((x.latents, *x.tokens.get("reference", ())))
        ]
        return {
            "timestep": x.timestep.expand(len(x.rows)).to(x.latents.dtype) / 1000,
            "encoder_hidden_states": text,
            "txt_ids": places[0].new_zeros(text.shape[1], 3),
            "img_ids": torch.cat(places),
        }

    def _places(self, number: int, latents: Tensor, dtype: torch.dtype) -> Tensor:
        height, width = (side // self.patch for side in latents.shape[2:])
        places = torch.zeros(height, width, 3, device=self.device, dtype=dtype)
        places[..., 0] = number
        places[..., 1] += torch.arange(height, device=self.device)[:, None]
        places[..., 2] += torch.arange(width, device=self.device)
        return places.flatten(0, 1)

    def _layout(self, given: Mapping[str, Any], tokens: int) -> Layout:
        """The text's tokens come first, then the picture's, and references after them."""
        picture = slice(self._text, self._text + self._picture)
        cos, sin = (part[picture, ::2] for part in given["image_rotary_emb"])
        return Layout(picture, places=torch.complex(cos, sin), late=self._late)

    @contextmanager
    def attending(self, transform: Transform) -> Iterator[None]:
        """While inside, every attention of the denoiser goes through `transform`."""
        with super().attending(transform), ExitStack() as undo:
            undo.callback(self._rest)
            if "image_prompt" in self.capabilities:
                for block in self.denoiser.transformer_blocks:
                    undo.callback(block.attn.norm_q.register_forward_hook(self._asked).remove)
                    undo.callback(block.register_forward_hook(self._block_ends).remove)
            yield

    def _rest(self) -> None:
        """Keep nothing of the present block, which may have failed."""
        self._queries = self._sum = None

    def _asked(self, norm: Any, given: Any, queries: Tensor) -> None:
        """Keep a block's queries, ``(rows, tokens, heads, d)``, before they are turned."""
        self._queries = queries

    def _late(self, beside: tuple[Beside, ...]) -> None:
        """Attend beside the present block, for its end: what its heads see, with no projection."""
        assert self._queries is not None
        q = self._queries.transpose(1, 2)
        total = torch.zeros_like(self._queries.flatten(2))
        for one in beside:
            seen = F.scaled_dot_product_attention(q, one.k, one.v).transpose(1, 2).flatten(2)
            if one.mask is not None:
                where = one.mask[:, 0]
                if where.shape[1] > 1:  # it is of the picture: a reference after it is left alone
                    where = F.pad(where, (0, 0, 0, seen.shape[1] - where.shape[1]))
                seen = seen * where
            total = total + one.weight * seen
        self._sum = total

    def _block_ends(self, block: Any, given: Any, made: tuple[Tensor, Tensor]) -> Any:
        text, tokens = made
        total = self._sum
        self._rest()
        return made if total is None else (text, tokens + total)

    def _looks(self) -> Places:
        net, inner = self.denoiser, self.denoiser.inner_dim
        shape = inner, net.config.joint_attention_dim
        modules = {n: (f"transformer_blocks.{n}.attn", shape) for n in range(net.config.num_layers)}
        return Places(modules, biased=True, black=True, late=True)

    def predict(self, x: ModelInput) -> Tensor:
        """The transformer's raw output (the velocity) for every row, in the type of the latents."""
        return torch.cat([self._predict(branch) for branch in x.branches()])

    def _predict(self, x: ModelInput) -> Tensor:
        self._rows = x.rows
        told = self._told(x, self.dtype, self.denoiser.config.get("guidance_embeds", False))
        picture = packed(self._seen(x))
        beside = [packed(one.to(picture)) for one in x.tokens.get("reference", ())]
        tokens = torch.cat([picture, *beside], dim=1)
        self._text, self._picture = told["encoder_hidden_states"].shape[1], picture.shape[1]
        places = x.residuals.places if x.residuals else ()
        if beside:  # control networks see the canvas only
            rest = tokens.shape[1] - picture.shape[1]
            places = tuple(F.pad(place, (0, 0, 0, rest)) for place in places)
        output = self.denoiser(
            hidden_states=tokens,
            **told,
            **self._added(places),
            return_dict=False,
        )[0]
        height, width = x.latents.shape[2:]
        return unpacked(output[:, : self._picture], height, width).to(x.latents.dtype)

    def _added(self, places: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments by which the transformer gets what control networks add to its blocks."""
        double = self.denoiser.config.num_layers
        return {
            "controlnet_block_samples": list(places[:double]) or None,
            "controlnet_single_block_samples": list(places[double:]) or None,
        }


def packed(latents: Tensor) -> Tensor:
    """Two by two cells as the channels of one token: ``(b, c, h, w)`` to ``(b, h w / 4, 4 c)``."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, for latents ``(b, c, height, width)``."""
    cells = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return F.pixel_shuffle(cells, 2)


def for_each_block(
    made: Sequence[Tensor], blocks: int, repeated: bool = False
) -> tuple[Tensor, ...]:
    """What a ControlNet of fewer blocks adds to each of the denoiser's.

    Each of its own stands for as many neighbouring ones, or all are gone through again and again.
    """
    if repeated:
        return tuple(made[block % len(made)] for block in range(blocks))
    stride = -(-blocks // len(made))
    return tuple(made[block // stride] for block in range(blocks))


class Family:
    """How Flux.1 is recognised and loaded."""

    name = Flux.family
    carries = Flux.carries
    sometimes = Flux.sometimes
    half = "bfloat16"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines of Flux.1: plain, Fill, Control, ControlNet, Kontext; not Flux 2 or Redux."""
        named = str(config.get("_class_name", ""))
        other = named.startswith(("Flux2", "Flux3")) or "Redux" in named
        return named.startswith("Flux") and not other

    def load(self, source: str, **options: Any) -> Flux:
        """Load from a diffusers folder or a hub id."""
        from diffusers import FluxKontextPipeline, FluxPipeline

        named = loading.class_name(source, options)
        kind = FluxKontextPipeline if "Kontext" in named else FluxPipeline
        pipe = loading.components(kind, source, **options)
        return Flux(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "Flux"]
