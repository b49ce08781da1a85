"""The controlnet plugin: hints, preprocessors, and control networks from files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file
from skimage import data

from diffedit import Call, Contribution, Editor, ModelInput, Pass, Residuals, Run, errors
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.testing import make_run, tiny_control_net, tiny_editor, tiny_pipeline
from diffedit_controlnet import ControlNet
from diffedit_controlnet.preprocessors import DETECTORS, canny
from diffedit_inpaint import Inpaint
from diffedit_invert import Invert
from tests.hub_server import serving
from tests.test_hub import use
from tests.test_single_files import unet

PHOTO = data.chelsea()[40:168, 100:228]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control network for the tiny model, saved as a user has it."""
    place = tmp_path_factory.mktemp("net")
    tiny_control_net(tiny_pipeline()).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def editor() -> Editor:
    return tiny_editor()


def made(editor: Editor, *edits: ControlNet | Inpaint) -> np.ndarray:
    return editor.run(PHOTO, Pass(prompt="a cat", steps=2, edits=edits), seed=1).pixels


def test_canny_finds_the_edge_of_a_square() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255
    found = canny(picture)
    assert found.shape == picture.shape
    assert set(np.unique(found)) == {0, 255}
    ys, xs = np.nonzero(found[..., 0])
    assert (ys.min(), xs.min()) in {(15, 15), (16, 16)}
    assert (ys.max(), xs.max()) in {(47, 47), (48, 48)}
    assert not found[24:40, 24:40].any()


def white(*places: slice) -> np.ndarray:
    mask = np.zeros(PHOTO.shape[:2], bool)
    mask[places] = True
    return mask


HOLE = white(np.s_[40:90], np.s_[30:70])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The hints that ControlNets are shown, call by call."""
    hints: list[torch.Tensor] = []
    run = ControlNetModel.forward

    def watched(self: ControlNetModel, *given: Any, **named: Any) -> Any:
        hints.append(named["controlnet_cond"])
        return run(self, *given, **named)

    monkeypatch.setattr(ControlNetModel, "forward", watched)
    return hints


def test_a_net_for_inpainting_is_shown_the_picture_with_its_hole(
    editor: Editor, folder: Path, seen: list[torch.Tensor]
) -> None:
    net = ControlNet(model=str(folder), kind="inpaint")
    pixels = made(editor, net, Inpaint(mask=HOLE, margin=128))
    assert (pixels[~HOLE] == PHOTO[~HOLE]).mean() > 0.8  # all but the feather
    shown = torch.from_numpy(PHOTO.copy()).permute(2, 0, 1).float() / 255
    expected = torch.where(torch.from_numpy(HOLE), -1.0, shown)
    assert len(seen) == 2
    for one in seen:
        assert torch.equal(one, expected.expand(2, -1, -1, -1))


def test_a_net_for_inpainting_needs_a_mask(editor: Editor, folder: Path) -> None:
    with pytest.raises(errors.InputError, match=r"is one for inpainting: it needs a mask"):
        made(editor, ControlNet(model=str(folder), kind="inpaint"))


def test_what_is_shown_no_hole_is_refused(editor: Editor, tmp_path: Path) -> None:
    adapter = T2IAdapter(channels=(32, 64), num_res_blocks=1, downscale_factor=8)
    adapter.save_pretrained(tmp_path)
    net = ControlNet(model=str(tmp_path), kind="inpaint")
    with pytest.raises(errors.InputError, match="networks that are shown the hole"):
        made(editor, net, Inpaint(mask=HOLE))


def test_seeds_together_and_apart(editor: Editor, folder: Path) -> None:
    """A network for inpainting is shown each picture's own hole."""
    net = ControlNet(model=str(folder), kind="inpaint")
    pass_ = Pass(prompt="a cat", steps=2, edits=[net, Inpaint(mask=HOLE)])
    both = editor.run(PHOTO, [pass_, pass_], seed=[1, 2])
    for seed, latents in zip((1, 2), both.latents, strict=True):  # type: ignore[arg-type]
        alone = editor.run(PHOTO, [pass_, pass_], seed=seed).latents
        assert alone is not None
        assert torch.allclose(latents, alone[0], atol=1e-4)


