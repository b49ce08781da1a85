"""The value that is read, edited and written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffedit.errors import ImageError

Pixels = npt.NDArray[Any]  # uint8 or uint16, (h, w) or (h, w, c)
Floats = npt.NDArray[np.floating[Any]]
EXIF_HEADER = b"Exif\0\0"


@dataclass(frozen=True, eq=False)
class Picture:
    """Decoded pixels with what a file says about them.

    Attributes:
        pixels: (h, w) grey or (h, w, c) with c = 2 (grey and alpha), 3 (RGB) or 4 (RGBA, alpha not
            premultiplied); uint8 or uint16; read-only. An array that its owner could still change
            is copied.
        icc: ICC profile of the pixels.
        exif: EXIF block in Pillow's form (it begins with ``Exif``); orientation is applied to the
            pixels already and its tag says 1.
        path: the file it was read from. Pictures derived from it keep the path, so that they are
            never saved over their source.

    Raises:
        ImageError: pixels of another shape or type.
    """

    pixels: Pixels
    icc: bytes | None = None
    exif: bytes | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        pixels = self.pixels
        shape, dtype = pixels.shape, pixels.dtype.newbyteorder("=")
        if len(shape) == 3 and shape[2] == 1:
            pixels = pixels[..., 0]
        elif len(shape) != 2 and not (len(shape) == 3 and shape[2] in (2, 3, 4)):
            raise ImageError(
                f"an array of shape {shape} is not a picture, should be (height, width) or "
                "(height, width, 1 to 4), channels last"
            )
        if 0 in shape:
            raise ImageError(f"an array of shape {shape} has no pixels")
        if dtype not in (np.uint8, np.uint16):
            raise ImageError(
                f"pixels are {dtype}, should be uint8 or uint16, or bool or float in a source"
            )
        pixels = pixels.astype(dtype, copy=False)
        if pixels.flags.writeable or not (pixels.flags.owndata and pixels.flags.c_contiguous):
            pixels = pixels.copy(order="C")
            pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)

    def __reduce__(self) -> tuple[Any, ...]:  # NumPy's pickle forgets that an array is read-only
        return Picture, (self.pixels, self.icc, self.exif, self.path)

    def __repr__(self) -> str:
        width, height = self.size
        origin = f", {str(self.path)!r}" if self.path else ""
        return f"Picture({width}x{height}, {self.channels} x {self.pixels.dtype}{origin})"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def channels(self) -> int:
        """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
        return 1 if self.pixels.ndim == 2 else self.pixels.shape[2]

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.channels in (2, 4)

    @property
    def max_value(self) -> int:
        """255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of dtype, shape and decoded pixels; metadata does not count."""
        head = f"{self.pixels.dtype.name} {self.pixels.shape} ".encode()
        little = self.pixels.astype(self.pixels.dtype.newbyteorder("<"), copy=False)
        return hashlib.sha256(head + little.tobytes()).hexdigest()

    def rgb(self) -> npt.NDArray[np.float32]:
        """Return (h, w, 3) float32 in [0, 1]: ``pixels / max_value``; grey repeated, no alpha."""
        colours = _colours(self.pixels)
        rgb = np.repeat(colours, 3 // colours.shape[2], axis=2).astype(np.float32)
        return rgb / np.float32(self.max_value)

    def with_rgb(self, rgb: Floats, where: npt.NDArray[np.bool_]) -> Picture:
        """Return a picture whose colours are those of ``rgb`` in ``where``, and its own elsewhere.

        Args:
            rgb: (h, w, 3) floats, clipped to [0, 1] and rounded to this picture's depth. A grey
                picture takes the luminance, which for r == g == b is exactly that value.
            where: (h, w) bool; outside it every value stays as it is, and alpha stays everywhere.

        Raises:
            ImageError: arrays of another size or type, or NaN inside ``where``.
        """
        size = self.pixels.shape[:2]
        if rgb.shape != (*size, 3) or rgb.dtype.kind != "f":
            raise ImageError(f"new colours are {rgb.shape} {rgb.dtype}, not {(*size, 3)} floats")
        if where.shape != size or where.dtype != np.bool_:
            raise ImageError(f"where to change is {where.shape} {where.dtype}, not {size} bool")
        new = rgb[where].astype(np.result_type(rgb, np.float32))  # (n, 3); float16 is too coarse
        if np.isnan(new).any():
            raise ImageError("the new colours hold NaN, should be numbers in [0, 1]")
        pixels = self.pixels.copy()
        colours = _colours(pixels)
        if colours.shape[2] == 1:
            new = luma(new)[:, None]
        colours[where] = (np.clip(new, 0, 1) * self.max_value).round()
        return replace(self, pixels=pixels)

    def to_pil(self) -> Image.Image:
        """Return a Pillow image with ICC profile and EXIF in its ``info``.

        16-bit grey becomes ``I;16``. Pillow has no 16-bit mode for grey with alpha, RGB and RGBA:
        those are rounded to 8 bits.
        """
        pixels = self.pixels
        if self.max_value == 65535 and self.channels > 1:
            pixels = (pixels / 257).round().astype(np.uint8)
        image = Image.fromarray(pixels)
        if self.icc:
            image.info["icc_profile"] = self.icc
        if self.exif:
            image.info["exif"] = self.exif
        return image

    def resized(self, size: tuple[int, int]) -> Picture:
        """Return the picture at (width, height): Lanczos, antialiased, depth and channels kept."""
        if min(size) < 1:
            raise ImageError(f"cannot resize to {size[0]}x{size[1]}, should be at least 1x1")
        if size == self.size:
            return self
        if self.max_value == 255:  # Pillow premultiplies alpha itself
            resized = self.to_pil().resize(size, Image.Resampling.LANCZOS)
            return replace(self, pixels=np.asarray(resized))
        planes = np.atleast_3d(self.pixels).astype(np.float32) / self.max_value  # (h, w, c)
        if self.has_alpha:  # transparent pixels must not bleed their colour into visible ones
            planes[..., :-1] *= planes[..., -1:]
        images = [Image.fromarray(plane) for plane in np.moveaxis(planes, 2, 0).copy()]
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
        planes = np.stack([np.asarray(image) for image in images], axis=2)
        if self.has_alpha:
            planes[..., :-1] /= np.where(planes[..., -1:] > 0, planes[..., -1:], 1)
        values = (np.clip(planes, 0, 1) * self.max_value).round()
        return replace(self, pixels=values.astype(np.uint16))


def _colours(pixels: Pixels) -> Pixels:
    """A view of the colours: (h, w[, c]) -> (h, w, 1) for grey, (h, w, 3) for RGB."""
    planes = np.atleast_3d(pixels)
    return planes[..., : 3 if planes.shape[2] > 2 else 1]


def luma(rgb: Floats) -> Floats:
    """(…, 3) -> (…); written so that r == g == b gives exactly that value."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return cast(Floats, green + 0.299 * (red - green) + 0.114 * (blue - green))
