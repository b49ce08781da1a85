"""Examples come out the same each time, whatever the files; what is wrong is named."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from diffedit.errors import ImageError, InputError
from diffedit.images import reading
from diffedit.training.data import SUFFIXES, Captioned, Folder, Source, Views, check, split

Array = npt.NDArray[Any]


def gradient(width: int = 48, height: int = 32) -> Array:
    """Red rises to the right, green downwards: every corner is told apart."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], 2).astype(np.uint8)


def put(path: Path, pixels: Array | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient() if pixels is None else pixels).save(path, **options)
    return path


def corrupt(path: Path) -> Path:
    put(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def rows(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_the_suffixes_are_those_of_the_formats_that_are_read() -> None:
    Image.init()
    known = {s for s, kind in Image.registered_extensions().items() if kind in reading._FORMATS}
    assert known == SUFFIXES


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    kind = {".apng": "PNG", ".jfif": "JPEG", ".jpe": "JPEG"}.get(suffix)
    put(tmp_path / f"a{suffix.upper()}", format=kind)
    (example,) = Folder(tmp_path, 32)
    assert example.image.shape == (32, 32, 3)
    assert example.image.dtype == np.uint8
    # Shorter side kept at 32, centre of the longer one.
    error = np.abs(example.image.astype(int) - gradient()[:, 8:40])
    assert error[..., :2].mean() < (12 if suffix == ".gif" else 4)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    put(tmp_path / "a.png", exif=exif)
    (example,) = Folder(tmp_path, 32)
    assert np.array_equal(example.image, np.rot90(gradient(), -1)[8:40])


def test_sixteen_bits_are_rounded_grey_is_repeated_alpha_lies_over_white(tmp_path: Path) -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (16, 16, 3), np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    put(tmp_path / "grey.png", gradient(16, 16)[..., 0])
    clear = np.dstack([gradient(16, 16), np.full((16, 16), 64, np.uint8)])
    clear[:8, :, 3] = 0
    put(tmp_path / "clear.png", clear)
    found = {example.caption: example.image for example in Folder(tmp_path, 16)}
    assert np.array_equal(found["deep"], (deep / 257).round())
    assert np.array_equal(found["grey"], np.repeat(gradient(16, 16)[..., :1], 3, 2))
    assert (found["clear"][:8] == 255).all()
    expected = (gradient(16, 16)[8:] * (64 / 255) + 255 * (1 - 64 / 255)).round()
    assert np.abs(found["clear"][8:] - expected).max() <= 1


def test_scaling_is_lanczos_of_the_shorter_side(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    put(tmp_path / "a.png", noise)
    expected = np.asarray(Image.fromarray(noise).resize((36, 24), Image.Resampling.LANCZOS))
    assert np.array_equal(Folder(tmp_path, 24)[0].image, expected[:, 6:30])


def test_a_folder_is_searched_below_sorted_and_without_hidden_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b/red_fox_003.png", "a b (2).png", "b/.hidden.png", ".git/x.png"):
        put(tmp_path / name)
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x")
    folder = Folder(tmp_path, 16)
    assert [(e.name, e.caption) for e in folder] == [
        ("a b (2).png", "a b"),
        ("b/red_fox_003.png", "red fox"),
    ]
    assert "1 files such as photo.heic" in caplog.text


def test_captions_of_text_files_and_one_for_all(tmp_path: Path) -> None:
    put(tmp_path / "1.png").with_suffix(".txt").write_text("﻿a cat\non a mat\n", "utf-8")
    assert Folder(tmp_path, 16, ".txt")[0].caption == "a cat on a mat"
    assert Folder(tmp_path, 16, "in sks style")[0].caption == "in sks style"
    assert Folder(tmp_path, 16, "")[0].caption == ""


def test_views_are_seeded_and_within_the_picture(tmp_path: Path) -> None:
    put(tmp_path / "a.png", gradient(96, 32))
    views = Views(count=24, crop="random", zoom=1.5, flip=True, seed=3)
    folder, again = Folder(tmp_path, 32, views=views), Folder(tmp_path, 32, views=views)
    assert len(folder) == 24
    images = [folder[i].image for i in range(24)]
    assert all(np.array_equal(again[i].image, images[i]) for i in reversed(range(24)))
    assert len({image.tobytes() for image in images}) > 16
    rising = [int(image[0, -1, 0]) > int(image[0, 0, 0]) for image in images]
    assert 4 < sum(rising) < 20  # some mirrored
    other = Folder(tmp_path, 32, views=Views(count=24, crop="random", zoom=1.5, flip=True))
    assert any(not np.array_equal(other[i].image, images[i]) for i in range(24))
    assert other.digest != folder.digest


def test_the_digest_follows_what_the_examples_are(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png")
    first = Folder(tmp_path, 16)
    os.utime(path, (1, 1))
    assert Folder(tmp_path, 16).digest == first.digest  # the same content
    copied = pickle.loads(pickle.dumps(first))  # noqa: S301
    assert copied.digest == first.digest
    assert copied[0].image.shape == (16, 16, 3)
    seen = {first.digest, Folder(tmp_path, 24).digest, Folder(tmp_path, 16, "x").digest}
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    seen.add(Folder(tmp_path, 16).digest)
    path.rename(tmp_path / "b.png")
    seen.add(Folder(tmp_path, 16).digest)
    assert len(seen) == 5


def test_large_folders_are_known_by_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a.png")
    monkeypatch.setattr("diffedit.training.data._HASHED", 10)
    first = Folder(tmp_path, 16).digest
    assert Folder(tmp_path, 16).digest == first
    os.utime(path, (1, 1))
    assert Folder(tmp_path, 16).digest != first


def test_corrupt_pictures_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        put(tmp_path / f"p{number}.png")
    corrupt(tmp_path / "p2b.png")
    (tmp_path / "p9.jpg").write_bytes(b"")
    put(tmp_path / "p8.png", gradient(200, 4))
    folder = Folder(tmp_path, 16, views=Views(count=2, crop="random"))
    with pytest.raises(ImageError, match=r"^p9\.jpg \(empty"):
        folder[6]
    with caplog.at_level(logging.WARNING):
        sound = check(folder)
    assert "skipped 3 of 7 pictures: p2b.png (truncated or damaged" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert [why.split(" ")[0] for why in sound.skipped] == ["p2b.png", "p8.png", "p9.jpg"]
    assert [e.name for e in sound] == [f"p{n}.png" for n in range(4)] * 2
    copied = pickle.loads(pickle.dumps(sound))  # noqa: S301
    assert copied.digest == sound.digest != folder.digest
    for number in range(4):
        (tmp_path / f"p{number}.png").unlink()
    with pytest.raises(InputError, match="none of its pictures can be read, such as p2b"):
        check(Folder(tmp_path, 16))


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        ([], {}, "holds no pictures, should hold"),
        (["x.heic"], {}, "holds no pictures but 1 other files such as x.heic"),
        (["0001.png", "fox.png"], {}, "1 of 2 pictures have no words in their names, such as 0001"),
        (["a.png"], {"caption": ".txt"}, "1 of 1 pictures have no .txt with a caption"),
        (["a.png"], {"side": 4}, "should be at least 8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_at_once(
    tmp_path: Path, names: list[str], options: dict[str, Any], says: str
) -> None:
    for name in names:
        put(tmp_path / name, format="PNG")
    with pytest.raises(InputError, match=says) as error:
        Folder(tmp_path, **{"side": 16, **options})
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none() -> None:
    with pytest.raises(InputError, match="does not exist, should be a folder"):
        Folder("nowhere", 16)
    with pytest.raises(InputError, match="is a file"):
        Folder(__file__, 16)
    for wrong in ({"count": 0}, {"crop": "left"}, {"zoom": 2.0}, {"zoom": 0.5, "crop": "random"}):
        with pytest.raises(InputError, match="should be"):
            Views(**wrong)


def test_rows_with_captions_and_hints(tmp_path: Path) -> None:
    put(tmp_path / "p" / "a.png")
    put(tmp_path / "hint.png", gradient(96, 64)[..., ::-1])
    row = {"image": "p/a.png", "caption": "A", "hint": "hint.png", "more": 1}
    other = {"file_name": "p/a.png", "text": "B", "hint": "hint.png", "caption": None}
    file = rows(tmp_path / "data.jsonl", row, "", other)
    views = Views(count=3, crop="random", flip=True)
    data = Captioned(file, 32, views=views)
    assert [e.caption for e in data] == ["A", "B"] * 3
    for example in data:
        assert example.hint is not None
        # The same window of both: the hint is the picture with red and blue exchanged.
        assert np.abs(example.hint[..., 2].astype(int) - example.image[..., 0]).max() < 16
    put(tmp_path / "hint.png", gradient(64, 64))
    with pytest.raises(ImageError, match=r"a\.png \(sides of 48x32, of its hint 64x64"):
        Captioned(file, 32)[0]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "holds no rows"),
        ([{"image": "a.png", "text": "A"}, "{'x'}"], "line 2: not JSON"),
        (["", {"image": "a.png"}], "line 2: lacks 'caption', has 'image'"),
        ([{"text": "A"}], "line 1: lacks 'image'"),
        ([{"image": 3, "text": "A"}], "line 1: 'image' should be text, is 3"),
        (["[1]"], "line 1: should be an object"),
        ([{"image": "b.png", "text": "A"}], "line 1: .*b.png does not exist"),
        (
            [
                {"image": "a.png", "text": "A", "hint": "a.png"},
                {"image": "a.png", "text": "A"},
            ],
            "1 of 2 rows lack a 'hint'",
        ),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, lines: list[Any], says: str) -> None:
    put(tmp_path / "a.png")
    with pytest.raises(InputError, match=says) as error:
        Captioned(rows(tmp_path / "data.jsonl", *lines), 16)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        Captioned(tmp_path / "none.jsonl", 16)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"should be \.jsonl or .parquet"):
        Captioned(tmp_path / "a.csv", 16)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        Captioned(tmp_path / "a.jsonl", 16)


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    put(tmp_path / "a.png")
    table = arrow.table({"image": ["a.png", "a.png"], "text": ["A", "B"]})
    parquet.write_table(table, tmp_path / "data.parquet")
    assert [e.caption for e in Captioned(tmp_path / "data.parquet", 16)] == ["A", "B"]
    parquet.write_table(arrow.table({"image": ["b.png"], "text": ["A"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"row 1: .*b\.png does not exist"):
        Captioned(tmp_path / "b.parquet", 16)
    (tmp_path / "c.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="is not a parquet file"):
        Captioned(tmp_path / "c.parquet", 16)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> Any:
        raise ImportError(name)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(InputError, match=r"needs pyarrow, install it with .*diffedit\[train\]"):
        Captioned(tmp_path / "a.parquet", 16)


def test_split_is_deterministic_disjoint_and_by_picture(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / f"p {number}.png")
    source: Source = Folder(tmp_path, 16, views=Views(count=2, crop="random"))
    train, held = split(source, 3, seed=5)
    again, _ = split(source, 3, seed=5)
    other, _ = split(source, 3, seed=6)
    names, held_names = [e.name for e in train], [e.name for e in held]
    assert len(held_names) == 3
    assert names[:9] == names[9:]
    assert not set(names) & set(held_names)
    assert len(set(names + held_names)) == 12
    assert again.digest == train.digest
    assert len({other.digest, train.digest, held.digest, source.digest}) == 4
    inner, _ = split(train, 2)
    assert [e.name for e in inner][:7] == [e.name for e in inner][7:]
    with pytest.raises(InputError, match="cannot hold out 12 of 12"):
        split(source, 12)
