"""New pixels take on the tone of what is around them, and nothing else of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffedit import Editor, Pass
from diffedit.tone import matched
from diffedit_inpaint import Inpaint


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
    assert change.abs().max() < 0.01  # a plain membrane would take 0.3 and more off


def test_nothing_known_or_nothing_new_leaves_it_alone() -> None:
    old = ground()
    new = shifted(old)
    assert matched(new, old, torch.ones(1, 1, 96, 96)) is new
    assert matched(new, old, torch.zeros(1, 1, 96, 96)) is new


def test_a_picture_that_is_nothing_alike_says_nothing() -> None:
    new = shifted(ground())
    black = torch.zeros_like(new)
    assert (matched(new, black, hole()) - new).abs().max() < 0.02


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


def test_even_ground_shows_no_patch() -> None:
    """The embedded model's autoencoder makes this pink a few levels lighter."""
    pink = np.full((256, 256, 3), (255, 140, 190), np.uint8)
    mask = np.zeros((256, 256), np.uint8)
    mask[96:160, 96:160] = 255
    asked = Pass(prompt="a pink background", steps=8, edits=(Inpaint(mask=mask),))
    made = Editor.load().run(pink, asked, seed=1).pixels.astype(float)
    patch = made[112:144, 112:144].mean(axis=(0, 1)) - pink[0, 0]
    assert np.abs(patch).max() < 4
