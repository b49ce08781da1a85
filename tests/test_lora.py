"""LoRA: the latents are those of diffusers' pipelines, and nothing is left of it after a pass."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from peft import set_peft_model_state_dict
from torch import Tensor

from diffedit import Call, Editor, Pass
from diffedit.errors import CapabilityError, ModelError, PluginError, UnsafeWeights
from diffedit.models.loading import EMBEDDED
from diffedit.models.lora import USUAL as FILE
from diffedit_img2img import Img2Img
from diffedit_lora import LoRA
from diffedit_style import Style
from tests.families import FAMILIES, FLUX, PIXART, SANA, SD, SD3, SDXL, Tiny
from tests.families.additions import USUAL, additions, kohya, parts_of, written
from tests.laws.state import state, unchanged
from tests.laws.tools import Custom
from tests.parity import comparisons
from tests.parity.comparisons import Case

CARRYING = tuple(family for family in FAMILIES if "lora" in family.model.carries)
#: Those whose text encoders get additions, too.
WRITTEN = (SD, SDXL, SD3, FLUX)
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PASS = Pass(prompt="a", steps=3, edits=[Img2Img(strength=0.7)])


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "STEPS", 2)


each = pytest.mark.parametrize("family", CARRYING, ids=lambda family: family.name)


def apart(family: Tiny, loras: Mapping[str, float]) -> float:
    """How far latents with these LoRAs (by file) are from those of diffusers' pipeline with them.

    Raises:
        AssertionError: they do not act at all.
    """
    ours, theirs = Case(family, None), Case(family, None)
    names = [f"number{number}" for number in range(len(loras))]
    for name, file in zip(names, loras, strict=True):
        theirs.pipe.load_lora_weights(file, adapter_name=name)
    theirs.pipe.set_adapters(names, list(loras.values()))
    wanted = theirs.theirs("text2img")
    plain = ours.ours()
    latents = ours.ours(*(LoRA(model=file, weight=weight) for file, weight in loras.items()))
    assert not torch.allclose(latents, plain, atol=0.01)
    return (latents - wanted).abs().max().item()


def file_for(family: Tiny, folder: Path, **options: Any) -> str:
    name = f"{family.name}-{len(list(folder.iterdir()))}.safetensors"
    return written(folder / name, additions(family.pipeline(), **options))


# --- parity ---------------------------------------------------------------------------------------


def test_all_families_carry_it_whose_pipelines_load_any() -> None:
    for family in FAMILIES:
        editor = family.editor()
        pipe = editor.model.pipe  # type: ignore[attr-defined]
        assert ("lora" in editor.model.capabilities) == hasattr(pipe, "load_lora_weights")


@each
def test_two_as_in_diffusers(family: Tiny, tmp_path: Path) -> None:
    first, second = file_for(family, tmp_path), file_for(family, tmp_path, seed=1, rank=8)
    assert apart(family, {first: 0.7, second: -0.4}) == 0.0


@pytest.mark.parametrize("family", WRITTEN, ids=lambda family: family.name)
def test_text_encoders_alone(family: Tiny, tmp_path: Path) -> None:
    _, *texts = parts_of(family.pipeline())
    assert apart(family, {file_for(family, tmp_path, parts=tuple(texts)): 1.0}) == 0.0


@pytest.mark.parametrize("family", [SD, SDXL], ids=lambda family: family.name)
def test_convolutions_and_ranks_of_their_own(family: Tiny, tmp_path: Path) -> None:
    wide = additions(family.pipeline(), rank=8, parts=("unet",), ends=("conv1", "proj_in"))
    narrow = additions(family.pipeline(), rank=2, parts=("unet",), ends=("to_q", "conv_in"))
    file = written(tmp_path / "a.safetensors", wide | narrow)
    assert apart(family, {file: 0.6}) == 0.0


@pytest.mark.parametrize("family", [SD, SDXL], ids=lambda family: family.name)
def test_the_layout_of_kohya(family: Tiny, tmp_path: Path) -> None:
    state = kohya(additions(family.pipeline()), xl=family is SDXL)
    assert apart(family, {written(tmp_path / "a.safetensors", state): 0.8}) == 0.0


@pytest.mark.parametrize("family", [SD, SDXL], ids=lambda family: family.name)
def test_alphas_are_each_layers_own(family: Tiny, tmp_path: Path) -> None:
    """Alpha / rank in the file, or B as many times as large; diffusers gets the first wrong."""
    ends = USUAL if family is SDXL else (*USUAL, "conv1")
    plain = additions(family.pipeline(), ends=ends)
    state = kohya(plain, lambda index: 1.0 + index % 3, xl=family is SDXL)
    file = written(tmp_path / "kohya.safetensors", state)
    for index, key in enumerate([key for key in plain if ".lora_A." in key]):
        plain[key.replace("lora_A", "lora_B")] *= (1.0 + index % 3) / 4
    same = written(tmp_path / "peft.safetensors", plain)
    editor = family.editor()
    told, multiplied = run(editor, LoRA(model=file)), run(editor, LoRA(model=same))
    assert torch.allclose(told, multiplied, atol=1e-4)
    assert not torch.allclose(told, run(editor), atol=1e-2)


def run(editor: Editor, *edits: Any) -> Tensor:
    latents = editor.run(None, Pass(prompt="a", steps=2, edits=edits)).latents
    assert latents is not None
    return latents


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    """Ranks and alphas in the metadata, as `diffedit train` and diffusers save them."""
    from diffedit.training.lora import add, save

    pipe: Any = SD.pipeline()
    for part, targets in ((pipe.unet, ["to_q", "conv1"]), (pipe.text_encoder, ["q_proj"])):
        add(part, targets, rank=4, alpha=12.0)
        for name, weight in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    save(tmp_path / "model", pipe.unet, pipe.text_encoder)
    assert apart(SD, {str(tmp_path / "model"): 0.9}) == 0.0


def test_the_order_in_which_they_are_listed(tmp_path: Path) -> None:
    files = [file_for(SD, tmp_path, seed=seed) for seed in range(3)]
    edits = [LoRA(model=file, weight=0.3) for file in files]
    editor = SD.editor()
    latents = run(editor, *edits)
    assert torch.equal(run(editor, *reversed(edits)), latents)
    assert not torch.equal(run(editor, *edits[:2]), latents)


def test_none_of_it_changes_nothing(tmp_path: Path) -> None:
    file = file_for(SD, tmp_path)
    editor = SD.editor()
    assert torch.equal(run(editor, LoRA(model=file, weight=0.0)), run(editor))


def test_a_models_own_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``lora/<name>`` of its folder; a path of that name is written as one."""
    pipe = SD.pipeline()
    file = written(tmp_path / "soft.safetensors", additions(pipe))
    pipe.save_pretrained(tmp_path / "model")
    own = tmp_path / "model" / "lora" / "soft"
    own.mkdir(parents=True)
    (own / FILE).write_bytes(Path(file).read_bytes())
    editor = Editor.load(tmp_path / "model", device="cpu", dtype="float32")
    asked = run(editor, LoRA(model="soft"))
    assert torch.equal(asked, run(editor, LoRA(model=file)))
    assert not torch.allclose(asked, run(editor), atol=1e-2)
    monkeypatch.chdir(tmp_path)
    other = written(tmp_path / "other.safetensors", additions(pipe, seed=1))
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft" / FILE).write_bytes(Path(other).read_bytes())
    assert torch.equal(run(editor, LoRA(model="soft")), asked)
    assert torch.equal(run(editor, LoRA(model="./soft")), run(editor, LoRA(model=other)))
    with pytest.raises(ModelError, match=r"^sofd: no such file or folder"):
        run(editor, LoRA(model="sofd"))
    assert torch.equal(run(editor, LoRA(model="other.safetensors")), run(editor, LoRA(model=other)))


