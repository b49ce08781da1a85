"""New pixels take on the tone of what is around them, and nothing else of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from diffedit import Editor, Pass, tone
from diffedit.box import Box
from diffedit.canvas import Canvas, Frame
from diffedit.images import Picture
from diffedit.tone import matched
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from tests.families import SD
from tests.laws.tools import Custom


def ground(side: int = 96) -> Tensor:
    """A slope of colours: (1, 3, side, side)."""
    along = torch.linspace(0.3, 0.7, side).expand(side, side)
    return torch.stack([along, along.T, 1 - along])[None].contiguous()


def hole(side: int = 96, low: int = 32, high: int = 64) -> Tensor:
    part = torch.zeros(1, 1, side, side)
    part[..., low:high, low:high] = 1
    return part


def shifted(picture: Tensor) -> Tensor:
    """What an autoencoder may make of it: paler, a little redder towards the right."""
    red = torch.linspace(0, 0.04, picture.shape[-1])
    return 0.96 * picture + 0.03 + red * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)


def test_a_shift_of_colours_is_taken_out_within_the_mask() -> None:
    old, part = ground(), hole()
    new = shifted(old)
    inside = part.expand_as(old) > 0
    assert (new - old)[inside].abs().max() > 0.03
    assert (matched(new, old, part) - old)[inside].abs().max() < 0.003


def test_what_is_new_keeps_its_difference() -> None:
    old, part = ground(), hole()
    new = shifted(old)
    new[..., 40:56, 40:56] += torch.tensor([0.2, -0.2, 0.1]).view(1, 3, 1, 1)
    more = (matched(new, old, part) - matched(shifted(old), old, part))[..., 40:56, 40:56]
    assert more[0, :, 8, 8].tolist() == pytest.approx([0.2, -0.2, 0.1], abs=1e-6)


def test_a_thing_that_reaches_over_the_edge_is_no_tone() -> None:
    old, part = ground(), hole()
    new = old.clone()
    new[..., 20:60, 40:56] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    change = (matched(new, old, part) - new)[..., 32:64, 32:64]
    assert change.abs().max() < 0.02  # a plain membrane would take 0.3 and more off


def test_nothing_known_or_nothing_new_leaves_it_alone() -> None:
    old = ground()
    new = shifted(old)
    assert matched(new, old, torch.ones(1, 1, 96, 96)) is new
    assert matched(new, old, torch.zeros(1, 1, 96, 96)) is new


@pytest.mark.parametrize("side", [96, 512])
def test_a_picture_that_is_nothing_alike_says_nothing(side: int) -> None:
    new = shifted(ground(side))
    black = torch.zeros_like(new)
    assert torch.equal(matched(new, black, hole(side, side // 3, 2 * side // 3)), new)


@pytest.mark.parametrize("every", [4, 8])
@pytest.mark.parametrize("blur", [0.6, 1.0, 1.5])
def test_texture_that_was_lost_is_no_tone(every: int, blur: float) -> None:
    """Fine dark lines come back blurred: no lighter and no darker on the whole."""
    lines = np.full((96, 96), 0.8)
    lines[:, ::every] = 0.2
    soft = gaussian_filter1d(lines, blur, axis=1, mode="wrap")
    old, new = (
        torch.from_numpy(one).float().expand(1, 3, 96, 96).contiguous() for one in (lines, soft)
    )
    assert (matched(new, old, hole()) - new).abs().max() < 1 / 255


def test_white_and_black_stay_what_they_are() -> None:
    old, made = torch.ones(1, 3, 96, 96), hole()
    new = old - 0.03
    new[..., 40:56, 40:56] = 1
    assert matched(new, old, made).max() <= 1
    assert matched(1 - new, 1 - old, made).min() >= 0


def test_where_a_mask_is_grey_the_picture_is_to_change() -> None:
    old, part = ground(), hole()
    part[..., :32, :] = 0.5
    new = old.clone()
    new[..., :32, :] += 0.02  # asked for
    assert torch.equal(matched(new, old, part), new)


def test_every_picture_of_a_batch_has_its_own() -> None:
    old, part = ground(), hole()
    new = torch.cat([shifted(old), old + 0.03])
    both = matched(new, old, part)
    for item in range(2):
        alone = matched(new[item : item + 1], old, part)
        assert torch.allclose(both[item : item + 1], alone, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 9), (33, 70), (1, 40)])
def test_any_size(size: tuple[int, int]) -> None:
    old = torch.full((1, 3, *size), 0.5)
    part = torch.zeros(1, 1, *size)
    part[..., size[1] // 2 :] = 1
    assert torch.allclose(matched(old - 0.02, old, part), old, atol=0.015)


def patch_on_even_ground() -> float:
    """How far a new piece of a pink ground is from the rest, in levels."""
    pink = np.full((256, 256, 3), (255, 140, 190), np.uint8)
    mask = np.zeros((256, 256), np.uint8)
    mask[96:160, 96:160] = 255
    asked = Pass(prompt="a pink background", steps=8, edits=(Inpaint(mask=mask),))
    made = Editor.load().run(pink, asked, seed=1).pixels.astype(float)
    return float(np.abs(made[112:144, 112:144].mean(axis=(0, 1)) - pink[0, 0]).max())


def test_even_ground_shows_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = patch_on_even_ground()
    monkeypatch.setattr(tone, "matched", lambda new, old, made: new)
    without = patch_on_even_ground()
    assert with_it < 4
    assert without > with_it + 2


def test_what_was_made_beside_the_mask_is_no_tone() -> None:
    """A cell that the mask's edge goes through is made as a whole: not all of it is pasted."""
    source = Picture(np.full((128, 128, 3), 128, np.uint8))
    canvas = Canvas.open(source, Frame(Box(0, 0, 128, 128), (128, 128), (128, 128)))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 36:92, 36:92] = 1
    new = canvas.pixels.clone()
    new[..., 32:96, 32:96] += 0.05  # asked for, in all cells that the mask touches
    assert torch.equal(canvas.toned(new, mask, mask, 8), new)
    half = Canvas.open(source, Frame(Box(0, 0, 128, 128), (64, 64), (64, 64)))
    new = canvas.pixels.clone()
    new[..., 32:96, 32:96] += 0.05  # scaled down, a cell is 16 pixels wide
    assert torch.equal(half.toned(new, mask, mask, 8), new)
    assert not torch.equal(canvas.toned(new - 0.02, mask, mask, 8), new - 0.02)


