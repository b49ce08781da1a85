"""Latent consistency: the solver is DDIM, the function has its boundary, and the LoRA samples.

Guidance: the student's error is its distance from what diffusers makes of a guided teacher.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffedit import Editor
from diffedit.errors import InputError
from diffedit.training import card, config
from diffedit.training.config import DistillTraining, Objective
from diffedit.training.denoising import scheduler_for
from diffedit.training.distill import ConsistencyTask, DistillTask, GuidanceTask, boundary
from diffedit.training.loop import accelerator, train
from diffedit.training.parts import new_scheduler
from diffedit.workflow import Pass

CPU = torch.device("cpu")


def _training(tmp_path: Path, model: Path, **changes: Any) -> DistillTraining:
    said: dict[str, Any] = {
        "train": "distill",
        "model": str(model),
        "data": {"world": "simple", "count": 24, "side": 32, "held_out": 6},
        "out": str(tmp_path / "out"),
        "steps": 3,
        "batch": 4,
        "rank": 4,
        "guidance": 3.0,
        "optimiser": {"rate": 1e-2, "warmup": 1},
    }
    file = tmp_path / "training.yaml"
    file.write_text(json.dumps(said | changes), "utf-8")
    return cast(DistillTraining, config.load(file)[0])


def _task(tmp_path: Path, model: Path, **changes: Any) -> ConsistencyTask:
    return ConsistencyTask(_training(tmp_path, model, **changes), CPU)


def _guidance(tmp_path: Path, model: Path, **changes: Any) -> GuidanceTask:
    return GuidanceTask(_training(tmp_path, model, method="guidance", **changes), CPU)


BOTH = pytest.mark.parametrize("make", [_task, _guidance])
Make = Callable[..., DistillTask]


def _stir(task: DistillTask) -> None:
    """Make the additions add something; fresh ones add nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in task.modules["lora"].parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))


def test_the_boundary_is_that_of_diffusers() -> None:
    scheduler = LCMScheduler()
    t = torch.tensor([-1, 0, 1, 19, 999])
    skip, out = boundary(t)
    its = [scheduler.get_scalings_for_boundary_condition_discrete(int(x)) for x in t.clamp_min(0)]
    np.testing.assert_allclose(np.stack([skip, out], axis=1), its, rtol=1e-6)
    assert (float(skip[0]), float(out[0])) == (1.0, 0.0)


