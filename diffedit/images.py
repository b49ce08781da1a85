"""Open, convert and save pictures without losing a value.

Units, once for the whole module:

* sizes are ``(width, height)``, arrays are ``(height, width[, channels])``;
* ``Picture.pixels`` are integers: uint8 in [0, 255] or uint16 in [0, 65535];
* ``rgb()`` and masks are float32 in [0, 1]; a mask is 1 where the picture may change;
* luminance is Rec. 601 luma (0.299, 0.587, 0.114), as in Pillow's and OpenCV's grey conversions.

Pillow opens 16-bit RGB as 8-bit without a word, so the pixels of 16-bit files are read with OpenCV
or tifffile; Pillow reads everything else and the metadata. PNG and TIFF are written here, in one
way for every depth and channel count, because no single library at hand writes them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from diffedit.errors import ImageError, MaskError, OutputError

__all__ = ["ImageSource", "Picture", "encode_png", "open_picture", "read_mask", "save_picture"]

log = logging.getLogger(__name__)

Pixels = npt.NDArray[Any]  # uint8 or uint16, (h, w) or (h, w, c)
Floats = npt.NDArray[np.floating[Any]]
FloatBits = Literal[8, 16]  # what float pixels are rounded to

_READS = "PNG, JPEG, WebP, TIFF, BMP or GIF"
# Only these: Pillow would also run Ghostscript on an EPS, and reads deep JPEG 2000 as 8-bit.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAGIC = (_PNG_MAGIC, b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXIF_HEADER = b"Exif\0\0"
_ORIENTATION = 0x0112


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
        pixels = _checked(self.pixels)
        if pixels.dtype not in (np.uint8, np.uint16):
            raise ImageError(f"a picture's pixels are {pixels.dtype}, should be uint8 or uint16")
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
        return 255 if self.pixels.dtype == np.uint8 else 65535

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of dtype, shape and decoded pixels; metadata does not count."""
        head = f"{self.pixels.dtype.name} {self.pixels.shape} ".encode()
        little = self.pixels.astype(self.pixels.dtype.newbyteorder("<"), copy=False)
        return hashlib.sha256(head + little.tobytes()).hexdigest()

    def rgb(self) -> npt.NDArray[np.float32]:
        """Return (h, w, 3) float32 in [0, 1]: ``pixels / max_value``; grey repeated, no alpha."""
        return np.ascontiguousarray(_rgb(self.pixels).astype(np.float32) / self.max_value)

    def with_rgb(self, rgb: Floats, where: npt.NDArray[np.bool_]) -> Picture:
        """Return a picture whose colours are those of ``rgb`` in ``where``, and its own elsewhere.

        Args:
            rgb: (h, w, 3) floats, clipped to [0, 1] and rounded to this picture's depth. A grey
                picture takes the luminance, which for r == g == b is exactly that value.
            where: (h, w) bool; outside it every value stays as it is, and alpha stays everywhere.

        Raises:
            ImageError: arrays of another size or type, or NaN inside ``where``.
        """
        width, height = self.size
        if rgb.shape != (height, width, 3) or rgb.dtype.kind != "f":
            raise ImageError(
                f"new colours are {rgb.shape} {rgb.dtype}, should be {(height, width, 3)} floats"
            )
        if where.shape != (height, width) or where.dtype != np.bool_:
            raise ImageError(
                f"the region to change is {where.shape} {where.dtype}, "
                f"should be {(height, width)} bool"
            )
        new = rgb[where]  # (n, 3)
        if new.dtype == np.float16:  # too coarse for 8 bits already
            new = new.astype(np.float32)
        if np.isnan(new).any():
            raise ImageError("the new colours hold NaN, should be numbers in [0, 1]")
        grey = self.channels <= 2
        values = (np.clip(_luma(new) if grey else new, 0, 1) * self.max_value).round()
        pixels = self.pixels.copy()
        colours = pixels if pixels.ndim == 2 else pixels[..., 0] if grey else pixels[..., :3]
        colours[where] = values.astype(pixels.dtype)
        return self._derived(pixels)

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
        width, height = size
        if width < 1 or height < 1:
            raise ImageError(f"cannot resize to {width}x{height}, should be at least 1x1")
        if size == self.size:
            return self
        if self.max_value == 255:  # Pillow premultiplies alpha itself
            resized = self.to_pil().resize(size, Image.Resampling.LANCZOS)
            return self._derived(np.asarray(resized))
        planes = np.atleast_3d(self.pixels).astype(np.float32) / self.max_value  # (h, w, c)
        if self.has_alpha:  # transparent pixels must not bleed their colour into visible ones
            planes[..., :-1] *= planes[..., -1:]
        planes = np.stack([_resize_plane(planes[..., c], size) for c in range(self.channels)], -1)
        if self.has_alpha:
            alpha = planes[..., -1:]
            planes[..., :-1] /= np.where(alpha > 0, alpha, 1)
        values = (np.clip(planes, 0, 1) * self.max_value).round().astype(np.uint16)
        return self._derived(values.reshape(height, width, *self.pixels.shape[2:]))

    def crop(self, left: int, top: int, right: int, bottom: int) -> Picture:
        """Return the pixels with left <= x < right and top <= y < bottom."""
        width, height = self.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ImageError(
                f"crop ({left}, {top}, {right}, {bottom}) does not lie in a {width}x{height} "
                "picture, should be (left, top, right, bottom) with 0 <= left < right <= width "
                "and 0 <= top < bottom <= height"
            )
        return self._derived(self.pixels[top:bottom, left:right])

    def _derived(self, pixels: Pixels) -> Picture:
        return Picture(pixels, self.icc, self.exif, self.path)

    def _repr_png_(self) -> bytes:
        return encode_png(self)


ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Picture


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
    return _open(source, float_bits)


