"""Models in one file, in the layouts of those who made them: as diffusers reads them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, FluxKontextPipeline
from safetensors.torch import load_file, save_file
from skimage import data

from diffedit import Editor, Pass, errors
from diffedit.cli import main
from diffedit.models import single_file
from diffedit.models.files import header
from diffedit_img2img import Img2Img
from tests.families import FLUX, SD, SD3, SDXL, Tiny
from tests.families.originals import (
    autoencoder,
    clip,
    flux,
    kernels,
    narrow_flux,
    open_clip,
    sampled,
    sd3,
    text_encoders,
)
from tests.families.stable_diffusion_xl import xl_pipeline
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
    name = single_file.published(whole, header(whole))
    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        said = rf"{whole.name}: says nothing .*with config .*{name}: .*none of this name on the hub"
        with pytest.raises(errors.ModelError, match=said):
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
        (lambda s: s.pop("double_blocks.0.img_mod.lin.bias"), "lacks double_blocks.0.img_mod"),
        (
            lambda s: s.update({"txt_in.weight": torch.zeros(3, 3)}),
            r"its transformer\.context_embedder\.weight is \[3, 3\] where its configuration asks",
        ),
        (
            lambda s: s.pop("vae.encoder.conv_in.weight"),
            r"lacks vae\.encoder\.conv_in\.weight; .* \(the configuration is .*vae/config\.json",
        ),
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
    for beside in (file, folders["place"] / FLUX.name / "model_index.json"):
        with pytest.raises(errors.ModelError, match=f"^{beside}: a file, and config names a"):
            Editor.load(file, config=beside, device="cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.ModelError, match="not a checkpoint in an original layout"):
        Editor.load(tmp_path / "other.safetensors")


def test_a_config_whose_tokenizer_knows_no_words(folders: dict[str, Path], tmp_path: Path) -> None:
    file, folder = file_of(folders, FLUX, "whole")
    shutil.copytree(folder, tmp_path / "config")
    (tmp_path / "config" / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(errors.ModelError, match="tokenizer_2: the tokenizer knows no words"):
        Editor.load(file, config=tmp_path / "config", device="cpu")


@pytest.mark.parametrize("part", ["double_blocks.0.img_attn.", "text_encoders.t5xxl.", "vae."])
def test_weights_that_are_quantised(part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """ComfyUI's and bitsandbytes' would be read as if they were plain, without a word."""
    file, folder = file_of(folders, FLUX, "whole")
    state, wrong = load_file(file), tmp_path / "wrong.safetensors"
    name = next(one for one in state if one.startswith(part) and one.endswith(".weight"))
    stem = name.removesuffix(".weight")
    eighth = {name: state[name].to(torch.float8_e4m3fn)}
    faults: list[tuple[dict[str, torch.Tensor], str]] = [
        (eighth | {f"{stem}.scale_weight": torch.tensor(0.5)}, f"holds {stem}.scale_weight"),
        (eighth | {f"{stem}.weight_scale": torch.tensor(0.5)}, f"holds {stem}.weight_scale"),
        (eighth | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, "holds scaled_fp8"),
        ({name: state[name].to(torch.int8)}, f"its {name} is of type I8"),
        ({name: torch.zeros(9, 1, dtype=torch.uint8)}, f"its {name} is of type U8"),
    ]
    for changes, said in faults:
        save_file(state | changes, wrong)
        with pytest.raises(errors.ModelError, match="quantised in a way that") as refused:
            Editor.load(wrong, config=folder, device="cpu")
        assert str(refused.value).startswith(f"{wrong}: ")
        assert said in str(refused.value)
    save_file(state | eighth | {f"{stem}.position_ids": torch.arange(3)}, wrong)
    Editor.load(wrong, config=folder, device="cpu")


# --- UNets ----------------------------------------------------------------------------------------


def unet(net: Any) -> dict[str, torch.Tensor]:
    """A UNet of Stable Diffusion or its XL as its makers call its tensors."""
    each = net.config.layers_per_block + 1
    names = {
        r"time_embedding\.linear_1": "time_embed.0",
        r"time_embedding\.linear_2": "time_embed.2",
        r"add_embedding\.linear_1": "label_emb.0.0",
        r"add_embedding\.linear_2": "label_emb.0.2",
        r"^conv_in": "input_blocks.0.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
        r"mid_block\.attentions\.0": "middle_block.1",
        r"mid_block\.resnets\.0": "middle_block.0",
        r"mid_block\.resnets\.1": "middle_block.2",
        r"norm1\.(?=\w+$)": "in_layers.0.",
        r"\.conv1": ".in_layers.2",
        r"\.time_emb_proj": ".emb_layers.1",
        r"norm2\.(?=\w+$)": "out_layers.0.",
        r"\.conv2": ".out_layers.3",
        r"conv_shortcut": "skip_connection",
    }
    kinds = {"resnets": 0, "attentions": 1}

    def place(found: re.Match[str]) -> str:
        way, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        if kind == "downsamplers":
            return f"input_blocks.{1 + each * block + each - 1}.0.op."
        if kind == "upsamplers":
            attends = getattr(net.up_blocks[block], "attentions", None) is not None
            return f"output_blocks.{each * block + each - 1}.{2 if attends else 1}.conv."
        if way == "down":
            return f"input_blocks.{1 + each * block + layer}.{kinds[kind]}."
        return f"output_blocks.{each * block + layer}.{kinds[kind]}."

    made = {}
    for name, tensor in net.state_dict().items():
        attention = "attentions" in name
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(conv\.)?", place, name)
        for ours, theirs in names.items():
            if not attention or "block" in ours:
                name = re.sub(ours, theirs, name)
        made[f"model.diffusion_model.{name}"] = tensor
    return made


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion and its XL: folders, and their UNets in files beside them."""
    place = tmp_path_factory.mktemp("unets")
    for family in (SD, SDXL):
        pipe: Any = family.pipeline()
        family.save(pipe, place / family.name)
        # A tiny UNet of XL is known by what stands beside it, not by its width.
        mark = {"conditioner.embedders.2.mark": torch.zeros(1)} if family is SDXL else {}
        save(unet(pipe.unet) | mark, place / f"{family.name}.safetensors")
    return place


