"""Does the model do what was asked? Figures with chance levels and unasked controls.

Whatever makes the pictures is passed in as a :class:`Painter`, so that the same gate judges a bare
diffusers pipeline and diffedit's own Editor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffedit.training.cases import Case, InpaintCase
from diffedit.training.judges import Mask, colour_map, colour_share, judge_shape, segment
from diffedit.training.pictures import psnr, to_tensor
from diffedit.training.world.backdrops import Pixels
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Mix, draw_scene
from diffedit.training.world.source import HELD_OUT
from diffedit.training.world.things import COLOURS

Figures = dict[str, float]

FRAME_SHARE = 0.02
"""A colour is "there" if it covers this much of a picture made from nothing."""

MASK_SHARE = 0.1
"""A colour is "in the mask" if it covers this much of it."""

CHANCE = 1 / len(SHAPES)


class Painter(Protocol):
    """Makes a picture; without ``image`` and ``mask`` from nothing, otherwise in the mask."""

    def __call__(
        self, image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
    ) -> Image.Image:
        """An RGB picture. ``mask`` is of mode L, 255 where ``image`` is to change."""
        ...


def share(hits: Iterable[bool]) -> float:
    """The share of hits, rounded to three places; nan of none."""
    values = list(hits)
    return round(sum(values) / len(values), 3) if values else float("nan")


def generation(paint: Painter, cases: Sequence[Case]) -> Figures:
    """Pictures from nothing: is the asked colour there, is the asked shape, and what was not asked?

    ``colour`` and ``unasked_colour`` use one rule; the second asks it of ``Case.other``. ``shape``
    judges the largest piece of the asked colour; chance is 1/8. ``background`` is counted over the
    prompts that name one, by the commonest colour on the picture's border.
    """
    colour, unasked, shape, background = [], [], [], []
    for case in cases:
        image = np.asarray(paint(None, None, case.prompt, case.seed).convert("RGB"))
        colour.append(colour_share(image, case.colour) >= FRAME_SHARE)
        unasked.append(colour_share(image, case.other) >= FRAME_SHARE)
        shape.append(is_shape(segment(image, case.colour), case.shape))
        if case.background is not None:
            background.append(border_colour(image) == case.background)
    return {
        "n": len(cases),
        "colour": share(colour),
        "unasked_colour": share(unasked),
        "shape": share(shape),
        "shape_chance": CHANCE,
        "background": share(background),
    } | {
        f"shape_{name}": share(hit for hit, c in zip(shape, cases, strict=True) if c.shape == name)
        for name in SHAPES
    }


def inpainting(paint: Painter, cases: Sequence[InpaintCase]) -> Figures:
    """Painting into masks: colour and shape inside, and the same asked of the untouched picture."""
    colour, before, unasked, shape, shape_before = [], [], [], [], []
    for item in cases:
        case, mask = item.case, item.mask
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        painted = paint(Image.fromarray(item.image), grey, case.prompt, case.seed)
        image = np.asarray(painted.convert("RGB"))
        colour.append(colour_share(image, case.colour, mask) >= MASK_SHARE)
        before.append(colour_share(item.image, case.colour, mask) >= MASK_SHARE)
        unasked.append(colour_share(image, case.other, mask) >= MASK_SHARE)
        shape.append(is_shape(segment(image, case.colour, mask), case.shape))
        shape_before.append(is_shape(segment(item.image, case.colour, mask), case.shape))
    return {
        "n": len(cases),
        "colour": share(colour),
        "colour_before": share(before),
        "unasked_colour": share(unasked),
        "shape": share(shape),
        "shape_before": share(shape_before),
        "shape_chance": CHANCE,
    }


def is_shape(piece: Mask, shape: str) -> bool:
    """Whether the judge takes ``piece`` for ``shape``."""
    verdict = judge_shape(piece)
    return verdict is not None and verdict.shape == shape


def border_colour(image: Pixels) -> str:
    """The commonest palette colour of the outermost four pixels; "" if none is near."""
    inside = np.zeros(image.shape[:2], np.bool_)
    inside[4:-4, 4:-4] = True
    found = colour_map(image)[~inside]
    found = found[found >= 0]
    return COLOURS[int(np.bincount(found).argmax())] if len(found) else ""


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Sequence[Pixels]) -> list[Pixels]:
    """Each (h, w, 3) picture through the autoencoder, without noise."""
    made = []
    for image in images:
        pixels = to_tensor(image[None]).to(next(vae.parameters()))
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        scaled = ((output.float().cpu() + 1) * 127.5).round().clamp(0, 255)
        made.append(scaled.permute(1, 2, 0).to(torch.uint8).numpy())
    return made


def autoencoder_quality(vae: AutoencoderKL, pictures: Sequence[Pixels]) -> float:
    """Mean PSNR in dB of the pictures' reconstructions."""
    made = reconstruct(vae, pictures)
    pairs = zip(made, pictures, strict=True)
    return round(sum(psnr(to_tensor(a[None]), to_tensor(b[None])) for a, b in pairs) / len(made), 2)


def judge_accuracy(vae: AutoencoderKL, mix: Mix, count: int = 200, side: int = 128) -> Figures:
    """How often the judges are right on held-out scenes with one plain object, after the VAE.

    ``colour_false`` is how often they see a colour that stands in neither object nor background.
    """
    scenes = [draw_scene(HELD_OUT, i, mix) for i in range(4 * count)]
    scenes = [s for s in scenes if len(s.things) == 1 and s.things[0].texture == "plain"][:count]
    images = reconstruct(vae, [render(scene, side).image for scene in scenes])
    colour, false, shape = [], [], []
    for scene, image in zip(scenes, images, strict=True):
        thing = scene.things[0]
        there = {thing.colour, scene.background.colour, scene.background.second}
        absent = [c for c in COLOURS if c not in there]
        colour.append(colour_share(image, thing.colour) >= FRAME_SHARE)
        false.append(colour_share(image, absent[len(colour) % len(absent)]) >= FRAME_SHARE)
        shape.append(is_shape(segment(image, thing.colour), thing.noun))
    return {
        "n": len(scenes),
        "colour": share(colour),
        "colour_false": share(false),
        "shape": share(shape),
    }
