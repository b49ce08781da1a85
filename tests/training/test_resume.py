"""Every kind of training: stopped and gone on with, and by several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffedit.training import config
from diffedit.training.loop import Report, Task, accelerator, train
from diffedit.training.stages import build

KINDS: dict[str, dict[str, Any]] = {
    "denoiser": {"train": "denoiser", "ema": 0.5},
    "denoiser of new words": {"train": "denoiser", "text": "new", "widths": [16, 32]},
    "rectified flow": {"train": "denoiser", "objective": {"target": "flow_prediction"}},
    "controlnet": {"train": "controlnet", "kind": ["canny", "depth"]},
    "lora": {"train": "lora", "text": True},
    "word": {"train": "textual_inversion", "token": "<new>", "like": "red"},
    "consistency": {"train": "distill", "solver_steps": 20},
    "guidance": {"train": "distill", "method": "guidance"},
    "autoencoder": {"train": "autoencoder", "crop": 32, "adversarial": 0.1},
}


def training(model: Path, out: Path, name: str, **changes: Any) -> config.Training:
    said: dict[str, Any] = {
        "model": str(model),
        "data": {"world": "rich", "count": 16, "side": 32, "held_out": 4},
        "out": str(out),
        "steps": 4,
        "batch": 4,
        "seed": 3,
        "device": "cpu",
        "precision": "fp32",
        "optimiser": {"rate": 1e-3, "warmup": 2, "decay": 0.5},
    }
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(said | KINDS[name] | changes), "utf-8")
    return config.load(file)[0]


def trained(how: config.Training, **options: Any) -> tuple[Task, Report, list[int]]:
    """The task, what was told, and the numbers of the batches that were asked for."""
    task: Any = build(how, torch.device("cpu"))
    asked, batch = [], task.batch

    def counted(step: int, generator: torch.Generator) -> Any:
        asked.append(step)
        return batch(step, generator)

    task.batch = counted
    return task, train(task, how, accelerator(how), **options), asked


def weights(task: Task) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.detach()
        for part, module in task.modules.items()
        for name, value in module.named_parameters()
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    small_model: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole_task, whole, _ = trained(training(small_model, tmp_path / "whole", name))
    how = training(small_model, tmp_path / "parts", name)
    assert trained(how, max_minutes=0)[1].step == 1
    task, report, asked = trained(how, resume=True)
    assert asked == [1, 2, 3]
    assert report.finished
    assert len(report.losses) == 4
    assert report.losses == pytest.approx(whole.losses, abs=1e-6)
    assert "are others than at its start" not in caplog.text
    there = weights(whole_task)
    for key, value in weights(task).items():
        torch.testing.assert_close(value, there[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "autoencoder", "lora of an encoder"])
def test_data_that_have_changed_since_are_told(
    small_model: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    data = tmp_path / "pictures"
    data.mkdir()
    numbers = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(numbers):
        Image.fromarray(pixels).save(data / f"{number:02}.png")
        (data / f"{number:02}.txt").write_text("a red circle", "utf-8")
    how = training(
        model, tmp_path / "out", name.partition(" ")[0],
        data={"folder": str(data), "side": 32, "held_out": 4},
    )  # fmt: skip
    assert trained(how, max_minutes=0)[1].step == 1
    if name == "lora of an encoder":
        vae = model / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(vae)
        save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 0.5}, vae)
    else:
        (data / "03.png").unlink()
        (data / "03.txt").unlink()
    assert trained(how, resume=True)[1].finished
    (told,) = [text for text in caplog.messages if "are others than at its start" in text]
    assert told.startswith(f"{how.out / 'checkpoint.pt'}: ")


def test_two_processes_of_the_command_train_what_one_does(
    small_model: Path, tmp_path: Path
) -> None:
    """As docs/training.md starts them; latents are made once, the result is written once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    made = {}
    for count in (1, 2):
        out = tmp_path / f"of {count}"
        training(small_model, out, "lora", text=False)
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(20_000 + os.getpid() % 20_000)]
        command = [sys.executable, *launch, "-m", "diffedit", "train", f"{out}.yaml"]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        made[count] = losses, load_file(out / "model" / "pytorch_lora_weights.safetensors")
    (alone, one), (shared, two) = made[1], made[2]
    assert len(alone) == len(shared) == 4
    assert shared == pytest.approx(alone, rel=1e-4)
    assert any(bool(value.any()) for key, value in one.items() if "lora_B" in key)
    for key, value in two.items():
        torch.testing.assert_close(value.float(), one[key].float(), atol=2e-3, rtol=2e-2)
