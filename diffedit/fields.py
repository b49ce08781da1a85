"""Types for parameters that name files: they compare, hash, serialise and show a form.

A model is named by a text (`ModelField`), a picture by a handle. A handle is equal to another with
the same decoded pixels, wherever they come from. It is written to JSON as a path when it was given
as one, and otherwise as a lossless PNG: a file in a folder, or a data URI. Three keys of pydantic's
``context`` matter, all optional:

* ``base``: the folder that relative paths count from (default: the working directory);
* ``files``: False refuses every path, for values from people who may not name files here;
* ``store``: a folder that takes in-memory pictures when they are serialised.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from diffedit.errors import ImageError, MaskError
from diffedit.images import (
    ImageSource,
    Picture,
    encode_png,
    open_picture,
    read_mask,
    save_picture,
)

__all__ = ["ImageField", "MaskField", "ModelField"]

_DATA_URI = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*?;base64,", re.IGNORECASE)


class ImageField:
    """A handle on a picture; immutable, equal by decoded pixels.

    A path is checked to exist at once, and opened when its pixels are first asked for.

    Args:
        source: a path, a ``data:image/…;base64,…`` URI, bytes, a Pillow image, a NumPy array, a
            :class:`Picture` or another handle.
        base: the folder that a relative path counts from (default: the working directory).

    Raises:
        ImageError: nothing there, or not an image.
    """

    json_format: ClassVar[str] = "image"
    path: Path | None
    """Absolute path of the file it was given as; None for pictures in memory."""

    def __init__(
        self, source: ImageSource | ImageField, *, base: str | os.PathLike[str] | None = None
    ) -> None:
        if isinstance(source, ImageField):
            source = source.path or source.picture
        path, picture = None, None
        if isinstance(source, str) and source[:5].lower() == "data:":
            picture = self._read(_from_data_uri(source))
        elif isinstance(source, str | os.PathLike):
            path = _existing(source, base)
        else:
            picture = self._read(source)
        self._set(path, picture)

    def _set(self, path: Path | None, picture: Picture | None) -> None:
        self.__dict__["path"] = path
        if picture is not None:
            self.__dict__["picture"] = picture

    @staticmethod
    def _read(source: ImageSource) -> Picture:
        return open_picture(source)

    @cached_property
    def picture(self) -> Picture:
        """The picture itself; a file is read once, when this is first asked for.

        Raises:
            ImageError: the file is gone, or is not an image.
        """
        assert self.path is not None  # a handle has one or the other
        return self._read(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the decoded pixels."""
        return self.picture.digest

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable, cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable, cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageField) or self.json_format != other.json_format:
            return NotImplemented
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.json_format, self.digest))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path) if self.path else self.picture!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # a path travels as a path, not as its pixels
        return _restore, (type(self), self.path, None if self.path else self.picture)

    # -- pydantic ------------------------------------------------------------------------------

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            cls._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                cls._serialise, info_arg=True, when_used="json"
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "format": cls.json_format}

    @classmethod
    def _validate(cls, value: Any, info: core_schema.ValidationInfo[Any]) -> Self:
        if type(value) is cls:
            return value
        context = _context(info)
        if context.get("files") is False and not _in_itself(value):
            said = str(value)[:80]
            raise ImageError(
                f"{said} is a file's name, should be the picture itself (data:image/…)"
            )
        return cls(value, base=context.get("base"))

    def _serialise(self, info: core_schema.SerializationInfo[Any]) -> str:
        context = _context(info)
        base, store = context.get("base"), context.get("store")
        if self.path is not None:
            return _relative(self.path, base)
        if store is None:
            return "data:image/png;base64," + base64.b64encode(encode_png(self.picture)).decode()
        file = Path(store) / f"{self.digest[:16]}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_picture(self.picture, file)
        return _relative(file, store if base is None else base)