def test_a_pass_without_a_mask_keeps_its_colours() -> None:
    """Nothing was held there: all of it is new, whatever of it is shown."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    alpha = torch.zeros(1, 1, 64, 64)
    alpha[..., 16:48, 16:48] = 1
    seen: list[Tensor] = []

    def watched(pixels: Tensor) -> Tensor:
        seen.append(pixels.clone())
        return pixels

    window = Custom(parts={"alpha": alpha, "finish": watched})
    editor = SD.editor()
    edits = (Img2Img(strength=0.5), window)
    editor.run(grey, Pass(prompt="a", steps=2, edits=edits), seed=0)
    made = editor.run(grey, Pass(prompt="a", steps=2, edits=edits[:1]), seed=0)
    assert np.array_equal((seen[0][0].permute(1, 2, 0) * 255).round().numpy(), made.pixels)


@pytest.mark.parametrize(("stop", "compat"), [(1.0, False), (0.5, False), (1.0, True)])
def test_only_what_is_finished_and_ours(
    stop: float, compat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture with noise in it has no tone yet, and in compat mode pixels are diffusers'."""
    asked: list[Tensor] = []

    def watched(new: Tensor, old: Tensor, made: Tensor) -> Tensor:
        asked.append(made)
        return new

    monkeypatch.setattr(tone, "matched", watched)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    pass_ = Pass(prompt="a", steps=2, stop=stop, edits=(Inpaint(mask=mask),))
    SD.editor().run(np.full((64, 64, 3), 128, np.uint8), pass_, seed=0, compat=compat)
    assert len(asked) == (stop == 1 and not compat)
