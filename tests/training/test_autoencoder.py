"""The autoencoder's losses are what they say, and a training of it leaves a whole model."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from diffedit.errors import InputError, OutputError
from diffedit.training import config, pictures
from diffedit.training.autoencoder import (
    AutoencoderTask,
    Discriminator,
    adversarial_loss,
    edge_error,
    new_autoencoder,
)
from diffedit.training.config import AutoencoderTraining
from diffedit.training.data import Example
from diffedit.training.export import fold_statistics
from diffedit.training.loop import Report, accelerator, train
from diffedit.training.pictures import psnr, stored, to_pictures, to_tensor
from diffedit.training.stages import run
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import PHOTOS, draw_scene
from diffedit.training.world.source import Drawn

CPU = torch.device("cpu")


def _training(tmp_path: Path, model: Path, **changes: Any) -> AutoencoderTraining:
    said: dict[str, Any] = {
        "train": "autoencoder",
        "model": str(model),
        "data": {"world": {"rich": 1, "photos": 1}, "count": 24, "side": 32, "held_out": 6},
        "out": str(tmp_path / "out"),
        "steps": 4,
        "batch": 4,
        "crop": 16,
        "optimiser": {"rate": 2e-3, "warmup": 1},
    }
    file = tmp_path / "training.yaml"
    file.write_text(json.dumps(said | changes), "utf-8")
    return cast(AutoencoderTraining, config.load(file)[0])


def _trained(training: AutoencoderTraining, **options: Any) -> tuple[AutoencoderTask, Report]:
    task = AutoencoderTask(training, CPU)
    return task, train(task, training, accelerator(training), **options)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# -- pictures ------------------------------------------------------------------------------------


def test_psnr_is_that_of_scikit_image() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    each = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    assert psnr(to_tensor(a), to_tensor(b)) == pytest.approx(np.mean(each), abs=1e-4)
    # A shift of 0.2 in a range of 2 is 20 dB; values out of the range are clipped before.
    flat = torch.zeros(1, 3, 8, 8)
    assert psnr(flat, flat + 0.2) == pytest.approx(20, abs=1e-4)
    assert psnr(flat + 1, flat + 3) > 80


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_tensor(every)
    assert (float(tensor.min()), float(tensor.max())) == (-1.0, 1.0)
    assert (to_pictures(tensor) == every).all()
    assert to_pictures(torch.full((1, 3, 1, 1), 7.0)).tolist() == [[[[255, 255, 255]]]]


class _Counting(Drawn):
    asked = 0

    def __getitem__(self, index: int) -> Example:
        self.asked += 1
        return super().__getitem__(index)


def test_pictures_are_drawn_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_CHUNK", 3)
    source = _Counting({"photos": 1.0}, 7, 24)
    kept = stored(tmp_path, source)
    assert isinstance(kept, np.memmap)
    assert kept.shape == (7, 24, 24, 3)
    asked = source.asked
    assert (stored(tmp_path, source) == np.stack([source[i].image for i in range(7)])).all()
    assert source.asked == asked + 7  # the comparison's own
    stored(tmp_path, Drawn({"photos": 1.0}, 7, 24, seed=1))
    assert len(list(tmp_path.glob("pictures-*.npy"))) == 2


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        stored(tmp_path / "out", Drawn({"photos": 1.0}, 2, 16))
    assert not list((tmp_path / "out").iterdir())


def test_pictures_of_two_sizes_are_refused(tmp_path: Path) -> None:
    class Uneven(Drawn):
        def __getitem__(self, index: int) -> Example:
            return Example(np.zeros((16 + index, 16, 3), np.uint8), "", f"picture {index}")

    with pytest.raises(InputError, match="picture 1 is 16x17, others 16x16"):
        stored(tmp_path, Uneven({"photos": 1.0}, 2, 16))


def test_photographs_are_a_world_without_things() -> None:
    scenes = [draw_scene(0, i, PHOTOS) for i in range(64)]
    assert all(s.background.kind == "photo" and not s.things for s in scenes)
    assert all("photo" in s.caption for s in scenes)
    assert len({render(s, 16).image.tobytes() for s in scenes}) == 64


# -- losses --------------------------------------------------------------------------------------


def test_the_edge_error_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 3, 6, 5)).astype(np.float32)
    error = a - b
    sides = [np.abs(np.diff(error, axis=axis)).mean() for axis in (2, 3)]
    found = float(edge_error(torch.from_numpy(a), torch.from_numpy(b)))
    assert found == pytest.approx(np.mean(sides), rel=1e-5)
    assert float(edge_error(torch.from_numpy(a), torch.from_numpy(a) + 3)) < 1e-6


def test_the_two_players_share_a_sum_and_no_gradients() -> None:
    torch.manual_seed(0)
    judge = Discriminator(16)
    real = torch.randn(3, 3, 32, 32)
    output = torch.randn(3, 3, 32, 32, requires_grad=True)
    weights = list(judge.parameters())
    total = adversarial_loss(judge, output, real, 0.3)
    mine, *its = torch.autograd.grad(total, [output, *weights])

    said, of_real = judge(output), judge(real)
    fooled = -0.3 * said.mean()
    told = (1 - of_real).clamp_min(0).mean() + (1 + said).clamp_min(0).mean()
    assert total.item() == pytest.approx((fooled + told).item(), rel=1e-5)
    (alone,) = torch.autograd.grad(fooled, output, retain_graph=True)
    assert torch.allclose(mine, alone, atol=1e-7)
    own = torch.autograd.grad(told, weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(its, own, strict=True))


def test_the_discriminator_judges_rows_by_themselves_in_patches_of_34_pixels() -> None:
    torch.manual_seed(0)
    judge = Discriminator(16).eval()
    pixels = torch.randn(3, 3, 64, 64, requires_grad=True)
    assert torch.allclose(judge(pixels)[1:2], judge(pixels[1:2]), atol=1e-5)
    judge.norms = nn.ModuleDict()  # a group's statistics are of all patches
    (seen,) = torch.autograd.grad(judge(pixels)[0, 0, 7, 7], pixels)
    rows = seen[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 34


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path, small_model: Path) -> None:
    weights = {"mse": 0.0, "l1": 0.0, "kl": 0.0}
    task = AutoencoderTask(_training(tmp_path, small_model), CPU)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    posterior = task.vae.encode(rows["pixels"]).latent_dist
    output = task.vae.decode(posterior.mean + posterior.std * rows["noise"]).sample
    # torch's own divergence from N(0, 1).
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = {
        "mse": (output - rows["pixels"]).square().mean(),
        "l1": (output - rows["pixels"]).abs().mean(),
        "gradient": edge_error(output, rows["pixels"]),
        "kl": torch.distributions.kl_divergence(normal, standard).mean(),
    }
    for name, value in expected.items():
        task.training = _training(tmp_path, small_model, **(weights | {name: 2.5}))
        assert task.loss(rows).item() == pytest.approx(2.5 * value.item(), rel=1e-4), name


# -- trainings -----------------------------------------------------------------------------------


@torch.no_grad()
def test_folding_the_statistics_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder((8, 8, 8, 8), 32)
    pixels = to_tensor(np.stack([render(draw_scene(0, i), 32).image for i in range(16)]))
    before = vae.encode(pixels).latent_dist
    picture = vae.decode(before.mean).sample
    fold_statistics(vae, before.parameters)
    after = vae.encode(pixels).latent_dist
    assert after.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    spread = (after.std / before.std)[0, :, 0, 0] * before.mean.std(dim=(0, 2, 3))
    assert torch.allclose(spread, torch.ones(4), atol=1e-3)
    assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


def test_a_new_autoencoder_learns_and_leaves_a_whole_model(
    tmp_path: Path, small_model: Path
) -> None:
    data = {"world": {"simple": 1, "photos": 1}, "count": 40, "side": 64, "held_out": 8}
    training = _training(
        tmp_path, small_model, widths=[8, 16, 16, 16], steps=40, data=data, crop=32,
        gradient=0.5, validate_every=20,
    )  # fmt: skip
    assert run([training], say=lambda line: None)
    figures = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    scenes = [line["scenes, dB"] for line in figures if "scenes, dB" in line]
    photos = [line["photographs, dB"] for line in figures if "photographs, dB" in line]
    assert len(scenes) == len(photos) == 2
    assert scenes[-1] > 11
    assert scenes[-1] > scenes[0]

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out/model")
    assert tuple(pipeline.vae.config.block_out_channels) == (8, 16, 16, 16)
    assert pipeline.vae.config.scaling_factor == 1.0
    assert pipeline.vae.config.sample_size == 64
    own = StableDiffusionPipeline.from_pretrained(small_model)
    for part in ("unet", "text_encoder"):
        there, here = _state(getattr(own, part)), _state(getattr(pipeline, part))
        assert all(torch.equal(there[name], here[name]) for name in there)
    source = Drawn({"simple": 1.0, "photos": 1.0}, 40, 64)
    pixels = to_tensor(np.stack([source[i].image for i in range(40)]))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_the_decoder_alone_leaves_latents_as_they_are(tmp_path: Path, small_model: Path) -> None:
    training = _training(tmp_path, small_model, decoder_only=True)
    pixels = to_tensor(np.stack([Drawn({"rich": 1.0}, 1, 32)[0].image]))
    task = AutoencoderTask(training, CPU)
    before = _state(task.vae)
    train(task, training, accelerator(training))
    task.export(tmp_path / "model")
    own, made = (
        StableDiffusionPipeline.from_pretrained(folder).vae
        for folder in (small_model, tmp_path / "model")
    )
    with torch.no_grad():
        there, here = own.encode(pixels).latent_dist, made.encode(pixels).latent_dist
    assert torch.equal(there.mean, here.mean)
    assert torch.equal(there.std, here.std)
    moved = {
        name for name, value in _state(task.vae).items() if not torch.equal(value, before[name])
    }
    assert any(name.startswith("decoder") for name in moved)
    assert any(name.startswith("post_quant_conv") for name in moved)
    assert not [name for name in moved if name.startswith(("encoder", "quant_conv"))]
    # What is decoded is the mean: the noise of a batch plays no part.
    rows = dict(task.batch(0, torch.Generator().manual_seed(0)))
    loss = task.loss(rows).item()
    rows["noise"] = 100 * rows["noise"]
    assert task.loss(rows).item() == loss


def test_the_models_autoencoder_goes_on_at_its_own_size(tmp_path: Path, small_model: Path) -> None:
    data = {"world": "rich", "count": 8, "side": 64, "held_out": 2}
    training = _training(tmp_path, small_model, data=data, steps=1)
    task, _ = _trained(training)
    task.export(tmp_path / "model")
    assert json.loads((tmp_path / "model/diffedit.json").read_text())["sides"] == [32, 32]


def test_the_discriminator_comes_in_at_its_step_and_is_resumed(
    tmp_path: Path, small_model: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changes = {"adversarial": 0.1, "adversarial_from": 2, "steps": 5, "save_minutes": 0}
    training = _training(tmp_path / "a", small_model, **changes)
    task = AutoencoderTask(training, CPU)
    assert ["judged" in task.batch(k, torch.Generator()) for k in range(4)] == [
        False, False, True, True,
    ]  # fmt: skip
    rows = dict(task.batch(2, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        whole = float(task.loss(rows))
        del rows["judged"]
        assert whole - float(task.loss(rows)) == pytest.approx(2, abs=0.7)  # hinges of D(x) ≈ 0
    fresh = _state(task.judge)
    report = train(task, training, accelerator(training))
    assert all(math.isfinite(loss) for loss in report.losses)
    assert any(not torch.equal(value, fresh[name]) for name, value in _state(task.judge).items())

    other = _training(tmp_path / "b", small_model, **changes)
    _trained(other, max_minutes=0)
    again, resumed = _trained(other, resume=True)
    assert resumed.losses == report.losses
    assert all(torch.equal(a, b) for a, b in zip(
        _state(again.judge).values(), _state(task.judge).values(), strict=True
    ))  # fmt: skip


def test_a_folder_of_pictures_serves_as_well(tmp_path: Path, small_model: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    data = {"folder": str(folder), "caption": "", "side": 32, "held_out": 2}
    task, _ = _trained(_training(tmp_path, small_model, data=data, steps=1))
    assert set(task.validate()) == {"pictures, dB"}
    assert len(task.pictures_on_disk) == 6
    shown = task.pictures()
    assert [title for title, _ in shown] == ["pictures"] * 2
    assert shown[0][1].shape == (32, 64, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop": 40}, "crops of 40 pixels of pictures of 32"),
        ({"crop": 20}, "multiples of 8"),
        ({"widths": [8, 16, 16]}, "four multiples of 8"),
        ({"widths": [8, 16, 16, 20]}, "four multiples of 8"),
        ({"widths": [8, 8, 8, 8], "decoder_only": True}, "decoder_only keeps"),
        ({"adversarial": 0.1, "crop": 8}, "at least 16"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, small_model: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        AutoencoderTask(_training(tmp_path, small_model, **changes), CPU)
