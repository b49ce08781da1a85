"""T2I-Adapters and unions of control networks: bit for bit as diffusers has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetUnionModel, FluxControlNetModel, T2IAdapter, UNet2DConditionModel
from PIL import Image
from skimage import data

from diffedit import Editor, Pass, errors
from diffedit_controlnet import ControlNet
from diffedit_inpaint import Inpaint
from tests.families import FLUX, SD, SDXL, Tiny
from tests.parity.comparisons import contiguous

STEPS, SEED, SIDE = 4, 3, 64
HINT = data.coffee()[:SIDE, :SIDE]
OTHER = data.chelsea()[:SIDE, :SIDE]


def latents(editor: Editor, *edits: Any, image: Any = None, **said: Any) -> torch.Tensor:
    options = {"negative": "blurry", "guidance": 5.0, "true_guidance": said.pop("true", None)}
    pass_ = Pass(prompt="a red circle", steps=STEPS, edits=edits, **options)
    size = (SIDE, SIDE) if image is None else None
    made = editor.run(image, pass_, seed=SEED, size=size, **said).latents
    assert made is not None
    return made


def theirs(kind: str, pipe: Any, **call: Any) -> torch.Tensor:
    cls = getattr(diffusers, kind)
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)} | call.pop("parts")
    if cls is diffusers.StableDiffusionAdapterPipeline:
        del parts["image_encoder"]
        parts["requires_safety_checker"] = False
    made = cls(**parts)
    made.set_progress_bar_config(disable=True)
    found: torch.Tensor = made(
        "a red circle",
        negative_prompt="blurry",
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(SEED),
        width=SIDE,
        height=SIDE,
        output_type="latent",
        **call,
    ).images
    return found


# -- T2I-Adapters ----------------------------------------------------------------------------------


def sd() -> Any:
    """With attention at the first level, as Stable Diffusion's UNet has it."""
    pipe: Any = SD.pipeline()
    torch.manual_seed(1)
    config = dict(pipe.unet.config) | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipe.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return pipe


def adapter(folder: Path, kind: str, seed: int = 0, **options: Any) -> T2IAdapter:
    torch.manual_seed(seed)
    xl = kind == "full_adapter_xl"
    made = T2IAdapter(
        **{
            "in_channels": 3,
            "channels": [32, 64, 64, 64] if xl else [32, 64],
            "num_res_blocks": 1,
            "downscale_factor": 16 if xl else 8,
            "adapter_type": kind,
        }
        | options
    ).eval()
    made.save_pretrained(folder)
    return made


