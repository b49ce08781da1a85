"""The judge of styles is right on scenes that it was not fitted to, of any size, worn or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffedit.models.loading import EMBEDDED
from diffedit.training import styles
from diffedit.training.styles import JUDGED, WEIGHTS, StyleJudge, accuracy, drawn, fit, style_of
from diffedit.training.world.scenes import STYLES, UNSEEN_STYLES
from diffedit.training.world.source import HELD_OUT, VERSION


@pytest.fixture(scope="module")
def judge() -> StyleJudge:
    return StyleJudge.load()


def test_the_judge_that_ships_is_of_this_world() -> None:
    assert WEIGHTS.stat().st_size < 200_000
    with safe_open(WEIGHTS, "pt") as file:
        said = file.metadata()
    assert said == {"world": str(VERSION), "styles": " ".join((*STYLES, *UNSEEN_STYLES))}


def test_it_is_right_on_held_out_scenes(judge: StyleJudge) -> None:
    rates = accuracy(judge, 15, 256)
    assert list(rates) == list(JUDGED)
    assert np.mean(list(rates.values())) >= 0.95
    assert min(rates.values()) >= 0.8
    assert rates["blueprint"] == 1


@torch.no_grad()
def test_it_is_right_behind_an_autoencoder(judge: StyleJudge) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae", torch_dtype=torch.float32)
    hits = []
    for style in JUDGED:
        for image in drawn(style, 2, HELD_OUT + 1, 256):
            pixels = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None].float()
            back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1)
            levels = ((back.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
            hits.append(judge.style(levels) == style)
    assert np.mean(hits) >= 0.85  # of 16


def test_probabilities(judge: StyleJudge) -> None:
    images = [drawn(style, 1, HELD_OUT)[0] for style in ("neon", "sepia", "blueprint")]
    found = judge.probabilities(images)
    assert [set(said) for said in found] == [set(JUDGED)] * 3
    assert [sum(said.values()) for said in found] == pytest.approx([1, 1, 1], abs=1e-5)
    assert [max(said, key=said.__getitem__) for said in found] == ["neon", "sepia", "blueprint"]
    assert [style_of(image) for image in images] == ["neon", "sepia", "blueprint"]
    alone = judge.probabilities(images[2:])[0]
    assert alone == pytest.approx(found[2], abs=1e-5)
    assert judge.probabilities([]) == []


def test_the_size_of_a_picture_does_not_matter(judge: StyleJudge) -> None:
    for style in ("watercolor", "mosaic", "blueprint"):
        small, large = (drawn(style, 1, HELD_OUT, side)[0] for side in (128, 512))
        assert judge.style(small) == judge.style(large) == style
    wide = Image.fromarray(drawn("neon", 1, HELD_OUT)[0]).resize((300, 200))
    assert judge.style(np.asarray(wide)) == "neon"


def test_fitting_learns_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(styles, "JUDGED", ("neon", "sepia", "outlined"))
    one, two = (fit(12, seed=5, steps=80) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True)
    )
    other = fit(12, seed=6, steps=80)
    assert not torch.equal(one.net.state_dict()["0.weight"], other.net.state_dict()["0.weight"])
    images = [image for style in styles.JUDGED for image in drawn(style, 6, HELD_OUT)]
    truth = [style for style in styles.JUDGED for _ in range(6)]
    assert np.mean([one.style(i) == t for i, t in zip(images, truth, strict=True)]) > 0.8
    one.save(tmp_path / "judge.safetensors")
    again = StyleJudge.load(tmp_path / "judge.safetensors")
    for before, after in zip(one.probabilities(images), again.probabilities(images), strict=True):
        assert after == pytest.approx(before, abs=0.01)