class MaskField(ImageField):
    """A handle on a mask; 1 (white) = may change. Equal by decoded mask values.

    Floats given in memory are rounded to 16-bit grey at once, so that the mask is the same before
    and after it was written to a file.
    """

    json_format: ClassVar[str] = "mask"

    @staticmethod
    def _read(source: ImageSource) -> Picture:
        try:
            return open_picture(source, float_bits=16)
        except ImageError as error:
            if isinstance(source, np.ndarray):
                raise MaskError(f"not a mask: {error}") from None
            raise

    @cached_property
    def mask(self) -> npt.NDArray[np.float32]:
        """(h, w) in [0, 1], read-only; 1 = may change."""
        mask = read_mask(self.picture)
        mask.flags.writeable = False
        return mask

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the decoded mask values."""
        head = f"mask {self.mask.shape} ".encode()
        return hashlib.sha256(head + self.mask.astype("<f4").tobytes()).hexdigest()


def located(name: str, base: str | os.PathLike[str] | None) -> str:
    """A model's name; its absolute path if it names what lies in the folder ``base``.

    A word alone may be the name of a model or of a model's own network: a folder is ``./word``, and
    a file ``word.safetensors``.
    """
    said = Path(name)
    word = name == said.name
    if word and not said.suffix:
        return name
    try:
        path = (Path(base or ".") / said.expanduser()).absolute()
        there = path.is_file() if word else path.exists()
        return str(path.resolve() if ".." in path.parts else path) if there else name
    except (OSError, ValueError, RuntimeError):  # too long, NUL, no such home
        return name


def same_model(one: str, other: str) -> bool:
    """Whether two names are of the same model, which files may name by several paths."""
    try:
        return one == other or Path(one).expanduser().samefile(Path(other).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False


def _located(name: str, info: ValidationInfo) -> str:
    context = _context(info)
    base = context.get("base")
    # Whoever may not name files is not told which there are.
    return name if base is None or context.get("files") is False else located(name, base)


def _placed(name: str, info: SerializationInfo) -> str:
    base = _context(info).get("base")
    if base is None:
        return name
    # Where it is read, another one may lie at the same relative path.
    path = located(name, None)
    if not Path(path).is_absolute():
        return name
    said = _relative(Path(path), base)
    return said if Path(said).is_absolute() else f"./{said}"  # which no hub id begins with


ModelField = Annotated[
    str,
    Field(min_length=1, max_length=4096, json_schema_extra={"format": "model"}),
    AfterValidator(_located),
    PlainSerializer(_placed, return_type=str, when_used="json"),
]
"""What names a model or a part of one: a folder, a file, a hub id, or the name of a model's own.

In a workflow file a relative path counts from the folder of the file, and, when nothing is there,
from the working directory like everywhere else.
"""


def _restore(cls: type[ImageField], path: Path | None, picture: Picture | None) -> ImageField:
    handle = cls.__new__(cls)
    handle._set(path, picture)
    return handle


def _context(info: Any) -> Mapping[str, Any]:
    return info.context if isinstance(info.context, Mapping) else {}


def _existing(source: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> Path:
    given = os.fspath(source)
    if not given:
        raise ImageError("an empty path, should be the path of an image")
    if re.match(r"https?://", given, re.IGNORECASE):
        raise ImageError(f"{given} is a web address, should be a file: download it first")
    try:
        path = (Path(base or ".") / Path(given).expanduser()).absolute()
        if path.is_dir():
            raise ImageError(f"{path} is a folder, should be an image file")
        if not path.exists():
            raise ImageError(f"{path} does not exist, should be the path of an image")
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, no such home
        raise ImageError(f"{given[:80]!r} is not a path ({error})") from error
    return path


def _from_data_uri(uri: str) -> bytes:
    match = _DATA_URI.match(uri)
    if not match:
        raise ImageError(f"{uri[:40]!r}… is not a data URI, should be data:image/png;base64,…")
    try:
        return base64.b64decode(uri[match.end() :], validate=True)
    except binascii.Error as error:
        raise ImageError(f"{uri[:40]!r}… does not hold valid base64 ({error})") from None


def _in_itself(value: object) -> bool:
    """Whether a value is a picture, and not the name of one."""
    if isinstance(value, ImageField):
        return value.path is None
    if isinstance(value, Picture):
        return True
    if isinstance(value, str):
        return value[:5].lower() == "data:"
    return not isinstance(value, os.PathLike)


def _relative(path: Path, base: str | os.PathLike[str] | None) -> str:
    """Return the path from ``base`` when it lies below it, else the absolute path; posix style."""
    path = path.absolute()
    if base is None:
        return path.as_posix()
    folder = Path(base).absolute()
    if ".." in path.parts or ".." in folder.parts or not path.is_relative_to(folder):
        resolved, folder = path.resolve(), folder.resolve()
        if not resolved.is_relative_to(folder):
            return path.as_posix()
        path = resolved
    return path.relative_to(folder).as_posix()