def read_mask(source: ImageSource) -> npt.NDArray[np.float32]:
    """Return a mask as (h, w) float32 in [0, 1]; 1 = may change.

    RGB counts by its luminance, and alpha multiplies: white on transparent is a mask. Sources are
    those of :func:`open_picture`. uint8 counts to 255: an array of 0 and 1 should be bool.

    Raises:
        ImageError: a file that is missing or cannot be read.
        MaskError: an array that is not a mask.
    """
    if isinstance(source, np.ndarray):
        try:
            if source.dtype.kind == "f":
                return _mask_values(_checked(source).astype(np.float32))
            picture = _open(source, 16)
        except ImageError as error:
            raise MaskError(f"not a mask: {error}") from None
    else:
        picture = _open(source, 16)
    if picture.pixels.max() == 1:
        log.warning("a mask's values are 0 and 1 of %d: nearly black", picture.max_value)
    return _mask_values(picture.pixels.astype(np.float32) / picture.max_value)


def save_picture(
    picture: Picture,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    inputs: Iterable[Path] = (),
    png_text: Mapping[str, str] | None = None,
) -> Path:
    """Write a picture in the format that the suffix names, completely or not at all.

    ``.png`` and ``.tif``/``.tiff`` keep everything; ``.webp`` is written lossless (8 bit; it has no
    grey, so grey is stored as r = g = b); ``.bmp`` keeps 8-bit pixels without alpha and metadata;
    ``.jpg``/``.jpeg`` is lossy and logs a warning.

    Args:
        picture: what to write.
        path: where to; its suffix names the format.
        overwrite: whether a file that exists may be replaced.
        inputs: files that must not be replaced, besides the one the picture was read from; links
            to them count as well.
        png_text: keyword -> text, stored in PNG files only.

    Raises:
        OutputError: a format that cannot hold the picture, a folder that does not exist, an input.
    """
    path = Path(path)
    encode = _encoder(picture, path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist, create it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder, should be a file name such as {path / 'out.png'}")
    for source in (*inputs, *([picture.path] if picture.path else [])):
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise OutputError(
                f"{path} is the input {source}, which is never written to: name another output"
            )
    if not overwrite and os.path.lexists(path):
        raise OutputError(f"{path} exists: name another output, or allow overwriting")
    try:
        data = encode(picture, png_text or {})
    except Exception as error:  # whatever an encoder raises: it cannot hold this picture
        raise OutputError(f"{path}: cannot write this picture ({error}); .png can") from error
    try:
        with _replacing(path, overwrite) as file:
            file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror or error})") from error
    return path


# -- arrays and Pillow images ------------------------------------------------------------------


