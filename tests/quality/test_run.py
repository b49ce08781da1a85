"""The benchmark as it is run: a handful of cases through every engine, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from bench.quality import __main__ as command
from bench.quality import pictures
from bench.quality.cases import Case, balanced, cases
from bench.quality.engines import ENGINES, Bench, Few, Ours, Theirs
from diffedit import Editor

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")

FAST = ["--steps", "2", "--workers", "1", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()  # several, on a busy machine, wait for each other
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Editor.load(device="cpu", dtype="float32"), steps=1)


def first(category: str, **having: Any) -> Case:
    return next(
        case
        for case in cases()
        if case.category == category and all(getattr(case, k) == v for k, v in having.items())
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    assert command.main(["--out", str(out), "--limit", "9", *FAST]) == 0
    kept = next(out.glob("*-quality.json"))
    return out, json.loads(kept.read_text("utf-8"))


def test_a_run_leaves_figures_a_table_a_page_and_a_sheet(run: tuple[Path, dict[str, Any]]) -> None:
    out, results = run
    about = results["about"]
    assert (about["cases"], about["limit"], about["steps"]) == (9, 9, 2)
    assert next(out.glob("*-quality.json")).name == (
        f"{about['date']}-{about['commit']}-quality.json"
    )
    told = {(r["category"], r["measure"]): r["engines"] for r in results["rows"]}
    assert told["every mask", "nothing outside"]["diffedit"][0] == 1
    assert told["every mask", "nothing outside"]["diffusers"][0] == 0
    assert told["every mask", "seam"].keys() >= {"diffedit", "diffusers"}
    assert told["replace", "colour"]["source"][0] == 0
    assert told["replace", "shape"]["drawn answer"][0] == 1
    assert told["autoencoder", "PSNR, dB"]["diffedit"][0] > 20
    tables = next(out.glob("*-quality.md")).read_text("utf-8")
    assert "| nothing changed outside the mask | 1.00" in tables
    assert f"commit {about['commit']}" in tables
    html = (out / "index.html").read_text("utf-8")
    assert html.count("data:image/webp;base64,") > 20
    with Image.open(out / "grid.png") as sheet:
        assert min(sheet.size) > 200


def test_cases_that_the_model_cannot_understand_are_counted(
    run: tuple[Path, dict[str, Any]], bench: Bench
) -> None:
    results = run[1]
    declined = sum(d["cases"] for d in results["declined"] if d["engine"] == "diffedit")
    assert results["about"]["made"] == results["about"]["cases"] - declined
    unknown = replace(first("recolour"), prompts=("a zebra on a green background",))
    assert bench.unknown(unknown) == ["zebra"]
    for name in ("diffedit", "diffusers", "drawn answer"):
        assert "zebra" in ENGINES[name](bench).declines(unknown)
    assert not bench.unknown(first("recolour"))


def test_a_finished_run_is_not_made_again(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = run

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("a picture was made again")

    monkeypatch.setattr(command, "one", never)
    assert command.main(["--out", str(out), "--limit", "9", *FAST]) == 0
    again = json.loads(next(out.glob("*-quality.json")).read_text("utf-8"))
    assert again["rows"] == results["rows"]
    assert again["values"] == results["values"]


def test_a_folder_holds_one_run(run: tuple[Path, dict[str, Any]]) -> None:
    other = ["--steps", "3", "--workers", "1", "--threads", "1"]
    with pytest.raises(SystemExit, match="holds a run with steps 2, this one's is 3"):
        command.main(["--out", str(run[0]), "--limit", "9", *other])


class Killed(BaseException):
    """As a signal comes: nothing that runs handles it."""


def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []
    real = command.one

    def counted(after: int) -> Callable[..., dict[str, Any]]:
        def one(bench: Bench, case: Case, engine: Any, thumbs: Path) -> dict[str, Any]:
            if len(made) == after:
                raise Killed
            made.append((case.id, engine.name))
            return real(bench, case, engine, thumbs)

        return one

    arguments = ["--out", str(tmp_path), "--limit", "2", "--engines", "diffedit;source", *FAST]
    monkeypatch.setattr(command, "one", counted(2))
    with pytest.raises(Killed):
        command.main(arguments)
    file = tmp_path / "records-0.jsonl"
    before = file.read_text("utf-8").splitlines()
    assert len(before) == 2
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"case": "replace-000", "engi')
    monkeypatch.setattr(command, "one", counted(1000))
    assert command.main(arguments) == 0
    after = file.read_text("utf-8").splitlines()
    assert after[:2] == before
    assert len(made) == len(set(made)) == len(after) == 3  # two cases, one of them with a source
    assert all(json.loads(line)["values"] for line in after)


def test_the_card_takes_the_figures_of_a_run(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text('{"training": [], "old": 1}', "utf-8")
    out, results = run
    records = [json.loads(line) for line in (out / "records-0.jsonl").read_text().splitlines()]
    made = {one["case"] for one in records if one["engine"] == "diffedit" and one.get("values")}
    assert results["about"]["made"] == len(made)
    # Of those asked some may be declined, such as hints that the model has no net for.
    results = results | {"about": results["about"] | {"made": 7}}
    command.put_into_card(tmp_path, results)
    kept = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert set(kept) == {"training", "benchmark"}
    assert "values" not in kept["benchmark"]
    assert ": 7 seeded cases" in (tmp_path / "README.md").read_text("utf-8")


# --- engines --------------------------------------------------------------------------------------


def test_an_edit_changes_its_mask_and_nothing_else(bench: Bench) -> None:
    case = first("replace", group="drawn")
    before, made = pictures.source(case, bench.native), Ours(bench).make(case)
    changed = (before != made).any(axis=-1)
    where = pictures.mask(case, 0, bench.native)
    assert changed[where].mean() > 0.5
    again = Ours(bench).make(case)
    assert np.array_equal(made, again)


def test_diffusers_is_asked_the_same_on_the_same_weights(bench: Bench) -> None:
    theirs = Theirs(bench)
    pipe = bench.pipeline("StableDiffusionInpaintPipeline")
    assert pipe.unet is bench.parts.unet
    assert pipe.scheduler is not bench.parts.scheduler
    asked = theirs.common(first("replace"), 0)
    assert asked["num_inference_steps"] == bench.steps
    assert asked["guidance_scale"] == bench.guidance
    assert asked["prompt"] == first("replace").prompts[0]
    assert theirs.declines(first("restyle", group="by a reference")).startswith("none")


def test_without_the_edit_is_without_it(bench: Bench) -> None:
    bare = ENGINES["without the edit"](bench)
    case = first("restyle", group="by a reference")
    assert bare.declines(first("replace")) == "not asked"
    assert not bare.declines(case)
    assert [type(one).__name__ for one in Ours(bench).edits(case, 0)] == ["Img2Img", "Style"]
    assert [type(one).__name__ for one in bare.edits(case, 0)] == ["Img2Img"]  # type: ignore[attr-defined]


def test_a_hint_goes_through_the_model_s_own_net_on_both_sides(
    bench: Bench, tmp_path: Path
) -> None:
    case = first("restructure", hint="canny")
    assert Ours(bench).declines(case) == "no net" or bench.net("canny") is not None
    folder = tmp_path / "model"
    shutil.copytree(bench.source, folder, ignore=shutil.ignore_patterns("controlnet"))
    net = ControlNetModel.from_unet(bench.parts.unet)
    net.save_pretrained(folder / "controlnet" / "canny")
    own = Bench(Editor.load(folder, device="cpu", dtype="float32"), steps=2)
    bare, ours, theirs = ENGINES["without the edit"](own), Ours(own), Theirs(own)
    assert [one.declines(case) for one in (ours, bare, theirs)] == ["", "", ""]
    assert np.array_equal(ours.make(case), bare.make(case))  # its last layers are zero
    with torch.no_grad():
        for layer in net.controlnet_down_blocks:
            torch.nn.init.normal_(layer.weight, std=0.1)
    net.save_pretrained(folder / "controlnet" / "canny")
    own = Bench(Editor.load(folder, device="cpu", dtype="float32"), steps=2)
    assert not np.array_equal(Ours(own).make(case), bare.make(case))
    assert Theirs(own).make(case).shape == (own.native, own.native, 3)
    assert Theirs(own).declines(first("restructure", hint="depth")) == "no net"


def test_a_network_for_inpainting_leads_both_sides(bench: Bench, tmp_path: Path) -> None:
    case = next(one for one in cases() if one.category == "replace" and one.lot % 2 == 0)
    folder = tmp_path / "model"
    shutil.copytree(bench.source, folder, ignore=shutil.ignore_patterns("controlnet"))
    bare = Bench(Editor.load(folder, device="cpu", dtype="float32"), steps=2)
    digest = command._digest(bare)
    net = ControlNetModel.from_unet(bench.parts.unet)
    for layer in net.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1)
    net.save_pretrained(folder / "controlnet" / "inpaint")
    led = Bench(Editor.load(folder, device="cpu", dtype="float32"), steps=2)
    assert command._digest(led) != digest
    outside = ~led.mask(case, 0)
    before = pictures.source(case, led.native)
    for make in (Ours, Theirs, ENGINES["diffusers, crop"]):
        assert not make(led).declines(case)
        with_it, without = make(led).make(case), make(bare).make(case)
        assert not np.array_equal(with_it, without)
        assert np.abs(with_it.astype(int) - before)[outside].mean() < 20


def test_a_distillation_is_run_with_its_own_steps(bench: Bench, tmp_path: Path) -> None:
    case = first("replace")
    plain = Bench(bench.editor, steps=4, scheduler="unipc")
    assert np.array_equal(Few(bench).make(case), Ours(plain).make(case))
    unet = Editor.load(device="cpu", dtype="float32").model.pipe.unet  # type: ignore[attr-defined]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # at its start it changes nothing
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    told = {"steps": 2, "guidance": 1.0, "scheduler": "ddim"}
    (tmp_path / "diffedit.json").write_text(json.dumps(told), "utf-8")
    few = Few(Bench(bench.editor, steps=1, few=tmp_path))
    assert not few.declines(case)
    as_told = Bench(bench.editor, steps=2, guidance=1.0, scheduler="ddim")
    assert np.array_equal(few.make(case), Ours(as_told).make(case))
    assert not np.array_equal(few.make(case), Ours(bench).make(case))
    for name, layer in layers.items():
        if "lora_B" in name:
            layer.normal_(generator=torch.Generator().manual_seed(0))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    changed = Few(Bench(Editor.load(device="cpu", dtype="float32"), few=tmp_path)).make(case)
    assert not np.array_equal(changed, Ours(as_told).make(case))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_share_every_kind_of_work(workers: int) -> None:
    found = balanced(cases(), 500)
    shares = [command.shared(found, number, workers) for number in range(workers)]
    assert sorted(case.id for share in shares for case in share) == sorted(c.id for c in found)
    for group, count in Counter((c.category, c.group) for c in found).items():
        each = [sum((c.category, c.group) == group for c in share) for share in shares]
        assert max(each) <= count / workers + 2
    peers = [sum(c.lot % 2 == 0 for c in share) for share in shares]  # asked for every second one
    assert max(peers) < 1.5 * min(peers)
