"""Weights held in eight bits: half the memory, diffusers' own latents, left as they were found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from diffedit import Editor, Pass
from diffedit.cli import main
from diffedit.errors import ModelError
from diffedit.models.holding import computing, narrow
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_ip_adapter import IPAdapter
from diffedit_style import Style
from tests.families import FAMILIES, FLUX, SD, SDXL, Tiny, ip_adapter

PICTURE = data.coffee()[:64, :64]
PASS = Pass(prompt="a red circle", steps=2, guidance=3.0)


def held(editor: Editor, part: int = 0) -> int:
    """The bytes of a part's weights."""
    network = list(editor.model.parts())[part]
    return sum(one.numel() * one.element_size() for one in network.parameters())


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_denoisers_weights_take_half_of_float16(family: Tiny, tmp_path: Path) -> None:
    family.save(family.pipeline(), tmp_path)
    editor = Editor.load(tmp_path, device="cpu", dtype="float8")
    denoiser, *_ = editor.model.parts()
    layers = [
        one
        for one in denoiser.modules()
        if isinstance(one, torch.nn.Linear | torch.nn.Conv2d) and "_held" in one.__dict__
    ]
    kinds = {weight.dtype for layer in layers for weight in layer.parameters()}
    assert kinds == {torch.float8_e4m3fn}
    narrowed = sum(weight.numel() for layer in layers for weight in layer.parameters())
    total = sum(weight.numel() for weight in denoiser.parameters())
    assert held(editor) == narrowed + 4 * (total - narrowed)
    if family in (SD, SDXL):  # of others norms have layers, which are exact, too
        half = held(Editor.load(tmp_path, device="cpu", dtype="float16"))
        assert half == 2 * total
        assert held(editor) < 0.53 * half
    assert editor.model.dtype == torch.float32


@pytest.mark.parametrize("family", [SD, SDXL, FLUX], ids=lambda one: one.name)
def test_the_latents_are_those_of_diffusers_layerwise_casting(family: Tiny, tmp_path: Path) -> None:
    import diffusers

    family.save(family.pipeline(), tmp_path)
    editor = Editor.load(tmp_path, device="cpu", dtype="float8")
    made = editor.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    pipe: Any = getattr(diffusers, family.theirs["text2img"]).from_pretrained(tmp_path)
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    options = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    denoiser.enable_layerwise_casting(**options)
    generator = torch.Generator().manual_seed(7)
    wanted = pipe("a red circle", height=64, width=64, guidance_scale=3.0, num_inference_steps=2,
                  output_type="latent", generator=generator).images  # fmt: skip
    if family is FLUX:
        wanted = pipe._unpack_latents(wanted, 64, 64, pipe.vae_scale_factor)
    assert made is not None
    assert (made - wanted).abs().max() == 0.0
    exact = Editor.load(tmp_path, device="cpu").run(None, PASS, size=(64, 64), seed=7, compat=True)
    assert not torch.equal(made, exact.latents)  # type: ignore[arg-type]


def test_passes_leave_weights_and_hooks_as_they_found_them(family: Tiny, tmp_path: Path) -> None:
    family.save(family.pipeline(), tmp_path / "model")
    editor = Editor.load(tmp_path / "model", device="cpu", dtype="float8")
    model: Any = editor.model
    edits: list[Any] = [Img2Img(strength=0.6), Style(image=data.astronaut())]
    if net := family.control_net(family.pipeline()):
        net.save_pretrained(tmp_path / "net")
        edits.append(ControlNet(model=str(tmp_path / "net"), weight=0.5))
    plain = Pass(prompt="x", steps=2, edits=edits[:1])
    first = editor.run(PICTURE, plain).latents
    before = [
        (name, weight, weight.data_ptr(), weight.dtype, weight.clone())
        for name, weight in model.denoiser.state_dict(keep_vars=True).items()
    ]
    modules = [(one, dict(one.__dict__)) for one in model.denoiser.modules()]
    with editor.stream(PICTURE, Pass(prompt="x", steps=3, edits=family.carried(edits))) as events:
        next(iter(events))  # and is left in the midst
    editor.run(PICTURE, Pass(prompt="x", steps=2, edits=family.carried(edits)))
    after = model.denoiser.state_dict(keep_vars=True)
    for name, weight, place, kind, value in before:
        assert after[name] is weight
        assert (weight.data_ptr(), weight.dtype) == (place, kind)
        assert torch.equal(weight.view(torch.uint8), value.view(torch.uint8))
    for one, was in modules:
        assert {key: id(value) for key, value in one.__dict__.items() if "hook" in key} == {
            key: id(value) for key, value in was.items() if "hook" in key
        }
        assert one.__dict__.get("forward") is was.get("forward")
    again = editor.run(PICTURE, plain).latents
    assert torch.equal(again, first)  # type: ignore[arg-type]


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SD.save(SD.pipeline(), tmp_path / "model")
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--size", "64x64"]
    line += ["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float8"]
    assert main(line) == 0
    with pytest.raises(ModelError, match="unknown dtype 'float4'"):
        Editor.load(tmp_path / "model", dtype="float4")
    capsys.readouterr()


def test_a_network_that_cannot_be_held_so_is_refused() -> None:
    net: Any = torch.nn.Linear(2, 2)
    net._supports_layerwise_casting = False
    with pytest.raises(ModelError, match="a Linear cannot be held in float8_e4m3fn"):
        narrow(net, "float8_e4m3fn")
    assert computing(net) == torch.float32


def test_an_image_prompt_is_seen_in_the_type_that_is_computed_in(tmp_path: Path) -> None:
    pipe = SD.pipeline()
    file = ip_adapter.write(tmp_path / "adapter", pipe.unet)
    SD.save(pipe, tmp_path / "model")
    picture = np.zeros((32, 32, 3), np.uint8)
    edits = (IPAdapter(model=str(file), image=picture),)
    made, without = (
        Editor.load(tmp_path / "model", device="cpu", dtype="float8").run(
            None, Pass(prompt="a", steps=2, edits=some), seed=1
        )
        for some in (edits, ())
    )
    assert not torch.equal(made.latents, without.latents)  # type: ignore[arg-type]
    assert made.provenance["model"]["weights"] == "float8_e4m3fn"
