"""TIFF: 16-bit pixels, which Pillow does not read, and one way to write every layout."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
from PIL import Image

from diffedit.errors import ImageError
from diffedit.images.picture import EXIF_HEADER, Picture, Pixels
from diffedit.images.png import opencv

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 33432)  # description, make, model, software, …
_SUB_IFDS = (0x8769, 0x8825)  # Exif, GPS


def deep_pixels(data: bytes) -> tuple[Pixels, bytes | None] | None:
    """Return pixels and ICC profile of the first page if it is 16-bit; else None.

    Raises:
        ImageError: a layout that is not read.
        ValueError: a file that is cut off or damaged.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        limit = Image.MAX_IMAGE_PIXELS
        if limit and page.imagewidth * page.imagelength > 2 * limit:
            raise Image.DecompressionBombError(f"{page.imagewidth}x{page.imagelength} pixels")
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(offset + count > len(data) for offset, count in ends):
            raise ValueError("the file ends too early")  # tifffile would fill in zeros
        if page.bitspersample <= 8 or page.dtype == np.float32:
            return None
        samples, colours = page.samplesperpixel, page.photometric.name
        own = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}.get(colours, -1)  # without extras
        if page.dtype != np.uint16 or page.bitspersample != 16 or samples - own not in (0, 1):
            raise ImageError(
                f"{samples} x {page.bitspersample}-bit {page.dtype} {colours} pixels are not read, "
                "should be 8 or 16 bit without sign, grey or RGB"
            )
        try:
            pixels: Pixels = page.asarray()
        except ValueError:  # a compression that tifffile leaves to an optional package
            pixels = opencv(data)
            if pixels.dtype != np.uint16 or np.atleast_3d(pixels).shape[2] != samples:
                raise
        else:
            if "S" in page.axes:  # planes may be stored one after the other
                pixels = np.moveaxis(pixels, page.axes.index("S"), -1)
            if colours == "MINISWHITE":
                pixels = 65535 - pixels
        extra = [*page.extrasamples, 2][0]
        if samples > own and extra == 1:  # premultiplied alpha
            alpha = pixels[..., -1:].astype(np.float64)
            straight = pixels[..., :-1] * 65535.0 / np.where(alpha > 0, alpha, 65535)
            pixels = np.dstack([np.minimum(straight, 65535).round(), alpha]).astype(np.uint16)
        elif samples > own and extra != 2:  # not alpha
            pixels = pixels[..., :own]
        return pixels, page.tags.valueof(34675)


def descriptive(tags: Image.Exif) -> Image.Exif:
    """Return what the tags of a TIFF say about the picture, without what they say of its layout."""
    kept = Image.Exif()
    kept.update({tag: tags[tag] for tag in _DESCRIPTIVE if tag in tags})
    kept.update({tag: dict(values) for tag in _SUB_IFDS if (values := tags.get_ifd(tag))})
    return kept


def encode_tiff(picture: Picture) -> bytes:
    """One deflated strip; Pillow lays out the directory, which carries EXIF and ICC as well."""
    pixels, (width, height), channels = picture.pixels, picture.size, picture.channels
    strip = zlib.compress(
        pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    )  # as Pillow's tags
    found = Image.Exif()
    if picture.exif:
        found.load(picture.exif)
    tags = descriptive(found)
    tags.update({256: width, 257: height, 278: height})  # 278: rows in the only strip
    tags.update({273: 0, 279: len(strip)})  # its offset, from the end of the directory, and length
    tags[258] = (pixels.dtype.itemsize * 8,) * channels  # bits per sample
    tags.update({259: 8, 274: 1, 277: channels, 284: 1})  # deflate, upright, contiguous samples
    tags[262] = 1 if channels <= 2 else 2  # black is zero, or RGB
    if picture.has_alpha:
        tags[338] = 2  # an extra sample: alpha, not premultiplied
    if picture.icc:
        tags[34675] = picture.icc
    return tags.tobytes()[len(EXIF_HEADER) :] + strip
