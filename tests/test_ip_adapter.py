"""The edit `ip_adapter`: bit for bit as diffusers has it, and together with everything else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffedit import Editor, Pass, errors
from diffedit.cli import main
from diffedit.models.ip_adapter import at_tokens
from diffedit_inpaint import Inpaint
from diffedit_ip_adapter import IPAdapter
from diffedit_style import Style
from tests.families import CHROMA, FLUX, SD, SDXL, Tiny
from tests.families.ip_adapter import HIDDEN, PROJECTED, SIDE, write, write_for_flux
from tests.hub_server import Hub, serving
from tests.laws.state import state, unchanged
from tests.test_hub import use

CAT, CUP = data.chelsea()[:120, :160], data.coffee()[:100, :100]
STEPS, SEED = 4, 3
unets = pytest.mark.parametrize("family", [SD, SDXL], ids=lambda one: one.name)


def half(side: int = 64, left: bool = True) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    mask[:, : side // 2] = 255
    return mask if left else 255 - mask


def latents(editor: Editor, *edits: Any, image: Any = None, **said: Any) -> torch.Tensor:
    pass_ = Pass(
        prompt="a red circle",
        negative="blurry",
        steps=STEPS,
        guidance=said.pop("guidance", 5.0),
        edits=edits,
    )
    size = (64, 64) if image is None else None
    made = editor.run(image, pass_, seed=said.pop("seed", SEED), size=size, **said).latents
    assert made is not None
    return made


def theirs(
    family: Tiny, files: list[Path], pictures: list[Any], weights: list[float], masks: Any = None
) -> torch.Tensor:
    """diffusers' own, with as many adapters."""
    pipe = family.pipeline()
    kind = getattr(diffusers, family.theirs["text2img"])
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    parts |= {"image_encoder": None, "feature_extractor": None}
    if kind is diffusers.StableDiffusionPipeline:
        parts["requires_safety_checker"] = False
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        [str(file.parent) for file in files],
        subfolder="",
        weight_name=[file.name for file in files],
    )
    pipe.set_ip_adapter_scale(weights)
    more = {}
    if masks is not None:
        processor = diffusers.image_processor.IPAdapterMaskProcessor()
        shown = processor.preprocess([Image.fromarray(one) for one in masks], 64, 64)
        more["cross_attention_kwargs"] = {"ip_adapter_masks": [one[None] for one in shown]}
    made: torch.Tensor = pipe(
        "a red circle",
        negative_prompt="blurry",
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(SEED),
        width=64,
        height=64,
        ip_adapter_image=[Image.fromarray(one) for one in pictures],
        output_type="latent",
        **more,
    ).images
    return made


@unets
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_one_picture_is_as_in_diffusers(family: Tiny, kind: str, tmp_path: Path) -> None:
    editor = family.editor()
    file = write(tmp_path, editor.model.denoiser, kind)  # type: ignore[attr-defined]
    own = latents(editor, IPAdapter(model=str(file), image=CAT, weight=0.7), compat=True)
    assert torch.equal(own, theirs(family, [file], [CAT], [0.7]))
    assert not torch.equal(own, latents(editor, compat=True))


@unets
def test_two_with_weights_and_masks_are_as_in_diffusers(family: Tiny, tmp_path: Path) -> None:
    editor = family.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    files = [write(tmp_path / "a", unet), write(tmp_path / "b", unet, "plus", seed=1)]
    pictures, weights, masks = [CAT, CUP], [0.4, 0.9], [half(), half(left=False)]
    # Both sides see with one encoder: diffusers' pipelines hold one.
    encoder = str(tmp_path / "a" / "image_encoder")
    for shown in (None, masks):
        edits = [
            IPAdapter(
                model=str(file),
                image=picture,
                weight=weight,
                encoder=encoder,
                mask=shown and shown[number],
            )
            for number, (file, picture, weight) in enumerate(
                zip(files, pictures, weights, strict=True)
            )
        ]
        own = latents(editor, *edits, compat=True)
        assert torch.equal(own, theirs(family, files, pictures, weights, shown))


