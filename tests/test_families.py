"""Each family from a folder, as people load it: it is recognised, and says what it carries."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel
from PIL import Image
from skimage import data

from diffedit import Editor, Pass, plugins
from diffedit.attention import QKV, Site
from diffedit.cli import main
from diffedit.errors import CapabilityError, InputError, ModelError
from diffedit.models import devices, z_image
from diffedit.models.protocol import ModelInput
from diffedit.schedulers import usable
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.families import (
    CHROMA,
    CONTROLLED,
    FAMILIES,
    FLUX,
    SANA,
    SD3,
    SDXL,
    Z_IMAGE,
    Tiny,
    xl_pipeline,
)
from tests.families.z_image import control_net
from tests.laws.tools import Custom
from tests.parity.comparisons import Case, hint

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@every_family
def test_a_folder_is_recognised_and_gives_the_same_pixels(family: Tiny, tmp_path: Path) -> None:
    own = family.editor()
    family.save(own.model.pipe, tmp_path / "model")  # type: ignore[attr-defined]
    loaded = Editor.load(tmp_path / "model", device="cpu")
    assert loaded.model.info["family"] == family.name
    assert loaded.model.info["prediction"] == family.predicts
    assert ("control" in loaded.model.capabilities) == (family in CONTROLLED)
    pass_ = Pass(prompt="a red circle", steps=2, edits=(Img2Img(strength=0.6),))
    picture = data.coffee()[:96, :128]
    assert (loaded.run(picture, pass_).pixels == own.run(picture, pass_).pixels).all()


@every_family
def test_all_that_it_carries_in_one_pass_changes_nothing_outside_the_mask(
    family: Tiny, tmp_path: Path
) -> None:
    editor = family.editor()
    if family in CONTROLLED:
        family.control_net(editor.model.pipe).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    picture = data.coffee()[:150, :200]
    mask = np.zeros(picture.shape[:2], bool)
    mask[40:90, 60:110] = True
    net = ControlNet(model=str(tmp_path), weight=0.5)
    edits: Any = [Inpaint(mask=mask, feather=0), Img2Img(strength=0.8), net]
    edits.append(Style(image=data.astronaut()))
    edits = family.carried(edits)
    made = editor.run(picture, Pass(prompt="a red circle", steps=3, edits=edits)).pixels
    assert (made == picture)[~mask].all()
    assert (made != picture).any(axis=2)[mask].mean() > 0.5


@pytest.mark.parametrize("family", CONTROLLED, ids=lambda family: family.name)
def test_style_and_a_control_net_in_one_pass(family: Tiny, tmp_path: Path) -> None:
    family.needs_style()
    editor = family.editor()
    net = family.control_net(editor.model.pipe)  # type: ignore[attr-defined]
    net.save_pretrained(tmp_path)
    edits = (ControlNet(model=str(tmp_path)), Style(image=data.astronaut(), strength=1.0))
    picture = data.coffee()[:96, :128]
    made = [
        editor.run(picture, Pass(prompt="x", steps=2, edits=some)).pixels
        for some in (edits, edits[:1], edits[1:])
    ]
    assert made[0].shape == picture.shape
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


@pytest.mark.parametrize(("mine", "theirs"), list(itertools.permutations(CONTROLLED, 2)))
def test_a_control_net_of_another_family_is_refused(
    mine: Tiny, theirs: Tiny, tmp_path: Path
) -> None:
    theirs.control_net(theirs.pipeline()).save_pretrained(tmp_path)
    why = "another model: its cross_attention_dim|holds a .*ControlNetModel, and the loaded model"
    with pytest.raises(ModelError, match=why):
        mine.editor().model.load_control(str(tmp_path))


@every_family
def test_sizes_are_what_the_denoiser_takes(family: Tiny) -> None:
    """Pictures of any size are worked on at a multiple of what makes one token."""
    editor = family.editor()
    made = editor.run(None, Pass(prompt="x", steps=1), size=(90, 70))
    assert made.pixels.shape == (70, 90, 3)
    assert made.latents is not None
    model = editor.model
    assert all(side * model.cell % model.grid == 0 for side in made.latents.shape[2:])


@every_family
def test_a_denoiser_of_other_inputs_is_refused(family: Tiny, tmp_path: Path) -> None:
    pipe: Any = family.pipeline(in_channels=7)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a denoiser of 7 input channels is not supported"):
        Editor.load(tmp_path, device="cpu")


def test_an_edit_that_a_family_cannot_carry_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    CHROMA.save(CHROMA.pipeline(), folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    Image.fromarray(data.coffee()).save(tmp_path / "a.png")
    capsys.readouterr()
    line = ["edit", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "-p", "x"]
    assert main([*line, "--model", str(folder), "-e", "controlnet"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        "diffedit: controlnet: the family chroma has no 'control'; it has: lora, shared_attention"
    ]
    assert main([*line, "--model", str(folder), "-e", "img2img"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_attention_without_scores_is_not_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    style = Style(image=data.astronaut())
    with pytest.raises(CapabilityError, match="style: the loaded model has no 'shared_attention'"):
        SANA.editor().run(data.coffee(), Pass(prompt="x", steps=1, edits=(style,)))
    SANA.save(SANA.pipeline(), tmp_path / "model")
    Image.fromarray(data.coffee()).save(tmp_path / "a.png")
    capsys.readouterr()
    line = ["edit", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "-p", "x"]
    line += ["--model", str(tmp_path / "model"), "-e", f"style:image={tmp_path / 'a.png'}"]
    assert main(line) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        "diffedit: style: the family sana has no 'shared_attention'; it has: control, lora"
    ]


def test_cells_of_32_pixels(tmp_path: Path) -> None:
    """As all of Sana's are; its autoencoder draws no posterior."""
    editor = SANA.editor(stages=6)
    assert (editor.model.cell, editor.model.grid) == (32, 32)
    SANA.control_net(editor.model.pipe).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    picture = data.coffee()[:150, :200]
    mask = np.zeros(picture.shape[:2], bool)
    mask[40:90, 60:110] = True
    edits: Any = [Inpaint(mask=mask, feather=0), Img2Img(strength=0.8)]
    edits.append(ControlNet(model=str(tmp_path), weight=0.5))
    pass_ = Pass(prompt="a red circle", steps=3, edits=edits)
    with editor.stream(picture, pass_) as events:
        assert all(torch.isfinite(step.preview()).all() for step in events)
    made = events.result
    assert (made.pixels == picture)[~mask].all()
    assert (made.pixels != picture).any(axis=2)[mask].mean() > 0.5
    assert made.latents is not None
    assert made.latents.shape[2:] == (4, 4)


