"""Another autoencoder than a model's own: as in diffusers where it fits, refused where not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from diffedit import Editor, Pass
from diffedit.cli import main
from diffedit.errors import ModelError, UnsafeWeights
from diffedit_img2img import Img2Img
from tests.families import FAMILIES, FLUX, SANA, SD, SD3, SDXL, Tiny, originals
from tests.parity import comparisons
from tests.parity.comparisons import Case, photograph

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PASS = Pass(prompt="a", steps=2, edits=[Img2Img(strength=0.7)])


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "STEPS", 2)


def saved(family: Tiny, folder: Path) -> Path:
    family.save(family.pipeline(), folder)
    return folder


def another(vae: Any) -> Any:
    """One of the same settings, with weights and a scale of its own."""
    other = copy.deepcopy(vae)
    rng = torch.Generator().manual_seed(5)
    for weight in other.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=rng)
    if "scaling_factor" in other.config:
        other.register_to_config(scaling_factor=0.5)
    return other


def small(vae: Any) -> AutoencoderTiny:
    """One like TAESD, for the same latents."""
    torch.manual_seed(3)
    made = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=vae.config.latent_channels,
    )
    return made.eval().requires_grad_(False)


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_in_the_place_of_a_familys_own(family: Tiny, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model")
    own: Any = family.pipeline()
    vae = another(own.vae)
    vae.save_pretrained(tmp_path / "vae")
    editor = Editor.load(model, device="cpu", vae=tmp_path / "vae")
    assert editor.model.info["vae"] == str(tmp_path / "vae")
    result = editor.run(PICTURE, PASS, seed=3)
    assert result.provenance["model"]["vae"] == str(tmp_path / "vae")
    own.vae = vae
    pipe = Editor(family.model(own, "in memory", (64, 128, 128)))
    assert np.array_equal(result.pixels, pipe.run(PICTURE, PASS, seed=3).pixels)
    plain = Editor.load(model, device="cpu")
    assert "vae" not in plain.model.info
    assert not np.array_equal(result.pixels, plain.run(PICTURE, PASS, seed=3).pixels)


@pytest.mark.parametrize("kind", [another, small])
@pytest.mark.parametrize("family", [SD, SDXL, SD3, FLUX], ids=lambda family: family.name)
def test_latents_are_those_of_diffusers(family: Tiny, kind: Any, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model")
    theirs = Case(family, None)
    theirs.pipe.vae = kind(theirs.pipe.vae)
    theirs.pipe.vae.save_pretrained(tmp_path / "vae")
    ours = Case(family, None)
    ours.editor = Editor.load(model, device="cpu", vae=tmp_path / "vae")
    made = ours.ours(Img2Img(strength=0.6), image=photograph())
    wanted = theirs.theirs("img2img", image=photograph(), strength=0.6)
    assert (made - wanted).abs().max().item() == 0.0
    decoded = theirs.pipe.vae.decode
    scale, shift = theirs.pipe.vae.config.scaling_factor, theirs.pipe.vae.config.shift_factor or 0.0
    pixels = (decoded(wanted / scale + shift)[0] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(ours.editor.model.decode(made), pixels)


def test_the_places_that_one_can_be_in(tmp_path: Path) -> None:
    model = saved(SD, tmp_path / "model")
    other: Any = SD.pipeline()
    other.vae = another(other.vae)
    SD.save(other, tmp_path / "other")
    by_model = Editor.load(model, device="cpu", vae=tmp_path / "other")
    by_part = Editor.load(model, device="cpu", vae=tmp_path / "other" / "vae")
    file = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    scaled = by_part.run(PICTURE, PASS, seed=3).pixels
    assert np.array_equal(by_model.run(PICTURE, PASS, seed=3).pixels, scaled)
    # A file alone has no settings: it gets those of the model.
    by_file = Editor.load(model, device="cpu", vae=file)
    own: Any = SD.pipeline()
    own.vae.load_state_dict(other.vae.state_dict())
    wanted = Editor(SD.model(own, "in memory", (64, 128, 128)))
    assert np.array_equal(
        by_file.run(PICTURE, PASS, seed=3).pixels, wanted.run(PICTURE, PASS, seed=3).pixels
    )


def test_one_in_the_file_of_a_whole_model_whose_rest_is_quantised(tmp_path: Path) -> None:
    model = saved(SD, tmp_path / "model")
    other: Any = another(SD.pipeline().vae)
    state = originals.autoencoder(other)
    alone, whole = tmp_path / "alone.safetensors", tmp_path / "whole.safetensors"
    save_file(state, alone)
    scaled = {"model.diffusion_model.out.2.scale_weight": torch.ones(())}
    save_file(state | scaled, whole)
    made = [Editor.load(model, device="cpu", vae=file).run(PICTURE, PASS, seed=3).pixels
            for file in (alone, whole)]  # fmt: skip
    assert np.array_equal(made[0], made[1])


ORIGINAL = (
    (".down_blocks.", ".down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."), (".conv_shortcut.", ".nin_shortcut."),
    (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
    (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
    (".mid_block.attentions.0.to_", ".mid.attn_1."), (".mid_block.block.0.", ".mid.block_1."),
    (".mid_block.block.1.", ".mid.block_2."), (".conv_norm_out.", ".norm_out."),
)  # fmt: skip


def original(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Its weights as those who made it call them: levels of the decoder count from the end."""
    made = {}
    for name, value in vae.state_dict().items():
        for ours, theirs in ORIGINAL:
            name = name.replace(ours, theirs)
        if ".up_blocks." in name:
            head, _, rest = name.partition(".up_blocks.")
            level, _, rest = rest.partition(".")
            name = f"{head}.up.{len(vae.config.block_out_channels) - 1 - int(level)}.{rest}"
        linear = "attn_1" in name and name.endswith("weight") and value.ndim == 2
        made[name] = value[:, :, None, None] if linear else value
    return {name: value.contiguous() for name, value in made.items()}


