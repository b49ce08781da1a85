"""The command line: exit codes, one clear line for what is wrong, nothing written, quick help."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffedit import Pass, Workflow, hookimpl
from diffedit import plugins as installed
from diffedit.cli import cli, main
from diffedit.cli.checks import check_format
from diffedit.cli.edit import parse_edit, workflow_of
from diffedit.errors import Busy, InputError, OutputError, PluginError
from diffedit.images import Picture, save_picture
from diffedit.plugins import Plugins
from diffedit.schedulers import SCHEDULERS

SIDE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, as a diffusers folder."""
    from diffedit.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures, masks and broken files."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:40, 24:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:32]).save(tmp_path / "small.png")
    Image.fromarray(mask * 0).save(tmp_path / "empty.png")
    Image.fromarray(np.dstack([photo, mask])).save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("not an image")
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x04.")
    pickled = tmp_path / "pickled" / "unet"
    pickled.mkdir(parents=True)
    (pickled.parent / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "w.yaml").write_text(
        "seed: 3\npasses:\n  - prompt: a\n    steps: 2\n    edits:\n"
        "      - inpaint: {mask: mask.png, feather: 2}\n"
    )
    (tmp_path / "bad.yaml").write_text("passes:\n  - promt: a\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- bad input -------------------------------------------------------------------------------------

PAINT = ["-e", "inpaint:mask=mask.png"]


def edit(*more: str, image: str = "photo.png", out: str = "out.png") -> list[str]:
    return ["edit", image, "-o", out, *more]


BAD = {
    "missing file": (edit(*PAINT, image="no.png"), "no.png does not exist, should be the image"),
    "not an image": (edit(*PAINT, image="text.png"), "text.png is not an image"),
    "truncated image": (edit(*PAINT, image="cut.png"), "cut.png is truncated or damaged"),
    "folder as image": (edit(*PAINT, image="pickled"), "pickled"),
    "mask of another size": (
        edit("-e", "inpaint:mask=small.png"),
        "the mask is 64x32 and the picture 64x64",
    ),
    "empty mask": (edit("-e", "inpaint:mask=empty.png"), "the mask is empty"),
    "missing mask": (edit("-e", "inpaint:mask=no.png"), "--edit inpaint.mask: "),
    "broken mask": (edit("-e", "inpaint:mask=cut.png"), "cut.png is truncated or damaged"),
    "broken style": (edit("-e", "style:image=text.png"), "text.png is not an image"),
    "unknown edit": (
        edit("-e", "inpant:mask=mask.png"),
        "--edit: no edit 'inpant' (did you mean 'inpaint'?)",
    ),
    "unknown parameter": (
        edit("-e", "inpaint:mask=mask.png,fether=3"),
        "inpaint has no parameter 'fether' (did you mean 'feather'?)",
    ),
    "misspelt required parameter": (
        edit("-e", "inpaint:maks=mask.png"),
        "inpaint has no parameter 'maks' (did you mean 'mask'?)",
    ),
    "parameter missing": (edit("-e", "inpaint"), "--edit inpaint lacks 'mask', a mask"),
    "parameter out of range": (
        edit("-e", "img2img:strength=1.5"),
        "--edit img2img.strength is 1.5, should be a number above 0 and at most 1",
    ),
    "parameter of another type": (
        edit("-e", "inpaint:mask=mask.png,feather=soft"),
        "--edit inpaint.feather is 'soft', should be a whole number from 0 to ",
    ),
    "parameters that disagree": (
        edit("-e", "controlnet:start=0.9,end=0.1"),
        "--edit controlnet: ",
    ),
    "edit without a value": (edit("-e", "inpaint:mask"), "'mask' is no key=value"),
    "edit with bad JSON": (edit("-e", "inpaint:{mask: 1}"), "not JSON"),
    "edit without a name": (edit("-e", ":mask=m.png"), "has no name"),
    "parameter twice": (edit("-e", "inpaint:mask=mask.png,mask=a.png"), "'mask' stands twice"),
    "parameter twice in JSON": (edit("-e", 'inpaint:{"mask": 1, "mask": 2}'), "stands twice"),
    "steps": (edit(*PAINT, "--steps", "0"), "--steps is 0, should be a whole number from 1 to"),
    "guidance": (edit(*PAINT, "--guidance", "much"), "--guidance is 'much', should be a number"),
    "seed": (edit(*PAINT, "--seed", "-1"), "--seed is -1, should be a whole number from 0"),
    "seed twice": (edit(*PAINT, "--seed", "1", "--seed", "1"), "a seed stands twice"),
    "size of an image": (edit(*PAINT, "--size", "32x32"), "photo.png is 64x64 and stays so"),
    "size": (
        ["edit", "-o", "out.png", "-p", "a", "--size", "32"],
        "--size: '32' should be WIDTHxHEIGHT",
    ),
    "no image": (["edit", "-o", "out.png", "-p", "a"], "no IMAGE: name one, or give a size"),
    "nothing to do": (edit(), "nothing to do: give --prompt, --edit or both"),
    "unknown scheduler": (
        edit(*PAINT, "--scheduler", "eular"),
        "unknown scheduler 'eular' (did you mean 'euler'?)",
    ),
    "refused scheduler": (
        edit("-e", "img2img", "--scheduler", "ipndm"),
        "'ipndm' cannot be used: ",
    ),
    "pickled checkpoint": (
        edit(*PAINT, "--model", "weights.ckpt"),
        "weights.ckpt: a pickle (.ckpt) can run any code",
    ),
    "pickled folder": (edit(*PAINT, "--model", "pickled"), "a pickle (.bin) can run any code"),
    "unknown model": (edit(*PAINT, "--model", "tyni"), "(did you mean 'tiny'?)"),
    "unknown device": (edit(*PAINT, "--device", "toaster"), "no device 'toaster' (known: "),
    "unknown dtype": (edit(*PAINT, "--dtype", "int4"), "'int4' is not one of"),
    "output is the input": (
        edit(*PAINT, "--overwrite", out="photo.png"),
        "-o photo.png is the input photo.png, which is never written to",
    ),
    "output is the mask": (edit(*PAINT, "--overwrite", out="./mask.png"), "is the input"),
    "output exists": (edit(*PAINT, out="alpha.png"), "-o alpha.png exists: name another output"),
    "output in no folder": (edit(*PAINT, out="no/out.png"), "the folder no does not exist"),
    "output is a folder": (edit(*PAINT, out="pickled"), "-o pickled is a folder"),
    "output of no format": (edit(*PAINT, out="out.gif"), "'.gif' names no format"),
    "output without suffix": (edit(*PAINT, out="out"), "no suffix names no format"),
    "output without alpha": (
        edit(*PAINT, image="alpha.png", out="out.jpg"),
        "-o out.jpg: .jpg cannot hold alpha",
    ),
    "no output": (["edit", "photo.png"], "Missing option '-o'"),
    "unknown command": (["edti"], "no command 'edti' (did you mean 'edit'?)"),
    "unknown option": (["edit", "--promt", "a"], "--promt"),
    "unknown global option": (["--promt"], "--promt"),
    "no workflow": (
        ["run", "no.yaml", "photo.png", "-o", "out.png"],
        "no.yaml cannot be read as a workflow (No such",
    ),
    "image as workflow": (
        ["run", "photo.png", "w.yaml", "-o", "out.png"],
        "photo.png cannot be read as a workflow",
    ),
    "bad workflow": (
        ["run", "bad.yaml", "photo.png", "-o", "out.png"],
        "bad.yaml:2:5: passes.0: a pass has no parameter 'promt' (did you mean 'prompt'?)",
    ),
    "bad override": (
        ["run", "w.yaml", "photo.png", "-o", "out.png", "--set", "passes.1.prompt=x"],
        "--set passes.1.prompt: no '1' in passes, which has 0",
    ),
    "output is the workflow": (
        ["run", "w.png", "photo.png", "-o", "w.png", "--overwrite"],
        "is the input w.png",
    ),
    "unknown plugin": (["plugins", "show", "inpant"], "(did you mean 'inpaint'?)"),
    "models list of nothing": (["models", "info", "no/such/model"], "no such model"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input(
    arguments: list[str], said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("w.yaml", "w.png")
    before = state(here)
    code = main(arguments)
    out, err = capfd.readouterr()
    assert code == 2, err
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("diffedit: ")
    assert "Traceback" not in err
    assert out == ""
    assert state(here) == before


def test_a_model_whose_own_scheduler_cannot_do_img2img(
    here: Path, model: Path, tmp_path_factory: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("model") / "ipndm"
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "IPNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    before = state(here)
    code = main(edit("-e", "img2img", "-p", "a", "--model", str(folder)))
    _, err = capfd.readouterr()
    assert code == 2, err
    assert "IPNDM" in err
    assert err.count("\n") == 1
    assert state(here) == before


@pytest.mark.parametrize("case", ["unknown edit", "truncated image", "output is the input"])
def test_bad_input_in_a_process_of_its_own(case: str, here: Path) -> None:
    arguments, said = BAD[case]
    before = state(here)
    command = [sys.executable, "-m", "diffedit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert state(here) == before


# -- work that is done -----------------------------------------------------------------------------


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


def test_edit_and_run_do_the_same(
    here: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = ["-e", "inpaint:mask=mask.png,feather=2", "-p", "a", "--steps", "2", "--seed", "3"]
    assert main(edit(*said, "--model", str(model), "--json", out="one.png")) == 0
    out, err = capfd.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["outputs"] == ["one.png"]
    assert report["seeds"] == [3]
    (pass_,) = report["passes"]
    assert [one["edit"] for one in pass_["order"]] == ["inpaint"]
    assert pass_["steps"] == 2
    assert pass_["region"]
    assert pass_["timings"]
    assert report["workflow"]["passes"][0]["edits"][0]["inpaint"]["feather"] == 2

    command = ["run", "w.yaml", "photo.png", "-o", "two.png", "--set", f"model={model}"]
    assert main(command) == 0
    assert capfd.readouterr() == ("", "")  # quiet where nobody watches
    np.testing.assert_array_equal(pixels("one.png"), pixels("two.png"))
    changed = (pixels("one.png") != pixels("photo.png")).any(axis=2)
    assert changed.any()
    far = np.ones((SIDE, SIDE), bool)
    far[16 - 2 : 40 + 2, 24 - 2 : 48 + 2] = False
    assert not changed[far].any()

    from diffedit import Editor

    result = Editor.load(model).run("photo.png", Workflow.load("w.yaml"))
    np.testing.assert_array_equal(result.pixels, pixels("one.png"))


def test_several_seeds_make_several_files(here: Path, model: Path) -> None:
    said = ["-p", "a", "--size", "64x64", "--steps", "1", "--model", str(model)]
    assert main(["edit", "-o", "new.png", *said, "--seed", "7", "--seed", "8"]) == 0
    assert sorted(path.name for path in here.glob("new*")) == ["new-7.png", "new-8.png"]
    assert pixels("new-7.png").shape == (64, 64, 3)
    assert (pixels("new-7.png") != pixels("new-8.png")).any()


def test_overwriting_has_to_be_asked_for(here: Path, model: Path) -> None:
    shutil.copy("photo.png", "out.png")
    said = ["-e", "inpaint:mask=mask.png", "-p", "a", "--steps", "1", "--model", str(model)]
    assert main(edit(*said)) == 2
    assert main(edit(*said, "--overwrite")) == 0
    assert (pixels("out.png") != pixels("photo.png")).any()


def test_warnings_are_told_once(here: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = ["-p", "a", "--steps", "1", "--model", str(model)]
    assert main(edit(*said, out="out.jpg")) == 0
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 2
    assert "nothing of it is kept" in notes[0]
    assert "JPEG is lossy" in notes[1]
    assert all(note.startswith("diffedit: ") for note in notes)


def test_ctrl_c_leaves_nothing_behind(here: Path, model: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from diffedit.cli import main\n"
        "from diffedit.cli.edit import Progress\n"
        # A shell that runs the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "Progress.__call__ = lambda self, step: "
        "step.index == 2 and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main())\n"
    )
    before = state(here)
    said = [*PAINT, "-p", "a", "--steps", "900", "--model", str(model)]
    command = [sys.executable, "-c", script, *edit(*said)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "diffedit: cancelled\n"
    assert state(here) == before


def test_a_terminal_gets_a_bar(
    here: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = [*PAINT, "-p", "a", "--steps", "2", "--model", str(model)]
    assert main(edit(*said)) == 0
    assert "sampling" in capsys.readouterr().err


# -- what else can go wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("out of\nmemory"), 1, "RuntimeError: out of memory (run again with --debug"),
        (PluginError("inpaint", "returned NaN"), 1, "inpaint: returned NaN"),
        (Busy("this editor is running something"), 1, "this editor is running something"),
        (InputError("no"), 2, "no"),
        (KeyboardInterrupt(), 130, "cancelled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from diffedit.editor import Editor

    def fail(*_: object, **__: object) -> Editor:
        logging.getLogger("diffusers").info("chatter")
        warnings.warn("chatter", stacklevel=1)
        raise error

    monkeypatch.setattr(Editor, "load", fail)
    assert main(edit(*PAINT)) == code
    err = capfd.readouterr().err
    assert err.startswith(f"diffedit: {said}")
    assert err.count("\n") == 1
    assert not (here / "out.png").exists()


def test_debug_shows_the_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffedit.editor import Editor

    def fail(*_: object, **__: object) -> Editor:
        raise RuntimeError("boom")

    monkeypatch.setattr(Editor, "load", fail)
    assert main(edit(*PAINT, "--debug")) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: boom" in err.splitlines()[-1]


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = f"{sys.executable} -m diffedit edit --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr


# -- plugins and models ----------------------------------------------------------------------------


class Commands:
    """A plugin that adds a command."""

    @hookimpl
    def register_commands(self, cli: click.Group) -> None:
        @cli.command()
        def greet() -> None:
            """Greet."""
            click.echo("hello")


class BrokenCommands:
    """A plugin whose command cannot be added."""

    @hookimpl
    def register_commands(self, cli: click.Group) -> None:
        raise RuntimeError("no commands today")


@pytest.fixture
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """Plugins of the test's own in place of the installed ones."""
    made = Plugins()
    monkeypatch.setattr(installed, "default", lambda: made)
    monkeypatch.setattr(cli, "commands", dict(cli.commands))
    monkeypatch.setattr(cli, "_asked", False)
    return made


def test_plugins_add_commands(own_plugins: Plugins, capfd: pytest.CaptureFixture[str]) -> None:
    own_plugins.register(BrokenCommands(), "broken")
    own_plugins.register(Commands(), "greeter")
    assert main(["greet"]) == 0
    out, err = capfd.readouterr()
    assert out == "hello\n"
    assert "plugin 'broken': its commands were left out: no commands today" in err
    assert main(["gret"]) == 2
    assert "(did you mean 'greet'?)" in capfd.readouterr().err


def test_plugins_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "list", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {"controlnet", "img2img", "inpaint", "style"} <= {one["name"] for one in found}
    assert {"name", "distribution", "version", "module"} == set(found[0])
    assert main(["plugins", "list"]) == 0
    assert "diffedit_inpaint" in capfd.readouterr().out


def test_plugins_show(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "inpaint", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    (edit_,) = shown["edits"]
    feather = next(one for one in edit_["parameters"] if one["name"] == "feather")
    assert feather["default"] == 8
    assert feather["allowed"].startswith("a whole number from 0 to ")
    assert feather["help"]
    assert shown["hooks"] == ["register_edits"]
    assert main(["plugins", "show"]) == 0
    out = capfd.readouterr().out
    assert "edit img2img" in out
    assert "preprocessor canny" in out


def test_a_broken_plugin_is_named(
    own_plugins: Plugins, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("haze", "diffedit_haze_that_is_not_there", "diffedit")
    own_plugins.load(point)
    listed = installed.Installed("haze", "diffedit-haze", "1.0", point.value)
    monkeypatch.setattr(installed, "installed", lambda: [listed])
    assert main(["plugins", "show"]) == 0
    assert "broken: ModuleNotFoundError" in capfd.readouterr().out
    assert main(["plugins", "show", "haze"]) == 1
    assert "haze: could not be loaded: ModuleNotFoundError" in capfd.readouterr().err


def test_schedulers_are_listed_with_what_they_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == set(SCHEDULERS)
    assert found["heun"] == {
        "name": "heun",
        "class": "HeunDiscreteScheduler",
        "order": 2,
        "calls": 2,
        "stochastic": False,
        "starts_inside": True,
        "flow": True,
    }
    assert main(["schedulers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in lines]
    assert ["euler_a", "1", "1", "yes", "yes", "no", "EulerAncestralDiscreteScheduler"] in shown


def test_models(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [one["name"] for one in found["models"]] == ["tiny"]
    assert "stable-diffusion" in [one["name"] for one in found["families"]]
    assert main(["models", "list"]) == 0
    assert "tiny" in capfd.readouterr().out

    (model / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A model\n")
    assert main(["models", "info", str(model), "--json"]) == 0
    known = json.loads(capfd.readouterr().out)
    assert known["class"] == "StableDiffusionPipeline"
    assert known["licence"] == "cc0-1.0"
    assert known["parameters"]["unet"] > 100_000
    assert "control networks" not in known
    assert main(["models", "info", str(model)]) == 0
    assert "licence: cc0-1.0" in capfd.readouterr().out
    assert main(["models", "info", "tiny", "--json"]) == 0
    known = json.loads(capfd.readouterr().out)
    assert known["control networks"] == ["hints (canny, depth, segments)", "inpaint"]
    assert known["LoRAs"] == {"few": "steps 4, guidance 1.0, scheduler unipc"}
    several = model / "controlnet" / "canny"
    several.mkdir(parents=True)
    (several / "config.json").write_text("{}")
    (several / "diffedit.json").write_text('{"kind": ["canny", "depth"]}')
    assert main(["models", "info", str(model), "--json"]) == 0
    known = json.loads(capfd.readouterr().out)
    assert known["control networks"] == ["canny (canny, depth)"]
    distilled = model / "lora" / "few" / "diffedit.json"
    distilled.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, distilled.with_name("pytorch_lora_weights.safetensors"))
    distilled.write_text('{"train": "distill", "steps": 4, "guidance": 1.0, "scheduler": "lcm"}')
    assert main(["models", "info", str(model), "--json"]) == 0
    known = json.loads(capfd.readouterr().out)
    assert known["LoRAs"] == {"few": "steps 4, guidance 1.0, scheduler lcm"}


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("vignette", "vignette"),
        ("vignette:", "vignette"),
        ("a:x=1,y=0.5,z=no,t=true", {"a": {"x": 1, "y": 0.5, "z": "no", "t": True}}),
        ("a:path=C:\\m.png", {"a": {"path": "C:\\m.png"}}),
        ("a:x=b=c", {"a": {"x": "b=c"}}),
        ('a:{"x": "b, c", "y": [1, 2]}', {"a": {"x": "b, c", "y": [1, 2]}}),
        ('a:x="7"', {"a": {"x": "7"}}),
    ],
)
def test_edits_as_options(text: str, data: Any) -> None:
    assert parse_edit(text) == data


def test_defaults_are_the_passes_own() -> None:
    assert workflow_of([]) == Workflow(passes=(Pass(),))
    shown = edit_help()
    assert f"[default: {Pass().steps}]" in shown
    assert f"[default: {Pass().guidance:g}]" in shown


def edit_help() -> str:
    from diffedit.cli.edit import edit as command

    text = command.get_help(click.Context(command, info_name="edit", max_content_width=200))
    return " ".join(text.split())


def test_seeds_and_sizes() -> None:
    workflow = workflow_of([], seed=["7,8", "9"], size="64x32")
    assert workflow.seeds == (7, 8, 9)
    assert workflow.size == (64, 32)
    assert workflow_of([], seed=["7"]).seed == 7


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".webp", ".bmp", ".jpg", ".jpeg"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 2), (8, 8, 3), (8, 8, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_formats_are_refused_as_saving_would(
    suffix: str, shape: tuple[int, ...], dtype: Any, tmp_path: Path
) -> None:
    picture = Picture(np.zeros(shape, dtype))

    def refuses(ask: Callable[[], object]) -> bool:
        try:
            ask()
        except OutputError:
            return True
        return False

    target = tmp_path / f"out{suffix}"
    early = refuses(lambda: check_format(target, picture))
    assert early == refuses(lambda: save_picture(picture, target))


# -- quick help ------------------------------------------------------------------------------------


def cpu(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "diffedit", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments", [["--help"], ["edit", "--help"], ["train", "--help"], ["--version"]]
)
def test_help_is_quick(arguments: list[str]) -> None:
    assert min(cpu(*arguments) for _ in range(3)) < 0.3


def test_the_commands() -> None:
    context = click.Context(cli)
    own = ["edit", "models", "plugins", "run", "schedulers", "train"]
    # A plugin's stands there once plugins were asked, which another test may have done.
    assert [name for name in cli.list_commands(context) if name != "demo"] == own


def test_no_arguments_show_help(capfd: pytest.CaptureFixture[str]) -> None:
    main([])
    out, err = capfd.readouterr()
    assert "Usage: diffedit" in out + err