def test_beside_what_acts_on_attention(tmp_path: Path) -> None:
    edits = [Style(image=PICTURE), LoRA(model=file_for(SD, tmp_path))]
    editor = SD.editor()
    both = run(editor, *edits)
    assert not torch.allclose(both, run(editor, edits[0]), atol=1e-2)
    assert not torch.allclose(both, run(editor, edits[1]), atol=1e-2)


def test_on_a_denoiser_that_takes_more_than_latents(tmp_path: Path) -> None:
    """Flux: additions to the layer that takes what is new in Fill see the latents alone."""
    state = additions(FLUX.pipeline(), parts=("transformer",), ends=("x_embedder", "to_q"))
    file = written(tmp_path / "a.safetensors", state)
    plain: Any = FLUX.editor(**FLUX.options("inpainting")).model
    made = plain.load_lora(file).parts["transformer"][1]["x_embedder.lora_A.weight"]
    given = state["transformer.x_embedder.lora_A.weight"]
    assert made.shape[1] == plain.denoiser.x_embedder.in_features > given.shape[1]
    assert torch.equal(made[:, : given.shape[1]], given)
    assert not made[:, given.shape[1] :].any()


# --- nothing is left ------------------------------------------------------------------------------


def attributes(editor: Editor) -> list[Any]:
    """All that modules hold beside their parts."""
    return [
        (key, {name: id(value) for name, value in one.__dict__.items()})
        for part in parts_of(editor.model.pipe).values()  # type: ignore[attr-defined]
        for key, one in part.named_modules()
    ]


