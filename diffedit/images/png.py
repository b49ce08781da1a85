"""PNG: what Pillow and OpenCV do not read faithfully, and one way to write every layout."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from PIL.PngImagePlugin import PngInfo

from diffedit.images.picture import EXIF_HEADER, Picture, Pixels

MAGIC = b"\x89PNG\r\n\x1a\n"
Chunk = tuple[bytes, bytes]  # type, content


def deep_pixels(data: bytes) -> Pixels | None:
    """Return the pixels of 16-bit PNGs, and of those with a colour key below 8 bits; else None.

    Raises:
        ValueError: any PNG that is cut off or damaged.
    """
    chunks = list(_split(data))
    depth, colour_type = chunks[0][1][8:10]
    key = next((content for kind, content in chunks if kind == b"tRNS"), None)
    # Pillow compares the key of a 2- or 4-bit grey picture with values scaled to 8 bits.
    if depth != 16 and not (key and colour_type == 0 and depth < 8):
        return None
    # Only what holds the pixels: no gamma, animation or colour key for OpenCV to act on.
    pixels = opencv(_join(chunk for chunk in chunks if chunk[0] in (b"IHDR", b"IDAT", b"IEND")))
    if colour_type == 4:  # OpenCV repeats the grey
        pixels = pixels[..., 2:]
    if key and colour_type in (0, 2):
        scale = 1 if depth == 16 else 255 // (2**depth - 1)
        transparent = np.frombuffer(key, ">u2") * scale
        opaque = (np.atleast_3d(pixels) != transparent).any(axis=2)
        pixels = np.dstack([pixels, opaque.astype(pixels.dtype) * np.iinfo(pixels.dtype).max])
    return pixels


def opencv(data: bytes) -> Pixels:
    """Decode with OpenCV as stored, in RGB(A) order."""
    import cv2

    pixels: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("its pixels cannot be decoded")
    return pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def encode_png(picture: Picture, text: Mapping[str, str] | None = None) -> bytes:
    """Return a picture as a PNG file, with its depth, channels, profile and EXIF, and with text.

    Raises:
        ValueError: a keyword of the text that PNG cannot hold.
    """
    pixels = picture.pixels
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[picture.channels]
    layout = (pixels.dtype.itemsize * 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *picture.size, *layout))]
    if picture.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif[len(EXIF_HEADER) :]))
    info = PngInfo()
    for keyword, value in (text or {}).items():
        if not 1 <= len(keyword) <= 79 or "\0" in keyword + value:
            raise ValueError(f"PNG text {keyword!r}: a keyword has 1 to 79 characters, none is NUL")
        info.add_text(keyword, value)
    chunks += [(kind, content) for kind, content, *_ in info.chunks]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(len(pixels), -1)
    # Filter 2 on every row, the difference from the row above: within a few per cent of the size
    # that choosing for each row gives.
    filtered = np.full((len(rows), 1 + rows.shape[1]), 2, np.uint8)
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=rows[:1] * 0)
    return _join([*chunks, (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")])


def _split(data: bytes) -> Iterator[Chunk]:
    """Yield each chunk; raises if the file does not run on to its end chunk."""
    at, kind = len(MAGIC), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        content, checksum = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if len(checksum) < 4:
            raise ValueError("the file ends too early")
        if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            raise ValueError(f"wrong checksum of its {kind.decode('latin-1')} part")
        yield kind, content
        at += 12 + length


def _join(chunks: Iterable[Chunk]) -> bytes:
    parts = [MAGIC]
    for kind, content in chunks:
        checksum = zlib.crc32(content, zlib.crc32(kind))
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)]
    return b"".join(parts)
