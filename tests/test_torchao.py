"""Denoisers that torchao has quantised: as diffusers reads them, and the model's own otherwise."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import TorchAoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)

from diffedit import Edit, Editor, Pass, errors
from diffedit.cli import main
from diffedit.guard import constituents
from diffedit.models import holding, torchao
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_lora import LoRA
from tests.families import FLUX, SD, Tiny
from tests.families.additions import additions, written
from tests.families.originals import sampled
from tests.laws.tools import Custom

PASS = Pass(prompt="a red circle", steps=2, guidance=3.0)
PARTS = {SD.name: "unet", FLUX.name: "transformer"}
KINDS = (torch.float32, torch.bfloat16)


def said(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose denoisers diffusers has quantised and saved, by family and type."""
    made = tmp_path_factory.mktemp("models")
    for family in (SD, FLUX):
        pipe: Any = family.pipeline()
        family.save(pipe, made / family.name)
        part = PARTS[family.name]
        for kind in KINDS:
            net = type(getattr(pipe, part)).from_pretrained(
                made / family.name / part,
                quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
                dtype=kind,
            )
            to = made / f"{family.name}-{said(kind)}"
            shutil.copytree(made / family.name, to, ignore=shutil.ignore_patterns(part))
            net.save_pretrained(to / part)
    return made


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """A quantised Flux, to be spoilt."""
    return Path(shutil.copytree(place / f"{FLUX.name}-float32", tmp_path / "model"))


def theirs(family: Tiny, folder: Path, kind: torch.dtype) -> Any:
    return getattr(diffusers, family.theirs["text2img"]).from_pretrained(folder, dtype=kind)


def weights(editor: Editor) -> dict[str, list[torch.Tensor]]:
    denoiser: Any = next(iter(editor.model.parts()))
    return {name: constituents(one) for name, one in denoiser.named_parameters()}


