from __future__ import annotations

import base64
import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from diffedit.errors import ImageError, MaskError
from diffedit.fields import ImageField, MaskField
from diffedit.images import Picture, open_picture, read_mask, save_picture

Array = npt.NDArray[Any]


class Both(BaseModel, frozen=True):
    image: ImageField | None = None
    mask: MaskField | None = Field(None, description="white = may change")


def noise(*shape: int, dtype: Any = np.uint8) -> Array:
    rng = np.random.default_rng(sum(shape))
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    save_picture(Picture(noise(5, 7, 3)), tmp_path / "photo.png")
    save_picture(Picture(noise(5, 7, dtype=np.uint16)), tmp_path / "sub" / "mask.png")
    return tmp_path


def load(data: dict[str, Any], **context: Any) -> Both:
    return Both.model_validate(data, context=context)


def test_every_source_gives_the_same_handle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    path = folder / "photo.png"
    data = path.read_bytes()
    sources: list[Any] = [
        str(path), path, "photo.png", Path("photo.png"), "~/photo.png", data, bytearray(data),
        Image.open(path), noise(5, 7, 3), open_picture(path), ImageField(path),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]  # fmt: skip
    handles = [load({"image": source}).image for source in sources]
    assert len(set(handles)) == 1
    for handle in handles:
        assert isinstance(handle, ImageField)
        np.testing.assert_array_equal(handle.picture.pixels, noise(5, 7, 3))
        assert handle.digest == open_picture(path).digest
        assert handle.picture is handle.picture
    assert ImageField("photo.png").path == path
    assert ImageField(data).path is None
    assert load({"image": ImageField(path)}).image is not None


def test_base(folder: Path) -> None:
    model = load({"image": "photo.png", "mask": "sub/mask.png"}, base=folder)
    assert model.image is not None
    assert model.mask is not None
    assert model.image.path == folder / "photo.png"
    dumped = model.model_dump(mode="json", context={"base": folder})
    assert dumped == {"image": "photo.png", "mask": "sub/mask.png"}
    elsewhere = model.model_dump(mode="json", context={"base": folder / "sub"})
    assert elsewhere == {"image": (folder / "photo.png").as_posix(), "mask": "mask.png"}
    assert model.model_dump(mode="json")["mask"] == (folder / "sub" / "mask.png").as_posix()
    up = load({"image": "../photo.png"}, base=folder / "sub")
    assert up.model_dump(mode="json", context={"base": folder})["image"] == "photo.png"
    assert load(dumped, base=folder) == model


def test_relative_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = load({"mask": "mask.png"}, base="sub")
    monkeypatch.chdir("/")
    assert model.mask is not None
    assert model.mask.mask.shape == (5, 7)


def test_a_path_through_a_symlink_stays_right(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "link").symlink_to(folder / "sub")
    save_picture(Picture(noise(3, 3)), folder / "other" / "photo.png")
    (folder / "deep").symlink_to(folder / "other")
    handle = ImageField("deep/../photo.png", base=folder)  # the parent of other, not of deep
    assert handle.picture.size == (7, 5)


def test_wrong_sources_are_collected(folder: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        load({"image": "photo.pgn", "mask": "no.png"}, base=folder)
    errors = caught.value.errors()
    assert [error["loc"] for error in errors] == [("image",), ("mask",)]
    assert str(folder / "photo.pgn") in errors[0]["msg"]
    assert isinstance(errors[0]["ctx"]["error"], ImageError)
    for source, says in [
        ("", "empty path"), (".", "folder"), ("https://x.org/a.png", "download"),
        ("data:text/plain,hello", "data URI"), ("data:image/png;base64,???", "base64"),
        ("a\0b", "does not exist"), ("x" * 5000, "not a path"),
        (7, "int"), (b"text", "not an image"), (["a"], "list"),
        (np.zeros((2, 2), np.int64), "int64"), ("~nobody-here/x.png", "not a path"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
    ]:  # fmt: skip
        with pytest.raises(ValidationError, match=says) as caught:
            load({"image": source}, base=folder)
        assert "\n" not in caught.value.errors()[0]["msg"]
    with pytest.raises(ValidationError, match="NaN") as caught:
        load({"mask": np.full((2, 2), np.nan)})
    assert isinstance(caught.value.errors()[0]["ctx"]["error"], MaskError)


def test_python_mode_keeps_the_handle(folder: Path) -> None:
    model = load({"image": folder / "photo.png"})
    assert model.model_dump()["image"] is model.image
    assert model.image is not None
    assert "picture" not in vars(model.image)  # not read before it is asked for


def test_json_schema() -> None:
    for mode in ("validation", "serialization"):
        properties = Both.model_json_schema(mode=mode)["properties"]
        assert {"type": "string", "format": "image"} in properties["image"]["anyOf"]
        assert {"type": "string", "format": "mask"} in properties["mask"]["anyOf"]
        assert properties["mask"]["description"] == "white = may change"


arrays = st.builds(
    lambda dtype, height, width, channels: (dtype, (height, width, *channels)),
    st.sampled_from([np.uint8, np.uint16]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(), (2,), (3,), (4,)]),
).flatmap(lambda kind: hnp.arrays(kind[0], kind[1]))


@given(pixels=arrays)
@settings(max_examples=60, deadline=None)
def test_data_uri_round_trip_keeps_the_digest(pixels: Array) -> None:
    model = load({"image": pixels, "mask": pixels})
    text = model.model_dump_json()
    assert '"data:image/png;base64,' in text
    again = Both.model_validate_json(text)
    assert again == model
    assert hash(again) == hash(model)
    assert again.image is not None
    assert again.image.digest == Picture(pixels).digest
    assert again.image.picture.pixels.dtype == pixels.dtype


@given(values=hnp.arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)))
@settings(max_examples=60, deadline=None)
def test_float_mask_round_trip_keeps_the_digest(values: Array) -> None:
    for source in (values, Image.fromarray(values), values.astype(np.float64)):
        model = load({"mask": source})
        again = Both.model_validate_json(model.model_dump_json())
        assert model.mask is not None
        assert again.mask is not None
        assert again.mask.digest == model.mask.digest
        np.testing.assert_array_equal(again.mask.mask, model.mask.mask)
        np.testing.assert_allclose(model.mask.mask, values, atol=0.5 / 65535 + 1e-7)


