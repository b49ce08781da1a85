"""Stable Diffusion 1 and 2: UNets with text cross-attention, 4 channels or 9 (inpainting).

A diffusers pipeline serves as a bundle of components and loaders; it is never called.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline
from torch import Tensor

from diffedit.attention import Transform, attending
from diffedit.errors import CapabilityError, ModelError
from diffedit.models import loading
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.rows import RowMap
from diffedit.schedulers import Schedule, build

#: Working regions go up to this many times the size the model was trained at.
LARGEST = 2


class StableDiffusion:
    """The `LatentModel` of the Stable-Diffusion UNet family (epsilon and v-prediction).

    Args:
        pipe: the components.
        source: where they came from, for messages and provenance.
        sizes: the smallest and largest side of a region and the largest of a whole picture, in
            pixels; None: once and twice the size that the UNet's configuration names, and twice.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        source: str = "in memory",
        sizes: tuple[int, int, int] | None = None,
    ) -> None:
        self.pipe: Any = pipe
        self.source = source
        self.unet: Any = pipe.unet
        self.vae: Any = pipe.vae
        self.grid: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels: int = self.vae.config.latent_channels
        cells = self.unet.config.sample_size
        native = (min(cells) if isinstance(cells, list | tuple) else int(cells or 64)) * self.grid
        smallest, largest, whole = sizes or (native, LARGEST * native, LARGEST * native)
        self.sides, self.whole = (smallest, largest), whole
        inputs = self.unet.config.in_channels
        if inputs not in (self.channels, 2 * self.channels + 1):
            raise ModelError(
                f"{source}: a UNet of {inputs} input channels is not supported;"
                f" {self.channels} and {2 * self.channels + 1} (inpainting) are"
            )
        found = {"control", "shared_attention"}
        self.roles: Mapping[str, int] = {}
        if inputs != self.channels:
            found.add("mask_channels")
            self.roles = {"mask": 1, "masked": self.channels}
        if self.unet.config.time_cond_proj_dim is not None:
            found.add("embedded_guidance")
        self.capabilities = frozenset(found)
        self._counts = {
            name: sum(weight.numel() for weight in part.parameters())
            for name, part in zip(("unet", "vae", "text_encoder"), self.parts(), strict=True)
        }
        self._rows = RowMap(())
        self._look: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        # diffusers' own property walks through all modules each time.
        return cast(torch.device, next(self.unet.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the denoiser's weights."""
        return cast(torch.dtype, next(self.unet.parameters()).dtype)

    @property
    def info(self) -> Mapping[str, Any]:
        """What to tell people about this model."""
        return {
            "source": self.source,
            "family": Family.name,
            "parameters": self._counts,
            "native_side": self.sides[0],
            "largest_side": self.sides[1],
            "largest_whole_picture": self.whole,
            "prediction": self.pipe.scheduler.config.get("prediction_type", "epsilon"),
            "scheduler": type(self.pipe.scheduler).__name__,
            "capabilities": sorted(self.capabilities),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def parts(self) -> Sequence[torch.nn.Module]:
        """The modules whose state a pass must leave as it found it."""
        return [self.unet, self.vae, self.pipe.text_encoder]

    def embed(self, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        """Embed prompts with the text encoder: ``text`` is ``(prompts, tokens, d)``."""
        rows = [self.pipe.encode_prompt(text, self.device, 1, False)[0] for text in prompts]
        return Conditioning({"text": torch.cat(rows)})

    @property
    def _vae_dtype(self) -> torch.dtype:
        return cast(torch.dtype, next(self.vae.parameters()).dtype)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode ``(b, 3, h, w)`` in [0, 1]: the posterior's mean, or a sample with a generator."""
        posterior = self.vae.encode(
            (2.0 * pixels - 1.0).to(self.device, self._vae_dtype)
        ).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return cast(Tensor, self.vae.config.scaling_factor * latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to ``(b, 3, h, w)`` in [0, 1], float32."""
        scaled = (latents / self.vae.config.scaling_factor).to(self._vae_dtype)
        pixels = self.vae.decode(scaled, return_dict=False)[0]
        return cast(Tensor, (pixels.float() / 2 + 0.5).clamp(0, 1))

    def preview(self, x0: Tensor) -> Tensor:
        """A cell's pixels as a linear map of the cell and its eight neighbours, fitted once.

        About a four-hundredth of the decoder's time, and 21 to 25 dB from what it makes of drawn
        scenes and photographs (the embedded model at 128 px; one colour to a cell: 19 to 22 dB).
        """
        if self._look is None:
            self._look = self._fit_look()
        pixels = F.conv2d(_with_edge(x0.float()), *self._look)
        return F.pixel_shuffle(pixels, self.grid).clamp(0, 1)

    def _fit_look(self) -> tuple[Tensor, Tensor]:
        """Least squares from the latents of a picture of everything to its pixels."""
        pixels = _leaves(32 * self.grid)
        latents = self.encode(pixels).float().cpu()
        seen = F.unfold(_with_edge(latents), 3)  # (1, 9 c, cells)
        a = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)[0].T.double()
        b = F.pixel_unshuffle(pixels, self.grid).flatten(2)[0].T.double()
        # A little ridge: neighbouring cells say nearly the same.
        ridge = 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        solution = torch.linalg.solve(a.T @ a + ridge, a.T @ b).float().to(self.device)
        return solution[:-1].T.reshape(-1, self.channels, 3, 3), solution[-1]

    def schedule(
        self, name: str | None, steps: int, at: float = 1.0, *, compat: bool = False
    ) -> Schedule:
        """The calls of a trip that starts at noise level `at`."""
        return Schedule(build(name, self.pipe.scheduler), steps, self.device, at=at, compat=compat)

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a ControlNet; None: the model's own for hints of `kind` (`loading.own_control`).

        Raises:
            ModelError: there is none, or it was made for another family.
        """
        if source is None:
            own = loading.own_control(self.source, kind)
            if own is None:
                raise CapabilityError(
                    f"{self.source} brings no control network of its own for {kind!r}: name one by"
                    " its folder or hub id (controlnet: model)"
                )
            source = str(own)
        net: Any = loading.pretrained(ControlNetModel, source, dtype=self.dtype)
        if net.config.conditioning_channels != 3:
            said = net.config.conditioning_channels
            raise ModelError(
                f"{source}: this control network wants hints of {said} channels, not 3"
            )
        for key in ("cross_attention_dim", "block_out_channels"):
            # A config from a file has lists where one from a constructor has tuples.
            mine, its = (json.dumps(part.config[key]) for part in (self.unet, net))
            if mine != its:
                raise ModelError(
                    f"{source}: this control network was made for another model: its {key} is"
                    f" {its}, the loaded model's is {mine}"
                )
        return net.to(self.device).eval().requires_grad_(False)

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a ControlNet (Zhang et al. 2023, arXiv:2302.05543) on the rows of `x`."""
        down, middle = net(
            x.latents.to(net.dtype),
            x.timestep,
            encoder_hidden_states=x.conditioning.tensors["text"].to(net.dtype),
            controlnet_cond=hint.to(net.device, net.dtype).expand(len(x.rows), -1, -1, -1),
            conditioning_scale=weight,
            return_dict=False,
        )
        return Residuals((*down, middle))

    def attending(self, transform: Transform) -> AbstractContextManager[None]:
        """While inside, every attention of the UNet goes through `transform`."""
        return attending(self.unet, transform, lambda: self._rows)

    def predict(self, x: ModelInput) -> Tensor:
        """The UNet's raw output for every row, in the type of the latents."""
        self._rows = x.rows
        latents = x.latents
        if "mask_channels" in self.capabilities:
            latents = torch.cat([latents, x.channels["mask"], x.channels["masked"]], dim=1)
        places = x.residuals.places if x.residuals else None
        output = self.unet(
            latents.to(self.dtype),
            x.timestep,
            encoder_hidden_states=x.conditioning.tensors["text"],
            timestep_cond=self._guidance(x),
            down_block_additional_residuals=places[:-1] if places else None,
            mid_block_additional_residual=places[-1] if places else None,
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


def _with_edge(latents: Tensor) -> Tensor:
    return F.pad(latents, (1, 1, 1, 1), mode="replicate")


def _leaves(side: int, count: int = 60) -> Tensor:
    """Discs and bars of random colours on a smooth ground, (1, 3, side, side) in [0, 1].

    Occluding forms of all sizes have the statistics of pictures (Lee, Mumford & Huang 2001,
    "Occlusion models for natural images").
    """
    generator = torch.Generator().manual_seed(0)
    ground = torch.rand(1, 3, 16, 16, generator=generator)
    ground = F.interpolate(ground, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    picture = F.interpolate(ground, size=side, mode="bilinear")[0]
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    for number in range(count):
        left, top, size, turn, length = torch.rand(5, generator=generator).tolist()
        radius, angle = 0.03 + 0.17 * size**2, math.pi * turn
        u = (x - left) * math.cos(angle) + (y - top) * math.sin(angle)
        v = (y - top) * math.cos(angle) - (x - left) * math.sin(angle)
        bar = (u.abs() < radius) & (v.abs() < radius * (0.2 + length))
        inside = u.square() + v.square() < radius**2 if number % 2 else bar
        colour = torch.rand(3, 1, 1, generator=generator)
        shaded = colour + 0.2 * length * (x + y - 1) if number % 3 else colour
        picture = torch.where(inside, shaded, picture)
    return picture[None].clamp(0, 1)


class Family:
    """How Stable Diffusion 1 and 2 are recognised and loaded."""

    name = "stable-diffusion"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named StableDiffusion…, but not XL, 3, or the upscalers."""
        named = str(config.get("_class_name", ""))
        other = ("XL", "3", "Upscale", "Gligen", "Depth", "Instruct", "Video", "UnCLIP", "Image")
        return named.startswith("StableDiffusion") and not any(word in named for word in other)

    def load(self, source: str, **options: Any) -> StableDiffusion:
        """Load from a diffusers folder, a hub id, or a single .safetensors file."""
        pipe = loading.components(StableDiffusionPipeline, source, **options)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.eval().requires_grad_(False)
        return StableDiffusion(pipe, source, loading.sizes(source))
