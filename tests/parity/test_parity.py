"""Law 4: in compat mode the latents equal those of diffusers' own pipelines, max|d| = 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffedit_img2img import Img2Img
from tests.families import FAMILIES, Tiny
from tests.parity import table
from tests.parity.comparisons import Case, Row, photograph, rows

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize("row", rows(), ids=str)
def test_latents_are_those_of_diffusers(row: Row) -> None:
    ours, theirs = row.latents()
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(theirs).all()
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max().item() == 0.0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_comparison_can_fail(family: Tiny) -> None:
    case = Case(family, None)
    if "img2img" in family.theirs:
        ours = case.ours(Img2Img(strength=0.7), image=photograph())
        theirs = case.theirs("img2img", image=photograph(), strength=0.5)
    else:
        ours, theirs = case.ours(guidance=2.0), case.theirs("text2img")
    assert (ours - theirs).abs().max() > 0.01


def test_the_page_is_of_these_rows() -> None:
    """Written by `tests.parity.table`; where the rows have changed since, it has to be again."""
    outside = {
        (family.name, some): 0 if "inpaint" in some else None
        for family in FAMILIES
        for some in table.SETS
    }
    assert PAGE.read_text("utf-8") == table.page(dict.fromkeys(rows(), 0.0), outside)