def test_it_acts_in_its_mask_and_its_window_only(tmp_path: Path) -> None:
    editor = SD.editor()
    file = str(write(tmp_path, editor.model.denoiser))  # type: ignore[attr-defined]
    plain = latents(editor)
    nowhere = IPAdapter(model=file, image=CAT, mask=np.zeros((64, 64), np.uint8))
    assert torch.equal(latents(editor, nowhere), plain)
    never = IPAdapter(model=file, image=CAT, start=0.99, end=1)
    assert torch.equal(latents(editor, never), plain)
    nothing = IPAdapter(model=file, image=CAT, weight=0)
    assert torch.equal(latents(editor, nothing), plain)
    everywhere = IPAdapter(model=file, image=CAT)
    white = IPAdapter(model=file, image=CAT, mask=np.full((64, 64), 255, np.uint8))
    assert torch.equal(latents(editor, everywhere), latents(editor, white))


def test_guidance_leads_away_from_no_picture(tmp_path: Path) -> None:
    """The negative prediction sees none, so that without guidance the two differ by it alone."""
    editor = SD.editor()
    file = str(write(tmp_path, editor.model.denoiser))  # type: ignore[attr-defined]
    seen: list[list[bool]] = []
    latents(editor, IPAdapter(model=file, image=CAT))
    adapter = editor._resources[f"ip_adapter:{file}:"]
    tokens = adapter._tokens

    def watched(shown: Any, rows: Any) -> torch.Tensor:
        seen.append([key.negative for key in rows.keys])
        return tokens(shown, rows)  # type: ignore[no-any-return]

    adapter._tokens = watched
    latents(editor, IPAdapter(model=file, image=CAT))
    latents(editor, IPAdapter(model=file, image=CAT), guidance=1.0)
    assert seen == [[True, False], [False]]


@unets
def test_it_combines_and_leaves_the_model_as_it_was(family: Tiny, tmp_path: Path) -> None:
    editor = family.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    file = str(write(tmp_path, unet, "plus"))
    picture = data.astronaut()[:64, :64]
    before = latents(editor, image=picture)
    was = state(editor)
    edits = [
        Inpaint(mask=half(), feather=0),
        IPAdapter(model=file, image=CAT),
        Style(image=CUP),
    ]
    made = [latents(editor, *order, image=picture) for order in (edits, edits[::-1])]
    assert torch.equal(*made)
    assert not torch.equal(made[0], latents(editor, edits[0], edits[2], image=picture))
    pixels = editor.run(picture, Pass(prompt="x", steps=2, edits=edits), seed=1).pixels
    np.testing.assert_array_equal(pixels[:, 32:], picture[:, 32:])
    unchanged(was, state(editor))
    assert torch.equal(latents(editor, image=picture), before)


def test_a_batch_is_its_items(tmp_path: Path) -> None:
    editor = SD.editor()
    file = str(write(tmp_path, editor.model.denoiser))  # type: ignore[attr-defined]
    edit = IPAdapter(model=file, image=CAT)
    both = latents(editor, edit, seed=[3, 4])
    for item, seed in enumerate((3, 4)):
        torch.testing.assert_close(
            both[item], latents(editor, edit, seed=seed)[0], atol=1e-4, rtol=0
        )


def test_adapters_share_an_encoder(tmp_path: Path) -> None:
    editor = SD.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    files = [write(tmp_path, unet), write(tmp_path, unet, "full")]
    latents(editor, *(IPAdapter(model=str(file), image=CAT) for file in files))
    kept = [key for key in editor._resources if key.startswith("image encoder")]
    assert len(kept) == 1


@pytest.mark.parametrize("tokens", [8 * 12, 4 * 6, 2 * 3, 1 * 2])
def test_a_mask_at_each_level_of_a_unet(tokens: int) -> None:
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 48:] = 1
    made = at_tokens(mask, tokens)
    assert made.shape == (1, 1, tokens)
    assert made.mean() == pytest.approx(0.5, abs=0.01)


