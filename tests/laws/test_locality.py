"""Law 1: outside mask and feather every value is the source's own, after any chain of edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffedit import Editor, Pass
from diffedit.errors import DiffeditError
from diffedit.images import open_picture
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint, feathered
from diffedit_style import Style
from tests.laws.photographs import (
    MODES,
    SIZES,
    Pixels,
    alpha,
    changed,
    colours,
    distance,
    mask,
    photograph,
)
from tests.laws.tools import CHOSEN, per_family


@per_family
def editor(**options: Any) -> Editor:
    made = CHOSEN.family.editor(**options)
    made._resources["control:net:"] = CHOSEN.family.control_net(made.model.pipe)  # type: ignore[attr-defined]
    return made


def edited(image: Pixels, *edits: Any, steps: int = 2, **options: Any) -> Pixels:
    what = Pass(prompt="a red circle", steps=steps, edits=CHOSEN.family.carried(edits))
    return editor(**options).run(image, what, seed=3).pixels


def box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return width // 4, height // 3, width // 4 + width // 5 + 1, height // 3 + height // 6 + 1


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "greya8"])
@pytest.mark.parametrize("feather", [0, 3])
def test_only_the_mask_and_its_feather_change(
    mode: str, size: tuple[int, int], feather: int
) -> None:
    image, white = photograph(mode, size), mask(size, box(size))
    made = edited(image, Inpaint(mask=white, feather=feather))
    where = changed(image, made)
    assert not where[distance(white) > feather].any()
    assert where[white > 0].mean() > 0.5
    assert (alpha(made) == alpha(image)).all()


@pytest.mark.parametrize("which", ["astronaut", "coffee", "rocket"])
def test_other_photographs(which: str) -> None:
    image = photograph("rgb8", (211, 187), which)
    white = mask((211, 187), (30, 40, 90, 100))
    where = changed(image, edited(image, Inpaint(mask=white, feather=0)))
    assert not where[white == 0].any()
    assert where[white > 0].mean() > 0.9


@pytest.mark.parametrize("feather", [0, 1, 2, 8, 17])
def test_feather_reaches_no_further_than_it_says_and_as_far(feather: int) -> None:
    size = (140, 130)
    image, white = photograph("rgb16", size), mask(size, (60, 50, 80, 75))
    where = changed(image, edited(image, Inpaint(mask=white, feather=feather)))
    away = distance(white)
    assert not where[away > feather].any()
    if feather:
        assert where[(away > feather - 1) & (away <= feather)].any()


@pytest.mark.parametrize("mode", ["rgb8", "rgba8", "rgb16", "grey16"])
def test_a_chain_of_passes_changes_only_the_union(mode: str) -> None:
    size = (190, 150)
    image = photograph(mode, size)
    whites = [
        mask(size, (10, 10, 40, 40)),
        mask(size, (30, 30, 70, 60)),
        mask(size, (150, 120, 190, 150)),
    ]
    passes = [
        Pass(prompt=f"a circle {n}", steps=2, edits=[Inpaint(mask=white, feather=2)])
        for n, white in enumerate(whites)
    ]
    made = editor().run(image, passes, seed=3).pixels
    where = changed(image, made)
    assert not where[np.min([distance(white) for white in whites], axis=0) > 2].any()
    assert all(where[white > 0].mean() > 0.5 for white in whites)
    assert (alpha(made) == alpha(image)).all()


def test_runs_one_after_another_change_only_the_union() -> None:
    size = (120, 96)
    first, second = mask(size, (10, 10, 40, 40)), mask(size, (60, 50, 100, 80))
    image = photograph("rgb16", size)
    once = edited(image, Inpaint(mask=first, feather=4))
    twice = edited(once, Inpaint(mask=second, feather=0))
    assert not changed(once, twice)[second == 0].any()
    assert not changed(image, twice)[(distance(first) > 4) & (second == 0)].any()


@pytest.mark.parametrize("model", ["plain", "inpainting"])
@pytest.mark.parametrize("mode", ["rgba8", "grey8", "rgb16"])
def test_with_every_other_edit_in_the_same_pass(mode: str, model: str) -> None:
    size = (150, 117)
    image, white = photograph(mode, size), mask(size, (40, 30, 77, 61))
    made = edited(
        image,
        Inpaint(mask=white, feather=5),
        Img2Img(strength=0.7),
        ControlNet(model="net", kind="canny", weight=0.5),
        Style(image=photograph("rgb8", (64, 64), "coffee")),
        steps=3,
        **CHOSEN.family.options(model),
    )
    where = changed(image, made)
    assert not where[distance(white) > 5].any()
    assert where[white > 0].mean() > 0.5
    assert (alpha(made) == alpha(image)).all()


@pytest.mark.parametrize(
    "where",
    [(0, 0, 9, 9), (111, 87, 120, 96), (0, 40, 3, 60), (50, 95, 70, 96), (119, 0, 120, 96)],
    ids=["corner", "far corner", "left", "bottom row", "right column"],
)
def test_masks_at_the_border(where: tuple[int, int, int, int]) -> None:
    size = (120, 96)
    image, white = photograph("rgb16", size), mask(size, where)
    different = changed(image, edited(image, Inpaint(mask=white, feather=2)))
    assert not different[distance(white) > 2].any()
    assert different[white > 0].mean() > 0.9


def test_a_full_mask_changes_everything_and_no_alpha() -> None:
    size = (120, 96)
    image = photograph("rgba16", size)
    made = edited(image, Inpaint(mask=np.full((96, 120), 255, np.uint8)))
    assert changed(colours(image), colours(made)).mean() > 0.99
    assert (alpha(made) == alpha(image)).all()


@pytest.mark.parametrize("size", [(511, 387), (120, 96), (40, 30)], ids=str)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("thick", [1, 3])
def test_thin_strokes_change(thick: int, size: tuple[int, int], across: bool) -> None:
    """Also where the region is scaled down for the model."""
    width, height = size
    at = (0, height // 2, width, height // 2 + thick)
    at = at if across else (width // 3, 2, width // 3 + thick, height - 3)
    image, white = photograph("rgb8", size), mask(size, at)
    where = changed(image, edited(image, Inpaint(mask=white, feather=0)))
    assert not where[white == 0].any()
    assert where[white > 0].mean() > 0.9


def test_a_single_pixel_changes() -> None:
    image, white = photograph("rgb16"), mask((120, 96), (60, 40, 61, 41))
    where = changed(image, edited(image, Inpaint(mask=white, feather=0)))
    assert where.sum() == 1
    assert where[40, 60]


def test_two_masks_in_one_pass_change_both_places_and_nothing_else() -> None:
    size = (200, 150)
    image = photograph("rgb16", size)
    first, second = mask(size, (5, 5, 30, 40)), mask(size, (150, 100, 180, 140))
    where = changed(
        image, edited(image, Inpaint(mask=first, feather=0), Inpaint(mask=second, feather=3))
    )
    assert where[first > 0].mean() > 0.9
    assert where[second > 0].mean() > 0.9
    assert not where[(first == 0) & (distance(second) > 3)].any()


def test_a_soft_mask_is_the_alpha_of_the_paste_back() -> None:
    size = (120, 96)
    image = photograph("rgb16", size)
    soft = mask(size, (20, 20, 60, 70), value=64)
    hard = mask(size, (20, 20, 60, 70))
    some, all_of_it = (
        edited(image, Inpaint(mask=one, feather=0)).astype(int) - image for one in (soft, hard)
    )
    assert not some[soft == 0].any()
    assert some.any()
    assert np.abs(some).mean() < 0.6 * np.abs(all_of_it).mean()


def test_inpainting_models_hold_the_law_too() -> None:
    size = (77, 501)
    image, white = photograph("greya8", size), mask(size, (20, 200, 50, 240))
    made = edited(image, Inpaint(mask=white, feather=6), **CHOSEN.family.options("inpainting"))
    where = changed(image, made)
    assert not where[distance(white) > 6].any()
    assert where[white > 0].mean() > 0.5


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, "out.png") for mode in MODES] + [("rgb16", "out.tif"), ("grey16", "out.tiff")],
)
def test_saved_and_opened_again_it_still_holds(mode: str, name: str, tmp_path: Path) -> None:
    size = (120, 96)
    image, white = photograph(mode, size), mask(size, (20, 20, 60, 70))
    what = Pass(prompt="a red circle", steps=2, edits=[Inpaint(mask=white, feather=2)])
    result = editor().run(image, what)
    (file,) = result.save(tmp_path / name)
    again = open_picture(file).pixels
    assert (again == result.pixels).all()
    assert not changed(image, again)[distance(white) > 2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", [True, False])
def test_decoded_values_that_are_not_finite_do_not_leak(
    bad: float, source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CHOSEN.family.editor().model

    def broken(latents: torch.Tensor) -> torch.Tensor:
        pixels = type(model).decode(model, latents)
        pixels[..., 5:9, 3:20] = bad
        return pixels

    monkeypatch.setattr(model, "decode", broken)
    edits = [Inpaint(mask=mask((120, 96), (20, 20, 60, 70)))] if source else []
    with pytest.raises(DiffeditError, match="not finite"):
        Editor(model).run(photograph() if source else None, Pass(prompt="x", steps=2, edits=edits))


def test_a_feather_has_the_same_bits_every_time() -> None:
    white = np.zeros((128, 160), np.float32)
    for step in range(40):  # a zigzag
        white[45 + step % 4 * 4 :, 60 + step :][:9, :3] = 1
    rng = np.random.default_rng(0)
    kept: list[Any] = []
    found = set()
    for size in rng.integers(1, 100_000, 400):  # whatever the memory was that it got
        kept = [*kept[-20:], np.empty(size)]
        found.add(feathered(white, 8).tobytes())
    assert len(found) == 1
