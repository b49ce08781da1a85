"""The benchmarks run, and count what they say they count. Nothing here depends on the clock."""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import full_size, measure, offload, races, report, scenes, sizes, speed, training
from bench.measure import Contestant, Ratio
from bench.report import Report
from diffedit.models import holding
from diffedit.training.world.source import Drawn


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    out = tmp_path_factory.mktemp("bench") / "out.json"
    said = ["--what", "inpaint,img2img,nothing,bf16,engine", "--model", "nano", "--side", "128"]
    threads = torch.get_num_threads()  # several, on a busy machine, wait for each other
    try:
        found = speed.main(
            [*said, "--rounds", "1", "--steps", "2", "--threads", "1", "--json", str(out)]
        )
    finally:
        torch.set_num_threads(threads)
    written = json.loads(out.read_text("utf-8"))
    assert [one["title"] for one in written["reports"]] == [one.title for one in found]
    assert all(one.markdown() in out.with_suffix(".md").read_text("utf-8") for one in found)
    return found


def works(report: Report) -> list[str]:
    return [one["work"] for one in report.data["contestants"]]


def test_both_sides_of_inpainting_do_the_work_of_the_same_crop(
    reports: list[Report],
) -> None:
    ours, full, crop = works(reports[0])
    assert ours.startswith("2 × 2×4×14×14; VAE 1 in, 1 out")
    assert crop.split(";")[0] == ours.split(";")[0]
    assert full.startswith("2 × 2×4×16×16")


def test_both_sides_of_image_to_image_do_the_same_work(reports: list[Report]) -> None:
    assert set(works(reports[1])) == {"1 × 2×4×16×16; VAE 1 in, 1 out"}


def test_both_sides_of_a_picture_from_nothing_do_the_same_work(
    reports: list[Report],
) -> None:
    (work,) = set(works(reports[2]))
    assert work.startswith("4 × 2×4×")  # twice the steps, guided
    assert work.endswith("VAE 0 in, 1 out")


def test_lower_precision_makes_another_picture_by_the_same_work(
    reports: list[Report],
) -> None:
    exact, rough, *_ = works(reports[3])
    assert exact == rough
    assert "dB" in reports[3].notes[0]
    assert "inf" not in reports[3].notes[0]


def test_the_engine_is_measured_with_every_kind_of_edit(reports: list[Report]) -> None:
    assert {"no edit", "inpaint (keep)", "a refine"} < set(reports[4].data)


def test_contestants_take_turns() -> None:
    said: list[str] = []
    a, b = Contestant("a", lambda: said.append("a")), Contestant("b", lambda: said.append("b"))
    measure.race([a, b], rounds=2)
    assert said == ["a", "b"] * 3
    assert len(a.seconds) == len(b.seconds) == 2


def test_a_ratio_is_taken_within_each_round() -> None:
    slow, quick = Contestant("slow", list), Contestant("quick", list)
    slow.seconds, quick.seconds = [2.0, 30.0, 4.0], [1.0, 10.0, 1.0]
    slow.cpu, quick.cpu = [1.0, 1.0, 9.0], [1.0, 2.0, 1.0]
    assert measure.ratios(slow, quick) == (
        Ratio("slow", "quick", "clock", 3.0, 2.0, 4.0),
        Ratio("slow", "quick", "CPU", 1.0, 0.5, 9.0),
    )


def test_watching_leaves_the_components_as_they_were() -> None:
    from diffedit.testing import tiny_pipeline

    pipe = tiny_pipeline()
    before = set(vars(pipe.unet)), set(vars(pipe.vae))
    with measure.Meter(pipe).watching():
        assert "forward" in vars(pipe.unet)
    assert (set(vars(pipe.unet)), set(vars(pipe.vae))) == before


def test_a_command_that_fails_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code"):
        measure.cpu_seconds(["/bin/sh", "-c", "exit 3"])


def test_the_mask_covers_what_it_says() -> None:
    mask = races.square_mask(768)
    white = sum(mask.convert("1").histogram()[255:])
    assert white / 768**2 == pytest.approx(races.COVERED, rel=0.01)


def test_the_readme_takes_the_tables_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n", "utf-8")
    monkeypatch.setattr(report, "README", copy)
    report.into_readme("new")
    assert copy.read_text("utf-8") == "a\n<!-- results -->\n\nnew\n<!-- /results -->\nb\n"


