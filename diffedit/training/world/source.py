"""The drawn world as a source of training examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from diffedit.errors import InputError, nearest
from diffedit.training.data import Example, Phrase
from diffedit.training.world.forms import Floats
from diffedit.training.world.paint import Drawing, render
from diffedit.training.world.scenes import (
    MIXES,
    STYLES,
    UNSEEN_STYLES,
    Mix,
    Scene,
    draw_scene,
)

VERSION = 2
"""Of what the world looks like: raise it when the same seed draws something else."""

HELD_OUT = 1_000_003
"""Added to a world's seed for the scenes that are judged on, never trained on."""

_NEAR = 8 / 128
"""How far around an object its surroundings count as belonging to it, as a fraction of the side."""


class Drawn:
    """Scenes of a world; each is drawn when it is asked for.

    Args:
        shares: mixes by name (see ``scenes.MIXES``), each with its share of the scenes.
        count: how many scenes; ``first`` is the number of the first.
        side: of the pictures, in pixels.
        seed: of the world.
        style: draw everything in this style, whose name no caption says: one of ``scenes.STYLES``
            or ``scenes.UNSEEN_STYLES``.

    Raises:
        InputError: no such style.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        count: int,
        side: int,
        *,
        seed: int = 0,
        first: int = 0,
        style: str | None = None,
    ) -> None:
        known = STYLES + UNSEEN_STYLES
        if style is not None and style not in known:
            raise InputError(
                f"no style {style!r}{nearest(style, known)}, should be one of {', '.join(known)}"
            )
        self.shares, self.count, self.side = dict(shares), count, side
        self.seed, self.first, self.style = seed, first, style
        self.name = "world " + "+".join(shares)
        said = [VERSION, sorted(self.shares.items()), count, side, seed, first, style]
        self.digest = hashlib.sha256(repr(said).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Scene number ``index``."""
        number = self.first + index
        names = list(self.shares)
        weights = np.array([self.shares[name] for name in names])
        rng = np.random.default_rng((self.seed, number, 99))
        mix: Mix = MIXES[str(rng.choice(names, p=weights / weights.sum()))]
        if self.style is None:
            return draw_scene(self.seed, number, mix)
        mix = replace(mix, style=0.0)
        if self.style in UNSEEN_STYLES:
            # Paper has neither photographs nor patterns on it, and is never empty.
            mix = replace(mix, photo=0.0, pattern=0.0, empty=0.0)
        return replace(draw_scene(self.seed, number, mix), style=self.style)

    def __getitem__(self, index: int) -> Example:
        return self.drawn(index)[0]

    def drawn(self, index: int) -> tuple[Example, Drawing]:
        """Example number ``index``, and the drawing that it is taken from."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.name} has {self.count} scenes, no number {index}")
        scene = self.scene(index)
        drawing = render(scene, self.side)
        name = f"scene {self.first + index}"
        example = Example(
            drawing.image,
            scene.caption,
            name,
            weight=nearby(drawing),
            phrases=phrases(drawing),
        )
        return example, drawing


def phrases(drawing: Drawing) -> tuple[Phrase, ...]:
    """The words that name each object of a drawing, as far as the caption says them just once."""
    caption = f" {drawing.scene.caption.replace(',', ' ,').replace('grey', 'gray')} "
    found = []
    for thing, mask in zip(drawing.scene.things, drawing.masks, strict=True):
        for words in (f"{thing.colour} {thing.noun}", thing.noun):
            if caption.count(f" {words} ") == 1 and mask.any():
                grey = "gray" in words and "grey" in drawing.scene.caption
                words = words.replace("gray", "grey") if grey else words
                found.append(Phrase(words, mask))
                break
    return tuple(found)


def nearby(drawing: Drawing) -> Floats | None:
    """Where an object is or is near: (side, side), 1 there and 0 elsewhere.

    ``None`` for views, where everything is described, unless the caption is about one thing only.
    """
    masks, told = drawing.masks, drawing.scene.told
    if told is not None:
        masks = masks[told : told + 1]
    elif drawing.scene.view != "objects":
        return None
    if not masks:
        return None
    side = len(drawing.image)
    covered = np.maximum.reduce(masks) > 0
    reach = max(1, round(_NEAR * side))
    near = np.zeros((side, side), np.float32)
    if covered.any():
        # The mask grown by a square, along one axis after the other.
        sums = np.cumsum(np.pad(covered, ((reach + 1, reach), (0, 0))), axis=0)
        grown = (sums[2 * reach + 1 :] - sums[: -2 * reach - 1]) > 0
        sums = np.cumsum(np.pad(grown, ((0, 0), (reach + 1, reach))), axis=1)
        near[:] = (sums[:, 2 * reach + 1 :] - sums[:, : -2 * reach - 1]) > 0
    return near