def laid_out(preprocess: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Of one channel every layout counts as contiguous, while strides still say which it is."""
    return lambda *args: (made := preprocess(*args)).reshape(-1).view(made.shape)


@pytest.fixture(autouse=True)
def _contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL preprocessing yields channels-last tensors, with which results drift by 1e-6."""
    from diffusers.pipelines.t2i_adapter import pipeline_stable_diffusion_adapter as plain
    from diffusers.pipelines.t2i_adapter import pipeline_stable_diffusion_xl_adapter as xl

    for module in (plain, xl):
        made = laid_out(module._preprocess_adapter_image)
        monkeypatch.setattr(module, "_preprocess_adapter_image", made)
    kind = diffusers.image_processor.VaeImageProcessor
    monkeypatch.setattr(kind, "preprocess", contiguous(kind.preprocess))


ADAPTERS = [
    (SD, sd, "full_adapter", "StableDiffusionAdapterPipeline"),
    (SD, sd, "light_adapter", "StableDiffusionAdapterPipeline"),
    (SDXL, SDXL.pipeline, "full_adapter_xl", "StableDiffusionXLAdapterPipeline"),
]
adapters = pytest.mark.parametrize(
    ("family", "make", "kind", "peer"), ADAPTERS, ids=[one[2] for one in ADAPTERS]
)


@adapters
def test_an_adapter_is_as_in_diffusers(
    family: Tiny, make: Any, kind: str, peer: str, tmp_path: Path
) -> None:
    pipe = make()
    net = adapter(tmp_path, kind)
    editor = Editor(family.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edit = ControlNet(model=str(tmp_path), kind="none", image=HINT, weight=0.7)
    own = latents(editor, edit, compat=True)
    hint = Image.fromarray(HINT)
    call = {"parts": {"adapter": net}, "image": hint, "adapter_conditioning_scale": 0.7}
    assert torch.equal(own, theirs(peer, pipe, **call))
    assert not torch.equal(own, latents(editor, compat=True))


def test_an_adapter_acts_in_its_window_as_in_diffusers(tmp_path: Path) -> None:
    pipe: Any = SDXL.pipeline()
    net = adapter(tmp_path, "full_adapter_xl")
    editor = Editor(SDXL.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edit = ControlNet(model=str(tmp_path), kind="none", image=HINT, end=0.5)
    call = {"parts": {"adapter": net}, "image": Image.fromarray(HINT)}
    peer = "StableDiffusionXLAdapterPipeline"
    made = theirs(peer, pipe, **call, adapter_conditioning_factor=0.5)
    assert torch.equal(latents(editor, edit, compat=True), made)


def test_two_adapters_add_up_as_in_diffusers(tmp_path: Path) -> None:
    pipe = sd()
    nets = [adapter(tmp_path / str(n), "full_adapter", seed=n) for n in (0, 1)]
    editor = Editor(SD.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edits = [
        ControlNet(model=str(tmp_path / str(n)), kind="none", image=hint, weight=w)
        for n, (hint, w) in enumerate(((HINT, 0.4), (OTHER, 0.8)))
    ]
    call = {
        "parts": {"adapter": nets},
        "image": [Image.fromarray(HINT), Image.fromarray(OTHER)],
        "adapter_conditioning_scale": [0.4, 0.8],
    }
    made = theirs("StableDiffusionAdapterPipeline", pipe, **call)
    assert torch.equal(latents(editor, *edits, compat=True), made)


def test_an_adapter_of_one_channel_sees_one(tmp_path: Path) -> None:
    pipe = sd()
    net = adapter(tmp_path, "full_adapter", in_channels=1)
    editor = Editor(SD.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    grey = np.repeat(HINT[..., :1], 3, axis=2)
    own = latents(editor, ControlNet(model=str(tmp_path), kind="none", image=grey), compat=True)
    call = {"parts": {"adapter": net}, "image": Image.fromarray(HINT[..., 0])}
    assert torch.equal(own, theirs("StableDiffusionAdapterPipeline", pipe, **call))


def test_an_adapter_is_asked_once_a_pass_and_acts_beside_a_control_network(tmp_path: Path) -> None:
    pipe: Any = SDXL.pipeline()
    adapter(tmp_path / "adapter", "full_adapter_xl")
    SDXL.control_net(pipe).save_pretrained(tmp_path / "net")
    editor = Editor(SDXL.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edits = [
        ControlNet(model=str(tmp_path / name), kind="none", image=HINT)
        for name in ("adapter", "net")
    ]
    alone = [latents(editor, one) for one in edits]
    calls: list[int] = []
    net = next(one for one in editor._resources.values() if isinstance(one, T2IAdapter))
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    both = latents(editor, *edits)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(both, latents(editor, *edits[::-1]))
    assert not any(torch.equal(both, one) for one in alone)


@pytest.mark.parametrize("size", [(72, 88), (64, 104)])
def test_an_adapter_takes_any_size_that_the_model_does(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """Its own grid may be coarser: that of XL's is 16 pixels."""
    adapter(tmp_path, "full_adapter_xl")
    editor = SDXL.editor()
    picture = data.astronaut()[: size[1], : size[0]]
    edit = ControlNet(model=str(tmp_path), kind="none")
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[20:40, 20:40] = 255
    made = editor.run(picture, Pass(prompt="x", steps=2, edits=[edit, Inpaint(mask=mask)]))
    assert made.pixels.shape == picture.shape


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, "full_adapter", channels=[16, 32])
    with pytest.raises(errors.ModelError, match="T2I-Adapter was made for another model"):
        latents(SD.editor(), ControlNet(model=str(tmp_path), kind="none", image=HINT))


# -- unions ----------------------------------------------------------------------------------------


def union(folder: Path, unet: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    small = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4}
    usual = ControlNetUnionModel.from_unet(unet).config
    config = {key: value for key, value in usual.items() if key[0] != "_"}
    made: Any = ControlNetUnionModel.from_config(config | small)
    for weight in made.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    made.eval().requires_grad_(False).save_pretrained(folder)
    return made


def test_a_union_is_as_in_diffusers(tmp_path: Path) -> None:
    pipe: Any = SDXL.pipeline()
    net = union(tmp_path, pipe.unet)
    editor = Editor(SDXL.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    seen = []
    for mode in (1, 3):
        edit = ControlNet(model=str(tmp_path), kind="none", image=HINT, weight=0.8, mode=mode)
        own = latents(editor, edit, compat=True)
        call = {
            "parts": {"controlnet": net},
            "control_image": [Image.fromarray(HINT)],
            "control_mode": [mode],
            "controlnet_conditioning_scale": 0.8,
        }
        assert torch.equal(own, theirs("StableDiffusionXLControlNetUnionPipeline", pipe, **call))
        seen.append(own)
    assert not torch.equal(*seen)


def test_two_of_a_union_add_up_as_in_diffusers(tmp_path: Path) -> None:
    pipe: Any = SDXL.pipeline()
    net = union(tmp_path, pipe.unet)
    editor = Editor(SDXL.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edits = [
        ControlNet(model=str(tmp_path), kind="none", image=hint, weight=weight, mode=mode)
        for hint, weight, mode in ((HINT, 0.8, 3), (OTHER, 0.5, 1))
    ]
    call = {
        "parts": {"controlnet": [net, net]},
        "control_image": [[Image.fromarray(HINT)], [Image.fromarray(OTHER)]],
        "control_mode": [3, 1],
        "controlnet_conditioning_scale": [0.8, 0.5],
    }
    own = latents(editor, *edits, compat=True)
    assert torch.equal(own, theirs("StableDiffusionXLControlNetUnionPipeline", pipe, **call))


def test_the_mode_follows_from_the_kind(tmp_path: Path) -> None:
    pipe: Any = SDXL.pipeline()
    union(tmp_path, pipe.unet)
    editor = Editor(SDXL.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    edges = [
        latents(editor, ControlNet(model=str(tmp_path), kind="canny", image=HINT, mode=mode))
        for mode in (None, 3, 4)
    ]
    assert torch.equal(edges[0], edges[1])
    assert not torch.equal(edges[0], edges[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"kind": "none"}, "give mode, from 0 to 5"), ({"kind": "canny", "mode": 6}, "0 to 5")],
)
def test_a_mode_that_is_not_there_is_said(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    editor = SDXL.editor()
    union(tmp_path, editor.model.denoiser)  # type: ignore[attr-defined]
    with pytest.raises(errors.ParameterError, match=said):
        latents(editor, ControlNet(model=str(tmp_path), image=HINT, **options))


def test_a_mode_is_for_unions(tmp_path: Path) -> None:
    editor = SD.editor()
    SD.control_net(SD.pipeline()).save_pretrained(tmp_path)
    with pytest.raises(errors.ParameterError, match="unions"):
        latents(editor, ControlNet(model=str(tmp_path), image=HINT, mode=1))


def test_a_union_for_flux_is_as_in_diffusers(tmp_path: Path) -> None:
    pipe: Any = FLUX.pipeline()
    torch.manual_seed(2)
    config = {k: v for k, v in FLUX.control_net(pipe).config.items() if k[0] != "_"}
    net: Any = FluxControlNetModel.from_config(config | {"num_mode": 7})
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    net.eval().save_pretrained(tmp_path)
    editor = Editor(FLUX.model(pipe, "tiny", (SIDE, 2 * SIDE, 2 * SIDE)))
    # Pipelines for Flux draw a hint's posterior, and first.
    draw = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample
    seen = []
    for mode in (0, 2):
        edit = ControlNet(model=str(tmp_path), kind="none", image=HINT, weight=0.8, mode=mode)
        own = latents(editor, edit, compat=True)
        with pytest.MonkeyPatch.context() as patch:
            kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
            patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
            call = {
                "parts": {"controlnet": net},
                "control_image": Image.fromarray(HINT),
                "control_mode": mode,
                "controlnet_conditioning_scale": 0.8,
            }
            packed = theirs("FluxControlNetPipeline", pipe, **call)
        made = diffusers.FluxPipeline._unpack_latents(packed, SIDE, SIDE, 8)
        assert torch.equal(own, made)
        seen.append(own)
    assert draw is diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample
    assert not torch.equal(*seen)
