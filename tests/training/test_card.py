"""The card says what the folder holds and what was measured, and nothing of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from diffedit.errors import InputError
from diffedit.models.loading import EMBEDDED
from diffedit.training import card
from diffedit.training.config import DenoiserTraining

BENCHMARK: dict[str, Any] = {
    "about": {"date": "2026-01-02", "commit": "abc1234", "made": 500, "set": "0123", "steps": 20}
    | {"guidance": 5.0},
    "gates": [
        {"gate": "the asked shape in the mask", "figure": [0.9, 0.86, 0.93, 200]}
        | {"target": "≥ 0.85", "verdict": "reached"},
        {"gate": "a style from nothing", "figure": None, "target": "≥ 0.8"}
        | {"verdict": "not measured"},
        {"gate": "add: shape minus diffusers's", "figure": [0.1, 0.0, 0.2, 50], "target": "≥ 0"}
        | {"verdict": "reached"},
    ],
    "rows": [
        {"category": "add", "group": "drawn", "measure": "shape", "chance": 0.125}
        | {"engines": {"diffedit": [0.9, 0.8, 0.95, 44], "diffusers": [0.7, 0.5, 0.8, 44]}},
        {"category": "add", "group": "drawn", "measure": "distance"}
        | {"engines": {"diffedit": [9.0, 8.0, 10.0, 44]}},
        {"category": "add", "group": "rare", "measure": "shape"}
        | {"engines": {"diffedit": [1.0, 0.4, 1.0, 3]}},
        {"category": "add", "group": "drawn", "measure": "colour"}
        | {"engines": {"diffusers": [0.7, 0.5, 0.8, 44]}},
    ],
    "declined": [
        {"category": "add", "engine": "diffedit", "why": "words that …", "cases": 3},
        {"category": "restructure", "engine": "diffedit", "why": "no net", "cases": 2},
        {"category": "add", "engine": "diffusers", "why": "words that …", "cases": 3},
    ],
}


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "model"))


def test_the_parts_are_those_of_the_folder(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    ControlNetModel.from_unet(unet).save_pretrained(folder / "controlnet" / "canny")
    several = folder / "controlnet" / "several"
    ControlNetModel.from_unet(unet).save_pretrained(several)
    (several / "diffedit.json").write_text('{"kind": ["canny", "depth", "segments"]}', "utf-8")
    text = card.card(folder, {})
    assert "| `controlnet/several` | `ControlNetModel` for canny, depth and segments hints," in text
    assert "`UNet2DConditionModel`, widths (16, 32), cross-attention at every level" in text
    count = sum(p.numel() for p in unet.parameters())
    assert f"at every level | {count / 1e6:.1f} M |" in text
    assert "`AutoencoderKL`, f = 8, 4 channels, widths (8, 8, 8, 8)" in text
    assert "| `controlnet/canny` | `ControlNetModel` for canny hints, widths (16, 32)" in text
    assert "`DDIMScheduler`, v-prediction, zero terminal SNR, trailing spacing" in text
    assert "Native size: 32 px (4 × 4 latent cells). The weights are fp16 and fp32" in text
    for absent in ("Measured quality", "## Training", "128 px"):
        assert absent not in text


def test_the_words_are_those_of_the_tokenizer(folder: Path) -> None:
    # Its captions were "a red circle on a blue background" and "a photo of a green star".
    text = card.card(folder, {})
    assert "- 3 colours: red, green, blue\n- 2 shapes: circle, star\n" in text
    assert "styles" not in text
    assert "relations" not in text


def test_figures_stand_beside_their_controls_and_missing_ones_are_named(folder: Path) -> None:
    text = card.card(folder, {"benchmark": BENCHMARK})
    assert "| the asked shape in the mask | 0.90 (0.86–0.93) | ≥ 0.85 | reached |" in text
    assert "Not measured: a style from nothing." in text
    assert "minus" not in text
    row = "| add, drawn: shape | 44 | **0.90** (0.80–0.95) | 0.70 (0.50–0.80) |  |  |  | 0.12 |"
    assert row in text
    assert "distance |" not in text
    assert "drawn: colour" not in text
    assert "add, rare" not in text
    assert "3 with words that the model has not learnt and 2 with hints" in text
    assert "commit abc1234: 500 seeded cases (set 0123)" in text.replace("\n", " ")


def test_what_is_written_can_be_read_and_written_again(folder: Path) -> None:
    figures = {"benchmark": BENCHMARK, "training": []}
    card.write(folder, figures)
    assert card.read(folder) == json.loads(json.dumps(figures))
    before = (folder / "README.md").read_text("utf-8")
    assert card.main([str(folder)]) == 0
    assert (folder / "README.md").read_text("utf-8") == before


def test_a_training_tells_its_steps_and_settings_and_no_folder_of_the_machine(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "secret" / "run"
    training = DenoiserTraining.model_validate(
        {"train": "denoiser", "model": "/secret/base", "out": str(out), "steps": 40, "batch": 6}
        | {"data": {"folder": "/secret/my pictures"}, "optimiser": {"name": "muon"}}
    )
    out.mkdir(parents=True)
    torch.save(
        {
            "training": training.model_dump(mode="json"),
            "losses": [0.5] * 40,
            "figures": [(20, {"loss": 0.25}), (40, {"loss": 0.125})],
            "seconds": 185.0,
        },
        out / "checkpoint.pt",
    )
    assert card.main([str(folder), "--training", str(out)]) == 0
    text = (folder / "README.md").read_text("utf-8").replace("\n  ", " ")
    assert "- **denoiser**: 40 steps in 3 minutes; model base, " in text
    assert "batch 6, optimiser (name muon)" in text
    assert "At step 40: loss 0.125." in text
    assert "secret" not in text + (folder / "figures.json").read_text("utf-8")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        card.history(tmp_path)


def test_the_embedded_model_s_card_is_the_generated_one() -> None:
    written = (EMBEDDED / "README.md").read_text("utf-8")
    assert written == card.card(EMBEDDED, card.read(EMBEDDED))