@pytest.mark.parametrize("kind", ["1", "2", "xl"])
def test_a_whole_file_of_stable_diffusion_is_what_diffusers_makes_of_it(
    kind: str, tmp_path: Path
) -> None:
    """CLIP's own layout, OpenCLIP's, and both; an autoencoder with kernels for attention."""
    family = SDXL if kind == "xl" else SD
    pipe: Any = xl_pipeline(width=48) if kind == "xl" else family.pipeline()
    family.save(pipe, tmp_path / "folder")
    if kind == "1":
        texts = clip(pipe.text_encoder, "cond_stage_model.transformer.")
    elif kind == "2":
        texts = open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        texts = clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        texts |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    file = tmp_path / "whole.safetensors"
    save(unet(pipe.unet) | kernels(autoencoder(pipe.vae)) | texts, file)

    editor = Editor.load(file, config=tmp_path / "folder", device="cpu")
    assert editor.model.info["family"] == family.name
    for one in ("text_encoder", "text_encoder_2") if kind == "xl" else ("text_encoder",):
        # Nothing of it may be the folder's, so the folder's are other weights.
        other = getattr(pipe, one)
        for weight in other.parameters():
            torch.nn.init.normal_(weight)
        other.save_pretrained(tmp_path / "folder" / one)
    again = Editor.load(file, config=tmp_path / "folder", device="cpu")
    theirs: Any = getattr(diffusers, family.theirs["text2img"])
    loaded = theirs.from_single_file(str(file), config=str(tmp_path / "folder"))
    for own in (editor, again):
        made = own.run(None, PASS, size=(64, 64), seed=7, compat=True).latents
        assert made is not None
        assert (made - sampled(loaded)).abs().max() == 0.0
        for name, part in loaded.components.items():
            if isinstance(part, torch.nn.Module):
                mine = getattr(own.model.pipe, name).state_dict()  # type: ignore[attr-defined]
                assert all(
                    torch.equal(mine[key], value) for key, value in part.state_dict().items()
                )


@pytest.mark.parametrize("family", [SD, SDXL], ids=lambda family: family.name)
@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")], ids="-".join)
def test_a_file_says_what_its_unet_predicts(
    family: Tiny, marks: tuple[str, ...], unets: Path, tmp_path: Path
) -> None:
    """As ComfyUI reads it; equal to a folder whose scheduler says so."""
    file, config = tmp_path / "marked.safetensors", tmp_path / "config"
    state = load_file(unets / f"{family.name}.safetensors")
    save_file(state | {name: torch.zeros(0) for name in marks}, file)
    shutil.copytree(unets / family.name, config)
    mine = Editor.load(file, config=config, device="cpu")
    settings = config / "scheduler" / "scheduler_config.json"
    said = json.loads(settings.read_text())
    if "v_pred" in marks:
        said["prediction_type"] = "v_prediction"
    if "ztsnr" in marks:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    settings.write_text(json.dumps(said))
    wanted = Editor.load(config, device="cpu")
    assert mine.model.info["prediction"] == ("v_prediction" if marks else "epsilon")
    assert dict(mine.model.pipe.scheduler.config) == dict(wanted.model.pipe.scheduler.config)  # type: ignore[attr-defined]
    ours, theirs = (one.run(None, PASS, size=(64, 64), seed=7) for one in (mine, wanted))
    assert (ours.pixels == theirs.pixels).all()


def test_a_scheduler_that_would_ignore_what_a_file_says_is_replaced(
    unets: Path, tmp_path: Path
) -> None:
    file, config = tmp_path / "marked.safetensors", tmp_path / "config"
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(unets / f"{SD.name}.safetensors") | marks, file)
    shutil.copytree(unets / SD.name, config)
    index = json.loads((config / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (config / "model_index.json").write_text(json.dumps(index))
    model: Any = Editor.load(file, config=config, device="cpu").model
    assert model.info["scheduler"] == "EulerDiscreteScheduler"
    assert model.pipe.scheduler.alphas_cumprod[-1] < 1e-6


def test_noise_levels_of_edm_are_those_of_the_config_or_told(
    unets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Playground v2.5 has them, whose folder has such a scheduler."""
    file, config = tmp_path / "marked.safetensors", tmp_path / "config"
    marks = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    save_file(load_file(unets / f"{SDXL.name}.safetensors") | marks, file)
    Editor.load(file, config=unets / SDXL.name, device="cpu")
    (told,) = [one.getMessage() for one in caplog.records if "EDM" in one.getMessage()]
    assert told.startswith(f"{file}: was trained at the noise levels of EDM, and {unets}")
    caplog.clear()
    pipe: Any = SDXL.pipeline()
    pipe.scheduler = EDMDPMSolverMultistepScheduler()
    SDXL.save(pipe, config)
    Editor.load(file, config=config, device="cpu")
    assert not caplog.records


def test_a_unet_of_other_channels_than_the_config(unets: Path, tmp_path: Path) -> None:
    SD.save(SD.pipeline(in_channels=9), tmp_path)
    file = unets / f"{SD.name}.safetensors"
    said = rf"{file}: its unet\.conv_in\.weight is \[32, 4, 3, 3\] where .* \[32, 9, 3, 3\]"
    with pytest.raises(errors.ModelError, match=said):
        Editor.load(file, config=tmp_path, device="cpu")


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
