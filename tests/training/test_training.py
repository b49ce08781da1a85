"""Training can be stopped anywhere, and what it exports loads in plain diffusers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffedit.training.autoencoder import AutoencoderTask, build_autoencoder, to_tensor
from diffedit.training.denoiser import DenoiserTask, Phase
from diffedit.training.export import export, fold_statistics
from diffedit.training.latents import Growth, World
from diffedit.training.loop import Settings, train
from diffedit.training.optim import orthogonalise
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import RICH, SIMPLE, draw_scene
from diffedit.training.text import build_tokenizer

WIDTHS = (8, 8, 8, 8)
PHASES = (
    Phase(0, ((World("simple", SIMPLE, 32), 1.0),)),
    Phase(
        3,
        ((World("simple", SIMPLE, 32), 0.5), (World("rich", RICH, 32), 0.5)),
        rate=0.5,
        focus=0.5,
        floor=0.7,
        backdrop=0.2,
    ),
)


def _task(folder: Path) -> DenoiserTask:
    torch.manual_seed(0)
    captions = [draw_scene(0, i, RICH).caption for i in range(300)]
    return DenoiserTask(
        folder / "pools",
        build_autoencoder(WIDTHS),
        build_tokenizer(captions, folder / "tokenizer"),
        PHASES,
        batch=4,
        widths=(16, 32),
        growth=Growth(size=8, first=1, steps=2, most=3),
        held_out=4,
    )


class _Interrupted(DenoiserTask):
    """Sends its own process SIGTERM in the middle of a step."""

    at: int

    def parts(self, step: int, generator: torch.Generator) -> list[Callable[[], Tensor]]:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().parts(step, generator)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_run_gives_the_same_curve_and_weights(tmp_path: Path) -> None:
    settings = Settings(steps=6, validate_every=3, log_every=2)
    whole, whole_ema = train(_task(tmp_path / "a"), settings, tmp_path / "a.pt", resume=False)
    assert whole.step == 6

    first = _task(tmp_path / "b")
    first.__class__ = _Interrupted
    assert isinstance(first, _Interrupted)
    first.at = 3
    stopped, _ = train(first, settings, tmp_path / "b.pt", resume=True)
    assert stopped.step == 4
    resumed, ema = train(_task(tmp_path / "b"), settings, tmp_path / "b.pt", resume=True)
    assert resumed.losses == whole.losses
    assert resumed.figures == whole.figures
    for name in whole_ema.shadow:
        assert _same(ema.shadow[name], whole_ema.shadow[name])


def test_time_runs_out_resumably(tmp_path: Path) -> None:
    report, _ = train(
        _task(tmp_path), Settings(steps=50, minutes=0.0), tmp_path / "c.pt", resume=False
    )
    assert report.step == 1
    assert (tmp_path / "c.pt").exists()


def test_the_autoencoder_learns(tmp_path: Path) -> None:
    task = AutoencoderTask(tmp_path, pictures=16, batch=4, crop=32, held_out=8, widths=WIDTHS)
    report, _ = train(task, Settings(steps=12, validate_every=100), tmp_path / "v.pt", resume=False)
    assert np.mean(report.losses[-3:]) < 0.8 * np.mean(report.losses[:3])
    assert set(report.figures[-1][1]) == {"scenes_db", "photos_db"}


@torch.no_grad()
def test_folding_the_statistics_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = build_autoencoder(WIDTHS)
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


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 8, 40), (3, 40, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    made = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


def test_the_exported_folder_loads_in_a_plain_pipeline(tmp_path: Path) -> None:
    task = _task(tmp_path)
    tokenizer = build_tokenizer(["a red circle"], tmp_path / "tokenizer")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    vae = build_autoencoder(WIDTHS)
    export(folder, vae, task.text_encoder, tokenizer, task.unet, side=32)
    assert (folder / "README.md").read_text() == "a card"
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    assert all(file.stat().st_size <= 16e6 for file in weights)
    assert not any("_name_or_path" in f.read_text("utf-8") for f in folder.rglob("config.json"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.vae.config.scaling_factor == 1.0
    assert pipeline.safety_checker is None
    made = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert made.shape == (32, 32, 3)
    assert np.isfinite(made).all()