def test_half_precision_is_for_the_denoiser_alone(tmp_path: Path) -> None:
    """Of Sana; the language model and the autoencoder overflow in it."""
    SANA.save(SANA.pipeline(), tmp_path)
    editor = Editor.load(tmp_path, device="cpu", dtype="float16")
    kinds = [next(part.parameters()).dtype for part in editor.model.parts()]
    assert kinds == [torch.float16, torch.bfloat16, torch.bfloat16]
    made = editor.run(data.coffee()[:64, :64], Pass(prompt="x", steps=1, edits=(Img2Img(),)))
    assert made.pixels.shape == (64, 64, 3)


def test_sprint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    index = {"_class_name": "SanaSprintPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelError, match="Sana-Sprint is not supported yet; Sana and Sana-1"):
        Editor.load(tmp_path, device="cpu")


def test_every_family_says_what_it_carries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["families"]}
    assert set(found) == {family.name for family in FAMILIES}
    for family in FAMILIES:
        assert ("control" in found[family.name]["carries"]) == (family in CONTROLLED)
        assert set(found[family.name]["carries"]) == family.editor().model.capabilities


def test_the_page_says_what_each_family_carries_and_takes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    table = re.findall(r"^\| `([\w-]+)` \|.*\| (\w[\w, ]*) \| `(\w+\.py)` \| (\d+) \|$", page, re.M)
    assert [name for name, *_ in table] == [family.name for family in FAMILIES]
    for family, (_, carried, file, lines) in zip(FAMILIES, table, strict=True):
        assert ("controlnet" in carried) == (family in CONTROLLED)
        assert ("style" in carried) == family.styled
        path = Path(inspect.getfile(family.model))
        assert path.name == file
        assert int(lines) == pytest.approx(len(path.read_text("utf-8").splitlines()), rel=0.2)