# -- Flux.1 ----------------------------------------------------------------------------------------


def flux_latents(editor: Editor, *edits: Any, true: float = 1.0, **said: Any) -> torch.Tensor:
    pass_ = Pass(prompt="a red circle", steps=STEPS, guidance=3.0, true_guidance=true, edits=edits)
    made = editor.run(None, pass_, seed=SEED, size=(64, 64), compat=True, **said).latents
    assert made is not None
    return made


def flux_theirs(files: list[Path], weights: list[float], true: float) -> torch.Tensor:
    parts = FLUX.pipeline().components
    pipe = diffusers.FluxPipeline(**parts | {"image_encoder": None, "feature_extractor": None})
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        [str(file.parent) for file in files],
        subfolder="",
        weight_name=[file.name for file in files],
        image_encoder_pretrained_model_name_or_path=str(files[0].parent / "image_encoder"),
        image_encoder_dtype=torch.float32,
    )
    pipe.set_ip_adapter_scale(weights if len(weights) > 1 else weights[0])
    pictures: list[Any] = [Image.fromarray(one) for one in (CAT, CUP)[: len(files)]]
    made = pipe(
        "a red circle",
        negative_prompt="" if true > 1 else None,
        true_cfg_scale=true,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(SEED),
        width=64,
        height=64,
        ip_adapter_image=pictures if len(files) > 1 else pictures[0],
        output_type="latent",
    ).images
    latents: torch.Tensor = pipe._unpack_latents(made, 64, 64, pipe.vae_scale_factor)
    return latents


@pytest.mark.parametrize("theirs", [True, False], ids=["XLabs", "diffusers"])
@pytest.mark.parametrize("true", [1.0, 4.0])
def test_one_picture_for_flux_is_as_in_diffusers(theirs: bool, true: float, tmp_path: Path) -> None:
    editor = FLUX.editor()
    transformer = editor.model.denoiser  # type: ignore[attr-defined]
    file = write_for_flux(tmp_path, transformer, theirs=theirs)
    own = flux_latents(editor, IPAdapter(model=str(file), image=CAT, weight=0.7), true=true)
    assert torch.equal(own, flux_theirs([file], [0.7], true))
    assert (own - flux_latents(editor, true=true)).abs().mean() > 0.01


def test_two_for_flux_are_as_in_diffusers(tmp_path: Path) -> None:
    editor = FLUX.editor()
    transformer = editor.model.denoiser  # type: ignore[attr-defined]
    files = [
        write_for_flux(tmp_path / name, transformer, number) for number, name in enumerate("ab")
    ]
    edits = [
        IPAdapter(
            model=str(file),
            image=picture,
            weight=weight,
            encoder=str(tmp_path / "a" / "image_encoder"),
        )
        for file, picture, weight in zip(files, (CAT, CUP), (0.4, 0.9), strict=True)
    ]
    assert torch.equal(flux_latents(editor, *edits), flux_theirs(files, [0.4, 0.9], 1.0))


def test_on_flux_it_combines_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    editor = FLUX.editor()
    transformer: Any = editor.model.denoiser  # type: ignore[attr-defined]
    file = str(write_for_flux(tmp_path, transformer))
    picture = data.astronaut()[:64, :64]
    before = latents(editor, image=picture)
    was = state(editor)
    cat = IPAdapter(model=file, image=CAT)
    edits = [Inpaint(mask=half(), feather=0), cat, Style(image=CUP)]
    made = [latents(editor, *order, image=picture) for order in (edits, edits[::-1])]
    assert torch.equal(*made)
    assert not torch.equal(made[0], latents(editor, edits[0], edits[2], image=picture))
    pixels = editor.run(picture, Pass(prompt="x", steps=2, edits=edits), seed=1).pixels
    np.testing.assert_array_equal(pixels[:, 32:], picture[:, 32:])
    unchanged(was, state(editor))
    assert torch.equal(latents(editor, image=picture), before)
    nowhere = IPAdapter(model=file, image=CAT, mask=np.zeros((64, 64), np.uint8))
    assert torch.equal(flux_latents(editor, nowhere), flux_latents(editor))
    white = IPAdapter(model=file, image=CAT, mask=np.full((64, 64), 255, np.uint8))
    everywhere = flux_latents(editor, cat)
    assert torch.equal(flux_latents(editor, white), everywhere)
    there = flux_latents(editor, IPAdapter(model=file, image=CAT, mask=half()))
    assert not torch.equal(there, everywhere)
    style = Style(image=CUP)
    assert torch.equal(flux_latents(editor, white, style), flux_latents(editor, cat, style))
    assert editor.model._queries is editor.model._sum is None  # type: ignore[attr-defined]


