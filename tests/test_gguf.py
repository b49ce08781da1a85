"""Denoisers in GGUF files: as diffusers reads them, and as the model's own in every other way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from gguf import GGMLQuantizationType as Kind
from skimage import data

from diffedit import Edit, Editor, Pass, errors
from diffedit.cli import main
from diffedit.models import holding, single_file
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_lora import LoRA
from tests.families import FLUX, SD, SD3, Tiny
from tests.families.additions import additions, written
from tests.families.originals import flux, narrow_flux, sampled, sd3
from tests.laws.state import state, unchanged

PASS = Pass(prompt="a red circle", steps=2, guidance=3.0)
BLOCK = 32
"""Numbers in a block of the types used here."""


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_flux(32):
        yield


def save(state: dict[str, torch.Tensor], path: Path, kind: Kind) -> None:
    """A file of a network, its matrices in blocks of few bits, the rest as it is."""
    writer = gguf.GGUFWriter(path, arch="image")
    for name, tensor in state.items():
        values = tensor.float().contiguous().numpy()
        if values.ndim == 2 and values.shape[1] % BLOCK == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as folders, and their denoisers as files beside them."""
    made = tmp_path_factory.mktemp("models")
    for family, layout in ((SD3, sd3), (FLUX, flux)):
        pipe: Any = family.pipeline()
        family.save(pipe, made / family.name)
        for kind in (Kind.Q4_0, Kind.Q8_0):
            save(layout(pipe.transformer), made / f"{family.name}-{kind.name}.gguf", kind)
    return made


def theirs(family: Tiny, file: Path, folder: Path) -> Any:
    """diffusers' own pipeline with the file's denoiser."""
    named = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    net = getattr(diffusers, named).from_single_file(
        str(file),
        config=str(folder),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    return getattr(diffusers, family.theirs["text2img"]).from_pretrained(folder, transformer=net)


both = pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)


@both
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
def test_latents_are_those_of_diffusers(family: Tiny, kind: Kind, place: Path) -> None:
    file, folder = place / f"{family.name}-{kind.name}.gguf", place / family.name
    editor = Editor.load(file, config=folder, device="cpu")
    assert editor.model.info["family"] == family.name
    assert editor.model.dtype == torch.float32
    whole = Editor.load(folder, device="cpu").model.info["parameters"]
    assert editor.model.info["parameters"] == whole
    pipe = theirs(family, file, folder)
    own = editor.model.pipe.transformer.state_dict()  # type: ignore[attr-defined]
    assert any(value.dtype == torch.uint8 for value in own.values())
    assert all(torch.equal(own[key], value) for key, value in pipe.transformer.state_dict().items())
    made = editor.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    assert made is not None
    assert (made - sampled(pipe)).abs().max() == 0.0


def test_eight_bits_are_nearer_than_four(place: Path) -> None:
    def made(source: Path, **options: Any) -> torch.Tensor:
        latents = (
            Editor.load(source, device="cpu", **options)
            .run(None, PASS, size=(64, 64), seed=7, compat=True)
            .latents
        )
        assert latents is not None
        return latents

    whole = made(place / FLUX.name)
    away = [
        float(
            (made(place / f"{FLUX.name}-{kind}.gguf", config=place / FLUX.name) - whole)
            .abs()
            .mean()
        )
        for kind in ("Q8_0", "Q4_0")
    ]
    assert 0 < away[0] < away[1]


def test_edits_act_on_it_and_the_rest_of_the_picture_stays(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = place / f"{FLUX.name}-Q8_0.gguf", place / FLUX.name
    picture = data.coffee()[:64, :64]
    mask = torch.zeros(64, 64).numpy().astype(bool)
    mask[16:48, 16:48] = True
    editor = Editor.load(file, config=folder, device="cpu")
    before = {
        key: value.clone()
        for key, value in editor.model.pipe.transformer.state_dict().items()  # type: ignore[attr-defined]
    }
    pass_ = Pass(prompt="x", steps=2, edits=[Inpaint(mask=mask, feather=0), Img2Img(strength=0.8)])
    made = editor.run(picture, pass_).pixels
    assert (made[~mask] == picture[~mask]).all()
    assert (made[mask] != picture[mask]).any()
    after = editor.model.pipe.transformer.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(after[key], value) for key, value in before.items())
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--size", "64x64"]
    assert main([*line, "--model", str(file), "--config", str(folder), "--device", "cpu"]) == 0
    assert (tmp_path / "a.png").exists()