def test_an_edit_that_a_family_cannot_carry_is_refused_before_anything_runs() -> None:
    editor = CHROMA.editor()
    pass_ = Pass(prompt="x", steps=2, edits=(ControlNet(model="nowhere"),))
    with pytest.raises(CapabilityError, match="controlnet: the loaded model has no 'control'"):
        editor.run(data.coffee(), pass_)


@every_family
def test_every_sampler_that_fits_a_family_runs_on_it(family: Tiny) -> None:
    """With the family's own spacing and shift of noise, from the start and from the middle."""
    model = family.editor().model
    shape = (model.channels, 8, 8)
    names = usable(model.pipe.scheduler)  # type: ignore[attr-defined]
    assert len(names) > 8
    for name, at in itertools.product(names, (1.0, 0.5)):
        schedule = model.schedule(name, 6, at, shape=shape)
        levels = [schedule.coefficients(i) for i in range(len(schedule))]
        assert all(np.isfinite(levels).ravel()), name


def test_control_nets_of_other_makes_act_together(tmp_path: Path) -> None:
    """One without single blocks beside one with them, which diffusers cannot add."""
    editor = FLUX.editor()
    pipe: Any = editor.model.pipe  # type: ignore[attr-defined]
    whole = FLUX.control_net(pipe)
    part = FluxControlNetModel.from_config(
        {**whole.config, "num_layers": 2, "num_single_layers": 0}
    )
    torch.nn.init.normal_(part.controlnet_blocks[0].weight, std=0.05)
    for name, net in (("whole", whole), ("part", part)):
        net.save_pretrained(tmp_path / name)
    picture = data.coffee()[:64, :64]
    nets = [ControlNet(model=str(tmp_path / name)) for name in ("whole", "part")]
    made = [
        editor.run(picture, Pass(prompt="x", steps=1, edits=some)).pixels
        for some in (nets, nets[:1], nets[1:])
    ]
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


#: Its ControlNets of the first version, which see no mask.
FIRST = replace(Z_IMAGE, nets=functools.partial(control_net, masked=False))


