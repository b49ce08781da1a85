"""Additions start as nothing, are all that is trained, and do in diffusers what they did here."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from diffedit.errors import InputError
from diffedit.training import lora
from diffedit.training.config import LoraTraining
from diffedit.training.loop import Report, accelerator, train
from diffedit.training.lora import ATTENTION, LoraTask, add, layers_of
from diffedit.training.parts import load, new_unet
from diffedit.training.stages import run

CPU = torch.device("cpu")
SIDE = 32


def training(model: Path, out: Path, **changes: Any) -> LoraTraining:
    said: dict[str, Any] = {
        "train": "lora",
        "model": str(model),
        "data": {"world": "plain", "count": 8, "side": SIDE, "held_out": 2},
        "out": out / "out",
        "rank": 4,
        "steps": 3,
        "batch": 4,
        "optimiser": {"rate": 1e-2, "warmup": 1},
    }
    return LoraTraining.model_validate(said | changes)


def trained(how: LoraTraining, **options: Any) -> tuple[LoraTask, Report]:
    task = LoraTask(how, CPU)
    return task, train(task, how, accelerator(how), **options)


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return new_unet((16, 32), plain_levels=0, sample_size=4).eval()


@torch.no_grad()
def prediction(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, 4, 4, 4, generator=generator)
    words = torch.randn(2, 5, 128, generator=generator)
    made: Tensor = unet(x_t, torch.tensor([10, 900]), encoder_hidden_states=words).sample
    return made


def stirred(additions: nn.Module) -> None:
    """Give additions that are nothing yet something to do."""
    torch.manual_seed(1)
    for parameter in additions.parameters():
        nn.init.normal_(parameter, std=0.2)


# -- what is added -------------------------------------------------------------------------------


def test_untrained_additions_change_nothing() -> None:
    unet = small_unet()
    before = prediction(unet)
    additions = add(unet, layers_of(unet), rank=4, alpha=4)
    assert torch.equal(prediction(unet), before)
    stirred(additions)
    assert not torch.allclose(prediction(unet), before, atol=1e-3)


def test_a_layer_adds_alpha_over_r_times_b_a_x() -> None:
    net: Any = small_unet()
    linear, kernel = net.mid_block.attentions[0].proj_in, net.conv_in
    x, pixels = torch.randn(3, linear.weight.shape[1], 2, 2), torch.randn(2, 4, 5, 5)
    bare, bare_pixels = linear(x), kernel(pixels)
    stirred(add(net, ["mid_block.attentions.0.proj_in", "conv_in"], rank=3, alpha=6))
    for layer, given, before in (
        (net.mid_block.attentions[0].proj_in, x, bare),
        (net.conv_in, pixels, bare_pixels),
    ):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert len(a) == 3
        down = nn.functional.conv2d(given, a, padding=a.shape[-1] // 2)
        expected = before + 6 / 3 * torch.einsum("or,nrhw->nohw", b[:, :, 0, 0], down)
        assert torch.allclose(layer(given), expected, atol=1e-5)


@pytest.mark.parametrize("layers", ["attention", "all", ["attention", "mid_block.resnets.0.conv1"]])
def test_the_layers_that_are_asked_for(small_model: Path, tmp_path: Path, layers: Any) -> None:
    task = LoraTask(training(small_model, tmp_path, layers=layers), CPU)
    found = {n.split(".lora_A")[0] for n, _ in task.parts.unet.named_modules() if ".lora_A" in n}
    every = set(layers_of(load(str(small_model), CPU).unet))
    attention = {n for n in every if n.endswith(ATTENTION)}
    wanted = {"attention": attention, "all": every}
    asked = wanted.get(layers) if isinstance(layers, str) else attention | {layers[1]}
    assert found == asked


def test_a_layer_that_is_not_there_is_named(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no layer 'to_qq' .*did you mean 'to_q'") as caught:
        LoraTask(training(small_model, tmp_path, layers=["to_qq"]), CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no layer 'norm1'"):  # there, but nothing to add to
        LoraTask(training(small_model, tmp_path, layers="norm1"), CPU)


def test_another_target_than_the_models_is_refused(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"predicts v_prediction, .* leave target out"):
        LoraTask(training(small_model, tmp_path, objective={"target": "epsilon"}), CPU)


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_nothing_but_additions_is_trained(small_model: Path, tmp_path: Path, text: bool) -> None:
    task, _ = trained(training(small_model, tmp_path, text=text))
    before = load(str(small_model), CPU)
    for mine, theirs in ((task.parts.unet, before.unet), (task.parts.text_encoder,) * 2):
        given = theirs.state_dict() if mine is not theirs else before.text_encoder.state_dict()
        mine_state = {k.replace(".base_layer", ""): v for k, v in mine.state_dict().items()}
        assert all(torch.equal(mine_state[key], value) for key, value in given.items())
    parts = ["unet", "text_encoder"] if text else ["unet"]
    assert list(task.modules) == parts
    for part in parts:
        later = {n: p for n, p in task.modules[part].named_parameters() if n.count("lora_B")}
        assert later
        assert all(p.any() for p in later.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_training_goes_on(small_model: Path, tmp_path: Path, name: str) -> None:
    how: dict[str, Any] = {"rank": 8, "optimiser": {"name": name, "rate": 1e-2, "warmup": 1}}
    whole_task, at_once = trained(training(small_model, tmp_path / "a", **how))
    first = training(small_model, tmp_path / "b", **how)
    assert trained(first, max_minutes=0)[1].step == 1
    task, report = trained(first, resume=True)
    assert report.finished
    assert report.losses == pytest.approx(at_once.losses, abs=1e-6)
    assert torch.allclose(prediction(task.parts.unet), prediction(whole_task.parts.unet), atol=1e-6)


# -- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_diffusers_draws_with_it_what_was_trained(
    small_model: Path, tmp_path: Path, text: bool
) -> None:
    how = training(small_model, tmp_path, layers="all", alpha=9, text=text, steps=1)
    task = LoraTask(how, CPU)
    for additions in task.modules.values():
        stirred(additions)
    task.export(tmp_path / "result")

    pipe = StableDiffusionPipeline.from_pretrained(small_model, torch_dtype=torch.float32)
    bare = prediction(pipe.unet)
    pipe.load_lora_weights(tmp_path / "result")
    assert torch.allclose(prediction(pipe.unet), prediction(task.parts.unet), atol=1e-5)
    assert not torch.allclose(prediction(pipe.unet), bare, atol=1e-2)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        theirs, mine = pipe.text_encoder(ids)[0], task.parts.text_encoder(ids)[0]
        was = load(str(small_model), CPU).text_encoder(ids)[0]
    assert torch.allclose(theirs, mine, atol=1e-5)
    assert torch.allclose(theirs, was, atol=1e-3) is not text


def test_a_training_leaves_its_result(small_model: Path, tmp_path: Path) -> None:
    how = training(small_model, tmp_path, steps=2, prompts=("a red circle",))
    assert run([how])
    result = how.out / "model"
    assert sorted(p.name for p in result.iterdir()) == [
        "diffedit.json",
        "pytorch_lora_weights.safetensors",
    ]
    file = result / "pytorch_lora_weights.safetensors"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert any(value.any() for key, value in load_file(file).items() if "lora_B" in key)


def test_the_same_additions_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        unet = small_unet()
        add(unet, ATTENTION, rank=2, alpha=2)
        lora.save(tmp_path / name, unet)
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in "ab"]
    metadata = files[0].read_bytes()[8:].split(b"}}")[0]
    order = [metadata.index(name.encode()) for name in sorted(ATTENTION)]
    assert order == sorted(order)
