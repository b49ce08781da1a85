"""A denoiser learns from any source, with new words or frozen ones, and loads in diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffedit.training.config import Data, DenoiserTraining, Objective, Optimiser
from diffedit.training.denoiser import DenoiserTask
from diffedit.training.loop import accelerator, train

CPU = torch.device("cpu")


def training(folder: Path, model: Path, **changes: Any) -> DenoiserTraining:
    given: dict[str, Any] = {
        "train": "denoiser",
        "model": str(model),
        "data": Data(world="plain", count=24, side=32, held_out=4),
        "out": folder / "out",
        "steps": 30,
        "batch": 8,
        "device": "cpu",
        "optimiser": Optimiser(name="muon", rate=2e-3, muon_rate=1e-2, warmup=3),
        "validate_every": 30,
        "sample_every": 100,
    }
    return DenoiserTraining(**given | changes)


def weights(task: DenoiserTask, name: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in task.modules[name].state_dict().items()}


def test_it_learns_and_the_result_loads_in_a_plain_pipeline(
    tmp_path: Path, small_model: Path
) -> None:
    how = training(tmp_path, small_model, text="new", prompts=("a red circle",), sample_every=30)
    task = DenoiserTask(how, CPU)
    words = weights(task, "text_encoder")
    report = train(task, how, accelerator(how))
    assert np.mean(report.losses[-5:]) < 0.8 * np.mean(report.losses[:5])
    assert any(
        not torch.equal(value, words[key])
        for key, value in task.modules["text_encoder"].state_dict().items()
    )
    assert (tmp_path / "out" / "index.html").exists()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    task.export(folder)
    assert (folder / "README.md").read_text() == "a card"
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 3
    assert all(file.stat().st_size <= 16e6 for file in files)
    assert not any("_name_or_path" in f.read_text("utf-8") for f in folder.rglob("config.json"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.vae.config.scaling_factor == 1.0
    made = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert made.shape == (32, 32, 3)
    assert np.isfinite(made).all()
    for name, part in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for key, value in part.state_dict().items():
            # Stored as fp16.
            kept = task.modules[name].state_dict()[key]
            assert torch.allclose(value, kept, atol=1e-3, rtol=1e-3), key


def test_new_words_keep_what_the_old_encoder_knew(tmp_path: Path, small_model: Path) -> None:
    before = DenoiserTask(training(tmp_path / "a", small_model, text="train"), CPU).parts
    after = DenoiserTask(training(tmp_path / "b", small_model, text="new"), CPU).parts
    old, new = before.tokenizer.get_vocab(), after.tokenizer.get_vocab()
    kept = [word for word in ("red</w>", "circle</w>", "blue</w>") if word in old and word in new]
    assert len(kept) == 3
    assert len(new) > len(old)
    states = [parts.text_encoder.state_dict() for parts in (before, after)]
    key = next(k for k in states[0] if k.endswith("token_embedding.weight"))
    for word in kept:
        assert torch.equal(states[0][key][old[word]], states[1][key][new[word]])
    other = next(k for k in states[0] if k.endswith("k_proj.weight"))
    assert torch.equal(states[0][other], states[1][other])


def test_frozen_text_is_encoded_once_and_stays(tmp_path: Path, small_model: Path) -> None:
    how = training(tmp_path, small_model, text="frozen", steps=3)
    task = DenoiserTask(how, CPU)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert "embeddings" in rows
    assert "tokens" not in rows
    assert set(task.modules) == {"unet"}
    words = {k: v.clone() for k, v in task.parts.text_encoder.state_dict().items()}
    train(task, how, accelerator(how))
    after = task.parts.text_encoder.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in words.items())


def test_embeddings_kept_are_those_of_the_encoder(tmp_path: Path, small_model: Path) -> None:
    objective = Objective(dropout=0.5)
    kept, live = (
        DenoiserTask(training(tmp_path / text, small_model, text=text, objective=objective), CPU)
        for text in ("frozen", "train")
    )
    rows, others = (task.batch(2, torch.Generator().manual_seed(5)) for task in (kept, live))
    assert torch.equal(rows["latents"], others["latents"])
    with torch.no_grad():
        words = live.latents.words(others)
    # Captions are padded to one length on both sides; half-precision is not kept.
    assert torch.allclose(rows["embeddings"].float(), words, atol=2e-3)
    assert len({float(row.sum()) for row in words}) < len(words)  # some are the empty caption's


def test_every_example_comes_once_before_any_comes_again(tmp_path: Path, small_model: Path) -> None:
    data = Data(world="plain", count=16, side=32, held_out=0)
    task = DenoiserTask(training(tmp_path, small_model, data=data, batch=4), CPU)
    generator = torch.Generator().manual_seed(0)
    seen = [task.batch(step, generator)["latents"] for step in range(8)]
    first, second = torch.cat(seen[:4]).flatten(1), torch.cat(seen[4:]).flatten(1)
    assert len({tuple(row[:16].tolist()) for row in first}) == 16
    assert not torch.equal(first, second)
    assert torch.equal(first[first[:, 0].argsort()][:, 0], second[second[:, 0].argsort()][:, 0])


def test_a_folder_of_pictures_trains_too_and_a_broken_one_is_named(
    tmp_path: Path, small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        image.save(pictures / f"red {number}.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    data = Data(folder=pictures, caption="name", side=32, held_out=1)
    how = training(tmp_path, small_model, data=data, steps=2, batch=4)
    with caplog.at_level("WARNING"):
        task = DenoiserTask(how, CPU)
    assert "skipped 1 of 7 pictures" in caplog.text
    assert "broken.png" in caplog.text
    assert train(task, how, accelerator(how)).finished


def test_a_new_unet_has_the_asked_levels(tmp_path: Path, small_model: Path) -> None:
    how = training(tmp_path, small_model, widths=(16, 32, 48), plain_levels=1)
    unet = DenoiserTask(how, CPU).parts.unet
    assert list(unet.config.block_out_channels) == [16, 32, 48]
    assert unet.config.down_block_types[0] == "DownBlock2D"
    assert unet.config.down_block_types[1] == "CrossAttnDownBlock2D"


def test_checkpointing_gives_the_same_gradients(tmp_path: Path, small_model: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        how = training(tmp_path / str(checkpointing), small_model, checkpointing=checkpointing)
        task = DenoiserTask(how, CPU)
        rows = task.batch(0, torch.Generator().manual_seed(0))
        task.loss(rows).backward()
        grads.append({n: p.grad for n, p in task.parts.unet.named_parameters()})
        assert task.parts.unet.is_gradient_checkpointing is checkpointing
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6, rtol=1e-4), name


def test_settings_of_the_result_are_plain_json(tmp_path: Path, small_model: Path) -> None:
    task = DenoiserTask(training(tmp_path, small_model), CPU)
    task.export(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