def test_both_loops_train_the_same_from_the_same_start(tmp_path: Path) -> None:
    options = training.parsed(["--side", "64", "--batch", "8", "--count", "8", "--warmup", "1"])
    with training.running(["diffedit", "plain-1"], tmp_path, options) as runners:
        for runner in runners.values():
            runner.turn(1)
    ours, plain = runners.values()
    for one in (ours, plain):
        assert len(one.contestant.seconds) == 1  # the first step is not timed
        assert len(one.losses) == 2
        assert one.peak > 100
    # The same weights and pictures; noise and timesteps are each loop's own.
    assert 0.5 < ours.losses[0] / plain.losses[0] < 2


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_models_of_full_size_have_it(name: str) -> None:
    billions = {"sd15": 0.860, "sdxl": 2.567, "flux": 11.901}  # of the published denoisers
    size = sizes.MODELS[name]
    model = size.model(sizes.made(size, torch.device("meta")), name)
    assert model.denoiser.num_parameters() / 1e9 == pytest.approx(billions[name], abs=0.001)
    assert model.dtype == size.dtype
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["nano-sd15", "nano-sdxl", "nano-flux"])
def test_both_sides_of_a_full_size_run_do_the_same_work(name: str) -> None:
    options = {"device": "cpu", "steps": 3, "rounds": 1, "compile": ""}
    bench = full_size.Bench(name, argparse.Namespace(**options))
    for task in ("text2img", "img2img", "inpaint"):
        ours, *theirs = bench.measured(task)
        assert {ours.work} == {one.work for one in theirs}
        assert ours.work.startswith("1 ×" if "sd" in name and task == "img2img" else ("3 ×", "2 ×"))
        assert all(len(one.step_ms) == len(one.seconds) == 1 for one in (ours, *theirs))
        assert "diffusers" in full_size.table("t", [ours, *theirs])
    assert "decode" not in vars(bench.pipe.vae)


def test_ratios_of_steps_are_taken_within_each_round() -> None:
    slow, quick = (full_size.Side(name, list) for name in ("diffusers", "diffedit"))
    slow.step_ms, quick.step_ms = [2.0, 30.0, 4.0], [1.0, 10.0, 1.0]
    assert full_size.ratio(slow, quick) == "3.00× (2.00–4.00)"
    slow.seconds = quick.seconds = [1.0] * 3
    assert "≥ 1.05× asked, 3.00×: reached" in full_size.table("t", [quick, slow])
    slow.step_ms = quick.step_ms
    assert "≥ 1.05× asked, 1.00×: NOT REACHED" in full_size.table("t", [quick, slow])


def test_room_for_weights_is_what_a_model_takes_less_of_the_device() -> None:
    whole, half, none = (offload.costs("nano-sd15", share) for share in offload.SHARES)
    assert whole.weights > 1.8 * half.weights > 10 * none.weights
    # What is computed takes the same; a layer's copy comes on top.
    assert 0 <= (none.call - none.weights) - (whole.call - whole.weights) < 0.2 * whole.weights
    # What is away of the denoiser travels at each call of it, and nothing else does.
    assert whole.copied == 0
    assert half.copied is not None
    assert none.copied is not None
    assert 0.3 * none.copied < half.copied < 0.6 * none.copied
    size = sizes.MODELS["nano-sd15"]
    unet = size.make().unet
    layers = (one for one in unet.modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d))
    held = sum(one.nbytes for layer in layers for one in layer.parameters(recurse=False))
    wide = torch.float32.itemsize / size.dtype.itemsize
    assert none.copied == held / wide
    assert "| nano | 0% |" in offload.table({"nano": [whole, half, none]})


def test_calls_on_the_cpu_are_timed_with_weights_that_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    usual = holding._copies

    def noted(layer: Any) -> Any:
        weight, bias = usual(layer)
        copied.append(weight.nbytes + (0 if bias is None else bias.nbytes))
        return weight, bias

    monkeypatch.setattr(holding, "_copies", noted)
    offload.main(["--cpu", "--model", "nano-sd15", "--rounds", "2", "--out", str(tmp_path)])
    assert holding._copies is noted
    (file,) = tmp_path.iterdir()
    took = json.loads(file.read_text("utf-8"))["ms"]["nano-sd15"]
    assert {share: len(some) for share, some in took.items()} == {"1.0": 2, "0.5": 2, "0.0": 2}
    size = replace(sizes.MODELS["nano-sd15"], dtype=torch.bfloat16)
    unet = size.make().unet.to(torch.bfloat16)
    layers = (one for one in unet.modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d))
    held = sum(one.nbytes for layer in layers for one in layer.parameters(recurse=False))
    assert held < sum(copied) / 3 < 2 * held  # all of them with no room, some with half
    layer = torch.nn.Linear(2, 2)
    with offload._copied():
        weight, _ = holding._copies(layer)
        assert weight.data_ptr() != layer.weight.data_ptr()
    told = offload.timed("x", {1.0: [10.0, 20.0, 30.0], 0.0: [20.0, 30.0, 30.0]})
    assert told.endswith("| x | 0% | 30 | 1.50× (1.00–2.00) |")


def test_scenes_are_counted_and_in_each_round_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []
    clock = itertools.count(step=4)

    class Noted(Drawn):
        def __getitem__(self, index: int) -> Any:
            drawn.append((next(iter(self.shares)), self.first + index))
            return super().__getitem__(index)

    monkeypatch.setattr(scenes, "Drawn", Noted)
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    scenes.main(["--side", "64", "--count", "2", "--rounds", "3", "--out", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rates = json.loads(file.read_text("utf-8"))["scenes a CPU second"]
    assert rates == {
        world: [0.5] * 3 for world in ("plain", "simple", "pairs", "rich", "views", "photos")
    }
    assert drawn == [(world, number) for world in rates for number in range(6)]