@pytest.mark.parametrize("family", [SD, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize("kind", KINDS, ids=said)
def test_latents_are_those_of_diffusers(family: Tiny, kind: torch.dtype, place: Path) -> None:
    folder = place / f"{family.name}-{said(kind)}"
    editor = Editor.load(folder, device="cpu")
    info = editor.model.info
    assert (info["family"], info["weights"]) == (family.name, "int8")
    assert editor.model.dtype == kind  # what they were quantised from, whatever the device's usual
    whole = Editor.load(place / family.name, device="cpu")
    assert info["parameters"] == whole.model.info["parameters"]
    made = editor.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    assert made is not None
    assert (made - sampled(theirs(family, folder, kind))).abs().max() == 0.0
    plain = whole.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    assert plain is not None
    assert 0 < (made.float() - plain).abs().mean() < 0.05


def test_edits_act_on_it_and_leave_it_as_it_was(place: Path, tmp_path: Path) -> None:
    folder = place / f"{FLUX.name}-float32"
    picture = data.coffee()[:64, :64]
    mask = torch.zeros(64, 64).numpy().astype(bool)
    mask[16:48, 16:48] = True
    editor = Editor.load(folder, device="cpu")
    before = {name: [p.clone() for p in parts] for name, parts in weights(editor).items()}
    assert any(len(parts) > 1 for parts in before.values())
    lora = written(tmp_path / "lora.safetensors", additions(FLUX.pipeline()))
    every: list[Edit] = [Inpaint(mask=mask, feather=0), Img2Img(strength=0.8), LoRA(model=lora)]
    made = editor.run(picture, Pass(prompt="x", steps=2, edits=every)).pixels
    assert (made[~mask] == picture[~mask]).all()
    assert (made[mask] != picture[mask]).any()

    def latents(*edits: Edit) -> torch.Tensor:
        pass_ = PASS.model_copy(update={"edits": edits})
        found = editor.run(None, pass_, size=(64, 64), seed=7, compat=True).latents
        assert found is not None
        return found

    plain, ours = latents(), latents(LoRA(model=lora, weight=0.7))
    assert not torch.allclose(ours, plain, atol=0.01)
    assert torch.equal(latents(), plain)
    pipe = theirs(FLUX, folder, torch.float32)
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.set_adapters(["one"], [0.7])
    assert (ours - sampled(pipe)).abs().max() == 0.0
    after = weights(editor)
    assert after.keys() == before.keys()
    for name, parts in before.items():
        assert all(torch.equal(*pair) for pair in zip(parts, after[name], strict=True)), name


def test_what_a_plugin_writes_into_quantised_weights_is_put_back(place: Path) -> None:
    editor = Editor.load(place / f"{FLUX.name}-float32", device="cpu")
    before = {name: [p.clone() for p in parts] for name, parts in weights(editor).items()}
    assert any(p.count_nonzero() for p in before["proj_out.weight"])
    denoiser: Any = next(iter(editor.model.parts()))

    def written_into(run: Any) -> None:
        with torch.no_grad():
            denoiser.proj_out.weight.qdata.zero_()

    def swapped(run: Any) -> None:
        weight = denoiser.proj_out.weight
        weight.qdata = torch.zeros_like(weight.qdata)

    for spoils in (written_into, swapped):
        pass_ = PASS.model_copy(update={"edits": [Custom(parts=spoils)]})
        with pytest.raises(errors.PluginError, match=r"custom.*left the model changed \(weights\)"):
            editor.run(None, pass_, size=(64, 64))
    for name, parts in weights(editor).items():
        assert all(torch.equal(*pair) for pair in zip(parts, before[name], strict=True)), name


def test_they_take_a_quarter_of_float32_and_stay_so_where_they_go(place: Path) -> None:
    net: Any = next(iter(Editor.load(place / f"{FLUX.name}-float32", device="cpu").model.parts()))
    layer = net.transformer_blocks[0].ff.net[2]
    rows, columns = layer.weight.shape
    assert layer.weight.nbytes == 4 * rows * columns  # what torch says
    assert holding._bytes(layer.weight) == rows * (columns + 4 + 1)  # with a scale and a zero
    moved = holding._moved(layer.weight, torch.device("meta"))
    assert moved.device.type == "meta"
    assert type(moved) is type(layer.weight)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def rewritten(
    file: Path, spoil: Callable[[dict[str, torch.Tensor], dict[str, str]], object]
) -> None:
    tensors, told = load_file(file), metadata(file)
    spoil(tensors, told)
    save_file(tensors, file, told)


NAME = "transformer_blocks.0.attn.to_q"


def told_of(**changed: Any) -> Callable[[dict[str, torch.Tensor], dict[str, str]], object]:
    """Have a file say something else of how one of its weights is quantised."""

    def spoil(tensors: dict[str, torch.Tensor], said: dict[str, str]) -> None:
        said[f"{NAME}.weight"] = json.dumps(json.loads(said[f"{NAME}.weight"]) | changed)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda tensors, said: tensors.pop(f"{NAME}._weight_scale"),
            rf"lacks {NAME}\._weight_scale; it would be random numbers",
        ),
        (lambda tensors, said: tensors.pop(f"{NAME}.bias"), rf"lacks {NAME}\.bias"),
        (lambda tensors, said: said.pop(f"{NAME}.weight"), rf"lacks {NAME}\.weight"),
        (
            lambda tensors, said: tensors.update({f"{NAME}.bias": torch.zeros(3)}),
            rf"its {NAME}\.bias is \[3\] where its configuration asks for \[32\]",
        ),
        (
            lambda tensors, said: tensors.update(
                {f"{NAME}._weight_qdata": torch.zeros(3, 5, dtype=torch.int8)}
            ),
            rf"its {NAME}\._weight_qdata is \[3, 5\] where its configuration asks for \[32, 32\]",
        ),
        (
            lambda tensors, said: tensors.update({f"{NAME}._weight_scale": torch.ones(1, 1)}),
            rf"its {NAME}\._weight_scale is \[1, 1\] where its configuration asks for \[32, 1\]",
        ),
        (told_of(_type="MXTensor"), "is a MXTensor of torchao, which diffedit does not read"),
        (told_of(_type=["Int8Tensor"]), "which diffedit does not read"),
        (told_of(_tensor_data_names=7), f"how its {NAME}.weight is quantised is not whole"),
        (told_of(_tensor_data_names=["scale"]), "is not whole"),
        (told_of(_data=7), "is not whole"),
        (told_of(_data={"block_size": [1, 32], "dtype": "float32"}), "is not whole"),
        (told_of(_data={"block_size": [0, 32], "dtype": {"_data": "float32"}}), "is not whole"),
        (told_of(_data={"block_size": [1, 32], "dtype": {"_data": "int8"}}), "is not whole"),
        (
            told_of(_data={"block_size": [32], "dtype": {"_data": "float32"}}),
            r"is \[32, 1\] where its configuration asks for \[\]",
        ),
        (
            lambda tensors, said: said.update({f"{NAME}.weight": "[" * 100_000}),
            rf"lacks {NAME}\.weight",
        ),
        (
            lambda tensors, said: said.update(tensor_names="[]"),
            "is quantised, and not that it holds it",
        ),
        (lambda tensors, said: said.clear(), "does not say of its weights how torchao"),
    ],
)
def test_a_file_that_is_not_what_it_says(
    folder: Path, spoil: Callable[[dict[str, torch.Tensor], dict[str, str]], object], told: str
) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    rewritten(file, spoil)
    with pytest.raises(errors.ModelError, match=rf"^{re.escape(str(file))}: .*{told}"):
        Editor.load(folder, device="cpu")


