"""The one-page example runs, repeats itself, and its sampler is diffusers' own."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor

from diffedit.training.process import Diffusion, linear


@pytest.fixture(scope="module")
def example(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddpm", root / "examples" / "ddpm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pictures(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for index in range(count):
        side = 20 + 4 * index
        ramp = Image.linear_gradient("L").resize((side, 24)).rotate(90 * index)
        Image.merge("RGB", [ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp]).save(
            folder / f"{index}.png"
        )
    return folder


def test_it_learns_four_pictures_and_says_how_well(
    tmp_path: Path, example: ModuleType, monkeypatch: Any, capsys: Any
) -> None:
    folder = _pictures(tmp_path / "in")
    arguments = [
        "--size=16", "--width=8", "--timesteps=12", "--steps=40", "--batch=4", "--lr=0.003",
        "--samples=4", "--device=cpu",
    ]  # fmt: skip
    told = []
    for run in ("a", "b"):
        out = tmp_path / run
        monkeypatch.setattr(sys, "argv", ["ddpm.py", str(folder), f"--out={out}", *arguments])
        example.main()
        told.append(capsys.readouterr().out.replace(str(out), "OUT"))
    assert told[0] == told[1]
    before, after = (float(bits) for bits in re.findall(r"([\d.]+) bits/dim", told[0]))
    assert after < before - 0.1
    assert (tmp_path / "a/samples.png").read_bytes() == (tmp_path / "b/samples.png").read_bytes()
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "a/model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=12).images[0].size == (16, 16)
    betas = torch.tensor(pipeline.scheduler.config["trained_betas"])
    torch.testing.assert_close(betas, linear(12).float())


def test_sampling_is_algorithm_2_as_diffusers_has_it(example: ModuleType) -> None:
    process = Diffusion(linear(20, 0.01, 0.3))
    torch.manual_seed(0)
    unet = example.build(16, 8).eval()
    scheduler = DDPMScheduler(20, trained_betas=process.betas.tolist(), clip_sample=True)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    ours: Tensor = example.sample(unet, process, 2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_a_folder_without_pictures_is_named(tmp_path: Path, example: ModuleType) -> None:
    with pytest.raises(SystemExit, match="0 pictures; at least 2 are needed"):
        example.load(tmp_path, 16)
