"""Prompts for regions: inside the mask guidance is that of the region's prompt, on every family."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffedit import Branch, Call, Pass
from diffedit.errors import CapabilityError, InputError, MaskError, PluginError
from diffedit.guidance import composed
from diffedit.testing import make_run
from diffedit_controlnet import ControlNet
from diffedit_guidance import AdaptiveProjected, Interval, PerpNeg, PerturbedAttention
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_invert import Invert
from diffedit_region import Region, softened
from diffedit_style import Style
from tests.families import FAMILIES, FLUX, SD, SDXL, Tiny
from tests.laws.photographs import changed, mask, photograph
from tests.laws.tools import CHOSEN, Custom, Watched

SIZE = (96, 64)
WHITE = np.full((64, 96), 255, np.uint8)
#: White, grey and black, each as wide as the largest cell and token that a family has.
BANDS = mask(SIZE, (0, 0, 32, 64)) + mask(SIZE, (32, 0, 64, 64), value=51)
OURS, THEIRS = "a wide green field", "one small red house"
every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@functools.cache
def editor(family: Tiny) -> Any:
    made: Any = family.editor()
    made._resources["control:net:"] = family.control_net(made.model.pipe)
    return made


def run(family: Tiny, prompt: str, *edits: Any, guidance: float = 4.0, **more: Any) -> Any:
    """A pass of two steps; guidance is the classifier-free kind on every family."""
    options: dict[str, Any] = {"negative": "blurry", "steps": 2, "guidance": guidance}
    if family is FLUX:
        options["true_guidance"] = guidance
    image = more.pop("image", None)
    seed = more.pop("seed", 1)
    size = SIZE if image is None else None
    what = Pass(**(options | {"prompt": prompt, "edits": edits} | more))
    return editor(family).run(image, what, seed=seed, size=size)


def first(family: Tiny, prompt: str, *edits: Any, at: int = 0, **more: Any) -> Tensor:
    """What guidance makes of the first call, as clean latents: of equal noise, so linear in it."""
    seen: list[Tensor] = []

    def refine(x0: Tensor, call: Call) -> Tensor:
        seen.append(x0.clone())
        return x0

    run(family, prompt, *edits, Custom(parts={"refine": refine}), **more)
    return seen[at]


def grid(values: Any, family: Tiny) -> Tensor:
    """A mask over the cells of the latents."""
    cell = editor(family).model.cell
    return F.avg_pool2d(torch.tensor(values / 255)[None, None].float(), cell)


# --- inside, outside, between ---------------------------------------------------------------------


@every
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_region_is_guided_by_its_own_prompt_and_the_rest_as_without_it(
    family: Tiny, guidance: float
) -> None:
    ours = first(family, OURS, guidance=guidance)
    theirs = first(family, THEIRS, guidance=guidance)
    region = Region(prompt=THEIRS, mask=BANDS, feather=0)
    both = first(family, OURS, region, guidance=guidance)
    weight = grid(BANDS, family).expand_as(both)
    assert weight.unique().tolist() == pytest.approx([0, 0.2, 1])
    scale = (ours - theirs).abs().max()
    assert scale > 0.01
    # A batch of one more is summed otherwise, which moves last bits.
    near = 1e-4 * scale
    assert (both - ours)[weight == 0].abs().max() < near
    assert (both - theirs)[weight == 1].abs().max() < near
    between = (weight > 0) & (weight < 1)
    if family.name != "qwen-image":  # whose guidance turns, so that halfway is not half of each
        mixed = torch.lerp(ours, theirs, weight.to(ours))
        assert (both - mixed)[between].abs().max() < near


@every
def test_white_everywhere_is_another_prompt(family: Tiny) -> None:
    expected = run(family, THEIRS).latents
    made = run(family, OURS, Region(prompt=THEIRS, mask=WHITE)).latents
    assert (made - expected).abs().max() < 1e-4
    assert (made - run(family, OURS).latents).abs().max() > 0.01


@every
def test_a_region_has_a_negative_prompt_of_its_own(family: Tiny) -> None:
    region = Region(prompt=THEIRS, mask=WHITE, negative="a tree")
    expected = run(family, THEIRS, negative="a tree").latents
    assert (run(family, OURS, region).latents - expected).abs().max() < 1e-4
    assert (run(family, THEIRS).latents - expected).abs().max() > 0.001
    # Where there is no guidance, there is nothing to lead away from.
    region = Region(prompt=THEIRS, mask=WHITE, negative="a tree")
    made = first(family, OURS, region, guidance=1.0)
    assert (made - first(family, THEIRS, guidance=1.0)).abs().max() < 1e-4


def test_the_arithmetic_keeps_bits_where_one_prediction_stands_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    whole, one, other = torch.randn(3, 2, 4, 8, 8, generator=draw)
    left, right = torch.zeros(2, 1, 1, 8, 8)
    left[..., :3], right[..., 2:6] = 1, 0.5
    made = composed(whole, [(left, one), (right, other)])
    assert torch.equal(made[..., 6:], whole[..., 6:])
    assert torch.equal(made[..., :2], one[..., :2])
    # 1 and 0.5 share what they both want, in proportion.
    assert torch.allclose(made[..., 2], (one + 0.5 * other)[..., 2] / 1.5)
    assert torch.allclose(made[..., 3:6], (0.5 * (whole + other))[..., 3:6])
    assert torch.equal(made, composed(whole, [(left, one), (right, other)]))


def test_regions_share_where_they_overlap() -> None:
    both = [Region(prompt=text, mask=WHITE) for text in (THEIRS, "a boat")]
    made = first(SD, OURS, *both)
    expected = (first(SD, THEIRS) + first(SD, "a boat")) / 2
    assert (made - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", [Interval, PerpNeg, AdaptiveProjected])
def test_other_ways_to_guide_guide_a_region_too(kind: Any) -> None:
    """They are given what is composed, so that they need know nothing of regions."""
    region = Region(prompt=THEIRS, mask=WHITE)
    made = run(SD, OURS, kind(), region, rescale=0.5, steps=4).latents
    expected = run(SD, THEIRS, kind(), rescale=0.5, steps=4).latents
    assert (made - expected).abs().max() < 1e-4
    assert (made - run(SD, THEIRS, rescale=0.5, steps=4).latents).abs().max() > 1e-3


def test_terms_are_of_the_pass_and_not_of_the_region() -> None:
    """What perturbed attention adds is what it adds without the region."""
    region = Region(prompt=THEIRS, mask=WHITE)
    added = first(SD, OURS, PerturbedAttention()) - first(SD, OURS)
    found = first(SD, OURS, PerturbedAttention(), region) - first(SD, OURS, region)
    assert added.abs().max() > 1e-3
    assert (found - added).abs().max() < 1e-4


def test_in_some_of_the_steps() -> None:
    late = Region(prompt=THEIRS, mask=WHITE, start=0.5)
    assert (first(SD, OURS, late) - first(SD, OURS)).abs().max() < 1e-5
    assert (first(SD, OURS, late, at=1) - first(SD, OURS, at=1)).abs().max() > 1e-3


# --- laws -----------------------------------------------------------------------------------------


def several() -> list[Region]:
    return [
        Region(prompt="a cup", mask=mask(SIZE, (0, 0, 40, 64)), weight=0.8),
        Region(prompt="a plate", mask=mask(SIZE, (24, 0, 64, 30)), negative="a fork"),
        Region(prompt="a table", mask=mask(SIZE, (24, 24, 64, 64)), feather=3),
    ]


@every
def test_all_at_once_and_in_any_order(family: Tiny) -> None:
    photo = photograph("rgb8", SIZE)
    hole = mask(SIZE, (8, 8, 56, 40))
    others = family.carried(
        [
            Inpaint(mask=hole, feather=0),
            Img2Img(strength=0.9),
            ControlNet(model="net", kind="none", image=photo, weight=0.5),
            Style(image=photograph("rgb8", SIZE, "coffee")),
        ]
    )
    edits = [*others, *several()]
    made = run(family, OURS, *edits, image=photo, seed=[1, 2])
    again = run(family, OURS, *reversed(edits), image=photo, seed=[1, 2])
    assert torch.equal(made.latents, again.latents)
    for picture in made.pictures:
        assert not changed(photo, picture.pixels)[hole == 0].any()
        assert changed(photo, picture.pixels)[hole > 0].mean() > 0.5
    without = run(family, OURS, *others, image=photo, seed=[1, 2])
    assert not torch.equal(made.latents, without.latents)


@every
def test_after_an_inversion(family: Tiny) -> None:
    photo = photograph("rgb8", SIZE)
    made = run(family, OURS, Invert(), *several(), image=photo)
    assert torch.isfinite(made.latents).all()
    assert not torch.equal(made.latents, run(family, OURS, Invert(), image=photo).latents)


def test_what_says_nothing_changes_no_bit() -> None:
    photo, hole = photograph("rgb8", (256, 64)), mask((256, 64), (200, 8, 240, 40))
    usual = run(SD, OURS, Inpaint(mask=hole), image=photo).latents
    for nothing in (
        Region(prompt=THEIRS, mask=hole, weight=0),
        Region(prompt=THEIRS, mask=mask((256, 64), (0, 0, 30, 64))),  # beyond what is worked on
    ):
        assert torch.equal(run(SD, OURS, Inpaint(mask=hole), nothing, image=photo).latents, usual)
    acting = Region(prompt=THEIRS, mask=mask((256, 64), (190, 0, 220, 64)))
    assert not torch.equal(run(SD, OURS, Inpaint(mask=hole), acting, image=photo).latents, usual)


def test_a_region_shifts_nobodys_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOSEN, "family", SD)
    watched = Watched()
    for edits in ([], several()):
        watched.editor.run(None, Pass(prompt="a", steps=1, edits=edits), seed=3, size=SIZE)
    plain, with_regions = watched.rows(0), watched.rows(1)
    assert torch.equal(plain, with_regions)


@pytest.mark.parametrize("leave", ["done", "cancelled", "failed"])
def test_nothing_is_left_behind(leave: str) -> None:
    expected = SD.editor().run(None, Pass(prompt="a", steps=3), seed=3, size=SIZE).latents
    one = SD.editor()

    def boom(x0: Tensor, call: Call) -> Tensor:
        if call.index == 1 and leave == "failed":
            raise RuntimeError("boom")
        return x0

    what = Pass(prompt="b", steps=3, edits=[*several(), Custom(parts={"refine": boom})])
    with one.stream(None, what, seed=3, size=SIZE) as events:
        if leave == "failed":
            with pytest.raises(PluginError, match="boom"):
                list(events)
        elif leave == "cancelled":
            next(events)
        else:
            list(events)
    after = one.run(None, Pass(prompt="a", steps=3), seed=3, size=SIZE).latents
    assert expected is not None
    assert after is not None
    assert torch.equal(after, expected)


# --- where ----------------------------------------------------------------------------------------


def test_it_is_read_for_the_size_that_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SDXL.editor()
    sizes: dict[str, Any] = {}
    model: Any = one.model
    embed = model.embed

    def noted(texts: Any, size: Any, **more: Any) -> Any:
        sizes[texts[0]] = size
        return embed(texts, size, **more)

    monkeypatch.setattr(model, "embed", noted)
    hole = mask((256, 64), (200, 8, 240, 40))
    edits = [Inpaint(mask=hole), Region(prompt=THEIRS, mask=hole)]
    one.run(photograph("rgb8", (256, 64)), Pass(prompt=OURS, steps=1, edits=edits))
    assert sizes[OURS] == sizes[THEIRS] != (256, 64)


def test_the_map_is_the_masks_share_of_each_cell() -> None:
    run_ = make_run(photograph("rgb8", SIZE))
    branches = Region(prompt="a", mask=BANDS, feather=0, weight=0.5).contribute(run_).branches
    (branch,) = branches
    assert branch.within is not None
    assert torch.equal(branch.within, 0.5 * grid(BANDS, SD))
    assert branch.within.unique().tolist() == pytest.approx([0, 0.1, 0.5])


@pytest.mark.parametrize("reach", [0, 1, 2, 7, 16])
def test_a_soft_edge(reach: int) -> None:
    values = torch.zeros(1, 1, 60, 60)
    values[..., 20:40, 20:40] = 1
    values[..., 50:, :9] = 0.25
    soft = softened(values, reach)
    assert bool((soft >= values).all())
    assert torch.equal(soft[values == 1], values[values == 1])
    profile = soft[0, 0, 30, 39:]  # from the last white pixel outwards
    assert bool((profile.diff() <= 0).all())
    assert bool((profile[1 : reach + 1] > 0).all())
    assert bool((profile[reach + 2 :] == 0).all())
    if not reach:
        assert torch.equal(soft, values)


# --- what is refused ------------------------------------------------------------------------------


def test_masks_must_fit_and_select() -> None:
    for white, why in ((np.full((8, 8), 255, np.uint8), "one size"), (0 * WHITE, "is empty")):
        with pytest.raises(MaskError, match=rf"^region: .*{why}"):
            run(SD, OURS, Region(prompt="a", mask=white))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_have_a_range(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Region(prompt="a", mask=WHITE, weight=weight)


def test_the_same_twice_needs_ids() -> None:
    region = several()[0]
    with pytest.raises(InputError, match="give one edit an id"):
        run(SD, OURS, region, region.model_copy())
    run(SD, OURS, region, region.model_copy(update={"id": "b"}))


@pytest.mark.parametrize(
    ("within", "why"),
    [
        (torch.ones(1, 1, 8, 9), r"within is \(1, 1, 8, 9\), not \(1, 1, 8, 12\)"),
        (torch.full((1, 1, 8, 12), 1.5), r"within must hold values in \[0, 1\]"),
        (torch.full((1, 1, 8, 12), float("nan")), r"within must hold values in \[0, 1\]"),
        (1.0, r"within is float, not a tensor"),
    ],
)
def test_maps_of_plugins_are_checked(within: Any, why: str) -> None:
    branch = Branch("b", "x", within=within)
    with pytest.raises(PluginError, match=rf"custom: a branch's {why}"):
        run(SD, OURS, Custom(parts={"branches": (branch,)}))


def test_weights_of_words_are_refused_by_name() -> None:
    other = next(one for one in FAMILIES if "prompt_weights" not in one.model.carries)
    with pytest.raises(CapabilityError, match=r"^region: "):
        run(other, OURS, Region(prompt="(a:1.3)", mask=WHITE))
