"""Files of LoRAs: the layouts that trainers write, and what is in them that cannot be right."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from diffedit.errors import ModelError
from diffedit.models.lora import USUAL
from diffedit_lora import LoRA
from tests.families import CHROMA, FAMILIES, FLUX, QWEN_IMAGE, SD, SDXL, Z_IMAGE, Tiny
from tests.families.additions import additions, kohya, parts_of, written
from tests.parity import comparisons
from tests.test_lora import apart, refused, run, unharmed

CARRYING = [family for family in FAMILIES if "lora" in family.model.carries]
State = dict[str, Tensor]


def _alone(family: Tiny, **options: Any) -> tuple[str, State]:
    """The name of the denoiser, and additions for its attention."""
    pipe = family.pipeline()
    part = next(iter(parts_of(pipe)))
    return part, additions(pipe, parts=(part,), ends=("to_q", "to_k", "to_v"), **options)


def _with_alpha(state: Mapping[str, Tensor], alpha: float) -> State:
    ends = {key.replace(".lora_A.weight", ".alpha") for key in state if ".lora_A." in key}
    return {**state, **{key: torch.tensor(alpha) for key in ends}}


def _renamed(state: Mapping[str, Tensor], *pairs: tuple[str, str]) -> State:
    made = {}
    for key, value in state.items():
        for old, new in pairs:
            key = key.replace(old, new, 1)
        made[key] = value
    return made


LAYOUTS: dict[str, Callable[[State, str], State]] = {
    "the model's names": lambda state, part: state,
    "ComfyUI's prefix": lambda state, part: _renamed(state, (f"{part}.", "diffusion_model.")),
    "no prefix": lambda state, part: _renamed(state, (f"{part}.", "")),
    "down and up": lambda state, part: _renamed(
        state, ("lora_A", "lora_down"), ("lora_B", "lora_up")
    ),
    "an adapter's name": lambda state, part: _renamed(
        state,
        ("lora_A.weight", "lora_A.default.weight"),
        ("lora_B.weight", "lora_B.default.weight"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", CARRYING, ids=lambda family: family.name)
def test_alphas_count_in_every_layout(family: Tiny, layout: str, tmp_path: Path) -> None:
    """Alpha 0.5 at rank 4 is an eighth of what the matrices say."""
    part, state = _alone(family)
    eighth = {key: value / 8 if ".lora_B." in key else value for key, value in state.items()}
    wanted = written(tmp_path / "eighth.safetensors", eighth)
    made = LAYOUTS[layout](_with_alpha(state, 0.5), part)
    file = written(tmp_path / "alpha.safetensors", made)
    editor = unharmed(family)
    latents = run(editor, LoRA(model=file))
    assert torch.allclose(latents, run(editor, LoRA(model=wanted)), atol=1e-5)
    assert not torch.allclose(latents, run(editor), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (FLUX, "the model's names"),
        (CHROMA, "the model's names"),
        (QWEN_IMAGE, "ComfyUI's prefix"),
        (Z_IMAGE, "ComfyUI's prefix"),
        (Z_IMAGE, "no prefix"),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_where_diffusers_reads_them_the_bits_are_its_own(
    family: Tiny, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "STEPS", 2)
    part, state = _alone(family)
    made = LAYOUTS[layout](_with_alpha(state, 3.0), part)
    assert apart(family, {written(tmp_path / "alpha.safetensors", made): 0.8}) == 0.0


def test_layers_that_the_model_lacks_do_not_cost_the_others_their_alpha(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, state = _alone(SD)
    editor = unharmed(SD)
    wanted = run(editor, LoRA(model=written(tmp_path / "a.safetensors", _with_alpha(state, 0.5))))
    more = {f"unet.nowhere.to_q.lora_{letter}.weight": torch.zeros(4, 4) for letter in "AB"}
    file = written(tmp_path / "b.safetensors", _with_alpha(state | more, 0.5))
    with caplog.at_level(logging.WARNING, "diffedit"):
        assert torch.equal(run(editor, LoRA(model=file)), wanted)
    assert any("2 of its" in one.getMessage() for one in caplog.records)


def test_eight_bits(tmp_path: Path) -> None:
    _, state = _alone(SD)
    rounded = {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    wanted = {key: value.float() for key, value in rounded.items()}
    files = [
        written(tmp_path / f"{name}.safetensors", one)
        for name, one in (("eight", rounded), ("full", wanted))
    ]
    made = [run(unharmed(SD), LoRA(model=file)) for file in files]
    assert torch.equal(made[0], made[1])


def test_what_peft_saves(tmp_path: Path) -> None:
    """`PeftModel.save_pretrained` keeps alpha beside the matrices, in a file of its own."""
    pipe: Any = SD.pipeline()
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v"])
    adapted: Any = get_peft_model(pipe.unet, config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, weight in adapted.named_parameters():
        if ".lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
            layer = name.removeprefix("base_model.model.").replace(".default.", ".")
            state[f"unet.{layer}"] = weight.data * (3.0 if ".lora_B." in name else 1.0)
    adapted.save_pretrained(tmp_path / "peft")
    wanted = written(tmp_path / "plain.safetensors", state)
    editor = unharmed(SD)
    made = run(editor, LoRA(model=str(tmp_path / "peft")))
    assert torch.allclose(made, run(editor, LoRA(model=wanted)), atol=1e-5)
    (tmp_path / "peft" / "adapter_config.json").unlink()
    (tmp_path / "peft").rename(tmp_path / "bare")
    refused(SD, tmp_path / "bare", r"keeps alpha in adapter_config\.json, and there is none beside")


def test_words_that_kohya_packs_in_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = kohya(additions(SDXL.pipeline()), xl=True)
    wanted = written(tmp_path / "plain.safetensors", state)
    words = {"bundle_emb.cat.string_to_param.*": torch.zeros(1, 32)}
    file = written(tmp_path / "bundle.safetensors", state | words)
    editor = unharmed(SDXL)
    with caplog.at_level(logging.WARNING, "diffedit"):
        made = run(editor, LoRA(model=file))
    assert torch.equal(made, run(editor, LoRA(model=wanted)))
    assert any("the words in it are not read" in one.getMessage() for one in caplog.records)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [SD, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize("letter", ["A", "B"])
def test_one_matrix_alone(family: Tiny, letter: str, tmp_path: Path) -> None:
    """The other one would be what happens to lie in memory."""
    _, state = _alone(family)
    lost = next(key for key in state if f"lora_{letter}" in key)
    del state[lost]
    refused(family, written(tmp_path / "half.safetensors", state), rf"lacks lora_{letter} of \w+")


def test_one_matrix_alone_in_the_layout_of_kohya(tmp_path: Path) -> None:
    state = kohya(_alone(SD)[1])
    del state[next(key for key in state if "lora_up" in key)]
    refused(SD, written(tmp_path / "half.safetensors", state), "half.safetensors")


def test_no_second_matrix_at_all(tmp_path: Path) -> None:
    state = {key: value for key, value in _alone(SD)[1].items() if "lora_A" in key}
    refused(SD, written(tmp_path / "half.safetensors", state), "lacks lora_B of")


def test_ranks_that_cannot_be(tmp_path: Path) -> None:
    _, state = _alone(SD)
    first = next(key for key in state if "lora_A" in key)
    other = state | {first: torch.zeros(3, state[first].shape[1])}
    refused(SD, written(tmp_path / "a.safetensors", other), "have the ranks 3 and 4")
    none = {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in state.items()}
    refused(SD, written(tmp_path / "b.safetensors", none), "ranks 0 and 0: should be one, and at")


def test_a_rank_that_the_file_says_and_does_not_have(tmp_path: Path) -> None:
    _, state = _alone(SD)
    told = {"unet.r": 8, "unet.lora_alpha": 8, "unet.target_modules": ["to_q", "to_k", "to_v"]}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    file = written(tmp_path / "a.safetensors", state, metadata)
    refused(SD, file, r"says that down_blocks\S+ has the rank 8, and it has 4")


@pytest.mark.parametrize(
    "told",
    [{"unet.r": 4, "unet.rank_pattern": {"(": 4}}, {"unet.r": 4, "unet.rank_pattern": [1]}],
    ids=["no pattern", "a list"],
)
def test_nonsense_that_the_file_says_of_itself(told: dict[str, Any], tmp_path: Path) -> None:
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    file = written(tmp_path / "a.safetensors", _alone(SD)[1], metadata)
    refused(SD, file, "says of itself what peft cannot read")


@pytest.mark.parametrize("alpha", [[float("nan")], [float("inf")], [4.0, 4.0], []])
@pytest.mark.parametrize("bare", [False, True])
def test_an_alpha_that_is_no_number(alpha: list[float], bare: bool, tmp_path: Path) -> None:
    _, state = _alone(SD)
    if not bare:
        state = {key.replace("lora_A", "lora_down"): value for key, value in state.items()}
        state = {key.replace("lora_B", "lora_up"): value for key, value in state.items()}
    key = next(iter(state)).split(".lora_")[0] + ".alpha"
    file = written(tmp_path / "a.safetensors", {**state, key: torch.tensor(alpha)})
    refused(SD, file, r"a\.safetensors: \S+\.alpha should be one finite number")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(number: float, tmp_path: Path) -> None:
    _, state = _alone(SD)
    state[next(iter(state))][0, 0] = number
    file = written(tmp_path / "a.safetensors", state)
    refused(SD, file, r"a\.safetensors: down_blocks\S+ holds numbers that are not finite")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_mid.weight", "of the kind LoCon in three matrices"),
        ("oft_blocks", "of the kind OFT"),
        ("on_input", "of the kind IA3"),
        ("a1.weight", "of the kind GLoRA"),
        ("diff", "holds whole differences of weights"),
    ],
)
def test_other_kinds_are_named(key: str, said: str, tmp_path: Path) -> None:
    state = {f"lora_unet_mid_block_attentions_0_proj_in.{key}": torch.zeros(2, 2)}
    refused(SD, written(tmp_path / "a.safetensors", state), said)


@pytest.mark.parametrize("family", [SD, SDXL], ids=lambda family: family.name)
def test_magnitudes_that_diffusers_would_drop(family: Tiny, tmp_path: Path) -> None:
    state = kohya(additions(family.pipeline()), xl=family is SDXL)
    dora = {
        key.replace("lora_down.weight", "dora_scale"): torch.ones(1, 1)
        for key in state
        if key.endswith("lora_down.weight")
    }
    file = written(tmp_path / "dora.safetensors", state | dora)
    refused(family, file, r"is a DoRA whose layout \(dora_scale\) is not read")


def test_one_of_the_same_family_is_not_said_to_be_for_it(tmp_path: Path) -> None:
    state = {f"somewhere.else.{key}": value for key, value in _alone(FLUX)[1].items()}
    with pytest.raises(ModelError, match="in a layout that is not read"):
        run(FLUX.editor(), LoRA(model=written(tmp_path / "a.safetensors", state)))


# --- changed on disk ------------------------------------------------------------------------------


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / USUAL
    editor = SD.editor()
    made = []
    for seed in (0, 1):
        written(file, _alone(SD, seed=seed)[1])
        os.utime(file, ns=(seed + 1, seed + 1))
        made += [run(editor, LoRA(model=str(named))) for named in (file, tmp_path)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not torch.allclose(made[0], made[2], atol=1e-3)
    fresh = run(SD.editor(), LoRA(model=str(file)))
    assert torch.equal(fresh, made[2])
    assert len(editor._resources) == 2


def test_the_same_name_elsewhere_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, made = SD.editor(), []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(tmp_path / str(seed))
        written(Path("a.safetensors"), _alone(SD, seed=seed)[1])
        made.append(run(editor, LoRA(model="a.safetensors")))
    assert not torch.allclose(made[0], made[1], atol=1e-3)


def test_a_file_that_is_gone_is_still_here(tmp_path: Path) -> None:
    """As with a server that lets go of what it was given."""
    editor, file = SD.editor(), tmp_path / "a.safetensors"
    first = run(editor, LoRA(model=written(file, _alone(SD)[1])))
    file.unlink()
    assert torch.equal(run(editor, LoRA(model=str(file))), first)
