"""Regions, and the map between the full image and the working picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffedit import Box
from diffedit.canvas import ZOOM, Canvas, Frame, exact_frame, frame
from diffedit.errors import InputError
from diffedit.images import Picture
from tests.laws.photographs import mask, photograph

SIDES, GRID = (64, 128), 8
sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))


@st.composite
def asked(draw: st.DrawFn) -> tuple[tuple[int, int], list[Box]]:
    width, height = draw(sizes)
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
        boxes.append(Box(left, top, right, bottom).grown(draw(st.integers(0, 40))))
    return (width, height), boxes


@given(asked())
def test_the_frame_holds_what_is_asked_for_and_what_the_model_likes(
    case: tuple[tuple[int, int], list[Box]],
) -> None:
    (width, height), boxes = case
    made = frame((width, height), boxes, SIDES, GRID)
    whole, region = Box(0, 0, width, height), made.region
    assert whole.contains(region)
    assert all(region.contains(box.clip(whole)) for box in boxes)
    if not boxes:
        assert region == whole
    assert all(side % GRID == 0 for side in made.size)
    assert max(made.size) <= SIDES[1]
    if min(width, height) >= SIDES[0]:
        assert made.content[0] <= region.width * ZOOM
        assert made.content[1] <= region.height * ZOOM
    assert all(0 <= s - c < GRID for s, c in zip(made.size, made.content, strict=True))
    short, long = sorted(region.size)
    scale = min(max(1.0, SIDES[0] / short), SIDES[1] / long)
    assert all(abs(c - r * scale) <= 1 for c, r in zip(made.content, region.size, strict=True))
    if short >= SIDES[0] and long <= SIDES[1]:
        assert made.content == region.size  # one to one
    if min(width, height) == SIDES[0] and max(width, height) <= SIDES[1]:
        assert made.content == region.size  # the model's own size
    # As wide as the model likes, wherever the image has the pixels for it.
    if boxes and min(width, height) * SIDES[1] >= SIDES[0] * long:
        assert min(made.content) >= SIDES[0]


@pytest.mark.parametrize(
    ("image", "region"), [(64, 64), (72, 64), (80, 56), (96, 48), (97, 48), (768, 48)]
)
def test_a_small_mask_gets_a_small_region_magnified_as_the_image_is_larger(
    image: int, region: int
) -> None:
    mask = Box(image // 2, image // 2, image // 2 + 5, image // 2 + 5)
    made = frame((image, 768), [mask], SIDES, GRID)
    assert made.region.size == (region, region)
    assert made.content == made.size == (64, 64)
    assert made.region.contains(mask)


def test_a_region_of_the_smallest_side_is_not_magnified() -> None:
    made = frame((768, 768), [Box(300, 300, 364, 372)], SIDES, GRID)
    assert made.region.size == made.content == made.size == (64, 72)


def test_a_long_region_gets_as_much_beside_it_as_lets_it_fill_the_model() -> None:
    made = frame((768, 768), [Box(300, 300, 400, 320)], SIDES, GRID)
    assert made.region.size == (104, 56)
    assert made.size == (120, 64)
    assert made.content == (119, 64)


def test_a_long_thin_mask_in_a_large_photograph_gets_picture_beside_it() -> None:
    made = frame((1000, 1000), [Box(500, 100, 503, 612)], SIDES, GRID)
    assert min(made.content) >= 64


def test_compat_takes_the_whole_image_and_no_odd_sides() -> None:
    assert exact_frame((64, 96), 8) == Frame(Box(0, 0, 64, 96), (64, 96), (64, 96))
    with pytest.raises(InputError, match=r"multiples of 8.*65x96"):
        exact_frame((65, 96), 8)


def over(size: tuple[int, int], boxes: list[Box], mode: str = "rgb16") -> Canvas:
    return Canvas.open(Picture(photograph(mode, size)), frame(size, boxes, SIDES, GRID))


@pytest.mark.parametrize("mode", ["rgb8", "grey8", "rgb16", "rgba16"])
def test_there_and_back_is_exact_where_pixels_map_one_to_one(mode: str) -> None:
    canvas = over((211, 187), [Box(30, 30, 111, 108)], mode)
    region = canvas.frame.region
    assert torch.equal(canvas.to_region(canvas.pixels), canvas.region_pixels)
    white = torch.from_numpy(mask((211, 187), region) / 255).float()[None, None]
    for alpha in (None, white):
        after = canvas.pasted(canvas.to_region(canvas.pixels), alpha)
        assert torch.equal(after.composite, canvas.composite)
        assert (after.picture(0).pixels == photograph(mode, (211, 187))).all()
        assert int(after.touched.sum()) == region.width * region.height


def test_padding_repeats_the_edge() -> None:
    canvas = over((77, 70), [])
    assert canvas.size == (80, 72)
    assert torch.equal(canvas.pixels[..., :70, :77], canvas.composite)
    assert torch.equal(canvas.pixels[..., :70, 79], canvas.composite[..., 76])


@pytest.mark.parametrize("size", [(511, 387), (120, 96), (40, 30)])
@pytest.mark.parametrize("at", [(3, 5), (20, 29), (39, 0)])
def test_a_latent_cell_is_released_if_any_of_its_pixels_is_masked(
    size: tuple[int, int], at: tuple[int, int]
) -> None:
    canvas = over(size, [])
    white = torch.zeros(1, 1, size[1], size[0])
    white[..., at[1], at[0]] = 0.25
    cells = canvas.mask_to_latent(white, GRID)
    assert cells.shape[-2:] == (canvas.size[1] // GRID, canvas.size[0] // GRID)
    scale = canvas.frame.content[0] / size[0], canvas.frame.content[1] / size[1]
    held = cells[0, 0, int(at[1] * scale[1]) // GRID, int(at[0] * scale[0]) // GRID]
    assert held == 0.25
    assert 1 <= int((cells > 0).sum()) <= math.ceil(max(1, *scale)) ** 2 + 3


def test_cells_that_are_masked_in_part_are_released_late_and_thin_strokes_at_once() -> None:
    canvas = over((128, 128), [])
    white = torch.zeros(1, 1, 128, 128)
    white[..., 16:44, 16:40] = 0.8  # 3 columns and 3 1/2 rows of cells
    white[..., 67:70, 8:120] = 1  # a stroke, 3 pixels high
    cells = canvas.mask_to_latent(white, GRID)[0, 0]
    assert torch.allclose(cells[2:5, 2:5], torch.full((3, 3), 0.8))
    assert torch.allclose(cells[5, 2:5], torch.full((3,), 0.8 * 0.5**5))
    assert (cells[8, 1:15] == 1).all()
    assert int((cells > 0).sum()) == 12 + 14


def test_of_a_small_mask_no_cell_is_held_to_the_end() -> None:
    canvas = over((128, 128), [])
    white = torch.zeros(1, 1, 128, 128)
    white[..., 20:36, 20:36] = 1  # one whole cell, and halves and quarters around it
    cells = canvas.mask_to_latent(white, GRID)[0, 0]
    assert cells[3, 3] == 1
    assert torch.allclose(cells[3, 2], torch.tensor(0.5**2))
    assert torch.allclose(cells[2, 2], torch.tensor(0.25**2))
    assert int((cells > 0).sum()) == 9


@pytest.mark.parametrize("width", [16, 24, 32, 64, 100])
@pytest.mark.parametrize("start", [0, 3, 8])
def test_what_is_further_inside_a_soft_edge_is_released_no_later(width: int, start: int) -> None:
    canvas = over((128, 128), [])
    ramp = ((torch.arange(128.0) - start + 0.5) / width).clamp(0, 1)
    cells = canvas.mask_to_latent(ramp.expand(1, 1, 128, 128).contiguous(), GRID)[0, 0, 8]
    assert (cells.diff() >= 0).all()
    # Greys are how late a pixel is to change, and no share of it.
    last = canvas.mask_to_work(ramp.expand(1, 1, 128, 128).contiguous())[0, 0, 64]
    whole = last.unflatten(0, (-1, GRID)).amax(-1)
    assert torch.equal(cells[start // GRID + 1 :], whole[start // GRID + 1 :])


def test_what_an_encoder_leaves_beside_white_is_no_grey() -> None:
    canvas = over((128, 128), [])
    white = torch.zeros(1, 1, 128, 128)
    white[..., 16:76, 16:76] = 1
    clean = canvas.mask_to_latent(white, GRID)
    noisy = white.clone()
    noisy[..., 76:80, 16:80] = 0.04
    noisy[..., 16:80, 76:80] = 0.04
    assert torch.equal(canvas.mask_to_latent(noisy, GRID), clean)


def test_the_pictures_own_edge_is_no_edge_of_a_mask() -> None:
    canvas = over((77, 70), [])  # padded to 80x72
    assert (canvas.mask_to_latent(torch.ones(1, 1, 70, 77), GRID) == 1).all()


def test_nothing_of_what_is_pasted_reaches_beyond_alpha() -> None:
    canvas = over((211, 187), [Box(30, 30, 111, 108)])
    alpha = torch.zeros(1, 1, 187, 211)
    alpha[..., 40:50, 40:60] = 1
    alpha[..., 50:55, 40:60] = 0.5
    box = canvas.frame.region
    new = torch.full((2, 3, box.height, box.width), float("nan"))
    new[..., 40 - box.top : 55 - box.top, 40 - box.left : 60 - box.left] = 1.0
    after = canvas.pasted(new, alpha)
    assert torch.isfinite(after.composite).all()
    for item in (0, 1):
        before, now = photograph("rgb16", (211, 187)), after.picture(item).pixels
        assert (now[40:50, 40:60] == 65535).all()
        half = (before[50:55, 40:60].astype(float) + 65535) / 2
        assert np.abs(now[50:55, 40:60] - half).max() <= 1
        now = now.copy()
        now[40:55, 40:60] = before[40:55, 40:60]
        assert (now == before).all()


def test_a_canvas_is_not_changed_by_what_follows() -> None:
    canvas = over((120, 96), [])
    before = canvas.composite.clone()
    canvas.pasted(torch.ones(1, 3, 96, 120), None)
    assert torch.equal(canvas.composite, before)
    assert not canvas.touched.any()


def test_from_nothing_every_item_has_its_own_picture() -> None:
    canvas = Canvas.blank((70, 50), frame((70, 50), [], SIDES, GRID))
    after = canvas.pasted(torch.stack([torch.zeros(3, 50, 70), torch.ones(3, 50, 70)]), None)
    assert [int(after.picture(item).pixels.max()) for item in (0, 1)] == [0, 255]
    assert after.picture(0).size == (70, 50)
