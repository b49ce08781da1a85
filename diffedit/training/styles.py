"""A judge of styles: which of the drawn world's a picture is in, the unseen ones included.

It looks at statistics of the whole picture, which say what it is made of and not what it shows:
histograms of colours, of gradients at four scales, of fine lines (morphological top hats, Serra
1982), and how gradients lie on the grid of a mosaic. A net with one hidden layer tells from them
the style. It was fitted to drawn scenes alone, the same scenes in every style, two thirds of them
bent, blurred, noisy and changed in tone at random; it has seen neither a model's pictures nor an
autoencoder's. ``python -m diffedit.training.styles`` fits it again, in a few minutes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from diffedit.training.data import Pixels
from diffedit.training.pictures import to_tensor
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import STYLES, UNSEEN_STYLES
from diffedit.training.world.source import HELD_OUT, VERSION, Drawn

log = logging.getLogger(__name__)

JUDGED = STYLES + UNSEEN_STYLES
"""What the judge tells apart."""

SIDE = 128
"""Pixels to a side at which pictures are judged, whatever their own size."""

WEIGHTS = Path(__file__).with_name("styles.safetensors")

_HIDDEN = 48
_PIECE = 32
"""Pictures that are looked at in one go."""

_SLOPES = torch.tensor([-0.2, -0.06, -0.02, -0.007, 0.007, 0.02, 0.06, 0.2])
_LINES = torch.tensor([0.04, 0.12, 0.3, 0.5])
"""Bounds of the histograms of gradients and of lines; 1 is from black to white."""

_TILE = SIDE // 16
"""Pixels to a tile of a mosaic; see ``world.paint``."""


class StyleJudge:
    """Says how likely each style is.

    Args:
        centre: (d,), mean of the features; ``spread``, their standard deviation.
        net: (n, d) standardised features -> (n, styles) logits.
    """

    def __init__(self, centre: Tensor, spread: Tensor, net: nn.Sequential) -> None:
        self.centre, self.spread, self.net = centre, spread, net

    @staticmethod
    def load(path: Path = WEIGHTS) -> StyleJudge:
        """The fitted judge that comes with diffedit."""
        state = load_file(path)
        centre, spread = state.pop("centre"), state.pop("spread")
        judge = StyleJudge(centre, spread, _new_net(len(centre)))
        judge.net.load_state_dict({key: value.float() for key, value in state.items()})
        return judge

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the judge, and of which world it is."""
        state = {key: value.half() for key, value in self.net.state_dict().items()}
        said = {"world": str(VERSION), "styles": " ".join(JUDGED)}
        save_file({"centre": self.centre, "spread": self.spread, **state}, path, said)
        path.chmod(0o644)

    @torch.no_grad()
    def probabilities(self, images: Sequence[Pixels]) -> list[dict[str, float]]:
        """Of each picture, (h, w, 3) uint8 of any size: every style with its probability."""
        made = []
        for start in range(0, len(images), _PIECE):
            pixels = torch.cat([_sized(image) for image in images[start : start + _PIECE]])
            logits = self.net((features(pixels) - self.centre) / self.spread)
            made += logits.softmax(dim=1).tolist()
        return [dict(zip(JUDGED, row, strict=True)) for row in made]

    def style(self, image: Pixels) -> str:
        """The likeliest style of a picture."""
        (found,) = self.probabilities([image])
        return max(found, key=found.__getitem__)


@cache
def judge() -> StyleJudge:
    """:meth:`StyleJudge.load`, read once."""
    return StyleJudge.load()


def style_of(image: Pixels) -> str:
    """The likeliest style of a picture, (h, w, 3) uint8: one of :data:`JUDGED`."""
    return judge().style(image)


def _sized(image: Pixels) -> Tensor:
    """(h, w, 3) uint8 -> (1, 3, SIDE, SIDE) in [0, 1]."""
    if image.shape[:2] != (SIDE, SIDE):
        picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
        image = np.asarray(picture)
    return (to_tensor(image[None]) + 1) / 2


def _new_net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, len(JUDGED)))


