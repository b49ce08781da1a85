"""Laws 2, 3 and 5: order and identity change no bit, and nobody shifts another's noise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from diffedit import Contribution, Edit, Pass, Result, Row
from diffedit.contribution import Pixels
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.families import SD
from tests.laws.photographs import mask, photograph
from tests.laws.tools import CHOSEN, Custom, Watched, per_family

SIZE = (64, 64)
STYLE = "style/" + Style(image=photograph("rgb8", (64, 64), "coffee")).image.digest[:16]


@per_family
def watched() -> Watched:
    return Watched()


def run(*edits: Edit, seed: Any = 3, scheduler: str | None = None, steps: int = 2) -> Result:
    seen = watched()
    seen.inputs.clear()
    scheduler = CHOSEN.family.alike(scheduler)
    edits = CHOSEN.family.carried(edits)
    what = Pass(prompt="a red circle", steps=steps, scheduler=scheduler, edits=edits)
    return seen.editor.run(photograph("rgb8", SIZE), what, seed=seed)


def five() -> list[Edit]:
    return [
        Inpaint(mask=mask(SIZE, (20, 20, 40, 50))),
        Img2Img(strength=1.0),
        ControlNet(model="net1", kind="canny", weight=0.7),
        ControlNet(model="net2", kind="none", weight=0.3, image=photograph("rgb8", SIZE, "rocket")),
        style(),
    ]


def style(**options: Any) -> Style:
    return Style(**{"image": photograph("rgb8", (64, 64), "coffee"), **options})


def order(result: Result) -> list[Any]:
    said: list[Any] = result.provenance["passes"][0]["order"]
    return said


def same(a: Result, b: Result) -> bool:
    assert a.latents is not None
    assert b.latents is not None
    return torch.equal(a.latents, b.latents) and bool((a.pixels == b.pixels).all())


def test_order_changes_no_bit_and_no_provenance() -> None:
    first = run(*five(), steps=1)
    orders = list(itertools.permutations(CHOSEN.family.carried(five())))
    # All of them on one family; on the others a share in which every pair stands both ways round.
    for edits in orders if CHOSEN.family is SD else orders[::5]:
        other = run(*edits, steps=1)
        assert same(first, other)
        assert order(first) == order(other)


def test_order_changes_no_bit_over_many_calls() -> None:
    first, last = run(*five(), steps=5), run(*reversed(five()), steps=5)
    assert same(first, last)
    assert not same(first, run(*five()[1:], steps=5))


@pytest.mark.parametrize(
    "nothing",
    [Custom(), Custom(parts={"during": (0.2, 0.4)}), style(strength=0)],
    ids=["empty", "window", "style 0"],
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_contributes_nothing_changes_no_bit(nothing: Edit, alone: bool) -> None:
    edits = [] if alone else five()[:4]
    assert same(run(*edits), run(*edits, nothing))


def test_a_control_network_of_weight_zero_changes_no_bit() -> None:
    CHOSEN.family.needs_control()
    assert same(run(), run(ControlNet(model="net1", weight=0)))


def test_an_id_changes_no_bit() -> None:
    assert same(run(style()), run(style(id="mine")))
    assert same(run(*five()), run(*(e.model_copy(update={"id": e.digest[:9]}) for e in five())))


@pytest.mark.parametrize("scheduler", [None, "euler_a", "ddpm", "dpmpp_sde"])
def test_another_edit_shifts_nobodys_noise(scheduler: str | None) -> None:
    def noise(*edits: Edit) -> tuple[Any, Any]:
        run(style(), *edits, scheduler=scheduler)
        seen = watched()
        return seen.rows(0), [seen.rows(call, STYLE) for call in range(len(seen.inputs))]

    canvas, reference = noise()
    others: list[Any] = [ControlNet(model="net1")]
    if CHOSEN.family.styled:
        others.append(style(image=photograph("rgb8", (64, 64), "rocket"), id="b", after="a"))
        others.append(Custom(parts={"rows": (Row("r", Pixels(torch.rand(1, 3, 64, 64))),)}))
    for more in others:
        mine = style(id="a") if more.after else style()
        scope = "a" + STYLE.removeprefix("style") if more.after else STYLE
        run(mine, more, scheduler=scheduler)
        seen = watched()
        assert torch.equal(seen.rows(0), canvas)
        for call, was in enumerate(reference):
            assert torch.equal(seen.rows(call, scope), was)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "ddpm", "dpmpp_sde"])
def test_a_neighbour_in_the_batch_shifts_nobodys_noise(scheduler: str) -> None:
    seeds = (7, 8, 9)
    together = run(*five()[:2], style(), seed=seeds, scheduler=scheduler, steps=3)
    seen = watched()
    start, beside = seen.rows(0), seen.rows(0, STYLE)
    assert not torch.equal(start[0], start[1])
    assert together.latents is not None
    for item, seed in enumerate(seeds):
        alone = run(*five()[:2], style(), seed=seed, scheduler=scheduler, steps=3)
        assert torch.equal(seen.rows(0)[0], start[item])
        assert torch.equal(seen.rows(0, STYLE)[:1], beside[item : item + 1])
        assert alone.latents is not None
        # A batch changes how floats are summed, by some 1e-6 a call; other noise would be 1.
        assert (alone.latents[0] - together.latents[item]).abs().max() < 1e-3
        near = alone.pixels.astype(int) - together.pictures[item].pixels
        assert np.abs(near).max() <= 1


def test_seeds_decide() -> None:
    assert same(run(seed=5), run(seed=5))
    assert not same(run(seed=5), run(seed=6))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(style(), scheduler="dpmpp_sde")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, run(style(), scheduler="dpmpp_sde"))


def test_a_contribution_is_empty_by_default() -> None:
    assert Custom().contribute(None) == Contribution()  # type: ignore[arg-type]
