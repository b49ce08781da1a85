from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from diffedit.training.report import add_engine, write


def test_the_card_shows_the_figures_it_is_given(tmp_path: Path) -> None:
    gates = {
        "generation": {"n": 240, "colour": 0.97, "unasked_colour": 0.03, "shape": 0.9}
        | {"shape_chance": 0.125, "background": 0.88},
        "inpainting_photos": {"n": 128, "colour": 0.91, "colour_before": 0.02}
        | {"unasked_colour": 0.04, "shape": 0.61, "shape_before": 0.0, "shape_chance": 0.125},
    }
    figures = {
        **gates,
        "engines": {"diffedit": {"generation": gates["generation"] | {"colour": 0.99}}},
        "sampling": {"guidance": 5.0, "rescale": 0.0, "steps": 20},
    }
    write(tmp_path, figures)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "| diffusers: from nothing, colour | 240 | **0.97** | unasked colour 0.03 |" in card
    assert "| diffedit: from nothing, colour | 240 | **0.99** | unasked colour 0.03 |" in card
    assert "kept photographs, shape | 128 | **0.61** | chance 0.125, source picture 0.00 |" in card
    assert "autoencoder: held-out" not in card
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == figures


def test_another_engine_is_judged_into_the_card(tmp_path: Path) -> None:
    def paint(
        image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
    ) -> Image.Image:
        return image or Image.new("RGB", (64, 64), "red")

    made = add_engine(tmp_path, "idle", paint, prompts=4, edits=2)
    assert made["generation"]["shape"] == 0
    assert "| idle: from nothing, shape | 4 | **0.00** |" in (tmp_path / "README.md").read_text()