# -- what is looked at -----------------------------------------------------------------------------


def features(pixels: Tensor) -> Tensor:
    """(n, 3, SIDE, SIDE) in [0, 1] -> (n, d)."""
    small = functional.avg_pool2d(pixels, 4)
    found = _colours(small)
    grey = pixels.mean(dim=1, keepdim=True)
    for scale in range(4):
        found.append(_slopes(functional.avg_pool2d(grey, 2**scale)))
    for channel in (pixels.amin(dim=1, keepdim=True), pixels.amax(dim=1, keepdim=True)):
        eroded, dilated = -_largest(-channel), _largest(channel)
        found.append(_shares(torch.bucketize(channel - _largest(eroded), _LINES), 5))
        found.append(_shares(torch.bucketize(-_largest(-dilated) - channel, _LINES), 5))
    return torch.cat([*found, _grid(pixels)], dim=1)


def _colours(small: Tensor) -> list[Tensor]:
    """Joint and single histograms, means, standard deviations, principal spreads."""
    red, green, blue = (small * 4).long().clamp(0, 3).unbind(dim=1)
    found = [_shares(16 * red + 4 * green + blue, 64)]
    low, high = small.amin(dim=1), small.amax(dim=1)
    found += [_shares((value * 8).long().clamp(0, 7), 8) for value in (high, low, high - low)]
    found += [small.mean(dim=(2, 3)), small.std(dim=(2, 3))]
    flat = small.flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    spreads = torch.linalg.eigvalsh(flat @ flat.mT / flat.shape[2])
    return [*found, spreads.clamp_min(0).sqrt()]


def _slopes(grey: Tensor) -> Tensor:
    """The joint histogram of both differences: (n, 1, h, w) -> (n, 81)."""
    along = torch.bucketize(grey[..., :-1, 1:] - grey[..., :-1, :-1], _SLOPES)
    down = torch.bucketize(grey[..., 1:, :-1] - grey[..., :-1, :-1], _SLOPES)
    return _shares(9 * along + down, 81)


def _grid(pixels: Tensor) -> Tensor:
    """How much more changes at each place of a tile than on average: (n, _TILE), logarithms."""
    along = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(dim=1)
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean(dim=1)
    there = [
        along[..., at::_TILE].mean(dim=(1, 2)) + down[:, at::_TILE].mean(dim=(1, 2))
        for at in range(_TILE)
    ]
    found = torch.stack(there, dim=1) + 4e-3
    return (found / found.mean(dim=1, keepdim=True)).log()


def _largest(x: Tensor) -> Tensor:
    """The largest value within two pixels."""
    rows = functional.max_pool2d(x, (5, 1), 1, (2, 0))
    return functional.max_pool2d(rows, (1, 5), 1, (0, 2))


def _shares(places: Tensor, count: int) -> Tensor:
    """Square roots of the shares of each of ``count`` values: (n, …) -> (n, count)."""
    places = places.reshape(len(places), -1)
    ones = torch.ones((), device=places.device).expand(places.shape)
    found = torch.zeros(len(places), count).scatter_add_(1, places, ones)
    return (found / places.shape[1]).sqrt()


# -- fitting ---------------------------------------------------------------------------------------


def drawn(style: str, count: int, seed: int, side: int = SIDE) -> list[Pixels]:
    """Scenes in one style, sparse ones and full ones, all with something in them.

    Returns:
        ``count`` pictures, (side, side, 3) uint8.
    """
    source = Drawn({"rich": 0.4, "simple": 0.6}, 8 * count + 64, side, seed=seed, style=style)
    scenes = (source.scene(index) for index in range(len(source)))
    there = islice((scene for scene in scenes if scene.things), count)
    return [render(scene, side).image for scene in there]


