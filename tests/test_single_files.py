"""Models in one file, in the layouts of those who made them: as diffusers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file, save_file
from skimage import data

from diffedit import Editor, Pass, errors
from diffedit.cli import main
from diffedit.models import single_file
from diffedit.models.files import header
from diffedit_img2img import Img2Img
from tests.families import FLUX, SD3, Tiny
from tests.families.originals import autoencoder, flux, narrow_flux, sampled, sd3, text_encoders
from tests.hub_server import serving
from tests.test_hub import use

PASS = Pass(prompt="a red circle", steps=2, guidance=3.0)


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_flux(32):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind as a folder, with files of it beside it."""
    place = tmp_path_factory.mktemp("models")
    for family in (SD3, FLUX):
        pipe: Any = family.pipeline()
        family.save(pipe, place / family.name)
        if family is SD3:
            net = sd3(pipe.transformer)
            texts = text_encoders(
                clip_l=pipe.text_encoder, clip_g=pipe.text_encoder_2, t5xxl=pipe.text_encoder_3
            )
            rest = autoencoder(pipe.vae) | texts
        else:
            net = flux(pipe.transformer)
            texts = text_encoders(clip_l=pipe.text_encoder, t5xxl=pipe.text_encoder_2)
            rest = autoencoder(pipe.vae, "vae.") | texts
        save(net | rest, place / f"{family.name}-whole.safetensors")
        save(net | autoencoder(pipe.vae), place / f"{family.name}-vae.safetensors")
        save(net, place / f"{family.name}-bare.safetensors")
    return {"place": place}


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)


def file_of(folders: dict[str, Path], family: Tiny, kind: str) -> tuple[Path, Path]:
    place = folders["place"]
    return place / f"{family.name}-{kind}.safetensors", place / family.name


both = pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)


@both
def test_the_layout_is_the_inverse_of_what_diffusers_reads(
    family: Tiny, folders: dict[str, Path]
) -> None:
    file, folder = file_of(folders, family, "vae")
    for part in ("transformer", "vae"):
        cls = getattr(
            diffusers, json.loads((folder / part / "config.json").read_text())["_class_name"]
        )
        made = cls.from_single_file(str(file), config=str(folder), subfolder=part).state_dict()
        wanted = cls.from_pretrained(folder / part).state_dict()
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[name], wanted[name]) for name in wanted)


@both
@pytest.mark.parametrize("kind", ["whole", "vae", "bare"])
def test_a_file_gives_what_diffusers_makes_of_it(
    family: Tiny, kind: str, folders: dict[str, Path]
) -> None:
    file, folder = file_of(folders, family, kind)
    editor = Editor.load(file, config=folder, device="cpu")
    assert editor.model.info["family"] == family.name
    theirs: Any = getattr(diffusers, family.theirs["text2img"])
    saved = theirs.from_pretrained(folder)
    lacking = {"whole": [], "vae": ["text"], "bare": ["text", "vae"]}[kind]
    given = {
        name: part
        for name, part in saved.components.items()
        if any(name.startswith(one) for one in lacking)
    }
    pipe = theirs.from_single_file(str(file), config=str(folder), **given)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            own = getattr(editor.model.pipe, name).state_dict()  # type: ignore[attr-defined]
            assert all(torch.equal(own[key], value) for key, value in part.state_dict().items())
    if kind == "whole":  # diffusers leaves a T5 of a file with its dropout on
        pipe.components["text_encoder_3" if family is SD3 else "text_encoder_2"].eval()
    made = editor.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
    assert made is not None
    assert (made - sampled(pipe)).abs().max() == 0.0


@both
def test_a_file_that_lacks_parts_says_where_to_have_them_from(
    family: Tiny, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = file_of(folders, family, "bare")
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--size", "64x64"]
    line += ["--model", str(file), "--device", "cpu"]
    assert main([*line, "--config", str(folder)]) == 0
    assert (tmp_path / "a.png").exists()
    shutil.copytree(folder, tmp_path / "part", ignore=lambda *_: ["vae"])
    capsys.readouterr()
    assert main([*line, "--overwrite", "--config", str(tmp_path / "part")]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert (
        told == f"diffedit: {tmp_path / 'part' / 'vae'}: missing; the single file has no vae either"
    )


@both
def test_without_a_config_the_makers_own_is_asked_of_the_hub(
    family: Tiny, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = file_of(folders, family, "whole")
    bare, _ = file_of(folders, family, "bare")
    name = single_file._published(whole, header(whole))
    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        with pytest.raises(errors.ModelError, match=f"{name}: .*none of this name on the hub"):
            Editor.load(whole, device="cpu")
        server.push(name, folder)
        made = Editor.load(whole, device="cpu").run(None, PASS, size=(64, 64))
        assert not any("/large/" in path for _, path, _ in server.asked)
        with pytest.raises(
            errors.ModelError, match=r"holds no text_encoder, text_encoder_2.*, vae: name"
        ):
            Editor.load(bare, device="cpu")
        again = Editor.load(bare, config=name, device="cpu").run(None, PASS, size=(64, 64))
        assert not any("/large/" in path and "transformer" in path for _, path, _ in server.asked)
    assert made.pixels.shape == again.pixels.shape == (64, 64, 3)


def test_what_a_config_says_of_its_pipeline_counts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of Kontext's files, which have the tensors of dev's."""
    file, _ = file_of(folders, FLUX, "bare")
    FLUX.save(FLUX.pipeline(kind=FluxKontextPipeline), tmp_path)
    editor = Editor.load(file, config=tmp_path, device="cpu")
    assert "instructions" in editor.model.capabilities


def test_files_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file, _ = file_of(folders, FLUX, "whole")
    _, other = file_of(folders, SD3, "whole")
    with pytest.raises(
        errors.ModelError, match=r"is for a FluxPipeline, and the .* of a StableDif"
    ):
        Editor.load(file, config=other, device="cpu")
    with pytest.raises(errors.ModelError, match="is no single file"):
        Editor.load(other, config=other, device="cpu")
    state = load_file(file)
    faults: list[tuple[Callable[[Any], Any], str]] = [
        (lambda s: s.pop("double_blocks.0.img_mod.lin.bias"), "cannot be loaded|lacks"),
        (lambda s: s.update({"txt_in.weight": torch.zeros(3, 3)}), "cannot be loaded .*shape"),
        (lambda s: s.pop("vae.encoder.conv_in.weight"), "lacks tensors that the configuration in"),
        (
            lambda s: s.pop("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"),
            "lacks",
        ),
    ]
    for spoil, said in faults:
        wrong = dict(state)
        spoil(wrong)
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(errors.ModelError, match=said):
            Editor.load(
                tmp_path / "wrong.safetensors", config=folders["place"] / FLUX.name, device="cpu"
            )
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.ModelError, match="not a checkpoint in an original layout"):
        Editor.load(tmp_path / "other.safetensors")


def test_edits_act_on_a_single_file(folders: dict[str, Path], tmp_path: Path) -> None:
    file, folder = file_of(folders, FLUX, "bare")
    picture = data.coffee()[:64, :64]
    pass_ = Pass(prompt="a red circle", steps=2, edits=(Img2Img(strength=0.6),))
    # The sizes of the folder are for tests, and the file has none.
    same = shutil.copytree(folder, tmp_path / "same", ignore=lambda *_: ["diffedit.json"])
    made = [
        Editor.load(source, config=config, device="cpu").run(picture, pass_).pixels
        for source, config in ((file, folder), (same, None))
    ]
    assert (made[0] == made[1]).all()
    assert (made[0] != picture).any()
