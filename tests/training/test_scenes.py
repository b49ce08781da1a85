from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from diffedit.training.world import backdrops
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import PLAIN, RICH, SIMPLE, VIEWS, Mix, draw_scene
from diffedit.training.world.source import Drawn, nearby


def test_captions_may_be_about_one_thing_of_a_view() -> None:
    """As an edit's prompt is; then only what is near it is described, and weighs."""
    told = passed_over = 0
    for index in range(120):
        example, drawing = Drawn({"views": 1.0}, 120, 64).drawn(index)
        scene = drawing.scene
        assert scene.style == "flat"
        if scene.told is None:
            continue
        told += 1
        thing = scene.things[scene.told]
        assert scene.caption.removeprefix("an ").removeprefix("a ") == thing.words
        assert example.weight is not None
        mask = drawing.masks[scene.told] > 0
        assert (example.weight[mask] == 1).all()
        others = [one for at, one in enumerate(drawing.masks) if at != scene.told]
        passed_over += any((example.weight[one > 0] == 0).all() for one in others if one.any())
    assert 10 < told < 40
    assert passed_over > 5


@pytest.mark.parametrize("mix", [SIMPLE, RICH], ids=["simple", "rich"])
def test_a_scene_depends_on_seed_and_index_only(mix: Mix) -> None:
    first = [render(draw_scene(3, i, mix), 32) for i in range(12)]
    again = [render(draw_scene(3, i, mix), 32) for i in reversed(range(12))][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.scene == b.scene
        assert np.array_equal(a.image, b.image)
    assert draw_scene(4, 0, mix) != draw_scene(3, 0, mix)


def test_labels_tell_what_is_drawn() -> None:
    for index in range(40):
        drawing = render(draw_scene(5, index, SIMPLE), 64)
        assert drawing.image.shape == (64, 64, 3)
        assert len(drawing.masks) == len(drawing.scene.things)
        for thing, mask in zip(drawing.scene.things, drawing.masks, strict=True):
            words = drawing.scene.caption.replace("grey", "gray").split()
            # Sepia has no colours, and its captions name none.
            told = {thing.noun, thing.colour} if drawing.scene.style != "sepia" else {thing.noun}
            assert told <= set(words)
            assert 0 <= mask.min() <= mask.max() <= 1
            if thing.texture == "plain" and drawing.scene.style == "flat" and mask.max() == 1:
                inside = drawing.image[mask == 1].mean(axis=0)
                assert np.abs(inside - np.array(thing.rgb)).max() < 2


def test_the_whole_world_has_every_view() -> None:
    seen = {draw_scene(9, index, RICH).view for index in range(60)}
    assert seen == set(VIEWS)


def test_one_scene_at_two_sizes_is_one_picture() -> None:
    scene = draw_scene(6, 1, Mix(photo=0))
    small, large = render(scene, 64), render(scene, 128)
    halved = large.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small.image).mean() < 3


def test_what_is_near_covers_the_objects_and_not_all() -> None:
    drawing = render(draw_scene(8, 0, PLAIN), 64)
    near = nearby(drawing)
    assert near is not None
    assert near.shape == (64, 64)
    assert (near[drawing.masks[0] > 0] == 1).all()
    assert drawing.masks[0].mean() < near.mean() < 1


def test_relations_hold() -> None:
    told = 0
    for index in range(60):
        scene = draw_scene(7, index, Mix(pair=1.0))
        if scene.relation is None or len(scene.things) < 2:
            continue
        a, b = scene.things
        holds = {
            "left of": a.x < b.x,
            "right of": a.x > b.x,
            "above": a.y < b.y,
            "below": a.y > b.y,
        }
        assert holds[scene.relation], scene
        told += 1
    assert told > 20


def test_the_photographs_kept_for_judging_are_never_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden() -> None:
        raise AssertionError("a photograph kept for judging was opened")

    for name in (*backdrops.KEPT_FOR_JUDGING, "cat"):
        monkeypatch.setattr(skimage.data, name, forbidden)
    backdrops.photographs.cache_clear()
    assert len(backdrops.photographs()) >= 10
