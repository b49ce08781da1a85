"""Training files: what they may say, and what is said of those that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from ruamel.yaml import YAML

from diffedit.cli import main
from diffedit.cli.train import train
from diffedit.errors import InputError
from diffedit.training import config

GOOD = """
train: denoiser
data: {world: plain, count: 8, side: 32}
out: runs/a
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    return file


def test_paths_count_from_the_file(tmp_path: Path) -> None:
    (training,) = config.load(written(tmp_path, GOOD))
    assert training.out == tmp_path / "runs/a"
    text = "train: lora\nmodel: tiny\ndata: {folder: pictures, caption: name}\nout: /elsewhere"
    (training,) = config.load(written(tmp_path, text))
    assert training.data.folder == tmp_path / "pictures"
    assert training.out == Path("/elsewhere")


def test_stages_share_what_stands_beside_them(tmp_path: Path) -> None:
    text = """
seed: 3
batch: 4
data: {world: {plain: 1, rich: 2}, side: 64}
stages:
  - {train: autoencoder, widths: [8, 8, 8, 8], out: a}
  - {train: denoiser, out: b, batch: 8}
"""
    first, second = config.load(written(tmp_path, text))
    assert isinstance(first, config.AutoencoderTraining)
    assert isinstance(second, config.DenoiserTraining)
    assert (first.seed, first.batch, second.seed, second.batch) == (3, 4, 3, 8)
    assert second.data.world == {"plain": 1, "rich": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no training, should have 'train:'"),
        ("- a", "holds no training"),
        (GOOD.replace("denoiser", "denoisr"), ".yaml:2:1: train is 'denoisr'.*'denoiser'.*one of"),
        (GOOD + "stepps: 3", r"train.yaml:5:1: stepps no such setting.*'steps'"),
        (GOOD + "steps: 0", r"train.yaml:5:1: steps Input should be greater than or equal to 1"),
        (GOOD + "objective: {gama: 3}", r"objective.gama no such setting.*'gamma'"),
        (GOOD.replace("out: runs/a", ""), "out is missing"),
        (GOOD.replace("world: plain", "world: plain, folder: x"), "names folder and world, should"),
        (GOOD.replace("world: plain, ", ""), "names no source, should name one of"),
        (GOOD + "batch: 2\naccumulate: 3", "accumulate 3 is more than batch 2"),
        (GOOD + "ema: 0.9\nema_width: 0.1", "names both ema and ema_width"),
        (GOOD + "stages: 3", "'stages' should be a list of trainings"),
        (GOOD + "stages: [{}, {steps: 2}]", "two stages write to"),
        ("train: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        config.load(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a training file"):
        config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "stepps: 3", "no such setting"),
        (GOOD.replace("world: plain, count: 8", "folder: none"), "does not exist"),
        (GOOD + "model: nowhere/at-all/ever", "nowhere/at-all/ever"),
        (GOOD + "precision: fp16\ndevice: cpu", "fp16 does not train on a CPU"),
        (GOOD + "device: abacus", "device 'abacus' is unknown"),
    ],
)
def test_the_command_says_it_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    code = main(["train", str(written(tmp_path, text))])
    told = capfd.readouterr().err.strip()
    assert code == 2
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_it_needs_and_writes_no_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(written(tmp_path, GOOD)), "--dry-run"]) == 0
    assert "needs about" in capfd.readouterr().err
    assert not (tmp_path / "runs/a/checkpoint.pt").exists()


DOC = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_schema_takes_what_loads_and_refuses_the_rest(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    check = jsonschema.Draft202012Validator(schema).is_valid
    good = YAML(typ="safe").load(GOOD)
    assert check(good)
    assert check({"data": good["data"], "stages": [{"train": "autoencoder", "out": "a"}]})
    assert not check(good | {"stepps": 3})
    assert not check(good | {"steps": 0})
    assert not check(good | {"objective": {"gama": 3}})
    assert not check({"stages": []})
    assert not check({k: v for k, v in good.items() if k != "out"})


def test_the_page_names_every_setting() -> None:
    kinds: list[type[BaseModel]] = [
        config.Data,
        config.Optimiser,
        config.Objective,
        *config.KINDS.values(),
    ]
    names = {name for kind in kinds for name in kind.model_fields}
    assert sorted(name for name in names if f"`{name}`" not in DOC) == []


def test_the_files_on_the_page_are_right(tmp_path: Path) -> None:
    files = re.findall(r"^```yaml\n(.*?)^```$", DOC, re.M | re.S)
    assert len(files) == 2
    for text in files:
        assert config.load(written(tmp_path, text))


def test_help_names_the_options() -> None:
    told = CliRunner().invoke(train, ["--help"])
    assert all(option in told.output for option in ("--resume", "--max-minutes", "--dry-run"))


@pytest.mark.parametrize(
    "file", sorted(EXAMPLES.rglob("train*/*.yaml")), ids=lambda file: file.stem
)
def test_the_examples_are_read(file: Path) -> None:
    stages = config.load(file)
    assert [one.train for one in stages]