def test_a_lora_acts_on_it_as_in_diffusers(place: Path, tmp_path: Path) -> None:
    file, folder = place / f"{FLUX.name}-Q8_0.gguf", place / FLUX.name
    lora = written(tmp_path / "lora.safetensors", additions(FLUX.pipeline()))
    editor = Editor.load(file, config=folder, device="cpu")
    packed = state(editor)

    def made(*edits: Edit) -> torch.Tensor:
        pass_ = PASS.model_copy(update={"edits": edits})
        latents = editor.run(None, pass_, size=(64, 64), seed=7, compat=True).latents
        assert latents is not None
        return latents

    plain = made()
    ours = made(LoRA(model=lora, weight=0.7))
    assert not torch.allclose(ours, plain, atol=0.01)
    unchanged(packed, state(editor))
    assert torch.equal(made(), plain)
    pipe = theirs(FLUX, file, folder)
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.set_adapters(["one"], [0.7])
    assert (ours - sampled(pipe)).abs().max() == 0.0


def test_packed_weights_stay_packed_where_they_go(place: Path) -> None:
    file, folder = place / f"{FLUX.name}-Q8_0.gguf", place / FLUX.name
    net = Editor.load(file, config=folder, device="cpu").model.pipe.transformer  # type: ignore[attr-defined]
    packed = net.transformer_blocks[0].ff.net[2].weight
    moved = holding._moved(packed, torch.device("meta"))
    assert moved.device.type == "meta"
    assert type(moved) is type(packed)
    assert moved.quant_type == packed.quant_type  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = place / f"{FLUX.name}-Q8_0.gguf", place / FLUX.name
    with pytest.raises(errors.ModelError, match=r"is for a FluxPipeline, and the .* of a StableDi"):
        Editor.load(file, config=place / SD3.name, device="cpu")
    with pytest.raises(errors.ModelError, match="held in few bits already: leave out dtype"):
        Editor.load(file, config=folder, device="cpu", dtype="float8")
    whole = file.read_bytes()
    for size in (0, 3, 40, 1000, len(whole) - 1000):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(errors.ModelError, match=r"cut\.gguf: not a readable \.gguf file \("):
            Editor.load(cut, config=folder, device="cpu")
    other = tmp_path / "other.gguf"
    save({"token_embd.weight": torch.zeros(32, 32)}, other, Kind.Q8_0)
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--size", "64x64"]
    assert main([*line, "--model", str(other), "--config", str(folder)]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "not a checkpoint in an original layout that is known" in told
    save(flux(FLUX.pipeline().transformer) | {"txt_in.weight": torch.zeros(3, 3)}, other, Kind.Q8_0)
    with pytest.raises(errors.ModelError, match=r"other\.gguf: cannot be loaded"):
        Editor.load(other, config=folder, device="cpu")
    lacking = flux(FLUX.pipeline().transformer)
    del lacking["double_blocks.0.img_mod.lin.weight"]
    save(lacking, other, Kind.Q8_0)
    with pytest.raises(errors.ModelError, match=r"other\.gguf: lacks double_blocks\.0\.img_mod"):
        Editor.load(other, config=folder, device="cpu")
    with pytest.raises(errors.ModelError, match=r"not a model; .* or a \.safetensors file"):
        Editor.load(place / FLUX.name, vae=file, device="cpu")


def test_without_the_package_it_is_said_which(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(errors.ModelError, match=r"pip install 'diffedit\[gguf\]'"):
        Editor.load(place / f"{FLUX.name}-Q8_0.gguf", config=place / FLUX.name)


@pytest.mark.parametrize(("told", "pipeline"), [(2816, "XL"), (2560, "XL"), (1024, "")])
def test_a_unet_of_xl_alone_is_known_by_what_it_is_told(
    told: int, pipeline: str, tmp_path: Path
) -> None:
    """It has no text encoders beside it that would tell it from Stable Diffusion's."""
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 32),
        "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1, told),
    }
    save(state, tmp_path / "unet.gguf", Kind.Q8_0)
    assert single_file.kind(tmp_path / "unet.gguf") == f"StableDiffusion{pipeline}Pipeline"


def test_a_unet_without_the_names_that_diffusers_reads_is_refused(tmp_path: Path) -> None:
    save({"input_blocks.0.0.weight": torch.zeros(4, 32)}, tmp_path / "sd.gguf", Kind.Q8_0)
    SD.save(SD.pipeline(), tmp_path / "sd")
    with pytest.raises(errors.ModelError, match=r"lack 'model\.diffusion_model\.' before their"):
        Editor.load(tmp_path / "sd.gguf", config=tmp_path / "sd", device="cpu")
