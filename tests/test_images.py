from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from diffedit.errors import ImageError, MaskError, OutputError
from diffedit.images import Picture, encode_png, open_picture, read_mask, save_picture

Array = npt.NDArray[Any]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DEPTHS = [np.uint8, np.uint16]
CHANNELS = [1, 2, 3, 4]


def noise(channels: int, dtype: Any = np.uint8, height: int = 13, width: int = 17) -> Array:
    shape = (height, width) if channels == 1 else (height, width, channels)
    rng = np.random.default_rng(channels)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def raw_png(
    rows: list[bytes], width: int, depth: int, colour_type: int, extra: bytes = b""
) -> bytes:
    """A PNG made by hand, for the layouts that no encoder at hand writes."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + png_chunk(b"IEND", b"")
    )


def deep_png(pixels: Array, extra: bytes = b"") -> bytes:
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    rows = [row.astype(">u2").tobytes() for row in pixels]
    return raw_png(rows, pixels.shape[1], 16, colour_type, extra)


def deep_tiff(pixels: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels in (2, 4):
        options.setdefault("extrasamples", ["unassalpha"])
    options.setdefault("photometric", "rgb" if channels > 2 else "minisblack")
    if channels > 1:
        options.setdefault("planarconfig", "contig")
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def pil_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_block(orientation: int = 1, **more: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = more.get("make", "Maker")
    exif.get_ifd(0x8769)[0x9003] = "2024:01:02 03:04:05"
    return exif.tobytes()


def exif_of(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    return exif


# -- opening: every layout, written by independent encoders ------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_8_bit_lossless(kind: str, channels: int) -> None:
    pixels = noise(channels)
    picture = open_picture(pil_bytes(Image.fromarray(pixels), kind))
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.pixels.dtype == np.uint8
    assert picture.size == (17, 13)
    assert picture.channels == channels
    assert picture.max_value == 255


@pytest.mark.parametrize("channels", CHANNELS)
def test_16_bit_png(channels: int) -> None:
    pixels = noise(channels, np.uint16)
    picture = open_picture(deep_png(pixels))
    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels, pixels)
    if channels != 2:  # OpenCV writes it filtered, and in BGR
        swapped = pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels
        np.testing.assert_array_equal(
            open_picture(cv2.imencode(".png", swapped)[1].tobytes()).pixels, pixels
        )


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"rowsperstrip": 3},
        {"tile": (16, 16)},
        {"bigtiff": True},
    ],
    ids=str,
)
def test_16_bit_tiff(channels: int, options: dict[str, Any]) -> None:
    pixels = noise(channels, np.uint16)
    np.testing.assert_array_equal(open_picture(deep_tiff(pixels, **options)).pixels, pixels)


def test_16_bit_tiff_layouts() -> None:
    pixels = noise(3, np.uint16)
    planar = deep_tiff(np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(open_picture(planar).pixels, pixels)
    lzw = cv2.imencode(".tif", pixels[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(open_picture(lzw).pixels, pixels)
    lzw = cv2.imencode(".tif", noise(4, np.uint16)[..., [2, 1, 0, 3]])[1].tobytes()
    np.testing.assert_array_equal(open_picture(lzw).pixels, noise(4, np.uint16))
    grey = noise(1, np.uint16)
    inverted = deep_tiff(grey, photometric="miniswhite")
    np.testing.assert_array_equal(open_picture(inverted).pixels, 65535 - grey)
    lzw_grey = pil_bytes(Image.fromarray(grey), "TIFF", compression="tiff_lzw")
    np.testing.assert_array_equal(open_picture(lzw_grey).pixels, grey)
    two_pages = io.BytesIO()
    tifffile.imwrite(two_pages, np.stack([grey, grey // 2]), photometric="minisblack")
    np.testing.assert_array_equal(open_picture(two_pages.getvalue()).pixels, grey)


def test_premultiplied_tiff_alpha_is_divided_out() -> None:
    pixels = np.array([[[0, 0, 0, 0], [10000, 20000, 30000, 40000]]], np.uint16)
    opened = open_picture(deep_tiff(pixels, extrasamples=["assocalpha"])).pixels
    np.testing.assert_array_equal(opened, [[[0, 0, 0, 0], [16384, 32768, 49151, 40000]]])


def test_tiff_channels_that_are_not_alpha_are_left_out() -> None:
    for channels in (2, 4):
        pixels = noise(channels, np.uint16)
        opened = open_picture(deep_tiff(pixels, extrasamples=["unspecified"])).pixels
        colours = pixels[..., 0] if channels == 2 else pixels[..., :3]
        np.testing.assert_array_equal(opened, colours)


def test_unsupported_tiff_says_so() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 5), np.int32))
    with pytest.raises(ImageError, match="32-bit int32"):
        open_picture(file.getvalue())
    file = io.BytesIO()
    tifffile.imwrite(file, noise(4, np.uint16), photometric="separated")
    with pytest.raises(ImageError, match="SEPARATED"):
        open_picture(file.getvalue())
    with pytest.raises(ImageError, match="CFA"):
        open_picture(deep_tiff(noise(1, np.uint16), photometric="cfa"))


def test_float_tiff() -> None:
    values = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    file = io.BytesIO()
    tifffile.imwrite(file, values)
    np.testing.assert_array_equal(open_picture(file.getvalue()).pixels, (values * 255).round())
    mask = read_mask(file.getvalue())
    np.testing.assert_allclose(mask, values, atol=1 / 131000)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_below_8_bits(depth: int) -> None:
    levels = 2**depth
    values = np.arange(levels, dtype=np.uint8)[None].repeat(3, 0)
    packed = np.packbits(
        np.unpackbits(values[..., None], axis=-1)[..., -depth:].reshape(3, -1), axis=1
    )
    rows = [row.tobytes() for row in packed]
    expected = values * (255 // (levels - 1))
    np.testing.assert_array_equal(open_picture(raw_png(rows, levels, depth, 0)).pixels, expected)
    key = png_chunk(b"tRNS", struct.pack(">H", 1))
    keyed = open_picture(raw_png(rows, levels, depth, 0, key)).pixels
    np.testing.assert_array_equal(keyed[..., 0], expected)
    np.testing.assert_array_equal(keyed[..., 1], np.where(values == 1, 0, 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_colour_key(channels: int) -> None:
    pixels = noise(channels, np.uint16)
    colour = np.atleast_1d(pixels[2, 3])
    key = png_chunk(b"tRNS", struct.pack(f">{channels}H", *colour))
    opened = open_picture(deep_png(pixels, key)).pixels
    np.testing.assert_array_equal(opened[..., :-1], np.atleast_3d(pixels))
    expected = np.full((13, 17), 65535)
    expected[2, 3] = 0
    np.testing.assert_array_equal(opened[..., -1], expected)


def test_gamma_chunk_does_not_change_16_bit_values() -> None:
    pixels = noise(3, np.uint16)
    gamma = png_chunk(b"gAMA", struct.pack(">I", 100000))
    np.testing.assert_array_equal(open_picture(deep_png(pixels, gamma)).pixels, pixels)


def test_palettes() -> None:
    pixels = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 9]]], np.uint8), 5, axis=0)
    palette = Image.fromarray(pixels).quantize(8)
    for data in (pil_bytes(palette, "PNG"), pil_bytes(palette, "GIF"), pil_bytes(palette, "BMP")):
        np.testing.assert_array_equal(open_picture(data).pixels, pixels)
    index = palette.getpixel((1, 0))
    opened = open_picture(pil_bytes(palette, "PNG", transparency=index)).pixels
    np.testing.assert_array_equal(opened[..., :3], pixels)
    np.testing.assert_array_equal(opened[0, :, 3], [255, 0, 255])


def test_1_bit_and_8_bit_colour_key() -> None:
    bits = noise(1) > 127
    opened = open_picture(pil_bytes(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(opened.pixels, bits * 255)
    pixels = noise(3)
    key = tuple(int(value) for value in pixels[4, 5])
    data = pil_bytes(Image.fromarray(pixels), "PNG", transparency=key)
    assert open_picture(data).pixels[4, 5].tolist() == [*key, 0]


def test_bmp_webp_jpeg() -> None:
    pixels = noise(3)
    np.testing.assert_array_equal(
        open_picture(cv2.imencode(".bmp", pixels[..., ::-1])[1].tobytes()).pixels, pixels
    )
    lossless = pil_bytes(Image.fromarray(noise(4)), "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(open_picture(lossless).pixels, noise(4))
    for grey in (True, False):
        jpeg = pil_bytes(Image.fromarray(noise(1 if grey else 3)), "JPEG")
        decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
        np.testing.assert_array_equal(open_picture(jpeg).pixels, decoded)


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("CMYK", (9, 7), (0, 255, 255, 0))
    picture = open_picture(pil_bytes(image, "JPEG", quality=100))
    assert picture.channels == 3
    assert np.abs(picture.pixels.astype(int) - [255, 0, 0]).max() <= 3
    # A profile that does not describe RGB must not stay on RGB pixels.
    broken = open_picture(pil_bytes(image, "JPEG", icc_profile=b"\0" * 200))
    assert broken.icc is None


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = pil_bytes(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert open_picture(data).pixels[0, 0, :3].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
             "HSV", "LAB", "I", "F", "I;16", "I;16B"],
)  # fmt: skip
def test_every_pillow_mode(mode: str) -> None:
    picture = open_picture(Image.new(mode, (5, 3)))
    assert picture.size == (5, 3)
    assert picture.path is None


def test_deep_and_odd_pillow_images() -> None:
    grey = noise(1, np.uint16)
    np.testing.assert_array_equal(open_picture(Image.fromarray(grey)).pixels, grey)
    wide = Image.fromarray(grey.astype(np.int32))
    np.testing.assert_array_equal(open_picture(wide).pixels, grey)
    with pytest.raises(ImageError, match="70000"):
        open_picture(Image.new("I", (2, 2), 70000))
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        open_picture(Image.new("F", (2, 2), 200.0))


def test_arrays() -> None:
    for dtype in DEPTHS:
        for channels in CHANNELS:
            pixels = noise(channels, dtype)
            np.testing.assert_array_equal(open_picture(pixels).pixels, pixels)
    assert open_picture(noise(1)[..., None]).pixels.shape == (13, 17)
    assert open_picture(np.array([[False, True]])).pixels.tolist() == [[0, 255]]
    for float_type in (np.float16, np.float32, np.float64):
        values = np.array([[0, 0.5, 1]], float_type)
        assert open_picture(values).pixels.tolist() == [[0, 128, 255]]
        assert open_picture(values, float_bits=16).pixels.tolist() == [[0, 32768, 65535]]
    swapped = noise(1, np.uint16).astype(">u2")
    assert open_picture(swapped).digest == open_picture(noise(1, np.uint16)).digest


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 40, 50), np.uint8), "channels last"),
        (np.zeros((4, 5, 6), np.uint8), r"\(4, 5, 6\)"),
        (np.zeros(7, np.uint8), r"\(7,\)"),
        (np.zeros((0, 5), np.uint8), "no pixels"),
        (np.zeros((4, 5), np.int64), "int64"),
        (np.zeros((4, 5), complex), "complex"),
        (np.full((4, 5), np.nan), "NaN"),
        (np.full((4, 5), 255.0), "255"),
        (np.full((4, 5), -0.1), "-0.1"),
        (np.array([["a"]]), "should be"),
    ],
)
def test_arrays_that_are_no_pictures(array: Array, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_picture(array)
    with pytest.raises(MaskError, match=says):
        read_mask(array)


def test_other_types_are_refused() -> None:
    with pytest.raises(ImageError, match="int"):
        open_picture(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="uint8 or uint16"):
        Picture(np.zeros((2, 2)))


# -- opening: what goes wrong ------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    image = Image.fromarray(noise(3, height=40, width=41))
    deep = noise(3, np.uint16, 40, 41)
    return {
        "png": pil_bytes(image, "PNG"),
        "jpeg": pil_bytes(image, "JPEG"),
        "progressive": pil_bytes(image, "JPEG", progressive=True),
        "webp": pil_bytes(image, "WEBP"),
        "webp-lossless": pil_bytes(image, "WEBP", lossless=True),
        "bmp": pil_bytes(image, "BMP"),
        "tiff": pil_bytes(image, "TIFF"),
        "tiff-lzw": pil_bytes(image, "TIFF", compression="tiff_lzw"),
        "png16": deep_png(deep),
        "tiff16": deep_tiff(deep),
        "tiff16-zlib": deep_tiff(deep, compression="zlib", rowsperstrip=7),
        "tiff16-lzw": cv2.imencode(".tif", deep)[1].tobytes(),
        "own-png": encode_png(Picture(deep)),
    }


SAMPLES = samples()


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("left", [0.02, 0.2, 0.5, 0.8, 0.97, -20, -3, -1])
def test_truncated_files(kind: str, left: float, tmp_path: Path) -> None:
    if (kind, left) == ("bmp", -1):
        pytest.skip("the last byte of a row is padding")
    data = SAMPLES[kind]
    assert open_picture(data).size == (41, 40)
    path = tmp_path / "photo.x"
    path.write_bytes(data[: int(left * len(data)) if left > 0 else int(left)])
    with pytest.raises(ImageError) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_strips_are_not_filled_with_black() -> None:
    data = SAMPLES["tiff16-zlib"]
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        last_strip = page.dataoffsets[-1]
    with pytest.raises(ImageError, match="truncated"):
        open_picture(data[:last_strip])


def test_a_truncation_that_is_only_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: warnings.warn("Truncated File Read", stacklevel=1)
    )
    with pytest.raises(ImageError, match="truncated"):
        open_picture(SAMPLES["bmp"])


def test_damaged_png_is_not_guessed(tmp_path: Path) -> None:
    for kind in ("png", "png16"):
        data = bytearray(SAMPLES[kind])
        data[len(data) // 2] ^= 0xFF
        with pytest.raises(ImageError, match="checksum"):
            open_picture(bytes(data))


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "sound.webp").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    for name, says in {
        "none.png": "does not exist",
        ".": "is a folder",
        "empty.png": "is empty",
        "text.png": "not an image",
        "sound.webp": "not an image",
        "a\0b.png": "not",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(ImageError, match=says) as caught:
            open_picture(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    for nothing in ("", b""):
        with pytest.raises(ImageError, match="empty"):
            open_picture(nothing)


@pytest.mark.parametrize("kind", ["png", "png16", "tiff16", "jpeg", "tiff", "bmp"])
def test_decompression_bomb(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 41 * 40 // 2 - 1)
    with pytest.raises(ImageError, match="too large"):
        open_picture(SAMPLES[kind])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 41 * 40 // 2 + 1)  # large, but not a bomb
    assert open_picture(SAMPLES[kind]).size == (41, 40)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    row = b"\0" * 6
    data = bytearray(raw_png([row], 1, 16, 2))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match="too large"):
        open_picture(bytes(data))


# -- EXIF and ICC ------------------------------------------------------------------------------


def oriented_files(kind: str, orientation: int) -> bytes:
    exif = exif_block(orientation)
    if kind == "png16":
        return deep_png(noise(3, np.uint16), png_chunk(b"eXIf", exif[6:]))
    if kind == "png16-grey":
        return deep_png(noise(1, np.uint16), png_chunk(b"eXIf", exif[6:]))
    if kind.startswith("tiff16"):
        options: dict[str, Any] = {"compression": "zlib"} if kind == "tiff16-zlib" else {}
        channels = 2 if kind == "tiff16-la" else 3
        tags = [(274, "H", 1, orientation, True)]
        return deep_tiff(noise(channels, np.uint16), extratags=tags, **options)
    image = Image.fromarray(noise(3))
    options = {"lossless": True} if kind == "webp" else {}
    if kind == "tiff-lzw":
        written: dict[int, object] = {274: orientation, 271: "Maker"}
        return pil_bytes(image, "TIFF", tiffinfo=written, compression="tiff_lzw")
    return pil_bytes(image, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind",
    ["png", "jpeg", "webp", "tiff", "tiff-lzw", "png16", "png16-grey", "tiff16", "tiff16-zlib",
     "tiff16-la"],
)  # fmt: skip
def test_orientation_is_applied_and_reset(kind: str, orientation: int) -> None:
    picture = open_picture(oriented_files(kind, orientation))
    stored = open_picture(oriented_files(kind, 1)).pixels
    # The oracle is Pillow's exif_transpose, one 8-bit plane at a time.
    planes = []
    for value in np.moveaxis(np.atleast_3d(stored), 2, 0):
        for byte in (value & 255, value >> 8):
            image = Image.fromarray(byte.astype(np.uint8))
            image.getexif()[0x0112] = orientation
            planes.append(np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16))
    expected = np.stack(
        [low + 256 * high for low, high in zip(planes[::2], planes[1::2], strict=True)], -1
    )
    np.testing.assert_array_equal(np.atleast_3d(picture.pixels), expected)
    if picture.exif:
        assert exif_of(picture.exif).get(0x0112, 1) == 1
    if not kind.startswith("tiff16"):
        assert picture.exif is not None
        assert exif_of(picture.exif)[0x010F] == "Maker"


def test_orientation_of_a_pillow_image() -> None:
    image = Image.open(io.BytesIO(oriented_files("png", 6)))
    assert open_picture(image).size == (13, 17)


def test_broken_exif_is_no_reason_to_refuse() -> None:
    for broken in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"):
        picture = open_picture(pil_bytes(Image.fromarray(noise(3)), "PNG", exif=broken))
        assert picture.size == (17, 13)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_round_trip_keeps_everything(
    channels: int, dtype: Any, suffix: str, tmp_path: Path
) -> None:
    picture = Picture(noise(channels, dtype), SRGB, exif_block())
    path = save_picture(picture, tmp_path / f"out{suffix}")
    again = open_picture(path)
    np.testing.assert_array_equal(again.pixels, picture.pixels)
    assert again.pixels.dtype == dtype
    assert again.digest == picture.digest
    assert again.icc == SRGB
    assert again.path == path
    assert again.exif is not None
    exif = exif_of(again.exif)
    assert exif[0x010F] == "Maker"
    assert exif.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
    # Independent decoders read the same pixels.
    if suffix == ".tif":
        np.testing.assert_array_equal(tifffile.imread(path), picture.pixels)
    # OpenCV multiplies alpha into 8-bit TIFFs.
    if channels != 2 and not (channels == 4 and dtype == np.uint8 and suffix == ".tif"):
        read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert read is not None
        swapped = read[..., [2, 1, 0, 3][:channels]] if channels > 1 else read
        np.testing.assert_array_equal(swapped, picture.pixels)
    if dtype == np.uint8 or channels == 1:
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), picture.pixels)
            assert image.info["icc_profile"] == SRGB
            assert image.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_icc_and_exif_survive_in_other_formats(suffix: str, tmp_path: Path) -> None:
    picture = Picture(noise(3), SRGB, exif_block())
    again = open_picture(save_picture(picture, tmp_path / f"out{suffix}"))
    assert (again.icc, again.exif) == (SRGB, picture.exif)


# -- the picture -------------------------------------------------------------------------------


def test_pixels_are_read_only_and_our_own() -> None:
    pixels = noise(3)
    picture = open_picture(pixels)
    before = picture.digest
    pixels[:] = 0
    assert open_picture(picture.pixels).digest == before
    view = noise(3)
    frozen = view[:]
    frozen.flags.writeable = False
    viewed = Picture(frozen)
    view[:] = 0
    assert viewed.pixels.any()
    for copy in (picture, pickle.loads(pickle.dumps(picture)), Picture(noise(1))):  # noqa: S301
        with pytest.raises(ValueError, match="read-only"):
            copy.pixels[0] = 1
    assert pickle.loads(pickle.dumps(picture)).digest == before  # noqa: S301


@pytest.mark.parametrize("dtype", DEPTHS)
def test_rgb(dtype: Any) -> None:
    for channels in CHANNELS:
        pixels = noise(channels, dtype)
        rgb = open_picture(pixels).rgb()
        scaled = pixels.astype(np.float32) / np.iinfo(dtype).max
        assert rgb.dtype == np.float32
        assert rgb.shape == (13, 17, 3)
        for c in range(3):
            source = scaled if channels == 1 else scaled[..., 0 if channels == 2 else c]
            np.testing.assert_array_equal(rgb[..., c], source)


def test_digest_counts_type_and_shape() -> None:
    pixels = np.zeros((4, 6), np.uint8)
    variants: list[Array] = [pixels, pixels.reshape(6, 4), np.zeros((2, 3, 2), np.uint8),
                pixels.view(np.uint16), pixels + np.uint8(1)]  # fmt: skip
    assert len({open_picture(variant).digest for variant in variants}) == len(variants)
    assert Picture(pixels, icc=SRGB).digest == Picture(pixels).digest


pictures = st.builds(
    lambda dtype, height, width, channels: (dtype, (height, width, *channels)),
    st.sampled_from(DEPTHS),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([(), (2,), (3,), (4,)]),
).flatmap(lambda kind: hnp.arrays(kind[0], kind[1]))


@given(pixels=pictures, data=st.data())
@settings(max_examples=150, deadline=None)
def test_with_rgb_keeps_everything_outside(pixels: Array, data: st.DataObject) -> None:
    picture = Picture(pixels, SRGB)
    size = pixels.shape[:2]
    where = data.draw(hnp.arrays(bool, size))
    rgb = data.draw(hnp.arrays(np.float32, (*size, 3), elements=st.floats(0, 1, width=32)))
    edited = picture.with_rgb(rgb, where)
    assert edited.pixels.dtype == pixels.dtype
    assert edited.pixels.shape == pixels.shape
    assert edited.icc == SRGB
    np.testing.assert_array_equal(edited.pixels[~where], pixels[~where])
    if picture.has_alpha:
        np.testing.assert_array_equal(edited.pixels[..., -1], pixels[..., -1])
    if picture.channels >= 3:
        expected = (rgb[where] * picture.max_value).round()
        np.testing.assert_array_equal(edited.pixels[..., :3][where], expected)
    same = picture.with_rgb(picture.rgb(), np.ones(size, bool))
    np.testing.assert_array_equal(same.pixels, pixels)


def test_with_rgb_luminance_and_bounds() -> None:
    grey = Picture(np.zeros((1, 4), np.uint8))
    colours = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [9, -9, 0.5]]], np.float32)
    everywhere = np.ones((1, 4), bool)
    assert grey.with_rgb(colours, everywhere).pixels[0, :3].tolist() == [76, 150, 29]
    rgb = Picture(np.zeros((1, 4, 3), np.uint8)).with_rgb(colours, everywhere)
    assert rgb.pixels[0, 3].tolist() == [255, 0, 128]
    for bad_rgb, bad_where in [
        (colours[:, :3], everywhere),
        (colours.astype(int), everywhere),
        (colours, everywhere[:, :3]),
        (colours, everywhere.astype(int)),
        (colours * np.nan, everywhere),
    ]:
        with pytest.raises(ImageError):
            grey.with_rgb(bad_rgb, bad_where)
    nowhere = np.zeros((1, 4), bool)
    assert grey.with_rgb(colours * np.nan, nowhere).digest == grey.digest


@given(level=st.integers(0, 65535))
def test_grey_takes_equal_channels_exactly(level: int) -> None:
    value = np.full((1, 1, 3), level / 65535, np.float32)
    for dtype in DEPTHS:
        picture = Picture(np.zeros((1, 1), dtype)).with_rgb(value, np.ones((1, 1), bool))
        assert picture.pixels[0, 0] == (value[0, 0, 0] * picture.max_value).round()


def test_to_pil() -> None:
    for channels in CHANNELS:
        image = Picture(noise(channels), SRGB).to_pil()
        np.testing.assert_array_equal(np.asarray(image), noise(channels))
        assert image.info["icc_profile"] == SRGB
        deep = np.asarray(Picture(noise(channels, np.uint16)).to_pil())
        expected = noise(channels, np.uint16)
        if channels > 1:
            expected = (expected / 65535 * 255).round()
        np.testing.assert_array_equal(deep, expected)


@pytest.mark.parametrize("channels", CHANNELS)
def test_resized_matches_pillow_in_both_depths(channels: int) -> None:
    pixels = noise(channels, height=40, width=60)
    if channels in (2, 4):
        pixels[..., -1] |= 128
    expected = np.asarray(Image.fromarray(pixels).resize((21, 11), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(Picture(pixels).resized((21, 11)).pixels, expected)
    deep = Picture(pixels.astype(np.uint16) * 257).resized((21, 11))
    assert deep.pixels.dtype == np.uint16
    assert deep.size == (21, 11)
    assert np.abs(deep.pixels / 257 - expected).max() < 3
    same = Picture(pixels)
    assert same.resized(same.size) is same
    with pytest.raises(ImageError):
        same.resized((0, 4))


def test_transparent_colour_does_not_bleed() -> None:
    for top, dtype in ((255, np.uint8), (65535, np.uint16)):
        pixels = np.zeros((8, 8, 4), dtype)
        pixels[:, :4] = [top, 0, 0, top]
        pixels[:, 4:] = [0, top, 0, 0]
        assert Picture(pixels).resized((5, 5)).pixels[..., 1].max() <= top // 100


# -- saving ------------------------------------------------------------------------------------


@given(pixels=pictures)
@settings(max_examples=100, deadline=None)
def test_png_round_trip(pixels: Array) -> None:
    again = open_picture(encode_png(Picture(pixels)))
    assert again.digest == Picture(pixels).digest


def test_png_compresses_smooth_pictures() -> None:
    smooth = np.add.outer(np.arange(600), np.arange(50)).astype(np.uint16)[..., None] * [1, 40, 90]
    picture = Picture(smooth.astype(np.uint16))
    data = encode_png(picture)
    assert len(data) < picture.pixels.nbytes / 20
    assert open_picture(data).digest == picture.digest


@pytest.mark.parametrize(
    ("suffix", "channels"), [(".webp", 3), (".webp", 4), (".bmp", 1), (".bmp", 3)]
)
def test_other_lossless_formats(
    suffix: str, channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = Picture(noise(channels))
    assert open_picture(save_picture(picture, tmp_path / f"o{suffix}")).digest == picture.digest
    assert not caplog.records


def test_webp_keeps_the_colour_of_transparent_pixels(tmp_path: Path) -> None:
    pixels = noise(4)
    pixels[:7, :, 3] = 0
    again = open_picture(save_picture(Picture(pixels), tmp_path / "o.webp"))
    np.testing.assert_array_equal(again.pixels, pixels)


def test_grey_webp_keeps_its_values(tmp_path: Path) -> None:
    again = open_picture(save_picture(Picture(noise(1)), tmp_path / "o.webp"))
    np.testing.assert_array_equal(again.pixels, np.repeat(noise(1)[..., None], 3, 2))


def test_jpeg_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        save_picture(Picture(noise(3)), tmp_path / "o.jpg")
    assert "outside the mask" in caplog.text
    assert ".png" in caplog.text


@pytest.mark.parametrize(
    ("name", "pixels", "use"),
    [
        ("o.jpg", noise(4), ".png"),
        ("o.jpeg", noise(3, np.uint16), ".png"),
        ("o.webp", noise(3, np.uint16), ".png"),
        ("o.bmp", noise(1, np.uint16), ".tif"),
        ("o.bmp", noise(4), ".webp"),
        ("o.xyz", noise(3), ".png"),
        ("o", noise(3), ".png"),
    ],
)
def test_formats_that_cannot_hold_it(
    name: str, pixels: Array, use: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OutputError, match=use):
        save_picture(Picture(pixels), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records


def test_picture_beyond_a_formats_size(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_picture(Picture(np.zeros((1, 16384, 3), np.uint8)), tmp_path / "o.webp")
    assert list(tmp_path.iterdir()) == []


def test_png_text(tmp_path: Path) -> None:
    text = {"diffedit": '{"seed": 7}', "Title": "Grün → rot"}
    path = save_picture(Picture(noise(3, np.uint16), SRGB), tmp_path / "o.png", png_text=text)
    with Image.open(path) as image:
        image.load()
        assert getattr(image, "text") == text  # noqa: B009
    for keyword in ("", "x" * 80, "a\0b", "→"):
        with pytest.raises(OutputError):
            save_picture(Picture(noise(1)), tmp_path / "p.png", png_text={keyword: "v"})
    assert [file.name for file in tmp_path.iterdir()] == ["o.png"]


def test_missing_folder_and_folder_as_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        save_picture(Picture(noise(1)), tmp_path / "no" / "o.png")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(OutputError, match="folder"):
        save_picture(Picture(noise(1)), tmp_path / "d.png")


def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_picture(Picture(noise(1)), tmp_path / "o.png", overwrite=False)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        save_picture(Picture(noise(3)), path, overwrite=False)
    # Someone else writes it between the check and the rename.
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(OutputError, match="exists"):
        save_picture(Picture(noise(3)), path, overwrite=False)
    monkeypatch.undo()
    assert path.read_bytes() == before
    save_picture(Picture(noise(3)), path)
    assert open_picture(path).digest == Picture(noise(3)).digest
    assert [file.name for file in tmp_path.iterdir()] == ["o.png"]


def test_overwrite_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    path = save_picture(Picture(noise(1)), tmp_path / "o.png", overwrite=False)
    with pytest.raises(OutputError, match="exists"):
        save_picture(Picture(noise(3)), path, overwrite=False)
    assert open_picture(path).digest == Picture(noise(1)).digest
    assert [file.name for file in tmp_path.iterdir()] == ["o.png"]


def _same(path: Path) -> Path:
    return path


def _relative(path: Path) -> Path:
    return Path(os.path.relpath(path))


def _dotted(path: Path) -> Path:
    (path.parent / "sub").mkdir()
    return path.parent / "sub" / ".." / path.name


def _symlink(path: Path) -> Path:
    link = path.with_name("link.png")
    link.symlink_to(path)
    return link


def _hardlink(path: Path) -> Path:
    link = path.with_name("hard.png")
    link.hardlink_to(path)
    return link


@pytest.mark.parametrize("alias", [_same, _relative, _dotted, _symlink, _hardlink])
@pytest.mark.parametrize("how", ["path", "derived", "inputs"])
def test_an_input_is_never_written_to(
    how: str, alias: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = tmp_path / "in.png"
    source.write_bytes(pil_bytes(Image.fromarray(noise(3)), "PNG"))
    before = source.read_bytes()
    picture = open_picture(source)
    if how == "derived":
        picture = picture.with_rgb(1 - picture.rgb(), np.ones((13, 17), bool))
        picture = picture.resized((9, 9))
    inputs = [source] if how == "inputs" else []
    if how == "inputs":
        picture = Picture(noise(4))
    with pytest.raises(OutputError, match="input"):
        save_picture(picture, alias(source), overwrite=True, inputs=inputs)
    assert source.read_bytes() == before


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("broken", ["fsync", "replace", "encode", "interrupt"])
def test_failing_write_leaves_nothing(
    broken: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        if broken == "interrupt":
            raise KeyboardInterrupt
        raise OSError(28, "No space left on device")

    path = tmp_path / "o.png"
    if existing:
        path.write_bytes(b"before")
    if broken == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif broken == "encode":
        monkeypatch.setattr(zlib, "compress", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    expected = KeyboardInterrupt if broken == "interrupt" else OutputError
    with pytest.raises(expected, match=None if broken == "interrupt" else "No space left"):
        save_picture(Picture(noise(3)), path)
    monkeypatch.undo()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([b"before"] if existing else [])


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    path = save_picture(Picture(noise(1)), tmp_path / "o.png")
    (tmp_path / "reference").touch()
    assert path.stat().st_mode == (tmp_path / "reference").stat().st_mode


# -- masks -------------------------------------------------------------------------------------


def test_mask_modes() -> None:
    grey = noise(1)
    scaled = grey.astype(np.float32) / 255
    np.testing.assert_array_equal(read_mask(Image.fromarray(grey)), scaled)
    np.testing.assert_array_equal(read_mask(grey), scaled)
    np.testing.assert_array_equal(read_mask(np.repeat(grey[..., None], 3, 2)), scaled)
    np.testing.assert_array_equal(read_mask(grey.astype(np.uint16) * 257), scaled)
    np.testing.assert_array_equal(read_mask(Image.fromarray(grey.astype(np.uint16) * 257)), scaled)
    np.testing.assert_array_equal(read_mask(grey > 99), grey > 99)
    np.testing.assert_array_equal(read_mask(Image.fromarray(grey > 99)), grey > 99)
    np.testing.assert_array_equal(read_mask(scaled), scaled)
    np.testing.assert_array_equal(read_mask(deep_png(noise(1, np.uint16))),
                                  noise(1, np.uint16).astype(np.float32) / 65535)  # fmt: skip
    for mask in (read_mask(grey), read_mask(grey > 99), read_mask(scaled.astype(np.float64))):
        assert mask.dtype == np.float32
        assert mask.shape == (13, 17)


def test_mask_colour_and_alpha() -> None:
    np.testing.assert_allclose(
        read_mask(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3]], np.uint8)),
        [[0.299, 0.587, 0.114, 1]],
        atol=1e-6,
    )
    la = noise(2).astype(np.float64) / 255
    np.testing.assert_allclose(read_mask(noise(2)), la[..., 0] * la[..., 1], atol=1e-6)
    rgba = noise(4).astype(np.float64) / 255
    expected = rgba[..., :3] @ [0.299, 0.587, 0.114] * rgba[..., 3]
    np.testing.assert_allclose(read_mask(noise(4)), expected, atol=1e-6)
    stroke = np.zeros((4, 4, 4), np.uint8)
    stroke[1, 2] = 255
    assert read_mask(Image.fromarray(stroke)).sum() == 1


def test_mask_of_zeros_and_ones_warns(caplog: pytest.LogCaptureFixture) -> None:
    read_mask(np.eye(4, dtype=np.uint8))
    assert "nearly black" in caplog.text
    caplog.clear()
    read_mask(np.eye(4, dtype=bool))
    assert not caplog.records


def test_mask_orientation_and_missing_file(tmp_path: Path) -> None:
    assert read_mask(oriented_files("png16-grey", 6)).shape == (17, 13)
    with pytest.raises(ImageError, match="does not exist"):
        read_mask(tmp_path / "no.png")


def test_imports_stay_light() -> None:
    code = (
        "import sys, diffedit.images, diffedit.fields;"
        "print([m for m in ('torch', 'cv2', 'tifffile', 'scipy', 'diffusers') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"
