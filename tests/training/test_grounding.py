"""Attention is told where words stand: the loss's closed form, the data it needs, what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from diffedit.errors import InputError
from diffedit.training.cache import LatentCache
from diffedit.training.config import Data, DenoiserTraining, Optimiser
from diffedit.training.data import Example, Phrase
from diffedit.training.denoiser import DenoiserTask
from diffedit.training.grounding import Watched, grounding
from diffedit.training.loop import accelerator, train
from diffedit.training.parts import load, new_unet
from diffedit.training.threads import in_parallel
from diffedit.training.world.source import Drawn, phrases
from diffedit.training.world.things import PALETTE

CPU = torch.device("cpu")


def place(*cells: int, side: int = 8) -> torch.Tensor:
    made = torch.zeros(side * side)
    made[list(cells)] = 1
    return made.view(1, 1, side, side)


def test_the_loss_is_the_square_of_the_share_that_falls_elsewhere() -> None:
    where, spans = place(0, 1, 2, 3), torch.tensor([[[0.0, 1.0, 0.0]]])
    even = torch.full((1, 64, 3), 1 / 3)
    assert float(grounding([even], where, spans)) == pytest.approx((1 - 4 / 64) ** 2)
    there = torch.zeros(1, 64, 3)
    there[0, :4, 1] = 0.25
    assert float(grounding([there], where, spans)) == pytest.approx(0)
    half = there.clone()
    half[0, 10:14, 1] = 0.25
    assert float(grounding([half], where, spans)) == pytest.approx(0.25)
    # Layers count alike, those of too few cells not at all; other tokens do not matter.
    assert float(grounding([there, half, torch.ones(1, 16, 3)], where, spans)) == pytest.approx(
        0.125
    )
    half[0, :, 2] = torch.rand(64)
    assert float(grounding([half], where, spans)) == pytest.approx(0.25)


def test_it_is_a_mean_over_tokens_and_zero_without_a_phrase() -> None:
    attention = torch.rand(2, 64, 5, generator=torch.Generator().manual_seed(0))
    where = torch.cat([place(0, 1), place(40)], 1).repeat(2, 1, 1, 1)
    spans = torch.zeros(2, 2, 5)
    spans[0, 0, [1, 2]] = spans[0, 1, 4] = 1
    wanted = 0.0
    for token, cells in ((1, [0, 1]), (2, [0, 1]), (4, [40])):
        share = attention[0, cells, token].sum() / attention[0, :, token].sum()
        wanted += float((1 - share) ** 2) / 3
    assert grounding([attention], where, spans).tolist() == pytest.approx([wanted, 0.0])


def test_places_are_taken_to_each_layers_size() -> None:
    where = torch.zeros(1, 1, 16, 16)
    where[..., :8, :] = 1
    attention = torch.zeros(1, 64, 1)
    attention[0, :32] = 1
    assert float(grounding([attention], where, torch.ones(1, 1, 1))) == pytest.approx(0)


def test_a_watched_unet_computes_the_same_and_threads_do_not_mix() -> None:
    torch.manual_seed(0)
    unet = new_unet((16, 32), plain_levels=0, sample_size=8).eval()
    unet.set_attn_processor(AttnProcessor())
    x, t, words = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900]), torch.randn(3, 6, 128)
    with torch.no_grad():
        plain = unet(x, t, words).sample
        watched = Watched(unet)
        assert torch.allclose(unet(x, t, words).sample, plain, atol=1e-6)

        def seen(row: int) -> list[torch.Tensor]:
            with watched.recording() as found:
                unet(x[row : row + 1], t[row : row + 1], words[row : row + 1])
            return found

        apart = in_parallel(seen, range(3))
        with watched.recording() as together:
            unet(x, t, words)
    assert {tuple(a.shape) for a in together} == {(3, 64, 6), (3, 16, 6)}
    for row, found in enumerate(apart):
        assert len(found) == len(together)
        for one, every in zip(found, together, strict=True):
            assert torch.allclose(one[0], every[row], atol=1e-5)
            assert torch.allclose(one.sum(-1), torch.ones(1, one.shape[1]), atol=1e-5)


def test_the_world_says_where_its_words_stand() -> None:
    world, seen, grey = Drawn({"pairs": 1.0}, 60, 64), 0, 0
    for index in range(len(world)):
        example, drawing = world.drawn(index)
        for phrase in example.phrases:
            assert f" {phrase.words} " in f" {example.caption.replace(',', ' ')} "
            colour = phrase.words.split()[0].replace("grey", "gray")
            grey += colour == "gray" and "grey" in phrase.words
            inside = drawing.image[phrase.where > 0.99]
            if colour in PALETTE and len(inside) > 20:
                assert np.abs(np.median(inside, 0) - PALETTE[colour]).max() < 30
                seen += 1
    assert seen > 60
    assert grey


def test_what_is_said_twice_has_no_place() -> None:
    world = Drawn({"pairs": 1.0}, 400, 32)
    twice = [i for i in range(400) if len({t.noun for t in world.scene(i).things}) == 1]
    twice = [i for i in twice if len(world.scene(i).things) == 2]
    assert twice
    for index in twice[:5]:
        for phrase in phrases(world.drawn(index)[1]):
            assert len(phrase.words.split()) > 1


class Two:
    """Two examples: a phrase over the left half, and one that is not in the caption."""

    name, digest = "two", "two"

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Example:
        left = np.zeros((32, 32), np.float32)
        left[:, :16] = 1
        words = ("red circle", "green star")[index]
        caption = "a red circle on a blue background"
        image = np.zeros((32, 32, 3), np.uint8)
        return Example(image, caption, "one", phrases=(Phrase(words, left),))


def test_the_cache_keeps_places_and_tokens(tmp_path: Path, small_model: Path) -> None:
    parts = load(str(small_model), CPU)
    cache = LatentCache(tmp_path, Two(), parts.vae, tokenizer=parts.tokenizer, phrases=2)
    batch = cache.rows([0, 1])
    assert batch.tokens is not None
    assert batch.phrases is not None
    assert batch.spans is not None
    assert batch.phrases.shape == (2, 2, 4, 4)
    assert torch.equal(batch.phrases[0, 0], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))
    marked = batch.tokens[0][batch.spans[0, 0].bool()]
    assert parts.tokenizer.decode(marked).split() == ["red", "circle"]
    assert not batch.spans[0, 1].any()
    assert not batch.spans[1].any()
    without = LatentCache(tmp_path, Two(), parts.vae, tokenizer=parts.tokenizer)
    assert without.key != cache.key
    assert without.rows([0]).phrases is None


def training(folder: Path, model: Path, **changes: Any) -> DenoiserTraining:
    given: dict[str, Any] = {
        "train": "denoiser",
        "model": str(model),
        "data": Data(world="pairs", count=16, side=64, held_out=0),
        "out": folder / "out",
        "steps": 25,
        "batch": 8,
        "device": "cpu",
        "optimiser": Optimiser(name="muon", rate=2e-3, muon_rate=1e-2, warmup=2),
        "validate_every": 100,
        "sample_every": 100,
        "grounding": 0.0,
    }
    return DenoiserTraining(**given | changes)


def elsewhere(task: DenoiserTask) -> float:
    """The grounding loss on the first batch."""
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert task.watched is not None
    with torch.no_grad(), task.watched.recording() as found:
        task.latents.loss(rows, task.predict)
        return float(grounding(found, rows["phrases"], rows["spans"]).mean())


def test_told_attention_goes_where_the_words_stand(tmp_path: Path, small_model: Path) -> None:
    after = {}
    for weight in (1e-9, 1.0):
        how = training(tmp_path / str(weight), small_model, grounding=weight)
        task = DenoiserTask(how, CPU)
        before = elsewhere(task)
        train(task, how, accelerator(how))
        after[weight] = elsewhere(task)
    assert after[1.0] < 0.7 * before
    assert after[1.0] < 0.8 * after[1e-9]


def test_dropped_captions_are_not_told(tmp_path: Path, small_model: Path) -> None:
    how = training(tmp_path, small_model, grounding=1.0, objective={"dropout": 0.5})
    task = DenoiserTask(how, CPU)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    empty = task.latents.cache.empty()[0]
    assert empty is not None
    dropped = (rows["tokens"] == empty).all(1)
    assert 0 < int(dropped.sum()) < 8
    assert not rows["spans"][dropped].any()
    assert rows["spans"][~dropped].flatten(1).any(1).float().mean() > 0.8


def test_grounding_keeps_activations(tmp_path: Path, small_model: Path) -> None:
    how = training(tmp_path, small_model, grounding=1.0, checkpointing=True)
    with pytest.raises(InputError, match="grounding and checkpointing do not go together"):
        DenoiserTask(how, CPU)


def test_a_model_that_was_told_is_written_like_any_other(tmp_path: Path, small_model: Path) -> None:
    how = training(tmp_path, small_model, grounding=1.0, steps=1)
    task = DenoiserTask(how, CPU)
    train(task, how, accelerator(how))
    task.export(tmp_path / "result")
    made = load(str(tmp_path / "result"), CPU).unet
    for name, weight in task.parts.unet.state_dict().items():
        assert torch.allclose(made.state_dict()[name], weight, atol=2e-3), name