@pytest.mark.parametrize("family", [SD, SDXL, FLUX], ids=lambda family: family.name)
def test_a_file_in_the_original_layout(family: Tiny, tmp_path: Path) -> None:
    """No hub is asked: the settings are those of the model's own autoencoder."""
    model = saved(family, tmp_path / "model")
    own: Any = family.pipeline()
    rng = torch.Generator().manual_seed(5)
    for weight in own.vae.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=rng)
    state = original(own.vae)
    assert "encoder.down.0.block.0.conv1.weight" in state
    save_file(state, tmp_path / "vae.safetensors")
    editor = Editor.load(model, device="cpu", vae=tmp_path / "vae.safetensors")
    pixels = editor.run(PICTURE, PASS, seed=3).pixels
    wanted = Editor(family.model(own, "in memory", (64, 128, 128))).run(PICTURE, PASS, seed=3)
    assert np.array_equal(pixels, wanted.pixels)


# --- what is refused ------------------------------------------------------------------------------


def refused(model: Path, vae: Path | str, match: str, kind: type = ModelError) -> None:
    with pytest.raises(kind, match=match) as caught:
        Editor.load(model, device="cpu", vae=vae)
    assert "\n" not in str(caught.value)


def test_one_that_does_not_fit(tmp_path: Path) -> None:
    model = saved(SD, tmp_path / "model")
    flux: Any = FLUX.pipeline()
    flux.vae.save_pretrained(tmp_path / "flux")
    coarse = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    coarse.save_pretrained(tmp_path / "coarse")
    sana: Any = SANA.pipeline()
    sana.vae.save_pretrained(tmp_path / "sana")
    refused(
        model, tmp_path / "flux", "does not fit the model: its latents have 16 channels.*have 4"
    )
    refused(model, tmp_path / "coarse", "4 channels and cells of 2 pixels, .* cells of 8")
    refused(model, tmp_path / "sana", "holds a AutoencoderDC, .* is a AutoencoderKL")
    refused(model, tmp_path / "model" / "unet", "holds a UNet2DConditionModel, and the model's")
    save_file(original(flux.vae), tmp_path / "flux.safetensors")
    said = r": does not fit the model: its latents have 16 channels, .* the denoiser takes have 4$"
    refused(model, tmp_path / "flux.safetensors", said)
    refused(model, tmp_path / "flux" / "diffusion_pytorch_model.safetensors", said)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_file_that_lacks_tensors(layout: str, tmp_path: Path) -> None:
    model, file = saved(SD, tmp_path / "model"), tmp_path / "vae.safetensors"
    vae: Any = SD.pipeline().vae
    whole = vae.state_dict() if layout == "diffusers" else original(vae)
    for lost, said in (
        ("decoder.conv_in.bias", r"lacks decoder\.conv_in\.bias; it would be random"),
        ("encoder.", r"lacks encoder\.conv_in\.bias and \d+ more tensors; it would"),
        ("decoder.", r"lacks decoder\.conv_in\.bias and \d+ more tensors; it would"),
    ):
        save_file({name: one for name, one in whole.items() if not name.startswith(lost)}, file)
        refused(model, file, f"^{file}: {said}")
    save_file(whole, file)
    Editor.load(model, device="cpu", vae=file)


def test_one_of_other_models_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of Stable Diffusion and of its XL differ in their weights and in their scales alone."""
    model = saved(SD, tmp_path / "model")
    vae = another(SD.pipeline().vae)
    for scale, said in ((vae.config.scaling_factor, False), (0.13025, True)):
        caplog.clear()
        vae.register_to_config(scaling_factor=scale)
        vae.save_pretrained(tmp_path / "vae")
        Editor.load(model, device="cpu", vae=tmp_path / "vae")
        assert ("by 0.13025 and 0, the model's own autoencoder by 0.18215" in caplog.text) == said


def test_one_that_is_none(tmp_path: Path) -> None:
    model = saved(SD, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("nothing", "utf-8")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused(model, tmp_path / "modle", "no such folder or file.*did you mean 'model'")
    (tmp_path / "modles").mkdir()  # nothing that could be meant
    refused(model, tmp_path / "modle", "no such folder or file.*did you mean 'model'")
    refused(model, tmp_path / "empty", "empty")
    refused(model, tmp_path / "text.safetensors", "not a readable .safetensors file")
    refused(model, tmp_path / "a.safetensors", "a.safetensors: lacks .* more tensors")
    refused(model, tmp_path / "vae.ckpt", "a pickle", UnsafeWeights)
    sana = saved(SANA, tmp_path / "sana")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused(sana, tmp_path / "a.safetensors", "a.safetensors: ")


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = saved(SD, tmp_path / "model")
    other: Any = SD.pipeline()
    another(other.vae).save_pretrained(tmp_path / "vae")
    out = tmp_path / "out.png"
    said = ["-p", "a", "--size", "64x64", "--model", str(model), "--steps", "2", "--json"]
    shared = ["edit", "-o", str(out), *said, "--device", "cpu", "--vae"]

    def ended(vae: Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["diffedit", *shared, str(vae)])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        told = capsys.readouterr()
        return int(code or 0), told.out, told.err

    code, _, error = ended(tmp_path / "nothing")
    assert code == 2
    assert error.splitlines()[-1].startswith(f"diffedit: {tmp_path / 'nothing'}: no such folder")
    assert "Traceback" not in error
    assert not out.exists()
    code, printed, _ = ended(tmp_path / "vae")
    assert code == 0
    assert out.exists()
    assert f'"vae": "{tmp_path / "vae"}"' in printed