def test_control_nets_that_see_the_mask_and_that_do_not_act_together(tmp_path: Path) -> None:
    editor = Z_IMAGE.editor()
    pipe: Any = editor.model.pipe  # type: ignore[attr-defined]
    for name, family in (("first", FIRST), ("second", Z_IMAGE)):
        family.control_net(pipe).save_pretrained(tmp_path / name)
    nets = [ControlNet(model=str(tmp_path / name)) for name in ("first", "second")]
    seen = []
    control = editor.model.control

    def watched(net: Any, x: ModelInput, *rest: Any) -> Any:
        seen.append(dict(x.channels))
        return control(net, x, *rest)

    editor.model.control = watched  # type: ignore[assignment, method-assign]
    picture = data.coffee()[:64, :64]
    white = np.zeros((64, 64), bool)
    white[16:32, 24:48] = True
    inpaint = Inpaint(mask=white, feather=0)
    made = [
        editor.run(picture, Pass(prompt="x", steps=1, edits=[*some, inpaint])).latents
        for some in (nets, nets[:1], nets[1:])
    ]
    for one, other in itertools.combinations(made, 2):
        assert one is not None
        assert other is not None
        assert not torch.equal(one, other)
    assert [sorted(channels) for channels in seen] == 2 * [["mask", "masked"]] + [
        [],
        ["mask", "masked"],
    ]
    cells = torch.from_numpy(white[::8, ::8]).float().expand(2, 1, 8, 8)
    assert torch.equal(seen[0]["mask"], cells)
    assert seen[0]["masked"].shape == (2, 16, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_nets_that_see_no_mask_are_those_of_diffusers(dtype: torch.dtype) -> None:
    case = Case(FIRST, None, nets=1, dtype=dtype)
    theirs = case.theirs("control", control_image=hint(0), controlnet_conditioning_scale=0.8)
    assert torch.equal(case.ours(case.control(weight=0.8)), theirs)


def test_a_control_net_of_other_inputs_is_refused(tmp_path: Path) -> None:
    editor = Z_IMAGE.editor()
    net = FIRST.control_net(editor.model.pipe)  # type: ignore[attr-defined]
    type(net).from_config({**net.config, "control_in_dim": 20}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="20 input channels is not supported; 16 and 33"):
        editor.model.load_control(str(tmp_path))


def test_attention_terms_act_in_the_denoiser_and_not_in_a_net_that_has_parts_of_it() -> None:
    editor = Z_IMAGE.editor()
    model: Any = editor.model
    net = Z_IMAGE.control_net(model.pipe)
    editor._resources["control:net:"] = net
    names: list[str] = []

    def attention(qkv: QKV, site: Site) -> QKV:
        names.append(site.name)
        assert len(site.rows) == len(qkv.q)
        return qkv

    term = Custom(parts={"attention": attention})
    picture = data.coffee()[:64, :64]
    lists = []
    for edits in ([term], [term, ControlNet(model="net")]):
        names.clear()
        editor.run(picture, Pass(prompt="x", steps=1, edits=edits))
        lists.append(list(names))
    assert lists[0] == lists[1]
    heard = {name.split(".")[0] for name in names}
    assert heard == {"noise_refiner", "layers"}  # and not what refines the text
    assert net.noise_refiner is None  # it has only borrowed them


def test_a_reference_may_have_more_words_than_a_control_net_saw() -> None:
    editor = Z_IMAGE.editor()
    model: Any = editor.model
    editor._resources["control:net:"] = Z_IMAGE.control_net(model.pipe)
    style = Style(image=data.rocket(), prompt="a rocket before it starts, early in the morning")
    picture = data.coffee()[:64, :64]
    made = [
        editor.run(picture, Pass(prompt="x", steps=1, edits=edits)).pixels
        for edits in ([style, ControlNet(model="net")], [style])
    ]
    assert (made[0] != made[1]).any()


def test_pictures_of_another_encoder_are_another_family() -> None:
    family = z_image.Family()
    assert family.recognises({"_class_name": "ZImageControlNetPipeline"})
    assert not family.recognises({"_class_name": "ZImageOmniPipeline"})


def test_an_unknown_family_is_told_of_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FLUX.save(FLUX.pipeline(), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    index["_class_name"] = "AuraFlowPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index), "utf-8")
    capsys.readouterr()
    assert main(["models", "info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] is None
    assert found["class"] == "AuraFlowPipeline"
    assert found["transformer"]["in_channels"] == 64
    with pytest.raises(ModelError, match="AuraFlowPipeline is of no family that diffedit knows"):
        Editor.load(tmp_path, device="cpu")


def test_a_negative_prompt_that_is_not_looked_at_is_said(caplog: pytest.LogCaptureFixture) -> None:
    editor = FLUX.editor()
    for true, warned in ((None, True), (3.0, False)):
        caplog.clear()
        pass_ = Pass(prompt="x", negative="blurry", steps=1, true_guidance=true)
        editor.run(None, pass_, size=(64, 64))
        assert ("negative prompt is not looked at" in caplog.text) == warned
    with pytest.raises(InputError, match="true_guidance is for models that take"):
        SDXL.editor().run(None, Pass(prompt="x", steps=1, true_guidance=3.0), size=(64, 64))


def test_a_model_that_takes_a_hint_is_given_one() -> None:
    editor = FLUX.editor(in_channels=32)
    picture = data.coffee()[:64, :64]
    with pytest.raises(CapabilityError, match="draws after a picture in the role 'hint', which no"):
        editor.run(picture, Pass(prompt="x", steps=1, edits=(Img2Img(strength=1.0),)))
    with pytest.raises(InputError, match="itself takes the hint, which has no weight"):
        editor.run(picture, Pass(prompt="x", steps=1, edits=(ControlNet(weight=0.5),)))
    made = [
        editor.run(picture, Pass(prompt="x", steps=1, edits=(ControlNet(image=one),))).pixels
        for one in (picture, data.rocket())
    ]
    assert (made[0] != made[1]).any()


def test_larger_pictures_get_more_noise_where_the_scheduler_asks_for_it() -> None:
    model = SD3.model(SD3.pipeline(dynamic=True))
    small, large = (model.schedule(None, 4, shape=(16, side, side)) for side in (16, 64))
    assert (large.timesteps[1:] > small.timesteps[1:]).all()
    plain = SD3.model(SD3.pipeline())
    small, large = (plain.schedule(None, 4, shape=(16, side, side)) for side in (16, 64))
    assert (large.timesteps == small.timesteps).all()


def test_the_refiner_is_told_of_scores(tmp_path: Path) -> None:
    xl_pipeline(refiner=True).save_pretrained(tmp_path)
    editor = Editor.load(tmp_path, device="cpu")
    told = [
        editor.model.embed(["a cup"], (64, 96), negative=negative).tensors["sizes"].tolist()
        for negative in (False, True)
    ]
    assert told == [[[96, 64, 0, 0, 6.0]], [[96, 64, 0, 0, 2.5]]]
    pass_ = Pass(prompt="a cup", steps=4, edits=(Img2Img(strength=0.3),))
    assert editor.run(data.coffee()[:64, :64], pass_).pixels.shape == (64, 64, 3)


def test_the_refiners_latents_are_those_of_diffusers() -> None:
    pipe: Any = xl_pipeline(refiner=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pixels = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    pass_ = Pass(prompt="a cup", negative="", steps=5, edits=(Img2Img(strength=0.6),))
    ours = Editor(SDXL.model(pipe)).run(pixels, pass_, seed=7, compat=True).latents
    theirs = pipe(
        prompt="a cup",
        negative_prompt="",
        image=torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255,
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=pass_.guidance,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert ours is not None
    assert (ours - theirs).abs().max().item() == 0.0


def test_a_refiner_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    pipe: Any = xl_pipeline(refiner=True)
    pipe.register_to_config(requires_aesthetics_score=False)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"takes 40 numbers about sizes .* gives 48"):
        Editor.load(tmp_path, device="cpu")


def test_autoencoders_with_statistics_round_trip() -> None:
    """Latents are whitened by each channel's mean and deviation, and decoded back."""
    pipe: Any = xl_pipeline()
    plain = SDXL.model(pipe)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = plain.decode(plain.encode(pixels))
    before = plain.encode(pixels)
    mean, deviation = [0.1, -0.2, 0.3, 0.4], [0.5, 2.0, 1.5, 0.8]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    whitened = plain.encode(pixels)
    scale = pipe.vae.config.scaling_factor
    told = [torch.tensor(one).view(1, 4, 1, 1) for one in (mean, deviation)]
    torch.testing.assert_close(whitened, (before / scale - told[0]) * scale / told[1])
    torch.testing.assert_close(plain.decode(whitened), expected)


@pytest.mark.parametrize(
    ("name", "old", "wanted"),
    [
        ("stable-diffusion", False, torch.float16),
        ("z-image", False, torch.bfloat16),
        ("z-image", True, torch.float16),
    ],
)
def test_an_accelerator_computes_in_what_the_family_was_trained_in(
    name: str, old: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = plugins.default().families[name]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not old)
    assert devices.usual(family, torch.device("cuda")) == wanted
    assert devices.usual(family, torch.device("cpu")) == torch.float32


def test_a_hint_of_several_pictures_is_encoded_once() -> None:
    editor: Any = FLUX.editor()
    editor._resources["control:net:"] = FLUX.control_net(editor.model.pipe)
    seen: list[int] = []
    encode = editor.model.vae.encode

    def watched(pixels: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.append(len(pixels))
        return encode(pixels, *args, **more)

    editor.model.vae.encode = watched
    said: dict[str, Any] = {"prompt": "x", "true_guidance": 2.0}
    first = Pass(**said, steps=1, edits=(Img2Img(strength=1.0),))
    second = Pass(**said, steps=4, edits=(ControlNet(model="net"),))
    editor.run(data.coffee()[:64, :64], [first, second], seed=[1, 2])
    assert seen == [1, 2]
