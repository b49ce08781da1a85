"""From what a user gives to a picture or a mask."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from diffedit.errors import ImageError, MaskError
from diffedit.images import png, tiff
from diffedit.images.picture import EXIF_HEADER, Picture, Pixels, luma

log = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Picture
FloatBits = Literal[8, 16]  # what float pixels are rounded to

_ORIENTATION = 0x0112
_READS = "PNG, JPEG, WebP, TIFF, BMP or GIF"
# Only these: Pillow would also run Ghostscript on an EPS, and reads deep JPEG 2000 as 8-bit.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF")


def open_picture(source: ImageSource, *, float_bits: FloatBits = 8) -> Picture:
    """Return the picture at a path, in a file's bytes, a Pillow image or a NumPy array.

    Files keep their depth (8 or 16 bit), channels, ICC profile and EXIF; palettes become RGB(A),
    CMYK becomes RGB (through its profile when it has one), of an animation the first frame is
    taken, and EXIF orientation is applied. Arrays are (h, w) or (h, w, c), uint8, uint16, bool
    (False, True -> 0, 255) or float in [0, 1], which is rounded to ``float_bits``.
    A Pillow image that was opened from a 16-bit RGB file is 8-bit already: pass the path instead.

    Raises:
        ImageError: nothing there, not an image, damaged, or pixels of another kind.
    """
    match source:
        case Picture():
            return source
        case np.ndarray():
            return Picture(_integers(source, float_bits))
        case Image.Image():
            return _decode(source, "the Pillow image", float_bits)
        case bytes() | bytearray():
            return _decode(bytes(source), "the image bytes", float_bits)
        case str() | os.PathLike():
            path = Path(source)
            if not os.fspath(source):
                raise ImageError("an empty path, should be the path of an image")
            return replace(_decode(_read_file(path), str(path), float_bits), path=path)
    raise ImageError(
        f"a {type(source).__name__} is not an image, should be a path, bytes, a Pillow image "
        "or a NumPy array"
    )


def read_mask(source: ImageSource) -> npt.NDArray[np.float32]:
    """Return a mask as (h, w) float32 in [0, 1]; 1 = may change.

    RGB counts by its luminance, and alpha multiplies: white on transparent is a mask. Sources are
    those of :func:`open_picture`, floats rounded to 16 bits. uint8 counts to 255: an array of 0
    and 1 should be bool.

    Raises:
        ImageError: a file that is missing or cannot be read.
        MaskError: an array that is not a mask.
    """
    try:
        picture = open_picture(source, float_bits=16)
    except ImageError as error:
        if isinstance(source, np.ndarray):
            raise MaskError(f"not a mask: {error}") from None
        raise
    if picture.pixels.max() == 1:
        log.warning("a mask's values are 0 and 1 of %d: nearly black", picture.max_value)
    mask = luma(picture.rgb())
    if picture.has_alpha:
        mask *= picture.pixels[..., -1].astype(np.float32) / picture.max_value
    return np.clip(mask, 0, 1).astype(np.float32, copy=False)


def _integers(pixels: Pixels, float_bits: FloatBits) -> Pixels:
    """Bool and float pixels as integers, others as they are."""
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind != "f":
        return pixels
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise ImageError(
            f"float pixels reach from {pixels.min():g} to {pixels.max():g}, should lie in [0, 1] "
            "without NaN"
        )
    values = pixels.astype(np.result_type(pixels, np.float32))  # 65535 lies beyond float16
    kind = np.uint8 if float_bits == 8 else np.uint16
    return (values * np.iinfo(kind).max).round().astype(kind)


def _read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{path} is {kind}, should be an image file")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist, should be the path of an image") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{str(path)!r} cannot be read ({reason})") from error


def _decode(source: bytes | Image.Image, where: str, float_bits: FloatBits) -> Picture:
    try:
        with warnings.catch_warnings():
            # Between once and twice Pillow's limit a picture is large, not an attack.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("error", "(?i).*truncated")
            decoded = _from_file(source) if isinstance(source, bytes) else _from_pil(source)
            pixels, icc, tagged = decoded
            orientation, block = _read_exif(tagged)
            return Picture(_oriented(_integers(pixels, float_bits), orientation), icc, block)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    except UnidentifiedImageError:
        what = "is not an image that can be read" if source else "is empty"
        raise ImageError(f"{where} {what}, should be {_READS}") from None
    except Exception as error:  # decoders raise anything on damaged data
        what = "is truncated or damaged"
        if isinstance(error, Image.DecompressionBombError):
            what = "is too large"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{where} {what} ({reason})") from error


_Decoded = tuple[Pixels, bytes | None, "Image.Image | bytes"]  # and where the EXIF tags are


def _from_file(data: bytes) -> _Decoded:
    if data.startswith(tiff.MAGIC) and (deep := tiff.deep_pixels(data)):
        return *deep, data  # Pillow does not open all of these, not even for their tags
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if data.startswith(png.MAGIC) and (pixels := png.deep_pixels(data)) is not None:
        return pixels, image.info.get("icc_profile"), image
    return _from_pil(image)


def _from_pil(image: Image.Image) -> _Decoded:
    image.load()
    icc = image.info.get("icc_profile") or None
    pixels = np.asarray(image)
    if image.mode in ("CMYK", "LAB"):
        pixels, icc = _to_srgb(image, icc)
    elif image.mode == "I":
        if not 0 <= pixels.min() <= pixels.max() <= 65535:
            raise ImageError(
                f"pixels reach from {pixels.min()} to {pixels.max()} (Pillow mode I), "
                "should lie in 0 … 65535"
            )
        pixels = pixels.astype(np.uint16)
    elif not image.mode.startswith(("I;16", "F")):
        kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        pixels = np.asarray(image.convert(kind + "A" * image.has_transparency_data))
    return pixels, icc, image


def _to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Pixels, bytes | None]:
    """CMYK or LAB -> RGB; a CMYK profile must not stay on RGB pixels."""
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    profile: Any = ImageCms.createProfile("LAB") if image.mode == "LAB" else io.BytesIO(icc or b"")
    try:
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except ImageCms.PyCMSError:  # no profile, or a broken one
        return np.asarray(image.convert("RGB")), None
    return np.asarray(converted), srgb.tobytes()


def _read_exif(source: Image.Image | bytes) -> tuple[int, bytes | None]:
    """Return the orientation (1 to 8), and the EXIF block with its orientation reset to 1.

    Broken EXIF is no reason to refuse a picture: it is dropped.
    """
    orientation = 1
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        if isinstance(source, bytes):
            tags, raw = Image.Exif(), None
            tags.load(source)  # an EXIF block is a TIFF file
        else:
            tags, raw = source.getexif(), source.info.get("exif")
        stored = tags.get(_ORIENTATION, 1)
        orientation = stored if stored in range(1, 9) else 1
        if raw and stored == 1:  # byte for byte: maker notes count on their place
            return 1, EXIF_HEADER + raw.removeprefix(EXIF_HEADER)
        if raw:
            tags[_ORIENTATION] = 1
        else:
            tags = tiff.descriptive(tags)
        return orientation, tags.tobytes() if len(tags) else None
    return orientation, None


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
