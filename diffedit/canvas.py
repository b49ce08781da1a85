"""The picture being edited: its pixels, the region being worked on, and the map between the two.

Full-image coordinates count pixels from the top left. Working coordinates belong to the region:
cropped, scaled, and padded on the right and at the bottom to the model's grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffedit import tone
from diffedit.box import Box
from diffedit.errors import InputError
from diffedit.images import Picture

FAINT = 0.1
"""Share of a latent cell's largest mask value below which a pixel counts as not covered."""


ZOOM = 1.5
"""How far a region is magnified at most.

What a mask covers is then drawn with more latent cells. In `bench/quality`, masks of 115 of 384
pixels got what was asked in 0.88 of chains instead of 0.70 (the embedded model, 40 chains).
"""


class Frame(NamedTuple):
    """A region and the size it is worked on at.

    Attributes:
        region: the part of the image that is worked on.
        content: (width, height) of the region after scaling, in working pixels.
        size: (width, height) of the working picture: `content`, padded to the grid.
    """

    region: Box
    content: tuple[int, int]
    size: tuple[int, int]


def frame(
    image: tuple[int, int], wanted: Sequence[Box], sides: tuple[int, int], grid: int
) -> Frame:
    """Choose the smallest region that holds what the edits ask for and that the model likes.

    Each side of the union of `wanted` is grown to the model's smallest side (as it is after
    scaling) and to its grid, as far as the image reaches. What is larger than the model's largest
    side is scaled down, and what is smaller than its smallest side is scaled up: an image, or a
    region of an image that is larger than that, by as much as the image is larger and at most by
    `ZOOM`. An image of the model's own size stays whole, for its scene says what belongs into the
    mask. In between, pixels map one to one.

    Args:
        image: (width, height) of the image in pixels.
        wanted: the boxes that edits ask for, context margin included; empty: the whole image.
        sides: the model's smallest and largest side in pixels.
        grid: pixels per latent cell.
    """
    width, height = image
    whole = Box(0, 0, width, height)
    region = whole
    if wanted:
        box = Box.union(wanted).clip(whole)
        zoom = min(max(1.0, min(image) / sides[0]), ZOOM)
        # What is too long to be scaled so far gets so much beside it that it is wide enough.
        long = -(-max(box.size) // grid) * grid
        least = math.ceil(sides[0] * max(1 / zoom, long / sides[1]))
        left, right = _grow(box.left, box.right, width, least, grid)
        top, bottom = _grow(box.top, box.bottom, height, least, grid)
        region = Box(left, top, right, bottom)
    short, long = sorted(region.size)
    scale = min(max(1.0, sides[0] / short), sides[1] / long)
    if scale == 1.0:
        content = region.size
    else:
        content = (max(1, round(region.width * scale)), max(1, round(region.height * scale)))
    size = (-(-content[0] // grid) * grid, -(-content[1] // grid) * grid)
    return Frame(region, content, size)


def _grow(low: int, high: int, limit: int, smallest: int, grid: int) -> tuple[int, int]:
    """Grow ``[low, high)`` about its middle to `smallest` and to a multiple of `grid`."""
    side = max(high - low, smallest)
    side = min(-(-side // grid) * grid, limit)
    low = min(max(0, low - (side - (high - low)) // 2), limit - side)
    return low, low + side


def exact_frame(image: tuple[int, int], grid: int) -> Frame:
    """The whole image as it is, for comparisons with pipelines that know no regions."""
    if image[0] % grid or image[1] % grid:
        raise InputError(
            f"compat mode needs sides that are multiples of {grid}, got {image[0]}x{image[1]}"
        )
    return Frame(Box(0, 0, *image), image, image)


@dataclass(frozen=True, eq=False)
class Canvas:
    """One pass's view of the picture. Read-only; a pass hands on a new one.

    Attributes:
        source: the pristine picture, None when a picture is made from nothing.
        composite: the picture so far, ``(n, 3, H, W)`` float32 in [0, 1], one per item or one for
            all of them.
        frame: the region being worked on.
        touched: ``(n, 1, H, W)`` bool: the pixels that some pass has changed.
    """

    source: Picture | None
    composite: Tensor
    frame: Frame
    touched: Tensor

    @staticmethod
    def open(source: Picture, where: Frame) -> Canvas:
        """A canvas over a picture; alpha is left aside, grey becomes RGB."""
        rgb = torch.from_numpy(source.rgb()).permute(2, 0, 1)[None].contiguous()
        touched = torch.zeros(1, 1, *rgb.shape[-2:], dtype=torch.bool)
        return Canvas(source, rgb, where, touched)

    @staticmethod
    def blank(size: tuple[int, int], where: Frame) -> Canvas:
        """A canvas to make a picture of `size` (width, height) from nothing."""
        shape = (size[1], size[0])
        return Canvas(None, torch.zeros(1, 3, *shape), where, torch.zeros(1, 1, *shape).bool())

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the full image in pixels."""
        return self.composite.shape[-1], self.composite.shape[-2]

    @property
    def empty(self) -> bool:
        """Whether there is no picture yet: nothing was given and no pass has made anything."""
        return self.source is None and not bool(self.touched.any())

    @property
    def so_far(self) -> Picture:
        """The picture so far, for edits to look at; of a batch the first."""
        untouched = self.source is not None and not bool(self.touched.any())
        return self.source if untouched and self.source is not None else self.picture(0)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the working picture in pixels."""
        return self.frame.size

    @cached_property
    def pixels(self) -> Tensor:
        """The working picture, ``(n, 3, h, w)`` in [0, 1]."""
        return self.to_work(self.composite)

    def focused(self, where: Frame) -> Canvas:
        """The same picture with another region."""
        return replace(self, frame=where)

    def to_work(self, full: Tensor) -> Tensor:
        """Map ``(n, c, H, W)`` over the full image to the working region, padded with the edge."""
        return self._pad(self._resize(self._crop(full), self.frame.content))

    def hint(self, picture: Picture) -> Tensor:
        """Map a picture of the whole image (a control hint) to the working region.

        Returns:
            ``(1, 3, h, w)`` float32 in [0, 1].
        """
        if picture.size != self.image_size:
            picture = picture.resized(self.image_size)
        return self.to_work(torch.from_numpy(picture.rgb()).permute(2, 0, 1)[None].contiguous())

    def mask_to_work(self, mask: Tensor) -> Tensor:
        """Map a mask ``(n, 1, H, W)`` to working pixels by maximum: thin strokes survive."""
        crop = self._crop(mask)
        width, height = self.frame.content
        if crop.shape[-2:] != (height, width):
            crop = F.adaptive_max_pool2d(crop, (height, width))
        return self._pad(crop)

    def mask_to_latent(self, mask: Tensor, grid: int) -> Tensor:
        """How freely each latent cell may change under a mask ``(n, 1, H, W)``, in [0, 1].

        A cell has the largest value of its pixels, times a power of the share of them that the mask
        covers, be it white or grey. So one pixel is enough to release a cell, but what lies partly
        outside is released late, when outlines are settled: what is made ends inside the mask, and
        the paste-back cuts nothing off. The power is the fifth along masks that are wide, where it
        leaves 0.87 of the seam that the square leaves (`bench/quality`), and the square on narrow
        ones, which would else keep much of what they cover. The share is that of the best covered
        cell around it: a stroke thinner than a cell is released at once.
        """
        work = self.mask_to_work(mask)
        most = F.max_pool2d(work, grid)
        # What an encoder of pictures leaves beside white is no grey.
        covered = work > FAINT * F.interpolate(most, scale_factor=grid)
        share = F.avg_pool2d(covered.to(work), grid)
        around = F.max_pool2d(share, 3, stride=1, padding=1)
        within = -F.max_pool2d(-(share > 1 - 0.5 / grid**2).to(work), 3, stride=1, padding=1)
        wide = F.max_pool2d(within, 5, stride=1, padding=2)
        return most * (share / around.clamp_min(1e-6)) ** (2 + 3 * wide)

    @property
    def region_pixels(self) -> Tensor:
        """The region as it is so far, ``(n, 3, height, width)`` in [0, 1], at full resolution."""
        return self._crop(self.composite)

    def to_region(self, decoded: Tensor) -> Tensor:
        """Map a working picture ``(b, 3, h, w)`` back to the region's own resolution."""
        width, height = self.frame.content
        return self._resize(decoded[..., :height, :width], self.frame.region.size)

    def toned(self, pixels: Tensor, mask: Tensor, alpha: Tensor, grid: int) -> Tensor:
        """Decoded pixels ``(b, 3, height, width)`` of the region, in the tone of what is around.

        What is around is what neither was made nor shows when it is pasted: a latent cell is made
        as a whole, wherever the mask's edge goes through it. See `tone.matched`.

        Args:
            pixels: in [0, 1].
            mask: ``(1 or b, 1, H, W)``, where latents were to change.
            alpha: ``(1 or b, 1, H, W)``, as for `pasted`.
            grid: pixels per latent cell.
        """
        width, height = self.frame.content
        freed = (self.mask_to_latent(mask, grid) > 0).to(alpha.dtype)
        freed = F.interpolate(freed, scale_factor=grid)[..., :height, :width]
        freed = F.adaptive_max_pool2d(freed, self.region_pixels.shape[-2:])
        made = torch.maximum(freed, self._crop(alpha))
        return tone.matched(pixels.float(), self.region_pixels, made)

    def pasted(self, pixels: Tensor, alpha: Tensor | None) -> Canvas:
        """Put new pixels into the region.

        Args:
            pixels: ``(b, 3, height, width)`` in [0, 1], the region at full resolution.
            alpha: ``(1 or b, 1, H, W)`` in [0, 1] over the full image; 0 leaves a pixel as it is,
                value for value. None: the whole region is new.
        """
        new = pixels.float().clamp(0, 1)
        box = self.frame.region
        items = max(len(new), len(self.composite))
        composite = self.composite.expand(items, -1, -1, -1).clone()
        touched = self.touched.expand(items, -1, -1, -1).clone()
        rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
        old = composite[..., rows, columns]
        part = torch.ones_like(new[:, :1]) if alpha is None else self._crop(alpha)
        # where() and not a blend alone: 0 * new + 1 * old would let NaN and rounding through.
        mixed = torch.where(part >= 1, new, old + part * (new - old))
        composite[..., rows, columns] = torch.where(part > 0, mixed, old)
        touched[..., rows, columns] |= part > 0
        return replace(self, composite=composite, touched=touched)

    def picture(self, item: int) -> Picture:
        """The picture so far, in the source's own type; untouched pixels are the source's own."""
        composite = self.composite[item if len(self.composite) > 1 else 0]
        rgb = composite.permute(1, 2, 0).numpy()
        if self.source is None:
            return Picture((rgb * 255).round().astype(np.uint8))
        touched = self.touched[item if len(self.touched) > 1 else 0, 0].numpy()
        return self.source.with_rgb(rgb, touched)

    def _crop(self, full: Tensor) -> Tensor:
        box = self.frame.region
        return full[..., box.top : box.bottom, box.left : box.right]

    @staticmethod
    def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
        if pixels.shape[-2:] == (size[1], size[0]):
            return pixels
        return F.interpolate(
            pixels, (size[1], size[0]), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)

    def _pad(self, pixels: Tensor) -> Tensor:
        right, bottom = self.size[0] - pixels.shape[-1], self.size[1] - pixels.shape[-2]
        if not right and not bottom:
            return pixels.contiguous()
        return F.pad(pixels, (0, right, 0, bottom), mode="replicate")