def test_on_flux_nothing_of_a_call_that_failed_acts_in_the_next(tmp_path: Path) -> None:
    editor = FLUX.editor()
    transformer: Any = editor.model.denoiser  # type: ignore[attr-defined]
    cat = IPAdapter(model=str(write_for_flux(tmp_path, transformer)), image=CAT)
    plain, shown = flux_latents(editor), flux_latents(editor, cat)
    fails = transformer.transformer_blocks[0].ff.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flux_latents(editor, cat)
    fails.remove()
    assert editor.model._queries is editor.model._sum is None  # type: ignore[attr-defined]
    assert torch.equal(flux_latents(editor), plain)
    assert torch.equal(flux_latents(editor, cat), shown)


def test_one_for_another_flux_is_refused(tmp_path: Path) -> None:
    editor = FLUX.editor()
    transformer = editor.model.denoiser  # type: ignore[attr-defined]
    whole = write_for_flux(tmp_path / "a", transformer)

    def halved(weight: torch.Tensor) -> torch.Tensor:
        return weight[: len(weight) // 2]

    def refused(file: Path, said: str) -> None:
        with pytest.raises(errors.ModelError, match=said):
            flux_latents(editor, IPAdapter(model=str(file), image=CAT))

    changes: list[tuple[dict[str, Any], str]] = [
        ({"stream_k_proj__bias": lambda w: None}, "has nothing, the loaded model's is 32"),
        ({"stream_v_proj__weight": lambda w: w[:-1]}, "has 31x64, the loaded model's is 32x64"),
        ({"double_blocks__1": lambda w: None}, "for transformer_blocks.1.attn it has nothing"),
        ({"proj_model__proj": lambda w: w[:-8]}, "not an IP-Adapter that is known"),
        ({"proj_model__proj__weight": lambda w: w[0, 0]}, "not an IP-Adapter that is known"),
        (
            {"proj_model__proj": halved, "proj_model__norm": halved},
            "has 32 numbers to a token, the loaded model's attention takes 64",
        ),
    ]
    for number, (change, said) in enumerate(changes):
        file = altered(whole, **change)
        refused(file.rename(tmp_path / "a" / f"{number}.safetensors"), said)
    refused(write(tmp_path / "b", SD.editor().model.denoiser), "made for another model")  # type: ignore[attr-defined]
    weights = load_file(whole)
    more = {
        key.replace("double_blocks.0", "double_blocks.7"): w.clone() for key, w in weights.items()
    }
    save_file(weights | more, tmp_path / "a" / "more.safetensors")
    refused(tmp_path / "a" / "more.safetensors", "for more attention modules than")


def altered(file: Path, **changed: Any) -> Path:
    weights = load_file(file)
    for pattern, made in changed.items():
        for key in [key for key in weights if pattern.replace("__", ".") in key]:
            value = made(weights.pop(key))
            if value is not None:
                weights[key] = value.contiguous()
    to = file.with_name("altered.safetensors")
    save_file(weights, to)
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ip_adapter": lambda w: None}, "not an IP-Adapter"),
        ({"to_k_ip": lambda w: w[:, :-1]}, "made for another model"),
        ({"ip_adapter__3": lambda w: None}, "made for another model"),
        ({"image_proj__proj__weight": lambda w: w[:, :-1]}, "another image encoder"),
        ({"1__to_k_ip": lambda w: w * torch.nan}, "1.to_k_ip.weight holds numbers .* not finite"),
        ({"image_proj__norm": lambda w: w + torch.inf}, "holds numbers that are not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    editor = SD.editor()
    file = altered(write(tmp_path, editor.model.denoiser), **change)  # type: ignore[attr-defined]
    with pytest.raises(errors.ModelError, match=said) as error:
        latents(editor, IPAdapter(model=str(file), image=CAT))
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    editor = SD.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    file = write(tmp_path / "a", unet)
    for given, said in {
        "nothing.safetensors": "no such file",
        str(tmp_path): "holds no .safetensors",
        "someone/adapter/file.safetensors": "no such folder here, and the hub",
        str(tmp_path / "a" / "x.bin"): "pickle",
    }.items():
        (tmp_path / "a" / "x.bin").write_bytes(b"")
        with pytest.raises(errors.ModelError, match=said):
            latents(editor, IPAdapter(model=given, image=CAT))
    (tmp_path / "b").mkdir()
    alone = file.rename(tmp_path / "b" / file.name)
    with pytest.raises(errors.ModelError, match="image_encoder beside it"):
        latents(editor, IPAdapter(model=str(alone), image=CAT))
    with pytest.raises(errors.MaskError, match="one size"):
        latents(editor, IPAdapter(model=str(alone), image=CAT, mask=half(8)))


# -- image encoders that lie elsewhere -------------------------------------------------------------


def eyes(**said: Any) -> CLIPVisionConfig:
    """Of an image encoder as those of `write`."""
    usual = {"hidden_size": HIDDEN, "projection_dim": PROJECTED, "intermediate_size": 64}
    usual |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE}
    return CLIPVisionConfig(**usual | {"patch_size": 8} | said)


def repository(folder: Path, unet: Any, kind: str) -> Path:
    """As h94/IP-Adapter is: beside the adapter lies a larger encoder, its own lies in models."""
    file = write(folder / "sdxl_models", unet, kind)
    (folder / "models").mkdir()
    (file.parent / "image_encoder").rename(folder / "models" / "image_encoder")
    large = CLIPVisionModelWithProjection(eyes(hidden_size=48, projection_dim=24))
    large.save_pretrained(file.parent / "image_encoder")
    return file


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        use(monkeypatch, served.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)  # where no folder is called as the repositories are
        yield served


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_the_encoder_that_fits_is_found(
    kind: str, tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = SDXL.editor()
    file = repository(tmp_path / "files", editor.model.denoiser, kind)  # type: ignore[attr-defined]
    own = str(tmp_path / "files" / "models" / "image_encoder")
    server.push("someone/adapters", tmp_path / "files")
    place = f"someone/adapters/sdxl_models/{file.name}"
    expected = latents(editor, IPAdapter(model=str(file), image=CAT, encoder=own))
    for model in (str(file), place):
        assert torch.equal(latents(editor, IPAdapter(model=model, image=CAT)), expected)
    fetched = server.fetched()
    assert "models/image_encoder/model.safetensors" in fetched
    assert "sdxl_models/image_encoder/model.safetensors" not in fetched  # the larger one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(latents(SDXL.editor(), IPAdapter(model=place, image=CAT)), expected)
    # One beside the adapter that fits goes before.
    shutil.rmtree(file.parent / "image_encoder")
    near = file.parent / "image_encoder"
    torch.manual_seed(5)
    CLIPVisionModelWithProjection(eyes()).save_pretrained(near)
    made = latents(SDXL.editor(), IPAdapter(model=str(file), image=CAT))
    assert not torch.equal(made, expected)


def test_one_beside_that_does_not_fit_leaves_the_models_own(tmp_path: Path) -> None:
    editor = SD.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    file = repository(tmp_path, unet, "plain")
    own = tmp_path / "models" / "image_encoder"
    expected = latents(editor, IPAdapter(model=str(file), image=CAT, encoder=str(own)))
    other = SD.editor()
    other.model.pipe.image_encoder = (  # type: ignore[attr-defined]
        CLIPVisionModelWithProjection.from_pretrained(own)
    )
    shutil.rmtree(own)
    assert torch.equal(latents(other, IPAdapter(model=str(file), image=CAT)), expected)


def test_an_encoder_may_be_a_place_on_the_hub(tmp_path: Path, server: Hub) -> None:
    editor = SD.editor()
    unet = editor.model.denoiser  # type: ignore[attr-defined]
    file = repository(tmp_path / "files", unet, "plain")
    near = tmp_path / "files" / "models" / "image_encoder"
    commit = server.push("someone/adapters", tmp_path / "files")

    def seen(encoder: str) -> torch.Tensor:
        return latents(SD.editor(), IPAdapter(model=str(file), image=CAT, encoder=encoder))

    expected = seen(str(near))
    assert torch.equal(seen("someone/adapters/models/image_encoder"), expected)
    assert set(server.fetched()) == {
        f"models/image_encoder/{name}" for name in ("config.json", "model.safetensors")
    }
    torch.manual_seed(5)
    CLIPVisionModelWithProjection(eyes()).save_pretrained(near)
    server.push("someone/adapters", tmp_path / "files")
    assert not torch.equal(seen("someone/adapters/models/image_encoder"), expected)
    assert torch.equal(seen(f"someone/adapters@{commit}/models/image_encoder"), expected)
    # A whole CLIP, in the folder that a repository is.
    text = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    whole = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=eyes().to_dict(), projection_dim=PROJECTED
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    server.push("someone/clip", tmp_path / "whole", {"pytorch_model.bin": b"not for us"})
    assert torch.equal(seen("someone/clip"), seen(str(tmp_path / "whole")))


def test_an_encoder_that_is_none_is_refused(tmp_path: Path, server: Hub) -> None:
    editor = SD.editor()
    file = repository(tmp_path / "files", editor.model.denoiser, "plain")  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "files" / "models")
    server.push("someone/adapters", tmp_path / "files")
    config = b"{}"
    pickled = {"a/config.json": config, "a/pytorch_model.bin": b""}
    (tmp_path / "nothing").mkdir()
    server.push("someone/pickles", tmp_path / "nothing", pickled)
    for encoder, said in {
        "someone/adapters": "config.json, on the hub; there is someone/adapters/sdxl_models/image_",
        "someone/adapters/x": "config.json, on the hub",
        "someone/adapters/../..": "no folder of an image encoder",
        "someone/pickles/a": "someone/pickles/a/pytorch_model.bin: a pickle",
        "someone/nobody/a": "none of this name on the hub",
        "nothing/here": "no folder of an image encoder",
        str(tmp_path / "x"): "no folder of an image encoder",
        "someone/adapters/sdxl_models/image_encoder": "another image encoder than",
    }.items():
        with pytest.raises(errors.ModelError, match=said) as error:
            latents(editor, IPAdapter(model=str(file), image=CAT, encoder=encoder))
        assert "\n" not in str(error.value)
    with pytest.raises(errors.ModelError, match="takes 16 numbers, and this one gives 24; name"):
        latents(editor, IPAdapter(model=f"someone/adapters/sdxl_models/{file.name}", image=CAT))


def test_other_families_refuse_before_weights_are_read(tmp_path: Path, capsys: Any) -> None:
    CHROMA.save(CHROMA.pipeline(), tmp_path / "chroma")
    Image.fromarray(CAT).save(tmp_path / "cat.png")
    said = ["edit", str(tmp_path / "cat.png"), "-o", str(tmp_path / "out.png"), "--prompt", "x"]
    said += ["--model", str(tmp_path / "chroma")]
    said += ["--edit", f"ip_adapter:model=a.safetensors,image={tmp_path / 'cat.png'}"]
    assert main(said) == 2
    assert "image_prompt" in capsys.readouterr().err