def fit(count: int, seed: int = 0, steps: int = 4000) -> StyleJudge:
    """A judge fitted to ``count`` scenes in every style; the same for the same arguments.

    Every second scene is drawn at twice the size and scaled down: its lines are softer.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for number, style in enumerate(JUDGED):
        images = drawn(style, count // 2, seed + 1, 2 * SIDE) + drawn(style, -(-count // 2), seed)
        for place, start in enumerate(range(0, count, _PIECE)):
            pixels = torch.cat([_sized(image) for image in images[start : start + _PIECE]])
            rows.append(features(_worn(pixels, generator) if place % 3 else pixels))
        labels += [number] * count
    return fitted(torch.cat(rows), torch.tensor(labels), seed=seed, steps=steps)


def fitted(rows: Tensor, labels: Tensor, *, seed: int, steps: int) -> StyleJudge:
    """The judge of features (n, d) and the styles' numbers (n,), by AdamW on cross-entropy."""
    centre, spread = rows.mean(dim=0), rows.std(dim=0) + 1e-2
    rows = (rows - centre) / spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _new_net(rows.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.1)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (128,), generator=generator)
        given = rows[chosen]
        given = given + 0.2 * torch.randn(given.shape, generator=generator)
        loss = functional.cross_entropy(net(given), labels[chosen], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return StyleJudge(centre, spread, net.requires_grad_(False))


def _worn(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures a little bent, blotched, blurred, noisy (most so along edges) and of another tone.

    Roughly what drawing from noise and an autoencoder do to a picture, whichever they are.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def clouds(channels: int, cells: int) -> Tensor:
        field = normal(len(pixels), channels, cells, cells)
        return functional.interpolate(field, (SIDE, SIDE), mode="bicubic")

    # Lines waver by up to about four pixels, mostly by one, over stretches of eight.
    away = 3.2 / SIDE * uniform(len(pixels), 1, 1, 1) * clouds(2, 16)
    straight = functional.affine_grid(
        torch.eye(2, 3).expand(len(pixels), -1, -1), list(pixels.shape), align_corners=False
    )
    bent = straight + away.permute(0, 2, 3, 1)
    made = functional.grid_sample(pixels, bent, padding_mode="border", align_corners=False)
    made = made + 0.04 * uniform(len(pixels), 1, 1, 1) * clouds(3, 8)
    made = (made + 0.03 * uniform(len(pixels), 1, 1, 1) * clouds(3, 32)).clamp(0, 1)
    for part in range(4):
        if (width := 1.2 * float(uniform(1))) > 0.25:
            made[part::4] = _blurred(made[part::4], width)
    count, soft = len(made), _blurred(made, 1.5)
    edges = _blurred((made - soft).abs(), 1.5)
    made = made + 0.8 * uniform(count, 1, 1, 1) * edges * _blurred(normal(*made.shape), 0.7)
    made = (made - 0.5) * (1 + 0.08 * normal(count, 1, 1, 1).clamp(-2, 2)) + 0.5
    made = made + 0.015 * normal(count, 3, 1, 1)
    return (made + 0.015 * uniform(count, 1, 1, 1) * normal(*made.shape)).clamp(0, 1)


def _blurred(pixels: Tensor, width: float) -> Tensor:
    """Through a Gaussian of a standard deviation of ``width`` pixels, cut at two pixels."""
    line = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * width * width))
    kernel = torch.outer(line, line) / line.sum() ** 2
    flat = functional.pad(pixels.flatten(0, 1).unsqueeze(1), (2, 2, 2, 2), mode="replicate")
    return functional.conv2d(flat, kernel[None, None]).view_as(pixels)


def accuracy(found: StyleJudge, count: int, side: int = SIDE) -> dict[str, float]:
    """How often a judge is right on ``count`` held-out scenes in each style."""
    rates = {}
    for style in JUDGED:
        images = drawn(style, count, HELD_OUT, side)
        rates[style] = sum(found.style(image) == style for image in images) / count
    return rates


def main(count: int = 1000) -> None:
    """Fit the judge, write it, and say how good it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    made = fit(count)
    made.save()
    for side in (128, 256):
        rates = accuracy(made, 60, side)
        log.info("%d px: %.3f, %s", side, sum(rates.values()) / len(rates), rates)


if __name__ == "__main__":
    main()