def _checked(pixels: Pixels) -> Pixels:
    """Return an array of a picture's shape and type, or raise; floats must lie in [0, 1]."""
    shape = pixels.shape
    if len(shape) == 3 and shape[2] == 1:
        pixels = pixels[..., 0]
    elif not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (2, 3, 4))):
        hint = ", channels last" if len(shape) == 3 and shape[0] in (1, 2, 3, 4) else ""
        raise ImageError(
            f"an array of shape {shape} is not a picture, should be (height, width) or "
            f"(height, width, 1 to 4){hint}"
        )
    if 0 in shape:
        raise ImageError(f"an array of shape {shape} has no pixels")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ImageError(
                f"float pixels reach from {low:g} to {high:g}, should lie in [0, 1] without NaN"
            )
    elif pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_):
        raise ImageError(
            f"pixels are {pixels.dtype}, should be uint8, uint16, bool or float in [0, 1]"
        )
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _integers(pixels: Pixels, float_bits: FloatBits) -> Pixels:
    pixels = _checked(pixels)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind == "f":
        if pixels.dtype == np.float16:  # 65535 lies beyond float16
            pixels = pixels.astype(np.float32)
        kind = np.uint8 if float_bits == 8 else np.uint16
        return (pixels * np.iinfo(kind).max).round().astype(kind)
    return pixels


def _rgb(pixels: Pixels) -> Pixels:
    """(h, w[, c]) -> (h, w, 3) of the same type."""
    if pixels.ndim == 3 and pixels.shape[2] > 2:
        return pixels[..., :3]
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    return np.repeat(grey[..., None], 3, axis=2)


def _luma(rgb: Floats) -> Floats:
    """(…, 3) -> (…); written so that r == g == b gives exactly that value."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return cast(Floats, green + 0.299 * (red - green) + 0.114 * (blue - green))


def _mask_values(values: Pixels) -> npt.NDArray[np.float32]:
    """float32 (h, w[, c]) in [0, 1] -> (h, w): luminance times alpha."""
    if values.ndim == 2:
        return values
    colour = values[..., 0] if values.shape[2] == 2 else _luma(values[..., :3])
    if values.shape[2] in (2, 4):
        colour = colour * values[..., -1]
    return np.clip(colour, 0, 1).astype(np.float32)


def _resize_plane(plane: Pixels, size: tuple[int, int]) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def _open(source: ImageSource, float_bits: FloatBits) -> Picture:
    if isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        return Picture(_integers(source, float_bits))
    if isinstance(source, Image.Image):
        return _from_pil(source, "the Pillow image", float_bits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the image bytes", float_bits)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        data = _read_file(path, source)
        picture = _decode(data, str(path), float_bits)
        return Picture(picture.pixels, picture.icc, picture.exif, path)
    raise ImageError(
        f"a {type(source).__name__} is not an image, should be a path, bytes, a Pillow image "
        "or a NumPy array"
    )


def _read_file(path: Path, source: object) -> bytes:
    try:
        if not os.fspath(source):  # type: ignore[call-overload]
            raise ImageError("an empty path, should be the path of an image")
        if path.is_dir():
            raise ImageError(f"{path} is a folder, should be an image file")
        if not path.exists():
            raise ImageError(f"{path} does not exist, should be the path of an image")
        if not path.is_file():
            raise ImageError(f"{path} is not a regular file, should be an image file")
        return path.read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{str(path)!r} cannot be read ({reason})") from error


def _from_pil(image: Image.Image, where: str, float_bits: FloatBits) -> Picture:
    try:
        image.load()
    except Exception as error:  # decoders raise anything on damaged data
        raise ImageError(f"{where} is truncated or damaged ({_line(error)})") from error
    pixels, icc = _pil_pixels(image, where, float_bits)
    orientation, exif = _read_exif(image)
    return Picture(_oriented(pixels, orientation), icc, exif)


def _pil_pixels(
    image: Image.Image, where: str, float_bits: FloatBits
) -> tuple[Pixels, bytes | None]:
    """Return a Pillow image's pixels in one of our layouts, and the profile that fits them."""
    icc = cast("bytes | None", image.info.get("icc_profile")) or None
    mode = image.mode
    transparent = image.info.get("transparency") is not None
    if mode in ("CMYK", "LAB"):
        image, icc = _to_srgb(image, icc)
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or transparent else "RGB")
    elif mode in ("1", "L", "RGB"):
        flat = "RGB" if mode == "RGB" else "L"
        alpha = "RGBA" if mode == "RGB" else "LA"
        image = image.convert(alpha if transparent else flat)
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif mode == "I":
        low, high = cast("tuple[int, int]", image.getextrema())
        if low < 0 or high > 65535:
            raise ImageError(
                f"{where} has pixels from {low} to {high} (Pillow mode I), should lie in 0 … 65535"
            )
        return np.asarray(image).astype(np.uint16), icc
    try:
        return _integers(np.asarray(image), float_bits), icc
    except ImageError as error:
        raise ImageError(f"{where} (mode {mode}): {error}") from None