@pytest.fixture(scope="module")
def leading(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """A model in a folder, with a control network for inpainting of its own."""
    place = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(place)
    shutil.copytree(folder, place / "controlnet/inpaint")
    return Editor.load(str(place), device="cpu")


def test_a_models_own_net_for_inpainting_leads_wherever_there_is_a_mask(
    leading: Editor, editor: Editor, folder: Path
) -> None:
    """Once, as that one network would if an edit brought it, and with any number of masks."""
    assert "inpaint_control" in leading.model.capabilities
    inpaint = Inpaint(mask=HOLE)
    brought = made(editor, ControlNet(model=str(folder), kind="inpaint"), inpaint)
    assert (made(leading, inpaint) == brought).all()
    assert (made(editor, inpaint) != brought).any()
    upper, lower = (Inpaint(mask=HOLE & white(place)) for place in (np.s_[:64], np.s_[64:]))
    two = made(editor, ControlNet(model=str(folder), kind="inpaint"), upper, lower)
    assert (made(leading, upper, lower) == two).all()
    pass_ = Pass(prompt="a cat", steps=2, edits=[inpaint])
    assert leading.run(PHOTO, pass_).passes[0]["led"]
    assert not editor.run(PHOTO, pass_).passes[0]["led"]


def test_a_models_own_net_for_inpainting_has_a_part_in_inversions(
    leading: Editor, seen: list[torch.Tensor]
) -> None:
    """The sampler that is inverted is the one that runs."""
    back = Invert(prompt="a cat", kind="edit_friendly", strength=1.0)
    edits = [back, Inpaint(mask=HOLE)]
    leading.run(PHOTO, Pass(prompt="a cat", steps=4, scheduler="ddim", eta=1.0, edits=edits))
    assert len(seen) == 4 + 4


def test_edits_are_blamed_for_their_own_residuals(leading: Editor, folder: Path) -> None:
    """Also where the model's own network leads."""

    class Wrong(ControlNet):
        name: ClassVar[str] = "wrong"

        def contribute(self, run: Run) -> Contribution:
            def residuals(x: ModelInput, call: Call) -> Residuals:
                given = ControlNet(model=str(folder), kind="none").contribute(run).residuals
                assert given is not None
                return Residuals(tuple(one[..., :3] for one in given(x, call).places))

            return Contribution(residuals=residuals)

    with pytest.raises(errors.PluginError, match=r"^wrong: .*other shapes"):
        made(leading, Wrong(), Inpaint(mask=HOLE))


def test_a_models_own_net_for_inpainting_steps_back(leading: Editor, editor: Editor) -> None:
    """Before one that an edit brings, at any weight, and where there is no mask."""
    inpaint = Inpaint(mask=HOLE)
    off = ControlNet(kind="inpaint", weight=0)
    assert (made(leading, off, inpaint) == made(editor, inpaint)).all()
    assert (made(leading) == made(editor)).all()
    pass_ = Pass(prompt="a cat", steps=2, edits=[inpaint])
    own, bare = (one.run(PHOTO, pass_, seed=1, compat=True).pixels for one in (leading, editor))
    assert (own == bare).all()


def test_an_adapter_leads_nobody(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    adapter = T2IAdapter(channels=(32, 64), num_res_blocks=1, downscale_factor=8)
    adapter.save_pretrained(tmp_path / "controlnet/inpaint")
    assert "inpaint_control" not in Editor.load(str(tmp_path)).model.capabilities


def test_a_net_that_may_be_for_anything_leads_nobody(folder: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    shutil.copytree(folder, tmp_path / "controlnet")
    assert "inpaint_control" not in Editor.load(str(tmp_path)).model.capabilities
    (tmp_path / "controlnet/diffedit.json").write_text('{"kind": "inpaint"}')
    assert "inpaint_control" in Editor.load(str(tmp_path)).model.capabilities


def test_hint_from_the_picture_equals_the_same_hint_ready_made(
    editor: Editor, folder: Path
) -> None:
    ready = cv2.Canny(np.ascontiguousarray(PHOTO), 100, 200)
    computed = made(editor, ControlNet(model=str(folder), kind="canny"))
    given = made(editor, ControlNet(model=str(folder), kind="none", image=ready))
    assert (computed == given).all()
    assert (computed != made(editor, ControlNet(model=str(folder), weight=0))).any()


def test_weight_nought_and_an_empty_window_are_no_control(editor: Editor, folder: Path) -> None:
    bare = made(editor)
    assert (made(editor, ControlNet(model=str(folder), weight=0)) == bare).all()
    assert (made(editor, ControlNet(model=str(folder), start=0.3, end=0.4)) == bare).all()


def test_hints_follow_the_region(editor: Editor, folder: Path) -> None:
    """A hint of the whole picture is cropped with it: far from the mask it cannot matter."""
    mask = np.zeros(PHOTO.shape[:2], np.uint8)
    mask[8:40, 8:40] = 255
    hole = Inpaint(mask=mask, feather=0, margin=4)
    near, far = np.zeros((2, *PHOTO.shape), np.uint8)
    near[5:45:4] = 255
    far[100:120:4] = 255
    empty = np.zeros_like(PHOTO)
    results = [
        made(editor, hole, ControlNet(model=str(folder), kind="none", image=hint, weight=4))
        for hint in (empty, near, far)
    ]
    assert (results[0] == results[2]).all()
    assert (results[0] != results[1]).any()


def test_two_items_each_follow_their_own_picture(editor: Editor, folder: Path) -> None:
    """In a second pass the pictures of a batch differ, and so do their hints."""
    passes = [Pass(prompt="a cat", steps=2), Pass(steps=2, edits=[ControlNet(model=str(folder))])]
    both = editor.run(PHOTO, passes, seed=[1, 2])
    for item, seed in enumerate((1, 2)):
        alone = editor.run(PHOTO, passes, seed=seed).pixels.astype(int)
        assert abs(both.pictures[item].pixels - alone).max() <= 1  # batching changes floats


def test_detector_with_weights_from_a_folder(tmp_path: Path) -> None:
    from controlnet_aux.hed import ControlNetHED_Apache2

    torch.manual_seed(0)
    torch.save(ControlNetHED_Apache2().state_dict(), tmp_path / "ControlNetHED.pth")
    detect = make_run(PHOTO).preprocess("hed", str(tmp_path))
    found = detect(np.ascontiguousarray(PHOTO[:100]))
    assert found.shape == (100, 128, 3)
    assert found.dtype == np.uint8


def test_every_detector_is_a_class_of_controlnet_aux() -> None:
    import controlnet_aux

    for cls, _ in DETECTORS.values():
        assert hasattr(getattr(controlnet_aux, cls), "from_pretrained")


def test_detectors_are_imported_when_used_only() -> None:
    code = (
        "import sys, diffedit; diffedit.edits()['controlnet'](kind='hed')\n"
        "assert 'controlnet_aux' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_weights_say_which_option_names_them(tmp_path: Path) -> None:
    run = make_run(PHOTO)
    with pytest.raises(errors.ModelError, match=r"hed.*controlnet: weights"):
        run.preprocess("hed", str(tmp_path))
    with pytest.raises(errors.ParameterError, match="did you mean 'canny'"):
        run.preprocess("cany")


def test_networks_that_do_not_fit_are_refused(editor: Editor, tmp_path: Path) -> None:
    net = tiny_control_net(tiny_pipeline())
    net.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(errors.UnsafeWeights, match="pickle"):
        made(editor, ControlNet(model=str(tmp_path / "pickled")))
    with pytest.raises(errors.ModelError, match="no such folder"):
        made(editor, ControlNet(model=str(tmp_path / "nowhere")))
    with pytest.raises(errors.CapabilityError, match="no control network of its own"):
        made(editor, ControlNet())
    config = dict(net.config, cross_attention_dim=64)
    type(net).from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(errors.ModelError, match="cross_attention_dim"):
        made(editor, ControlNet(model=str(tmp_path / "other")))


# --- files ----------------------------------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model.safetensors"


def original(net: Any) -> dict[str, torch.Tensor]:
    """A control network as its makers call its tensors."""
    names: dict[str, Any] = {
        r"^model\.diffusion_model\.": "control_model.",
        r"controlnet_down_blocks\.(\d+)": r"zero_convs.\1.0",
        r"controlnet_mid_block": "middle_block_out.0",
        r"controlnet_cond_embedding\.conv_in": "input_hint_block.0",
        r"controlnet_cond_embedding\.conv_out": "input_hint_block.14",
        r"controlnet_cond_embedding\.blocks\.(\d+)": (
            lambda found: f"input_hint_block.{2 * int(found[1]) + 2}"
        ),
    }
    made = {}
    for name, tensor in unet(net).items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        made[name] = tensor.contiguous()
    return made


def test_a_file_with_its_configuration_beside_it_is_as_its_folder(
    editor: Editor, folder: Path, tmp_path: Path
) -> None:
    """In both layouts, and of every class that has no other."""
    expected = made(editor, ControlNet(model=str(folder)))
    assert (made(editor, ControlNet(model=str(folder / WEIGHTS))) == expected).all()
    shutil.copy(folder / "config.json", tmp_path)
    save_file(original(ControlNetModel.from_pretrained(folder)), tmp_path / "a.safetensors")
    assert (made(editor, ControlNet(model=str(tmp_path / "a.safetensors"))) == expected).all()
    adapter = T2IAdapter(channels=(32, 64), num_res_blocks=1, downscale_factor=8)
    adapter.save_pretrained(tmp_path)
    loaded = editor.model.load_control(str(tmp_path / WEIGHTS))
    assert isinstance(loaded, T2IAdapter)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], one) for name, one in adapter.state_dict().items())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_configuration_of_a_lone_file_is_its_makers(
    layout: str, editor: Editor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, makers = tmp_path / "lone.safetensors", "lllyasviel/control_v11p_sd15_canny"
    net = ControlNetModel.from_pretrained(folder)
    save_file(original(net) if layout == "original" else net.state_dict(), file)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')  # not its own
    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        with pytest.raises(errors.ModelError) as refused:
            made(editor, ControlNet(model=str(file)))
        told = str(refused.value)
        assert told.startswith(f"{file}: no config.json of it lies beside it")
        assert f"({makers}: no such folder here, and none of this name on the hub" in told
        assert told.endswith("name the folder or hub id of a control network")
        server.push(makers, folder)
        mine = made(editor, ControlNet(model=str(file)))
        assert server.fetched() == ["config.json"]
    assert (mine == made(editor, ControlNet(model=str(folder)))).all()


@pytest.mark.parametrize(
    ("name", "seems"),
    [
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("lora_unet_down_blocks_0_to_q.lora_down.weight", "a LoRA"),
        ("lora_controlnet", "a Control-LoRA"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("first_stage_model.encoder.conv_in.weight", "a whole model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a denoiser"),
        ("decoder.conv_in.weight", "an autoencoder"),
    ],
)
def test_a_file_of_something_else_is_told_by_its_tensors(
    name: str, seems: str, editor: Editor, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    save_file({name: torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(errors.ModelError) as refused:
        made(editor, ControlNet(model=str(tmp_path / "a.safetensors")))
    said = f"{tmp_path / 'a.safetensors'}: seems to be {seems}, which is no control network"
    assert str(refused.value) == said


def test_a_file_that_lacks_a_tensor_is_refused(
    editor: Editor, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    net, file = ControlNetModel.from_pretrained(folder), tmp_path / "a.safetensors"
    lost = {
        "controlnet_mid_block.weight": "middle_block_out.0.weight",
        "controlnet_down_blocks.1.weight": "zero_convs.1.0.weight",
        "controlnet_cond_embedding.blocks.0.bias": "input_hint_block.2.bias",
        "mid_block.resnets.0.conv1.weight": "middle_block.0.in_layers.2.weight",
    }
    for ours, theirs in lost.items():
        for name, state in ((ours, net.state_dict()), (f"control_model.{theirs}", original(net))):
            del state[name]
            save_file(state, file)
            with pytest.raises(errors.ModelError, match=f"^{file}: lacks {ours}; it would be"):
                made(editor, ControlNet(model=str(file)))
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(errors.ModelError, match=f"^{file}: lacks .* and .* more tensors"):
        made(editor, ControlNet(model=str(file)))
    config = json.loads((folder / "config.json").read_text())
    config["_class_name"] = "FluxControlNetModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.ModelError, match="holds a FluxControlNetModel, and the loaded mode"):
        made(editor, ControlNet(model=str(file)))


def test_the_models_own_network(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    tiny_control_net(pipe).save_pretrained(tmp_path / "controlnet")
    own = Editor(StableDiffusion(pipe, str(tmp_path)))
    named = tiny_editor()
    expected = made(named, ControlNet(model=str(tmp_path / "controlnet")))
    assert (made(own, ControlNet()) == expected).all()
