"""The embedded model, through diffedit's own Editor, does what is asked.

The gates of the first version, each beside its chance level and a control that nobody asked for.
`bench/quality.py` makes the figures; the model card states them.
"""

from __future__ import annotations

import pytest

from bench.quality import image_to_image, painter, style
from diffedit import Editor
from diffedit.training.cases import inpaintings, single_objects
from diffedit.training.evaluate import generation, inpainting

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load()


def test_pictures_from_nothing_show_the_asked_colour_and_shape(editor: Editor) -> None:
    figures = generation(painter(editor), single_objects(208))
    assert figures["colour"] >= 0.95, figures
    assert figures["unasked_colour"] <= 0.2, figures
    assert figures["shape"] >= 0.85, figures  # chance 1 in 8


def test_inpainting_puts_the_asked_into_the_mask(editor: Editor) -> None:
    cases = inpaintings(128, "drawn", editor.model.sides[0])
    figures = inpainting(painter(editor), cases)
    assert figures["colour"] >= 0.9, figures
    assert figures["colour_before"] <= 0.1, figures
    assert figures["unasked_colour"] <= 0.25, figures
    assert figures["shape"] >= 0.5, figures  # chance 1 in 8


def test_inpainting_works_on_photographs(editor: Editor) -> None:
    cases = inpaintings(64, "photos", editor.model.sides[0])
    figures = inpainting(painter(editor), cases)
    assert figures["colour"] >= 0.9, figures
    assert figures["shape"] >= 0.5, figures


def test_the_stronger_the_further_from_the_source(editor: Editor) -> None:
    figures = image_to_image(editor, 16)
    far = [value for key, value in figures.items() if key.startswith("distance")]
    assert far == sorted(far), figures
    assert figures["rising_in_every_step"] >= 0.8, figures


def test_style_takes_colour_and_texture_and_keeps_the_object(editor: Editor) -> None:
    figures = style(editor, 48)
    assert figures["colour_styled"] < figures["colour_plain"], figures
    assert figures["gram_styled"] < figures["gram_adain"], figures
    assert figures["object_styled"] >= 0.5, figures  # chance 1 in 8