def test_what_else_does_not_go_with_it_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(errors.ModelError, match="held in few bits already: leave out dtype float8"):
        Editor.load(folder, device="cpu", dtype="float8")
    settings = folder / "vae" / "config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(errors.ModelError, match=r"vae.*quantised by torchao, which diffedit does"):
        Editor.load(folder, device="cpu")
    settings.write_text(json.dumps(config))
    monkeypatch.setattr(torchao, "_installed", lambda: False)
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--size", "64x64", "--device", "cpu"]
    assert main([*line, "--model", str(folder)]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.endswith("0.16.0 or newer is not installed: pip install 'diffedit[torchao]'")


def test_one_that_is_cut_off_is_named(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1000):
        file.write_bytes(whole[:size])
        with pytest.raises(errors.ModelError, match=rf"^{re.escape(str(file))}: (not a|cut off)"):
            Editor.load(folder, device="cpu")


def test_the_only_variant_is_taken(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    made = Editor.load(folder, device="cpu").run(None, PASS, size=(64, 64)).pixels
    file.rename(file.with_suffix(".fp16.safetensors"))
    assert (Editor.load(folder, device="cpu").run(None, PASS, size=(64, 64)).pixels == made).all()


@pytest.mark.parametrize("config", [Float8WeightOnlyConfig(), IntxWeightOnlyConfig()])
def test_other_kinds_and_what_they_do_to_the_other_models_of_a_workflow(
    config: Any, place: Path, tmp_path: Path
) -> None:
    to = tmp_path / "model"
    shutil.copytree(place / FLUX.name, to, ignore=shutil.ignore_patterns("transformer"))
    net = diffusers.FluxTransformer2DModel.from_pretrained(
        place / FLUX.name / "transformer",
        quantization_config=TorchAoConfig(config),
        dtype=torch.bfloat16,
    )
    net.save_pretrained(to / "transformer")
    editor = Editor.load(to, device="cpu")
    made = editor.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    assert made is not None
    assert (made - sampled(theirs(FLUX, to, torch.bfloat16))).abs().max() == 0.0
    first = Pass(prompt="x", steps=4, stop=0.3)
    passes = [first, Pass(prompt="x", steps=4, model=str(place / FLUX.name))]
    editor.run(None, passes, size=(64, 64))
    (other,) = (one for key, one in editor._resources.items() if key.startswith("model:"))
    assert (other.info["weights"], other.info["dtype"]) == ("bfloat16", "bfloat16")


def test_another_type_than_theirs_is_told(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffedit"):
        editor = Editor.load(place / f"{FLUX.name}-bfloat16", device="cpu", dtype="float32")
    assert editor.model.dtype == torch.bfloat16
    assert "computes in bfloat16, which its weights were quantised for" in caplog.text


def test_the_command_line_keeps_what_libraries_say_to_itself(folder: Path, tmp_path: Path) -> None:
    import subprocess

    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--size", "64x64"]
    line += ["--model", str(folder), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "diffedit", *line], capture_output=True, text=True, check=True
    )
    assert "torchao" not in done.stderr
    assert "pytree" not in done.stderr
