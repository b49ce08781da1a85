"""From a picture to a file, which is complete or absent."""

from __future__ import annotations

import io
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffedit.errors import OutputError
from diffedit.images.picture import Picture
from diffedit.images.png import encode_png
from diffedit.images.tiff import encode_tiff

log = logging.getLogger(__name__)

_DEEP = (".png", ".tif", ".tiff")
_PILLOW: dict[str, tuple[str, dict[str, Any]]] = {
    # exact: keep the colour of fully transparent pixels
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".bmp": ("BMP", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}


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
    _check_format(picture, path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist, create it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder, should be a file name such as {path / 'out.png'}")
    for source in (*inputs, *([picture.path] if picture.path else [])):
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise OutputError(
                f"{path} is the input {source}, which is never written to: name another output"
            )
    try:
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(path)
        _write(_encode(picture, path.suffix.lower(), png_text), path, overwrite)
    except FileExistsError:
        raise OutputError(f"{path} exists: name another output, or allow overwriting") from None
    except Exception as error:  # an encoder raises anything for what its format cannot hold
        raise OutputError(f"{path}: cannot write this picture ({error})") from error
    return path


def _check_format(picture: Picture, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in (*_DEEP, *_PILLOW):
        raise OutputError(
            f"{path}: {f'the suffix {suffix!r}' if suffix else 'no suffix'} names no format, "
            "should be .png, .tif, .webp, .bmp or .jpg"
        )
    deep = picture.max_value == 65535
    if suffix not in _DEEP and (deep or (picture.has_alpha and suffix != ".webp")):
        what = " and ".join(["16-bit pixels"] * deep + ["alpha"] * picture.has_alpha)
        better = ".png or .tif" if deep else ".png, .webp or .tif"
        raise OutputError(f"{path}: {suffix} cannot hold {what}, use {better}")
    if suffix in (".jpg", ".jpeg"):
        log.warning(
            "%s: JPEG is lossy, pixels outside the mask will not equal the source's; "
            "save as .png to keep them",
            path,
        )


def _encode(picture: Picture, suffix: str, text: Mapping[str, str] | None) -> bytes:
    if suffix == ".png":
        return encode_png(picture, text)
    if suffix in _DEEP:
        return encode_tiff(picture)
    kind, options = _PILLOW[suffix]
    file, metadata = io.BytesIO(), {"exif": picture.exif or b"", "icc_profile": picture.icc or b""}
    picture.to_pil().save(file, kind, **metadata, **options)
    return file.getvalue()


def _write(data: bytes, path: Path, overwrite: bool) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # same folder: a rename is atomic
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not overwrite:
            try:  # unlike a rename, fails if someone else wrote `path` in the meantime
                return path.hardlink_to(temporary)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                pass
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