def loras(family: Tiny, folder: Path) -> list[LoRA]:
    """Two that share some layers, and have others of their own."""
    few = file_for(family, folder, seed=1, ends=("to_q", "q_proj", "to_out.0", "proj_out"))
    return [LoRA(model=file_for(family, folder)), LoRA(model=few, weight=0.5)]


@each
def test_nothing_is_left(family: Tiny, tmp_path: Path) -> None:
    """After a pass, a cancel in the midst of one, and an error in the midst of one."""
    editor = family.editor()
    before, told = state(editor), attributes(editor)
    expected = family.editor().run(PICTURE, PASS, seed=3).latents
    edits: list[Any] = list(loras(family, tmp_path))

    def check() -> None:
        unchanged(before, state(editor))
        assert attributes(editor) == told
        latents = editor.run(PICTURE, PASS, seed=3).latents
        assert latents is not None
        assert expected is not None
        assert torch.equal(latents, expected)

    def refine(x0: Tensor, call: Call) -> Tensor:
        if call.index == 1:
            raise RuntimeError("boom")
        return x0

    editor.run(None, Pass(prompt="a", steps=2, edits=edits))
    check()
    with editor.stream(None, Pass(prompt="a", steps=3, edits=edits)) as events:
        next(events)
        assert "lora" in repr(next(iter(editor.model.parts())))
    check()
    edits.append(Custom(parts={"refine": refine}))
    with pytest.raises(PluginError, match=r"custom.*boom"):
        editor.run(None, Pass(prompt="a", steps=3, edits=edits))
    check()


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_one_that_cannot_be_added_leaves_nothing(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = SD.editor()
    before, told = state(editor), attributes(editor)
    calls = iter(range(99))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("no memory")
        return set_peft_model_state_dict(*args, **kwargs)

    monkeypatch.setattr("diffedit.models.lora.set_peft_model_state_dict", failing)
    with pytest.raises(PluginError, match=r"lora.*no memory"):
        run(editor, *loras(SD, tmp_path))
    unchanged(before, state(editor))
    assert attributes(editor) == told


def test_the_first_acts_on_when_the_second_has_gone(tmp_path: Path) -> None:
    first, second = loras(SDXL, tmp_path)
    editor = SDXL.editor()
    model, alone = editor.model, run(editor, first)
    undo = model.add_lora(model.load_lora(first.model), first.weight)
    model.add_lora(model.load_lora(second.model), second.weight)()
    assert torch.equal(run(editor), alone)
    undo()


def test_weights_that_were_to_be_trained_still_are(tmp_path: Path) -> None:
    editor = SD.editor()
    editor.model.denoiser.requires_grad_(True)  # type: ignore[attr-defined]
    before = state(editor)
    run(editor, *loras(SD, tmp_path))
    unchanged(before, state(editor))


def test_inside_inference_mode(tmp_path: Path) -> None:
    edits = loras(SD, tmp_path)
    latents = run(SD.editor(), *edits)
    editor = SD.editor()
    with torch.inference_mode():
        assert torch.equal(run(editor, *edits), latents)
    assert torch.equal(run(editor, *edits), latents)


def test_no_number_is_drawn_for_it(tmp_path: Path) -> None:
    editor, edits = SD.editor(), loras(SD, tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(editor, *edits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [SD, FLUX], ids=lambda family: family.name)
def test_beside_weights_held_in_eight_bits(family: Tiny, tmp_path: Path) -> None:
    """What is added is not rounded to them; nearly all that differs is what differed before."""
    family.save(family.pipeline(), tmp_path / "model")
    edit = LoRA(model=file_for(family, tmp_path))
    exact, narrow = (
        Editor.load(tmp_path / "model", device="cpu", dtype=kind) for kind in ("float32", "float8")
    )
    plain, drawn = (
        (run(narrow, *edits).float() - run(exact, *edits)).abs().mean() for edits in ((), (edit,))
    )
    assert drawn < 2 * plain
    model: Any = narrow.model
    undo = model.add_lora(model.load_lora(edit.model), 1.0)
    added = {p.dtype for n, p in model.denoiser.named_parameters() if ".lora_" in n}
    undo()
    assert added == {model.dtype}


def test_a_compiled_denoiser_steps_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compiling(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(mode)
            return forward(*args, **kwargs)

        return counted

    monkeypatch.setattr(torch, "compile", compiling)
    edits = loras(SD, tmp_path)
    editor = SD.editor()
    expected, plain = run(editor, *edits), run(editor)
    editor.model.compile()  # type: ignore[attr-defined]
    assert torch.equal(run(editor, *edits), expected)
    assert calls == []
    assert torch.equal(run(editor), plain)
    assert calls


# --- what is refused ------------------------------------------------------------------------------


@functools.cache
def unharmed(family: Tiny) -> Editor:
    return family.editor()


def refused(family: Tiny, model: str | Path, match: str, kind: type = ModelError) -> None:
    """It is refused in one line, before anything is sampled."""
    events = unharmed(family).stream(None, Pass(prompt="a", edits=[LoRA(model=str(model))]))
    with pytest.raises(kind, match=match) as caught:
        next(events)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "match"),
    [
        (FLUX, SD, r"does not fit.*seems to be for Flux"),
        (SD3, SDXL, r"does not fit.*seems to be for Stable Diffusion 3"),
        (SDXL, SANA, r"does not fit.*seems to be for Stable Diffusion XL"),
        (SDXL, FLUX, r"does not fit.*seems to be for Stable Diffusion XL"),
        (SD, SDXL, r"made for another model: for down_blocks.*attn2.to_k it has 32, .* model 64"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_one_for_another_family(theirs: Tiny, ours: Tiny, match: str, tmp_path: Path) -> None:
    refused(ours, file_for(theirs, tmp_path), match)


@pytest.mark.parametrize("ours", [SDXL, SD3, FLUX, SANA], ids=lambda family: family.name)
def test_one_of_kohya_for_another_family(ours: Tiny, tmp_path: Path) -> None:
    state = kohya(additions(SD.pipeline(), parts=("unet",), ends=("attn2.to_v",)))
    refused(
        ours, written(tmp_path / "a.safetensors", state), r"safetensors: (does not fit|was made)"
    )


def test_a_unets_text_says_whose_it_is(tmp_path: Path) -> None:
    for width, name in ((768, "Diffusion 1"), (1024, "Diffusion 2"), (2048, "Diffusion XL")):
        key = (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
        )
        made = {key: torch.zeros(4, width), key.replace("down.", "up."): torch.zeros(320, 4)}
        made[key.replace("lora_down.weight", "alpha")] = torch.tensor(4.0)
        file = written(tmp_path / f"{width}.safetensors", made)
        refused(SD, file, f"seems to be for Stable {name}")


def test_a_model_whose_family_has_no_loader(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="lora: the loaded model has no 'lora'"):
        run(PIXART.editor(), LoRA(model="nothing"))


def test_files_that_are_none(tmp_path: Path) -> None:
    good = Path(file_for(SD, tmp_path, ends=("to_q",)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").write_bytes(b"x")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("no weights at all", "utf-8")
    vae = written(tmp_path / "vae.safetensors", {"encoder.conv_in.weight": torch.zeros(2)})
    loha = written(tmp_path / "loha.safetensors", {"lora_unet_a.hada_w1_a": torch.zeros(2, 2)})
    refused(SD, good.with_stem(good.stem + "s"), rf"no such file.*did you mean '{good.name}'")
    refused(SD, tmp_path / "empty", r"holds no \.safetensors file")
    refused(SD, tmp_path / "pickle", "a pickle", UnsafeWeights)
    refused(SD, tmp_path / "a.ckpt", "a pickle", UnsafeWeights)
    refused(SD, tmp_path / "a.pt", "a pickle", UnsafeWeights)
    refused(SD, cut, "cut.safetensors: cut off")
    refused(SD, tmp_path / "text.safetensors", "not a readable .safetensors file")
    refused(SD, vae, "no LoRA: none of its 1 tensors is called lora, such as 'encoder.conv_in")
    refused(SD, loha, "of the kind LoHa; only LoRA")


def test_a_folder_of_several(tmp_path: Path) -> None:
    state = additions(SD.pipeline(), ends=("to_q",))
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", state)
    refused(SD, tmp_path, "several .safetensors files: name one of a.safetensors, b.safetensors")
    written(tmp_path / "pytorch_lora_weights.safetensors", state)
    latents = run(SD.editor(), LoRA(model=str(tmp_path)))
    assert torch.equal(latents, run(SD.editor(), LoRA(model=str(tmp_path / "a.safetensors"))))


@pytest.mark.parametrize("name", ["somebody/something", "somebody/something/style.safetensors"])
def test_a_hub_that_cannot_be_asked(name: str) -> None:
    refused(SD, name, r"somebody/something: .*hub")


def test_metadata_that_says_nonsense(tmp_path: Path) -> None:
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.of_another_time": 1})}
    state = additions(SD.pipeline(), parts=("unet",), ends=("to_q",))
    refused(SD, written(tmp_path / "a.safetensors", state, told), "what peft cannot read")


def test_what_fits_in_part_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = additions(SD.pipeline(), ends=("to_q",))
    more = {
        "unet.nowhere.lora_A.weight": torch.zeros(4, 8),
        "unet.nowhere.lora_B.weight": torch.zeros(8, 4),
    }
    file, plain = (
        written(tmp_path / f"{name}.safetensors", one)
        for name, one in (("more", state | more), ("plain", state))
    )
    with caplog.at_level(logging.WARNING, "diffedit"):
        latents = run(SD.editor(), LoRA(model=file))
    assert f"2 of its {len(state) + 2} weights belong to no layer" in caplog.text
    assert torch.equal(latents, run(SD.editor(), LoRA(model=plain)))


@pytest.mark.parametrize(
    ("said", "what"),
    [({}, "model"), ({"model": ""}, "model"), ({"model": "a", "weight": 9}, "weight")],
)
def test_parameters(said: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        LoRA(**said)


def test_what_mattered_in_training_only_does_not_act(tmp_path: Path) -> None:
    state = additions(SD.pipeline(), parts=("unet",), ends=("to_q",))
    told = {"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}
    files = [
        written(
            tmp_path / f"{rate}.safetensors",
            state,
            {"lora_adapter_metadata": json.dumps({**told, "unet.lora_dropout": rate})},
        )
        for rate in (0.0, 0.5)
    ]
    torch.manual_seed(0)
    plain, dropping, again = (
        run(SD.editor(), LoRA(model=file)) for file in (files[0], files[1], files[1])
    )
    assert torch.equal(plain, dropping)
    assert torch.equal(dropping, again)


def test_the_embedded_models_own_draws_in_four_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says it; the latents are those of diffusers' pipeline with the same file."""
    editor = Editor.load(device="cpu", dtype="float32")
    rows: list[int] = []
    predict = editor.model.predict

    def counted(x: Any) -> Tensor:
        rows.append(len(x.rows))
        return predict(x)

    monkeypatch.setattr(editor.model, "predict", counted)
    few = LoRA(model="few")
    pass_ = Pass(prompt="a red circle", steps=4, guidance=1, scheduler="unipc", edits=[few])
    made = editor.run(None, pass_, seed=2, compat=True)
    assert rows == [1] * 4
    pipe: Any = StableDiffusionPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    pipe.load_lora_weights(EMBEDDED / "lora" / "few")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images
    assert made.latents is not None
    assert torch.equal(made.latents, theirs)
    red, green, blue = made.pixels[96:160, 96:160].reshape(-1, 3).mean(axis=0)
    assert red > 1.5 * max(green, blue)
    plain = editor.run(None, pass_.model_copy(update={"edits": ()}), seed=2, compat=True).latents
    assert plain is not None
    assert not torch.equal(plain, theirs)