def test_store(folder: Path) -> None:
    store = folder / "pictures"
    model = load({"image": noise(4, 5, 3, dtype=np.uint16), "mask": np.eye(5, dtype=bool)})
    assert model.image is not None
    assert model.mask is not None
    dumped = model.model_dump(mode="json", context={"base": folder, "store": store})
    assert dumped["image"] == f"pictures/{model.image.digest[:16]}.png"
    assert load(dumped, base=folder) == model
    assert sorted(file.name for file in store.iterdir()) == sorted(
        [f"{model.image.digest[:16]}.png", f"{model.mask.digest[:16]}.png"]
    )
    written = store / f"{model.image.digest[:16]}.png"
    stamp = written.stat().st_mtime_ns
    os.utime(written, ns=(1, 1))
    assert stamp != 1
    alone = model.model_dump(mode="json", context={"store": store})
    assert written.stat().st_mtime_ns == 1  # written once
    assert alone["image"] == written.name
    assert load(alone, base=store) == model
    outside = model.model_dump(mode="json", context={"base": folder / "sub", "store": store})
    assert outside["image"] == written.as_posix()


def test_mask_values(folder: Path) -> None:
    handle = MaskField(folder / "sub" / "mask.png")
    np.testing.assert_array_equal(handle.mask, read_mask(folder / "sub" / "mask.png"))
    assert handle.mask.dtype == np.float32
    assert handle.mask is handle.mask
    with pytest.raises(ValueError, match="read-only"):
        handle.mask[0, 0] = 1
    grey = noise(4, 6)
    same = [MaskField(grey), MaskField(np.repeat(grey[..., None], 3, 2)),
            MaskField(grey.astype(np.uint16) * 257)]  # fmt: skip
    assert len(set(same)) == 1
    assert MaskField(grey) != MaskField(grey[::-1])
    assert MaskField(grey.reshape(6, 4)) != MaskField(grey)


def test_handles_convert_but_do_not_mix(folder: Path) -> None:
    image = ImageField(folder / "photo.png")
    mask = load({"mask": image}).mask
    assert type(mask) is MaskField
    assert mask.path == image.path
    assert mask != image
    assert image != mask
    assert image != "photo.png"
    in_memory = load({"mask": ImageField(noise(4, 4)), "image": mask})
    assert type(in_memory.image) is ImageField


def test_immutable(folder: Path) -> None:
    handle = ImageField(folder / "photo.png")
    for name in ("path", "picture", "digest", "other"):
        with pytest.raises(AttributeError):
            setattr(handle, name, None)
    with pytest.raises(AttributeError):
        del handle.path
    assert copy.copy(handle) is handle
    assert copy.deepcopy(handle) is handle
    model = load({"image": handle})
    assert model.model_copy(deep=True) == model
    assert "photo.png" in repr(handle)
    assert "Picture" in repr(ImageField(noise(2, 2)))


@pytest.mark.parametrize("read_first", [True, False])
def test_pickle(folder: Path, read_first: bool) -> None:
    model = load({"image": folder / "photo.png", "mask": np.eye(3, dtype=np.float32)})
    assert model.image is not None
    if read_first:
        assert model.image.picture.size == (7, 5)
    data = pickle.dumps(model)
    again = pickle.loads(data)  # noqa: S301
    assert again == model
    assert again.image.path == model.image.path
    assert isinstance(again.mask, MaskField)
    big = noise(200, 200, 3)
    file = folder / "big.png"
    Image.fromarray(big).save(file)
    handle = ImageField(file)
    assert handle.picture.size == (200, 200)
    assert len(pickle.dumps(handle)) < 2000  # the path, not the pixels


def test_a_broken_file_is_reported_when_it_is_read(folder: Path) -> None:
    broken = folder / "broken.png"
    broken.write_bytes((folder / "photo.png").read_bytes()[:40])
    handle = ImageField(broken)
    with pytest.raises(ImageError, match=r"broken\.png"):
        _ = handle.picture
    file = io.BytesIO()
    Image.fromarray(noise(5, 7, 3)).save(file, "PNG")
    broken.write_bytes(file.getvalue())
    assert handle.picture.size == (7, 5)  # a failure is not remembered


def test_picture_handles_do_not_claim_a_path(folder: Path) -> None:
    edited = open_picture(folder / "photo.png").resized((2, 2))
    handle = ImageField(edited)
    assert handle.path is None
    assert ImageField(handle.picture).digest == edited.digest


@pytest.mark.parametrize("named", ["photo.png", "/etc/hostname", "no-such.png", Path("photo.png")])
def test_where_files_may_not_be_named_every_path_is_refused_alike(
    folder: Path, named: str | Path
) -> None:
    with pytest.raises(ValidationError, match=r"is a file's name, should be the picture itself"):
        Both.model_validate({"image": named}, context={"base": folder, "files": False})
    for one in (noise(2, 2), folder.joinpath("photo.png").read_bytes()):
        made = Both.model_validate({"image": one}, context={"files": False})
        assert made.image is not None
        assert made.image.path is None
        again = Both.model_validate(made.model_dump(mode="json"), context={"files": False})
        assert again == made