def _to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """CMYK or LAB -> RGB; a CMYK profile must not stay on RGB pixels."""
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        if image.mode == "LAB":
            profile: Any = ImageCms.createProfile("LAB")
        elif icc:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        else:
            return image.convert("RGB"), None
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        assert converted is not None  # None only when converting in place
        return converted, srgb.tobytes()
    except (ImageCms.PyCMSError, OSError):  # a broken profile
        return image.convert("RGB"), None


# -- metadata ----------------------------------------------------------------------------------


def _read_exif(image: Image.Image) -> tuple[int, bytes | None]:
    """Return the orientation (1 to 8), and the EXIF block with its orientation reset to 1.

    Broken EXIF is no reason to refuse a picture: it is dropped.
    """
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        tags = image.getexif()
        orientation = tags.get(_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        raw = image.info.get("exif")
        if hasattr(image, "tag_v2"):
            raw = _tiff_exif(tags)
        elif not raw and len(tags):
            raw = tags.tobytes()
        if not raw:
            return orientation, None
        raw = raw if raw.startswith(_EXIF_HEADER) else _EXIF_HEADER + raw
        return orientation, _upright(raw)
    return 1, None


def _tiff_metadata(data: bytes) -> tuple[int, bytes | None, bytes | None]:
    """Return orientation, EXIF block and ICC profile of a TIFF's first page."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        tags = Image.Exif()
        tags.load(data)  # an EXIF block is a TIFF file
        orientation = tags.get(_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        return orientation, _tiff_exif(tags), tags.get(34675)
    return 1, None, None


_DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 33432)  # description, make, model, software, …
_SUB_IFDS = (0x8769, 0x8825)  # Exif, GPS


def _tiff_exif(tags: Image.Exif) -> bytes | None:
    """Return what a TIFF says about the picture, without what it says about its own layout."""
    kept = Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in tags:
            kept[tag] = tags[tag]
    for tag in _SUB_IFDS:
        if values := tags.get_ifd(tag):
            kept[tag] = dict(values)
    return kept.tobytes() if len(kept) else None


def _upright(exif: bytes) -> bytes:
    """Set the orientation in an EXIF block to 1, in place: offsets and maker notes stay valid."""
    block, start = bytearray(exif), len(_EXIF_HEADER)
    order = {b"II": "<", b"MM": ">"}[exif[start : start + 2]]
    ifd = start + struct.unpack_from(order + "I", block, start + 4)[0]
    for n in range(struct.unpack_from(order + "H", block, ifd)[0]):
        entry = ifd + 2 + 12 * n
        if struct.unpack_from(order + "H", block, entry)[0] == _ORIENTATION:
            struct.pack_into(order + "HIHH", block, entry + 2, 3, 1, 1, 0)  # one SHORT: 1
    return bytes(block)


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


# -- decoding ----------------------------------------------------------------------------------


def _decode(data: bytes, where: str, float_bits: FloatBits) -> Picture:
    if not data:
        raise ImageError(f"{where} is empty, should be {_READS}")
    audio = data[:4] == b"RIFF" and len(data) >= 12 and data[8:12] != b"WEBP"
    if audio or not data.startswith(_MAGIC + _TIFF_MAGIC):
        raise ImageError(f"{where} is not an image that can be read, should be {_READS}")
    try:
        with warnings.catch_warnings():
            # Between once and twice Pillow's limit a picture is large, not an attack.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("error", "(?i).*truncated")
            return _decode_checked(data, where, float_bits)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{where} is too large ({_line(error)}), scale it down first") from error
    except Exception as error:  # decoders raise anything on damaged data
        raise ImageError(
            f"{where} is truncated or damaged ({_line(error)}), should be a complete {_READS} file"
        ) from error


def _decode_checked(data: bytes, where: str, float_bits: FloatBits) -> Picture:
    special: Pixels | None = None  # pixels that Pillow would not read faithfully
    if data.startswith(_PNG_MAGIC):
        chunks = list(_png_chunks(data))
        _check_area(*struct.unpack(">II", chunks[0][1][:8]))
        special = _png_pixels(chunks)
    elif data.startswith(_TIFF_MAGIC):
        special = _tiff_pixels(data, where)
        if special is not None:  # Pillow does not open all of these, not even for metadata
            orientation, exif, icc = _tiff_metadata(data)
            return Picture(_oriented(special, orientation), icc, exif)
    Image.init()  # `formats` may only name plugins that are loaded
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if special is None:
        return _from_pil(image, where, float_bits)
    orientation, exif = _read_exif(image)
    icc = image.info.get("icc_profile") or None
    return Picture(_oriented(special, orientation), icc, exif)


def _check_area(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise Image.DecompressionBombError(f"{width}x{height} pixels, the limit is {2 * limit}")


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names an object in memory
        return "its header cannot be read"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, content) of each chunk; raises if the file does not run on to its end chunk."""
    at, kind = len(_PNG_MAGIC), b""
    while kind != b"IEND":
        head = data[at : at + 8]
        length = int.from_bytes(head[:4], "big")
        kind, content = head[4:], data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        if len(head) < 8 or len(checksum) < 4:
            raise ValueError("the file ends too early")
        if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            raise ValueError(f"wrong checksum of its {kind.decode('latin-1')} part")
        yield kind, content
        at += 12 + length


def _png_pixels(chunks: list[tuple[bytes, bytes]]) -> Pixels | None:
    """Return the pixels of 16-bit PNGs, and of those with a colour key below 8 bits; else None."""
    header = chunks[0][1]
    depth, colour_type = header[8], header[9]
    key = next((content for kind, content in chunks if kind == b"tRNS"), None)
    # Pillow compares the key of a 2- or 4-bit grey picture with values scaled to 8 bits.
    if depth != 16 and not (key and colour_type == 0 and depth < 8):
        return None
    # Only what holds the pixels: no gamma, animation or colour key for OpenCV to act on.
    kept = [(kind, content) for kind, content in chunks if kind in (b"IHDR", b"IDAT", b"IEND")]
    pixels = _opencv(_png_join(kept))
    if colour_type == 4:  # OpenCV repeats the grey
        pixels = np.stack([pixels[..., 0], pixels[..., -1]], axis=2)
    if key and colour_type in (0, 2):
        scale = 1 if depth == 16 else 255 // (2**depth - 1)
        channels = 1 if colour_type == 0 else 3
        transparent = np.array(struct.unpack(f">{channels}H", key)) * scale
        opaque = (np.atleast_3d(pixels) != transparent).any(axis=2)
        alpha = opaque.astype(pixels.dtype) * np.iinfo(pixels.dtype).max
        pixels = np.dstack([pixels, alpha])
    return pixels


def _opencv(data: bytes) -> Pixels:
    """Decode with OpenCV as stored, in RGB(A) order."""
    import cv2

    pixels: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("its pixels cannot be decoded")
    if pixels.ndim == 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return pixels


def _tiff_pixels(data: bytes, where: str) -> Pixels | None:
    """Return the pixels of the first page if they are 16-bit; else None."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        _check_area(page.imagewidth, page.imagelength)
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(offset + count > len(data) for offset, count in ends):
            raise ValueError("the file ends too early")  # tifffile would fill in zeros
        if page.bitspersample <= 8 or page.dtype == np.float32:
            return None
        samples = page.samplesperpixel
        layout = (page.photometric.name, samples - len(page.extrasamples))
        if page.dtype != np.uint16 or page.bitspersample != 16 or samples > 4:
            raise ImageError(
                f"{where} has {samples} x {page.bitspersample}-bit {page.dtype} pixels, "
                "should be 8 or 16 bit without sign, grey or RGB"
            )
        if layout not in (("MINISBLACK", 1), ("MINISWHITE", 1), ("RGB", 3), ("RGB", 4)):
            raise ImageError(
                f"{where} is a 16-bit {page.photometric.name} TIFF, should be grey or RGB"
            )
        try:
            pixels: Pixels = page.asarray()
        except ValueError:  # a compression that tifffile leaves to an optional package
            pixels = _opencv(data)
            if pixels.dtype != np.uint16 or pixels.shape[2:] != ((samples,) if samples > 1 else ()):
                raise
        else:
            planes = pixels.reshape(page.shaped)[:, 0]  # (planes, h, w, samples of a plane)
            pixels = np.moveaxis(planes, 0, 2).reshape(*planes.shape[1:3], samples)
            pixels = pixels[..., 0] if samples == 1 else pixels
            if page.photometric.name == "MINISWHITE":
                pixels = 65535 - pixels
        kinds = [int(kind) for kind in page.extrasamples]
        if kinds == [1]:
            pixels = _unpremultiplied(pixels)
        elif kinds and kinds != [2]:  # not alpha
            pixels = pixels[..., 0] if layout[1] == 1 else pixels[..., :3]
        return pixels


def _unpremultiplied(pixels: Pixels) -> Pixels:
    alpha = pixels[..., -1:].astype(np.float64)
    colour = pixels[..., :-1].astype(np.float64) * 65535 / np.where(alpha > 0, alpha, 1)
    return np.dstack([np.minimum(colour, 65535).round().astype(np.uint16), pixels[..., -1:]])


# -- encoding ----------------------------------------------------------------------------------


_Encoder = Callable[[Picture, Mapping[str, str]], bytes]


def _encoder(picture: Picture, path: Path) -> _Encoder:
    """Return what writes the format of a suffix, or say which format can hold the picture."""
    suffix = path.suffix.lower()
    deep, alpha = picture.max_value == 65535, picture.has_alpha
    can: _Encoder | None = None
    if suffix == ".png":
        can = encode_png
    elif suffix in (".tif", ".tiff"):
        can = _encode_tiff
    elif suffix == ".webp":
        can = None if deep else _encode_webp
    elif suffix == ".bmp":
        can = None if deep or alpha else _encode_bmp
    elif suffix in (".jpg", ".jpeg"):
        can = None if deep or alpha else _encode_jpeg
        if can:
            log.warning(
                "%s: JPEG is lossy, pixels outside the mask will not equal the source's; "
                "save as .png to keep them",
                path,
            )
    else:
        raise OutputError(
            f"{path}: {f'the suffix {suffix!r}' if suffix else 'no suffix'} names no format, "
            "should be .png, .tif, .webp, .bmp or .jpg"
        )
    if can is None:
        what = " and ".join(["16-bit pixels"] * deep + ["alpha"] * alpha)
        better = ".png or .tif" if deep else ".png, .webp or .tif"
        raise OutputError(f"{path}: {suffix} cannot hold {what}, use {better}")
    return can


def encode_png(picture: Picture, text: Mapping[str, str] | None = None) -> bytes:
    """Return a picture as a PNG file, with its depth, channels, profile and EXIF, and with text."""
    width, height = picture.size
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[picture.channels]
    depth = picture.pixels.dtype.itemsize * 8
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if picture.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif.removeprefix(_EXIF_HEADER)))
    chunks += [_png_text(keyword, value) for keyword, value in (text or {}).items()]
    chunks.append((b"IDAT", _png_data(picture.pixels)))
    return _png_join([*chunks, (b"IEND", b"")])


def _png_join(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    parts = [_PNG_MAGIC]
    for kind, content in chunks:
        checksum = zlib.crc32(content, zlib.crc32(kind))
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)]
    return b"".join(parts)


def _png_text(keyword: str, value: str) -> tuple[bytes, bytes]:
    name = keyword.encode("latin-1")
    if not 1 <= len(name) <= 79 or "\0" in keyword + value:
        raise ValueError(f"PNG text {keyword!r}: a keyword has 1 to 79 characters, none is NUL")
    try:
        return b"tEXt", name + b"\0" + value.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", name + b"\0\0\0\0\0" + value.encode()


def _png_data(pixels: Pixels) -> bytes:
    """Filter and compress rows; each takes the filter with the smallest sum (PNG spec, 12.7)."""
    height = pixels.shape[0]
    step = pixels.dtype.itemsize * (1 if pixels.ndim == 2 else pixels.shape[2])  # bytes per pixel
    big_endian = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">"))
    rows = big_endian.view(np.uint8).reshape(height, -1)
    packer, parts = zlib.compressobj(6), []
    for top in range(0, height, 256):  # in bands, so that memory stays small
        now = rows[top : top + 256]
        above = np.zeros_like(now)
        above[1:], above[:1] = now[:-1], rows[top - 1 : top] if top else 0
        left, corner = np.zeros_like(now), np.zeros_like(now)
        left[:, step:], corner[:, step:] = now[:, :-step], above[:, :-step]
        a, b, c = left.astype(np.int16), above.astype(np.int16), corner.astype(np.int16)
        to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - c - c)
        paeth = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, above, c))
        kinds = {0: now, 1: now - left, 2: now - above, 4: now - paeth.astype(np.uint8)}
        costs = [np.abs(filtered.view(np.int8).astype(np.int16)) for filtered in kinds.values()]
        best = np.argmin([cost.sum(axis=1, dtype=np.int64) for cost in costs], axis=0)
        filtered_rows = np.choose(best[:, None], list(kinds.values()))
        tags = np.array(list(kinds), np.uint8)[best]
        parts.append(packer.compress(np.column_stack([tags, filtered_rows]).tobytes()))
    return b"".join([*parts, packer.flush()])


def _encode_tiff(picture: Picture, text: Mapping[str, str]) -> bytes:
    """One deflated strip; Pillow lays out the directory, which carries EXIF and ICC as well."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    (width, height), channels = picture.size, picture.channels
    strip = zlib.compress(picture.pixels.astype(picture.pixels.dtype.newbyteorder("<")).tobytes())
    directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    if picture.exif:
        exif = Image.Exif()
        exif.load(picture.exif)
        for tag in _DESCRIPTIVE:
            if tag in exif:
                directory[tag] = exif[tag]
        for tag in _SUB_IFDS:
            if values := exif.get_ifd(tag):
                directory.tagtype[tag] = 4  # LONG: an offset
                directory[tag] = dict(values)
    shorts = {
        258: (picture.pixels.dtype.itemsize * 8,) * channels,  # BitsPerSample
        259: 8,  # Compression: deflate
        262: 1 if channels <= 2 else 2,  # PhotometricInterpretation: black is zero, or RGB
        274: 1,  # Orientation: upright
        277: channels,  # SamplesPerPixel
        284: 1,  # PlanarConfiguration: contiguous
    }
    if picture.has_alpha:
        shorts[338] = 2  # ExtraSamples: unassociated alpha
    longs = {
        256: width,
        257: height,
        273: 0,
        278: height,
        279: len(strip),
    }  # 273: offset, see below
    for kind, tags in ((3, shorts), (4, longs)):
        for tag, value in tags.items():
            directory.tagtype[tag] = kind
            directory[tag] = value
    if picture.icc:
        directory.tagtype[34675] = 7
        directory[34675] = picture.icc
    file = io.BytesIO()
    directory.save(file)  # StripOffsets counts from the end of the directory
    file.write(strip)
    return file.getvalue()


def _encode_webp(picture: Picture, text: Mapping[str, str]) -> bytes:
    image = picture.to_pil()
    if picture.channels <= 2:
        image = image.convert("RGBA" if picture.has_alpha else "RGB")
    # exact: keep the colour of fully transparent pixels
    return _pil_bytes(image, picture, "WEBP", lossless=True, exact=True)


def _encode_jpeg(picture: Picture, text: Mapping[str, str]) -> bytes:
    return _pil_bytes(picture.to_pil(), picture, "JPEG", quality=95, subsampling=0)


def _encode_bmp(picture: Picture, text: Mapping[str, str]) -> bytes:
    return _pil_bytes(picture.to_pil(), picture, "BMP")


def _pil_bytes(image: Image.Image, picture: Picture, kind: str, **options: Any) -> bytes:
    if picture.exif:
        options["exif"] = picture.exif
    file = io.BytesIO()
    image.save(file, kind, icc_profile=picture.icc or b"", **options)
    return file.getvalue()


@contextlib.contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[io.BufferedWriter]:
    """Give a file that takes the place of ``path`` once it is written, and vanishes otherwise."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # same folder: a rename is atomic
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _publish_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _publish_new(temporary: Path, path: Path) -> None:
    """Rename, unless someone else wrote ``path`` in the meantime."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise OutputError(f"{path} exists: name another output, or allow overwriting") from None
    except OSError:  # a file system without hard links
        temporary.replace(path)