@pytest.mark.parametrize("solver_steps", [50, 16, 4])
def test_times_are_those_that_diffusers_samples_at(
    tmp_path: Path, small_model: Path, solver_steps: int
) -> None:
    task = _task(tmp_path, small_model, solver_steps=solver_steps)
    every = set(task.on_grid(torch.arange(1000)).tolist())
    scheduler = task.scheduler()
    assert isinstance(scheduler, LCMScheduler)
    scheduler.set_timesteps(solver_steps)
    assert every == set(scheduler.timesteps.tolist())
    scheduler.set_timesteps(4)
    assert set(scheduler.timesteps.tolist()) <= every
    assert (scheduler.config.prediction_type, scheduler.config.original_inference_steps) == (
        "v_prediction",
        solver_steps,
    )
    signal = task.process.coefficients(torch.arange(1000))[0].square()
    assert torch.allclose(scheduler.alphas_cumprod.double(), signal, atol=1e-6)
    assert float(scheduler.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_of_the_teacher_is_ddims(tmp_path: Path, small_model: Path, guidance: float) -> None:
    task = _task(tmp_path, small_model, guidance=guidance, solver_steps=20)
    _stir(task)
    plain = StableDiffusionPipeline.from_pretrained(small_model)
    scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    scheduler.set_timesteps(20)
    assert {999, 949, 499, 49} <= set(scheduler.timesteps.tolist())
    rows = task.batch(0, torch.Generator().manual_seed(0))
    x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    words = task.latents.words(rows)
    with torch.no_grad():
        empty = plain.encode_prompt("", CPU, 1, False)[0].expand_as(words)
        for t in (999, 949, 499, 49):
            asked, free = (
                plain.unet(x, t, encoder_hidden_states=each).sample for each in (words, empty)
            )
            expected = scheduler.step(free + guidance * (asked - free), t, x).prev_sample
            times = torch.full((4,), t)
            found = task.solved(x, times, times - 50, words)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_picture_is_its_own_end(tmp_path: Path, small_model: Path) -> None:
    task = _task(tmp_path, small_model)
    _stir(task)
    x, words = torch.randn(2, 4, 4, 4), torch.zeros(2, 32, 128)
    with torch.no_grad():
        # Of v that is so by itself; a network that says x_0 would have it wrong.
        task.kind = "sample"
        assert torch.equal(task.end(x, torch.tensor([-1, -1]), words), x)
        task.kind = "v_prediction"
        assert torch.equal(task.end(x, torch.tensor([-1, -1]), words), x)
        later = task.end(x, torch.tensor([999, 19]), words)
    assert bool(torch.isfinite(later).all())
    assert not torch.allclose(later, x, atol=1e-2)


_MEAN, _STD = 0.7, 1.5


def _stub(task: ConsistencyTask, x0_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    """A network whose v-prediction says ``x0_of(x, a, b)``."""

    def predict(x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        a, b = (c.view(-1, 1, 1, 1) for c in task.process.coefficients(t))
        x0 = x0_of(x.double(), a, b)
        # v = a ε - b x_0 with ε = (x - a x_0) / b is (a x - x_0) / b.
        return SimpleNamespace(sample=((a * x - x0) / b).to(x.dtype))

    return predict


def _posterior_mean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _MEAN + a * _STD**2 / (a**2 * _STD**2 + b**2) * (x - a * _MEAN)


def _trajectorys_end(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where the probability flow of N(mean, std²) data leads: quantiles stay what they are."""
    return _MEAN + _STD * (x - a * _MEAN) / (a**2 * _STD**2 + b**2).sqrt()


def test_the_exact_consistency_function_of_gaussian_data_has_no_error(
    tmp_path: Path, small_model: Path
) -> None:
    errors = {}
    for steps in (25, 50):
        task = _task(tmp_path, small_model, solver_steps=steps, guidance=1.0)
        task.teacher = _stub(task, _posterior_mean)
        generator = torch.Generator().manual_seed(0)
        t = task.on_grid(torch.randint(1000, (512,), generator=generator))
        rows = {
            "latents": _MEAN + _STD * torch.randn(512, 4, 4, 4, generator=generator),
            "noise": torch.randn(512, 4, 4, 4, generator=generator),
            "time": t,
            "embeddings": torch.zeros(512, 1, 1),
        }
        for name, x0_of in (("exact", _trajectorys_end), ("mean", _posterior_mean)):
            task.parts.unet = _stub(task, x0_of)
            errors[name, steps] = float(task.errors(rows).mean())
    # What is left is DDIM's own error, of second order in a step's length.
    assert errors["exact", 25] < 0.05 * errors["mean", 25]
    assert errors["exact", 50] < 0.25 * errors["exact", 25]


class _Lines(torch.nn.Module):
    """x_0 = slope x + offset at each grid time; starts as the teacher, as a LoRA does."""

    def __init__(self, task: ConsistencyTask, times: Tensor) -> None:
        super().__init__()
        a, b = task.process.coefficients(times)
        offset = _posterior_mean(torch.zeros_like(a), a, b)
        self.slope = torch.nn.Parameter(_posterior_mean(torch.ones_like(a), a, b) - offset)
        self.offset = torch.nn.Parameter(offset)
        self.coefficients, self.stride = task.process.coefficients, task.stride

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        t = t.expand(len(x))
        slope, offset = (c[t // self.stride].view(-1, 1, 1, 1) for c in (self.slope, self.offset))
        a, b = (c.view(-1, 1, 1, 1) for c in self.coefficients(t))
        x0 = slope * x.double() + offset
        return SimpleNamespace(sample=((a * x - x0) / b).to(x.dtype))


def test_four_steps_come_to_draw_what_the_teacher_draws_in_all_of_its(
    tmp_path: Path, small_model: Path
) -> None:
    task = _task(tmp_path, small_model, solver_steps=8, guidance=1.0)
    task.teacher = _stub(task, _posterior_mean)
    times = task.on_grid(torch.arange(8) * task.stride)
    student = task.parts.unet = _Lines(task, times)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096, 4, 2, 2, generator=generator)
    words = torch.zeros(len(noise), 1, 1)

    @torch.no_grad()
    def in_four_steps() -> Tensor:
        scheduler, x = task.scheduler(), noise
        scheduler.set_timesteps(4)
        draws = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            out = student(x, t, words).sample
            x = scheduler.step(out, t, x, generator=draws).prev_sample
        return x

    with torch.no_grad():
        aim = noise
        for t in times.flip(0):
            now = t.expand(len(noise))
            aim = task.solved(aim, now, now - task.stride, words)
    before = in_four_steps()
    adam = torch.optim.Adam(student.parameters(), lr=0.02)
    count = 64
    for _ in range(300):
        rows = {
            "latents": _MEAN + _STD * torch.randn(count, 4, 2, 2, generator=generator),
            "noise": torch.randn(count, 4, 2, 2, generator=generator),
            "time": task.on_grid(torch.randint(1000, (count,), generator=generator)),
            "embeddings": torch.zeros(count, 1, 1),
        }
        adam.zero_grad()
        task.loss(rows).backward()
        adam.step()
    after = in_four_steps()
    assert aim.std().item() == pytest.approx(_STD, rel=0.2)
    assert abs(before.std() - aim.std()) > 0.3
    assert abs(after.std() - aim.std()) < 0.06
    assert abs(after.mean() - aim.mean()) < 0.06


def test_the_students_error_is_its_distance_from_the_guided_teacher(
    tmp_path: Path, small_model: Path
) -> None:
    task = _guidance(tmp_path, small_model, guidance=3.0)
    _stir(task)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    plain = StableDiffusionPipeline.from_pretrained(small_model)
    t = rows["time"]
    words = rows["embeddings"]
    student = task.parts.unet
    x = plain.scheduler.add_noise(rows["latents"], rows["noise"], t)
    x = task.reached(x, rows["noise"], words, rows["calls"])
    with torch.no_grad():
        empty = plain.encode_prompt("", CPU, 1, False)[0].expand_as(words)
        asked, free = (
            plain.unet(x, t, encoder_hidden_states=each).sample for each in (words, empty)
        )
        guided = free + 3.0 * (asked - free)
        made = student(x, t, encoder_hidden_states=words).sample
        expected = (made - guided).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(task.errors(rows), expected, atol=1e-6, rtol=1e-4)
        assert bool((expected > 1e-4).all())
        # What it is compared with is the teacher alone where nothing is guided.
        alone = _guidance(tmp_path, small_model, guidance=1.0)
        assert float(alone.errors(rows).max()) < 1e-10


def test_most_examples_are_what_the_student_comes_to_by_itself(
    tmp_path: Path, small_model: Path
) -> None:
    task = _guidance(tmp_path, small_model, few=3, batch=24)
    assert task.visited.tolist() == [999, 666, 332]
    rows = task.batch(0, torch.Generator().manual_seed(0))
    times, calls = rows["time"], rows["calls"]
    assert [int((calls == count).sum()) for count in (-1, 0, 1, 2)] == [3, 7, 7, 7]
    assert torch.equal(times[calls >= 0], task.visited[calls[calls >= 0]])
    more = [task.batch(step, torch.Generator().manual_seed(step)) for step in range(40)]
    others = torch.cat([one["time"][one["calls"] < 0] for one in more])  # the rest is of all times
    assert len(others) == 120
    assert (others < 250).float().mean() == pytest.approx(0.25, abs=0.1)
    assert (others > 750).float().mean() == pytest.approx(0.25, abs=0.1)
    again = task.batch(0, torch.Generator().manual_seed(0))
    assert all(torch.equal(rows[name], again[name]) for name in rows)


@pytest.mark.parametrize("target", ["v_prediction", "flow_prediction"])
def test_what_the_student_comes_to_is_what_diffusers_pipeline_comes_to(
    tmp_path: Path, small_model: Path, target: str
) -> None:
    model = small_model if target == "v_prediction" else _flow(small_model, tmp_path / "flow")
    task = _guidance(tmp_path, model, few=4, batch=8)
    _stir(task)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    calls, words = rows["calls"], rows["embeddings"]
    x_t, _ = task.latents.noised(rows)
    found = task.reached(x_t, rows["noise"], words, calls)
    assert not found.requires_grad
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.unet, pipe.scheduler = task.parts.unet, task.scheduler()
    pipe.set_progress_bar_config(disable=True)
    assert {*calls.tolist()} == {-1, 0, 1, 2, 3}
    passed: list[Tensor] = []

    def noted(_pipe: Any, _step: int, _time: Tensor, known: dict[str, Any]) -> dict[str, Any]:
        passed.append(known["latents"])
        return known

    for row, count in enumerate(calls.tolist()):
        passed[:] = [rows["noise"][row : row + 1]]
        pipe(
            prompt_embeds=words[row : row + 1],
            latents=passed[0],
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=noted,
        )
        expected = x_t[row] if count < 0 else passed[count][0]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def _flow(model: Path, folder: Path) -> Path:
    """The same as a rectified flow."""
    shutil.copytree(model, folder)
    made = scheduler_for(Objective(target="flow_prediction"), new_scheduler())
    shutil.rmtree(folder / "scheduler")
    made.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(made).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class _Worded(torch.nn.Module):
    """What is asked for is N(mean word, std²) for a word w in {-1, 0, 1}; x_0 is linear in both.

    ``slope`` x + ``offset`` w at each of some levels of noise; starts as the posterior mean.
    """

    LEVELS = 20

    def __init__(self, task: GuidanceTask) -> None:
        super().__init__()
        self.coefficients = task.process.coefficients
        a, b = self.coefficients(torch.arange(0, 1000, 1000 // self.LEVELS))
        gain = a * _STD**2 / (a**2 * _STD**2 + b**2)
        self.slope = torch.nn.Parameter(gain)
        self.offset = torch.nn.Parameter(_MEAN * (1 - gain * a))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        t = t.expand(len(x))
        level = t // (1000 // self.LEVELS)
        slope, offset = (c[level].view(-1, 1, 1, 1) for c in (self.slope, self.offset))
        a, b = (c.view(-1, 1, 1, 1) for c in self.coefficients(t))
        x0 = slope * x.double() + offset * encoder_hidden_states.view(-1, 1, 1, 1)
        return SimpleNamespace(sample=((a * x - x0) / b).to(x.dtype))


def test_four_steps_alone_come_to_draw_what_the_teacher_draws_guided(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _guidance(tmp_path, small_model, guidance=3.0)
    monkeypatch.setattr(task.latents.cache, "empty", lambda: (None, torch.zeros(1, 1, 1)))
    task.teacher = cast(Any, _Worded(task))
    task.parts.unet = student = _Worded(task)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2048, 4, 2, 2, generator=generator)
    words = torch.ones(len(noise), 1, 1)

    @torch.no_grad()
    def in_four_steps(predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        scheduler, x = task.scheduler(), noise
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, student(x, t, words).sample)

    aim = in_four_steps(lambda x, t: task.guided(x, t.expand(len(x)), words))
    before = in_four_steps(alone)
    adam = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(400):
        count = 64
        asked = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1
        rows = {
            "latents": _MEAN * asked.unsqueeze(1)
            + _STD * torch.randn(count, 4, 2, 2, generator=generator),
            "noise": torch.randn(count, 4, 2, 2, generator=generator),
            "time": torch.randint(1000, (count,), generator=generator),
            "embeddings": asked,
        }
        adam.zero_grad()
        task.loss(rows).backward()
        adam.step()
    after = in_four_steps(alone)
    assert aim.mean() > before.mean() + 0.5
    assert abs(after.mean() - aim.mean()) < 0.05
    assert abs(after.std() - aim.std()) < 0.05


def test_guidance_is_distilled_from_flows_too(tmp_path: Path, small_model: Path) -> None:
    flow = _flow(small_model, tmp_path / "flow")
    task = _guidance(tmp_path, flow)
    _stir(task)
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(task.errors(rows)).all())
    scheduler = task.scheduler()
    scheduler.set_timesteps(4)
    assert torch.allclose(task.process.timestep(task.visited).float(), scheduler.timesteps.float())
    assert int(torch.isin(rows["time"], task.visited.to(rows["time"])).sum()) == 3
    task.export(tmp_path / "model")
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "model/fused")
    assert type(fused.scheduler) is UniPCMultistepScheduler
    assert fused.scheduler.config.use_flow_sigmas
    with pytest.raises(InputError, match="is a flow: method consistency takes models with"):
        _task(tmp_path, flow)


@BOTH
def test_the_teacher_shares_the_weights_and_not_the_additions(
    tmp_path: Path, small_model: Path, make: Make
) -> None:
    task = make(tmp_path, small_model)
    x, t, words = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 32, 128)
    with torch.no_grad():
        before = task.teacher(x, t, encoder_hidden_states=words).sample
        assert torch.allclose(task.parts.unet(x, t, encoder_hidden_states=words).sample, before)
        _stir(task)
        after = task.parts.unet(x, t, encoder_hidden_states=words).sample
        assert torch.equal(task.teacher(x, t, encoder_hidden_states=words).sample, before)
    assert not torch.allclose(after, before, atol=1e-3)
    own = {id(value) for value in task.parts.unet.parameters()}
    assert all(id(value) in own for value in task.teacher.parameters())


@BOTH
def test_only_the_additions_are_trained_and_kept(
    tmp_path: Path, small_model: Path, make: Make
) -> None:
    task = make(tmp_path, small_model, steps=6, ema=0.5, optimiser={"rate": 5e-3})
    training = task.training
    before = task.validate()["validation loss"]
    weights = {k: v.clone() for k, v in task.teacher.state_dict().items()}
    report = train(task, training, accelerator(training))
    assert all(torch.equal(v, weights[k]) for k, v in task.teacher.state_dict().items())
    kept = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["modules"]
    assert set(kept) == {"lora"}
    assert all("lora" in name for name in kept["lora"])
    trained = sum(value.numel() for value in task.modules["lora"].parameters())
    assert sum(value.numel() for value in kept["lora"].values()) == trained
    assert report.figures[-1][1]["validation loss"] < before


@pytest.mark.parametrize(
    ("make", "solver", "name"),
    [
        (partial(_task, solver_steps=20), LCMScheduler, "lcm"),
        (_guidance, UniPCMultistepScheduler, "unipc"),
    ],
)
def test_the_result_samples_in_four_steps(
    tmp_path: Path, small_model: Path, make: Make, solver: Any, name: str
) -> None:
    task = make(tmp_path, small_model, prompts=["a red circle"])
    _stir(task)
    (title, own), *_ = task.pictures()
    assert title == "a red circle"
    task.export(tmp_path / "model")
    assert not list(tmp_path.glob(".model*"))
    about = json.loads((tmp_path / "model/diffedit.json").read_text())
    assert (about["scheduler"], about["steps"], about["guidance"]) == (name, 4, 1.0)
    note = (tmp_path / "model/README.md").read_text()
    assert f"{solver.__name__}.from_pretrained" in note
    assert f'scheduler "{name}"' in note

    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "model/fused")
    loaded = StableDiffusionPipeline.from_pretrained(small_model)
    loaded.load_lora_weights(tmp_path / "model")
    loaded.scheduler = solver.from_pretrained(tmp_path / "model/scheduler")
    x, t, words = torch.randn(1, 4, 4, 4), torch.tensor([999]), torch.randn(1, 32, 128)
    with torch.no_grad():
        expected = task.parts.unet(x, t, encoder_hidden_states=words).sample
        for pipeline in (fused, loaded):
            found = pipeline.unet(x, t, encoder_hidden_states=words).sample
            assert float((found - expected).abs().max()) < 0.003 * float(expected.abs().max())
    for pipeline in (fused, loaded):
        assert type(pipeline.scheduler) is solver
        if name == "lcm":
            assert pipeline.scheduler.config.original_inference_steps == 20
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            "a red circle",
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        assert np.abs(255 * made - own).mean() < 3


def test_diffedit_takes_the_whole_model(tmp_path: Path, small_model: Path) -> None:
    task = _task(tmp_path, small_model)
    task.export(tmp_path / "model")
    editor = Editor.load(tmp_path / "model/fused", device="cpu")
    assert editor.model.info["scheduler"] == "LCMScheduler"
    for name in (None, "lcm"):
        schedule = editor.model.schedule(name, 4)
        assert [int(schedule.call(i).timestep) for i in range(4)] == [999, 759, 499, 259]
    made = editor.run(None, Pass(prompt="a red circle", steps=4, guidance=1.0))
    assert made.image.size == (32, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"few": 9, "solver_steps": 8}, "few 9 is more than solver_steps 8"),
        ({"method": "guidance", "solver_steps": 8}, "solver_steps: of method consistency"),
        ({"method": "magic"}, "method"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, small_model: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        _task(tmp_path, small_model, **changes)


@BOTH
def test_the_card_tells_how_it_was_made(tmp_path: Path, small_model: Path, make: Make) -> None:
    task = make(tmp_path, small_model)
    how = task.training
    train(task, how, accelerator(how))
    told = card.history(how.out)
    assert (told["train"], told["steps"]) == ("distill", 3)
    assert told["settings"].get("method", "consistency") == how.method
    assert told["settings"]["guidance"] == 3.0
