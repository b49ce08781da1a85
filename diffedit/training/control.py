"""ControlNets: a copy of the UNet's encoder reads a hint and adds to what the UNet computes.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"
(arXiv:2302.05543). The copy is joined by convolutions that start at zero, so that a training begins
with exactly the model as it is. The UNet and the text encoder are never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from diffedit.errors import InputError
from diffedit.models import control
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.training.config import ControlNetTraining
from diffedit.training.data import Example, Pixels, Source
from diffedit.training.denoising import Latents, Predict, save_settings
from diffedit.training.export import SHARD, edit_json
from diffedit.training.files import whole_folder
from diffedit.training.hints import Hinted
from diffedit.training.kernels import quick
from diffedit.training.loop import Picture, Rows
from diffedit.training.parts import Parts
from diffedit.training.unet_task import UNetTask, must_fit

_HINT = (16, 32, 96, 256)
"""Channels of the convolutions that bring a hint to the size of the latents."""

_SMALL_HINT = (16, 32, 64, 128)

_SILU_GAIN = 1.68
"""1 / sqrt(E silu(z)^2) of a standard normal z."""

_SHOWN = 4
"""Held-out examples in a sample grid."""

_TOGETHER = 8
"""Pictures that are sampled at once."""


def new_controlnet(
    unet: UNet2DConditionModel, *, factor: int = 8, small: bool = False
) -> ControlNetModel:
    """A ControlNet whose blocks are copies of the UNet's and whose joints are zero.

    With it the UNet predicts, bit for bit, what it predicts without.

    Args:
        unet: of text-to-image: it reads the latents and no further channels.
        factor: pixels to a latent cell's side, a power of two.
        small: without attention: ``DownBlock2D`` in place of ``CrossAttnDownBlock2D``, and
            ``UNetMidBlock2D``, of which a ControlNet has one residual block for two. What the UNet
            has of both is copied. The widths stay, as its outputs are added to the UNet's; the
            convolutions that read the hint have fewer channels, and the last of them does not start
            at zero: what is no true copy need not be spared, and learns faster.

            ============================  =============  ============
            of a UNet with the widths     whole          small
            ============================  =============  ============
            64, 128, 192                  5.34 M         2.30 M
            64, 64, 128, 192              5.57 M         2.44 M
            ============================  =============  ============

            (one block per level, attention everywhere; 2 bytes a weight in a file).
    """
    levels = factor.bit_length() - 1
    channels: tuple[int, ...] = _SMALL_HINT if small else _HINT
    channels = (channels + channels[-1:] * levels)[: levels + 1]
    net: Any = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=channels, load_weights_from_unet=not small
    )
    if small:
        settings = dict(net.config) | {
            "down_block_types": ("DownBlock2D",) * len(unet.config.block_out_channels),
            "mid_block_type": "UNetMidBlock2D",
        }
        net = ControlNetModel.from_config(settings)
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            there, mine = getattr(unet, name).state_dict(), getattr(net, name)
            mine.load_state_dict({key: there[key] for key in mine.state_dict()})
    _waken(net, last=small)
    made: ControlNetModel = net.to(unet.device)
    return made


@torch.no_grad()
def _waken(net: Any, *, last: bool) -> None:
    """Start the convolutions that read the hint so that a hint comes through them at its size.

    He et al. 2015 (arXiv:1502.01852), eq. 10, with the gain of SiLU for that of ReLU. As torch
    starts them, the differences between two edge maps shrink by a factor of a thousand and more on
    the way through, and for hundreds of steps the hint might as well not be there.
    """
    reader = net.controlnet_cond_embedding
    convolutions = [reader.conv_in, *reader.blocks, *([reader.conv_out] if last else [])]
    for convolution in convolutions:
        fan_in = convolution.weight[0].numel()
        nn.init.normal_(convolution.weight, std=_SILU_GAIN / fan_in**0.5)
        nn.init.zeros_(convolution.bias)


def _started(folder: Path, unet: UNet2DConditionModel) -> Any:
    """The ControlNet that a training goes on from.

    Raises:
        InputError: it is none, or one for another UNet.
    """
    if not folder.is_dir():
        raise InputError(f"start: there is no folder {folder}")
    kinship = StableDiffusion.kinship
    return control.load(str(folder), (ControlNetModel,), unet, kinship, dtype=torch.float32)


class ControlNetTask(UNetTask[ControlNetTraining]):
    """A ControlNet for the model's frozen UNet, from hints that :class:`Hinted` gives."""

    def __init__(self, training: ControlNetTraining, device: torch.device) -> None:
        super().__init__(training, device)
        must_fit(training.objective, self.parts, training.model)
        factor = 2 ** (len(self.parts.vae.config.block_out_channels) - 1)
        self.latents = Latents(
            training, training.objective, self.parts, self.examples, embeddings=True
        )
        if training.start is None:
            self.net: Any = new_controlnet(self.parts.unet, factor=factor, small=training.small)
        else:
            self.net = _started(training.start, self.parts.unet)
        quick(self.net)
        self.net.requires_grad_(True).train()
        if training.checkpointing:
            self.net.enable_gradient_checkpointing()
        self.trains({"controlnet": self.net})

    def found(self) -> Source:
        """The examples, with hints of the training's kinds."""
        return Hinted(super().found(), *self.training.kind)

    def loss(self, rows: Rows) -> Tensor:
        """The objective's, under the examples' hints."""
        return self.latents.loss(rows, self.following(rows["hints"]))

    def following(self, hints: Tensor) -> Predict:
        """The UNet's prediction under hints (n, 3 or 4, h, w) in [0, 1], in pixels."""
        hints = shown(hints.to(self.latents.device))

        def predict(x_t: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
            return controlled(self.parts.unet, self.net, x_t, timestep, words, hints)

        return predict

    def validate(self) -> dict[str, float]:
        """The loss on held-out examples with their hints, and with black ones."""
        if self.latents.held is None:
            return {}
        return {
            "validation loss": self.latents.held_loss(lambda rows: self.following(rows["hints"])),
            "validation loss, blank hints": self.latents.held_loss(
                lambda rows: self.following(blank(rows["hints"]))
            ),
        }

    def pictures(self) -> list[tuple[str, Picture]]:
        """Held-out hints, each beside what is sampled from it: (side, 2 side, 3).

        The captions are the examples', or the training's prompts.
        """
        if self.latents.held is None:
            return []
        prompts = self.training.prompts
        held = self.latents.held.source
        count = min(len(prompts) or _SHOWN, len(held))
        shown = [held[index] for index in range(count)]
        captions = prompts[:count] or tuple(example.caption for example in shown)
        hints = [_hint(example) for example in shown]
        made = sampled(self.parts, self.net, captions, hints)
        both = [np.concatenate([_seen(h), m], axis=1) for h, m in zip(hints, made, strict=True)]
        return list(zip(captions, both, strict=True))

    def export(self, folder: Path) -> None:
        """An ordinary ControlNet folder in fp16 safetensors, see :func:`export_controlnet`."""
        export_controlnet(folder, self.net, *self.training.kind, strength=self.training.strength)


def shown(hints: Tensor) -> Tensor:
    """Hints as a network reads them, (n, 3, h, w): those for inpainting are -1 in their holes.

    Args:
        hints: (n, 3, h, w), or (n, 4, h, w) with the hole as the last channel; in [0, 1].
    """
    return torch.where(hints[:, 3:] > 0.5, -1.0, hints[:, :3]) if hints.shape[1] == 4 else hints


def blank(hints: Tensor) -> Tensor:
    """Hints of the same sizes that say nothing: black ones, and pictures that are all hole."""
    return torch.full_like(hints, float(hints.shape[1] == 4))


def controlled(
    unet: Any, net: Any, x_t: Tensor, timestep: Tensor, words: Tensor, hints: Tensor
) -> Tensor:
    """The prediction (n, c, h, w) of a UNet to which a ControlNet adds (section 3.1, eq. 2).

    Args:
        x_t: (n, c, h, w) noised latents.
        timestep: (n,).
        words: (n, length, d) text embeddings.
        hints: (n, 3, H, W) in [0, 1], in pixels.
    """
    down, middle = net(
        x_t, timestep, encoder_hidden_states=words, controlnet_cond=hints, return_dict=False
    )
    made: Tensor = unet(
        x_t,
        timestep,
        encoder_hidden_states=words,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    return made


def export_controlnet(
    folder: Path, net: ControlNetModel, *kinds: str, strength: float = 1.0
) -> None:
    """Write ``net`` as a diffusers folder; ``diffedit.json`` in it says for which kinds of hints.

    In a model's folder, as ``controlnet/<kind>``, it is the model's own for that kind, and for the
    others that the file names. ``folder`` is replaced as a whole and is never seen half written.
    ``net`` stays as it is, and in its precision.

    Args:
        strength: what the written network adds to the UNet's is that many times what ``net`` adds:
            its last convolutions, those that start at zero, are multiplied by it.
    """
    made_of = copy.deepcopy(net).to("cpu")
    with torch.no_grad():
        for joint in (*made_of.controlnet_down_blocks, made_of.controlnet_mid_block):
            for weight in joint.parameters():
                weight.mul_(strength)
    half = made_of.to(torch.float16).eval()
    with whole_folder(folder) as made:
        half.save_pretrained(made, safe_serialization=True, max_shard_size=SHARD)
        # Where the weights came from is a folder of the machine that made them.
        edit_json(made / "config.json", _name_or_path=None)
        save_settings(made, {"kind": kinds[0] if len(kinds) == 1 else list(kinds)})


# -- whether it can learn at all ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overfit:
    """Losses on one batch, unweighted, at noise that was not trained on.

    ``before`` is the fresh net's with its hints, the others the trained net's: with its hints, with
    each example's hint given to the next, and with black ones.
    """

    before: float
    hinted: float
    shuffled: float
    blank: float


def overfit(task: ControlNetTask, steps: int, *, draws: int = 4) -> Overfit:
    """Train on the first batch alone, with new noise in each step: what follows hints, fits it.

    A net that does not come to need its hints here will not on many pictures. The task's net is
    trained by this, at the optimisers' full rates; build another one for a training.

    Args:
        task: with batches of two or more.
        steps: a few hundred for a new net.
        draws: how often the figures draw noise.

    Raises:
        InputError: a batch of one, whose hints cannot be exchanged.
    """
    rows = dict(task.batch(0, torch.Generator().manual_seed(task.training.seed)))
    if len(rows["latents"]) < 2:
        raise InputError(f"batch {task.training.batch}: the self-test needs two examples or more")

    def noised(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(task.training.seed * 1_000_003 + step)
        return rows | {"noise": torch.randn(rows["noise"].shape, generator=generator)}

    @torch.no_grad()
    def error(hints: Tensor) -> float:
        predict = task.following(hints)
        found = [task.latents.errors(noised(-1 - draw), predict).mean() for draw in range(draws)]
        return float(torch.stack(found).mean())

    before = error(rows["hints"])
    params = [p for p in task.net.parameters() if p.requires_grad]
    for step in range(steps):
        for optimizer in task.optimizers:
            optimizer.zero_grad(set_to_none=True)
        task.loss(noised(step)).backward()
        nn.utils.clip_grad_norm_(params, task.training.optimiser.clip)
        for optimizer in task.optimizers:
            optimizer.step()
    hints = rows["hints"]
    return Overfit(before, error(hints), error(hints.roll(1, 0)), error(blank(hints)))


# -- samples --------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(
    parts: Parts,
    controlnet: ControlNetModel | None,
    captions: Sequence[str],
    hints: Sequence[Pixels],
    *,
    steps: int = 20,
    guidance: float = 5.0,
    weight: float = 1.0,
    seed: int = 0,
) -> list[Pixels]:
    """Pictures (h, w, 3) uint8 of hints of that size, by diffusers' own pipelines.

    Args:
        controlnet: None = the hints say the size only.
        seed: picture i starts from the noise of ``seed + i``.
    """
    common: dict[str, Any] = {
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "tokenizer": parts.tokenizer,
        "unet": parts.unet,
        "scheduler": parts.scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipeline: Any
    if controlnet is None:
        pipeline = StableDiffusionPipeline(**common)
    else:
        pipeline = StableDiffusionControlNetPipeline(**common, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    made: list[Pixels] = []
    for numbers in _groups(len(captions)):
        given = np.stack([hints[n] for n in numbers])
        options: dict[str, Any] = {"height": given.shape[1], "width": given.shape[2]}
        if controlnet is not None:
            options["image"] = shown(torch.from_numpy(given).permute(0, 3, 1, 2).float() / 255)
            options["controlnet_conditioning_scale"] = weight
        images = pipeline(
            [captions[n] for n in numbers],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + n) for n in numbers],
            output_type="np",
            **options,
        ).images
        made += list((images * 255).round().astype(np.uint8))
    return made


def _groups(count: int) -> Iterator[range]:
    return (range(first, min(first + _TOGETHER, count)) for first in range(0, count, _TOGETHER))


def _seen(hint: Pixels) -> Pixels:
    """A hint as people look at it, (h, w, 3): holes are grey."""
    if hint.shape[2] == 3:
        return hint
    return np.where(hint[..., 3:] > 127, np.uint8(128), hint[..., :3])


def _hint(example: Example) -> Pixels:
    if example.hint is None:
        raise InputError(f"{example.name} has no hint: wrap its source in Hinted")
    return example.hint
