"""The judges are right about scenes whose truth is known."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffedit.training.cases import inpaintings, single_objects
from diffedit.training.evaluate import generation, inpainting, is_shape
from diffedit.training.judges import colour_share, judge_shape, segment
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Background, Mix, Scene, draw_scene
from diffedit.training.world.things import COLOURS, PALETTE, Thing


def _picture(colour: str, shape: str, background: str, x: float = 0.5, y: float = 0.5) -> Scene:
    thing = Thing(shape, colour, PALETTE[colour], "plain", x, y, 0.2, 0.1)
    return Scene(Background("plain", background, background, 1), (thing,), "flat", None, "")


def test_shapes_and_colours_of_drawn_objects() -> None:
    mix = Mix(photo=0.2, pair=0, empty=0, texture=0, style=0)
    right = seen = false = 0
    for index in range(60):
        drawing = render(draw_scene(21, index, mix), 96)
        thing = drawing.scene.things[0]
        background = drawing.scene.background
        absent = next(
            c for c in COLOURS if c not in (thing.colour, background.colour, background.second)
        )
        right += is_shape(segment(drawing.image, thing.colour), thing.noun)
        seen += colour_share(drawing.image, thing.colour) > 0.01
        false += background.kind == "plain" and colour_share(drawing.image, absent) > 0.02
    assert right >= 55
    assert seen >= 59
    assert false == 0


def test_nothing_is_no_shape() -> None:
    assert judge_shape(np.zeros((64, 64), np.bool_)) is None


class _Draws:
    """A painter that does exactly what it is asked."""

    def __call__(
        self, image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
    ) -> Image.Image:
        words = prompt.split()
        background = words[-2] if "background" in words else "gray"
        background = "white" if background == words[1] else background
        scene = _picture(words[1], words[2], background)
        if image is None or mask is None:
            return Image.fromarray(render(scene, 128).image)
        where = np.asarray(mask) > 0
        rows, columns = np.nonzero(where)
        x, y = (columns.mean() + 0.5) / where.shape[1], (rows.mean() + 0.5) / where.shape[0]
        scene = _picture(words[1], words[2], "gray" if words[1] != "gray" else "white", x, y)
        drawn = render(scene, where.shape[0]).image
        return Image.fromarray(np.where(where[..., None], drawn, np.asarray(image)))


def _idle(
    image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
) -> Image.Image:
    return image if image is not None else Image.new("RGB", (128, 128), PALETTE["gray"])


def test_the_gates_tell_a_painter_that_obeys_from_one_that_does_nothing() -> None:
    cases = single_objects(16)
    good, bad = generation(_Draws(), cases), generation(_idle, cases)
    assert good["colour"] == good["shape"] == good["background"] == 1
    assert good["unasked_colour"] <= 0.2
    assert bad["shape"] <= 0.05
    items = inpaintings(12, "photos")
    good, bad = inpainting(_Draws(), items), inpainting(_idle, items)
    assert good["colour"] == 1
    assert good["shape"] >= 0.9
    assert bad["colour"] == bad["colour_before"] == good["colour_before"]
    assert bad["shape"] <= 0.2
