"""Law 4: in compat mode the latents equal those of diffusers' own pipelines, max|d| = 0.

fp32, CPU, tiny random components. Each case names the diffusers pipeline it is compared with; the
scheduler on diffusers' side is built here, not by `diffedit.schedulers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from diffedit import Editor, Pass, testing
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint

SIDE, STEPS, GUIDANCE, SEED = 64, 6, 5.0, 7
PROMPT, NEGATIVE = "a red circle", "blurry"

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
}


def photograph() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def mask() -> Image.Image:
    """Uneven on purpose: nearest sampling and maximum would differ on it."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    shape[13:41, 18:51] = 255
    shape[30, 5:60] = 200
    return Image.fromarray(shape)


def hint(number: int) -> Image.Image:
    picture = data.coffee() if number else data.rocket()
    return Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


class Case:
    """Components, and the two ways to run them."""

    def __init__(
        self, name: str | None, in_channels: int = 4, nets: int = 0, **options: Any
    ) -> None:
        self.pipe: Any = testing.tiny_pipeline(in_channels=in_channels, **options)
        self.nets = [testing.tiny_control_net(self.pipe, seed=n + 1) for n in range(nets)]
        self.editor = Editor(StableDiffusion(self.pipe))
        for number, net in enumerate(self.nets):
            self.editor._resources[f"control:net{number}:"] = net
        self.name = name

    def theirs(self, cls: str, **call: Any) -> torch.Tensor:
        parts = dict(self.pipe.components)
        if self.nets:
            parts["controlnet"] = self.nets[0] if len(self.nets) == 1 else list(self.nets)
        if self.name is not None:
            kind, options = SCHEDULERS[self.name]
            made = getattr(diffusers, kind)
            parts["scheduler"] = made.from_config(self.pipe.scheduler.config, **options)
        parts["requires_safety_checker"] = False
        pipe = getattr(diffusers, cls)(**parts)
        pipe.set_progress_bar_config(disable=True)
        pipe._execution_device  # noqa: B018 - resolves before the call, as a first run would
        if hasattr(pipe, "image_processor"):
            pipe.image_processor.preprocess = contiguous(pipe.image_processor.preprocess)
        torch.manual_seed(99)  # DPM++ SDE draws its seed from the global generator
        made = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **call,
        ).images
        return torch.as_tensor(made)

    def ours(self, *edits: Any, image: Any = None) -> torch.Tensor:
        pass_ = Pass(
            prompt=PROMPT,
            negative=NEGATIVE,
            steps=STEPS,
            guidance=GUIDANCE,
            scheduler=self.name,
            edits=edits,
        )
        torch.manual_seed(99)
        size = (SIDE, SIDE) if image is None else None
        latents = self.editor.run(image, pass_, seed=SEED, size=size, compat=True).latents
        assert latents is not None
        return latents

    def control(self, number: int = 0, **options: Any) -> ControlNet:
        return ControlNet(model=f"net{number}", kind="none", image=hint(number), **options)


def contiguous(preprocess: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """PIL preprocessing yields channels-last tensors, with which results drift by 1e-5."""

    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        return preprocess(*args, **kwargs).contiguous()

    return wrapped


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max().item() == 0.0


every_scheduler = pytest.mark.parametrize("name", [None, *SCHEDULERS])


@every_scheduler
def test_text_to_image(name: str | None) -> None:
    case = Case(name)
    equal(case.ours(), case.theirs("StableDiffusionPipeline", width=SIDE, height=SIDE))


@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_image_to_image(name: str | None, strength: float) -> None:
    case = Case(name)
    equal(
        case.ours(Img2Img(strength=strength), image=photograph()),
        case.theirs("StableDiffusionImg2ImgPipeline", image=photograph(), strength=strength),
    )


def _inpaint(case: Case, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    edits = [Inpaint(mask=mask())] + ([Img2Img(strength=strength)] if strength < 1 else [])
    ours = case.ours(*edits, image=photograph())
    return ours, case.theirs(
        "StableDiffusionInpaintPipeline",
        image=photograph(),
        mask_image=mask(),
        width=SIDE,
        height=SIDE,
        strength=strength,
    )


@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpaint(name: str | None, strength: float) -> None:
    equal(*_inpaint(Case(name), strength))


@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpaint_with_nine_channels(name: str | None, strength: float) -> None:
    equal(*_inpaint(Case(name, in_channels=9), strength))


@every_scheduler
def test_one_control_net(name: str | None) -> None:
    case = Case(name, nets=1)
    equal(
        case.ours(case.control(weight=0.8)),
        case.theirs(
            "StableDiffusionControlNetPipeline", image=hint(0), controlnet_conditioning_scale=0.8
        ),
    )


@every_scheduler
def test_two_control_nets(name: str | None) -> None:
    case = Case(name, nets=2)
    equal(
        case.ours(case.control(0, weight=0.8), case.control(1, weight=0.5)),
        case.theirs(
            "StableDiffusionControlNetPipeline",
            image=[hint(0), hint(1)],
            controlnet_conditioning_scale=[0.8, 0.5],
        ),
    )


@every_scheduler
def test_control_net_in_a_window(name: str | None) -> None:
    case = Case(name, nets=1)
    equal(
        case.ours(case.control(start=0.2, end=0.7)),
        case.theirs(
            "StableDiffusionControlNetPipeline",
            image=hint(0),
            control_guidance_start=0.2,
            control_guidance_end=0.7,
        ),
    )


@every_scheduler
def test_control_net_with_image_to_image(name: str | None) -> None:
    case = Case(name, nets=1)
    equal(
        case.ours(case.control(weight=0.8), Img2Img(strength=0.6), image=photograph()),
        case.theirs(
            "StableDiffusionControlNetImg2ImgPipeline",
            image=photograph(),
            control_image=hint(0),
            strength=0.6,
            controlnet_conditioning_scale=0.8,
        ),
    )


@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_control_net_with_inpaint(name: str | None, strength: float) -> None:
    case = Case(name, nets=1)
    edits = [Inpaint(mask=mask())] + ([Img2Img(strength=strength)] if strength < 1 else [])
    equal(
        case.ours(case.control(), *edits, image=photograph()),
        case.theirs(
            "StableDiffusionControlNetInpaintPipeline",
            image=photograph(),
            mask_image=mask(),
            control_image=hint(0),
            width=SIDE,
            height=SIDE,
            strength=strength,
            controlnet_conditioning_scale=1.0,  # this pipeline's default is 0.5
        ),
    )


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpmpp_2m", "unipc"])
def test_v_prediction_with_zero_terminal_snr(name: str) -> None:
    case = Case(
        name,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    equal(case.ours(), case.theirs("StableDiffusionPipeline", width=SIDE, height=SIDE))


def test_the_comparison_can_fail() -> None:
    case = Case("ddim")
    theirs = case.theirs("StableDiffusionImg2ImgPipeline", image=photograph(), strength=0.5)
    assert (case.ours(Img2Img(strength=0.7), image=photograph()) - theirs).abs().max() > 0.01
