"""What is compared with diffusers' own pipelines, as data: for the tests, and for the table.

Tiny random components on the CPU. The scheduler on diffusers' side is built here, not by
`diffedit.schedulers`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from skimage import data

from diffedit import Edit, Editor, Pass
from diffedit_controlnet import ControlNet
from diffedit_guidance import PerturbedAttention
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_instruct import Instruct
from tests.families import FAMILIES, Tiny

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

# Of rectified flows; in diffusers their shift is said by hand. Most of its pipelines for flows give
# steps no generator, so what draws at each step draws unseeded there, and is not compared.
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler_karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
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


def holed() -> torch.Tensor:
    """The photograph with -1 in the mask, as diffusers' docs make it for ControlNet 1.1."""
    pixels = np.asarray(photograph(), np.float32) / 255
    pixels[np.asarray(mask()) >= 128] = -1.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


class Case:
    """Components, and the two ways to run them."""

    def __init__(
        self,
        family: Tiny,
        name: str | None,
        nets: int = 0,
        dtype: torch.dtype = torch.float32,
        net: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.family = family
        self.pipe: Any = family.pipeline(**options)
        made = [family.control_net(self.pipe, seed=n + 1, **(net or {})) for n in range(nets)]
        self.nets = [one.to(dtype) for one in made]
        self.pipe.to(dtype)
        self.editor = Editor(family.model(self.pipe))
        for number, net in enumerate(self.nets):
            self.editor._resources[f"control:net{number}:"] = net
        self.name = name

    def theirs(self, task: str, **call: Any) -> torch.Tensor:
        kind = getattr(diffusers, self.family.theirs[task])
        takes = inspect.signature(kind).parameters
        parts = {**self.pipe.config, **self.pipe.components}
        parts = {key: value for key, value in parts.items() if key in takes}
        if "controlnet" in takes:
            parts["controlnet"] = self.nets[0] if len(self.nets) == 1 else list(self.nets)
            if isinstance(call.get(self.family.hint), list) and self.family.union:
                parts["controlnet"] = self.family.union(self.nets[0])
        if self.name is not None:
            flow = self.family.flow
            named, options = (FLOWS if flow else SCHEDULERS)[self.name]
            made = getattr(diffusers, named)
            if flow and named.startswith("FlowMatch"):
                options = {**options, "shift": self.pipe.scheduler.config.get("shift", 3.0)}
            elif flow:
                options = {**options, "use_flow_sigmas": True, "flow_shift": 3.0}
                options["prediction_type"] = "flow_prediction"
            parts["scheduler"] = made.from_config(self.pipe.scheduler.config, **options)
        if "requires_safety_checker" in takes:
            parts |= {"requires_safety_checker": False, "safety_checker": None}
        pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        hints = 0 if self.family.channels == 4 else len(self.nets) or task.startswith("hint")
        if isinstance(several := call.get(self.family.hint), list):
            hints = hints and len(several)
        pipe.vae.encode = without_luck(pipe.vae.encode, hints)
        self.family.mended(pipe)
        pipe._execution_device  # noqa: B018 - resolves before the call, as a first run would
        if hasattr(pipe, "image_processor"):
            pipe.image_processor.preprocess = contiguous(pipe.image_processor.preprocess)
        torch.manual_seed(99)  # DPM++ SDE draws its seed from the global generator
        negative = call.pop("negative", NEGATIVE)
        negative = self.family.unsaid if negative is None else negative
        takes = inspect.signature(pipe.__call__).parameters
        more: dict[str, Any] = {"width": SIDE, "height": SIDE}
        more |= {} if negative is None else {"negative_prompt": negative}
        more |= {"use_resolution_binning": False, "clean_caption": False}
        more |= {"max_sequence_length": 512} if self.family.long else {}
        more |= {"_auto_resize": False, "max_area": SIDE * SIDE}
        if "embedded_guidance" not in self.editor.model.capabilities:
            more |= {"true_cfg_scale": GUIDANCE}  # where that is what they call it
        call |= {key: value for key, value in more.items() if key in takes}
        if "image_guidance_scale" not in takes:
            call.pop("image_guidance_scale", None)
        latents = pipe(
            prompt=PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE - 1 + self.family.unguided,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **call,
        ).images
        found = torch.as_tensor(latents)
        if found.ndim == 3:  # tokens of two by two cells
            found = torch.as_tensor(pipe._unpack_latents(found, SIDE, SIDE, pipe.vae_scale_factor))
        return found[:, :, 0] if found.ndim == 5 else found  # a picture is a video of one frame

    def ours(
        self, *edits: Any, image: Any = None, negative: str = NEGATIVE, **more: Any
    ) -> torch.Tensor:
        said = {"guidance": GUIDANCE} | more
        pass_ = Pass(
            prompt=PROMPT,
            negative=negative,
            steps=STEPS,
            scheduler=self.name,
            edits=edits,
            **said,
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


def without_luck(encode: Callable[..., Any], hints: int) -> Callable[..., Any]:
    """Some pipelines draw a hint's posterior, and some unseeded; here its mode is meant.

    Some autoencoders have none.

    Args:
        encode: of the autoencoder.
        hints: how many calls are of hints, which come first.
    """
    calls = itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = encode(*args, **kwargs)
        if not hasattr(made, "latent_dist"):
            return made
        draw, mode = made.latent_dist.sample, made.latent_dist.mode
        hint = next(calls) < hints
        made.latent_dist.sample = lambda generator=None: (
            draw(generator) if generator and not hint else mode()
        )
        return made

    return wrapped


@dataclass(frozen=True, eq=False)
class Comparison:
    """One way to use a family's pipelines of diffusers, and the same in edits.

    Attributes:
        what: for people.
        task: which pipeline, as `Tiny.theirs` has it.
        edits: the same in edits.
        call: the arguments of the pipeline.
        image: whether a picture is edited.
        nets: how many control networks act.
        net: options that make them.
        several: whether a pipeline that takes one control network, always at work, cannot do it.
        union: whether one control network is shown several hints.
        options: of the components.
        said: of the pass.
        schedulers: by name; None: all that the pipeline takes.
    """

    what: str
    task: str
    edits: Callable[[Case], Sequence[Edit]] = lambda case: ()
    call: Callable[[Case], dict[str, Any]] = lambda case: {}
    image: bool = False
    nets: int = 0
    net: Mapping[str, Any] | None = None
    several: bool = False
    union: bool = False
    options: Callable[[Tiny], dict[str, Any]] = lambda family: {}
    said: dict[str, Any] = field(default_factory=dict)
    schedulers: tuple[str | None, ...] | None = None

    def fits(self, family: Tiny) -> bool:
        """Whether a family's pipelines of diffusers can do it."""
        if self.union != bool(family.union) and (self.union or self.nets > 1):
            return False
        return self.task in family.theirs and (family.several or not self.several)

    def taken(self, family: Tiny) -> list[str | None]:
        """The schedulers that a family's pipelines of diffusers take here."""
        if self.schedulers is not None:
            return list(self.schedulers)
        if not family.flow:
            return [None, *SCHEDULERS]
        # What starts from a picture asks its scheduler for scale_noise, which few have.
        from_noise = self.task in {"text2img", "control"}
        return [None, *(name for name in FLOWS if name in family.schedulers and from_noise)]


def _starting(strength: float) -> list[Edit]:
    return [Img2Img(strength=strength)] if strength < 1 else []


def _img2img(strength: float) -> Comparison:
    return Comparison(
        f"img2img, strength {strength:g}",
        "img2img",
        lambda case: [Img2Img(strength=strength)],
        lambda case: {"image": photograph(), "strength": strength},
        image=True,
    )


def _inpaint(strength: float, own: bool) -> Comparison:
    task = "inpaint model" if own else "inpaint"

    def edits(case: Case) -> Sequence[Edit]:
        # Fill draws the source's posterior even at strength 1, as if it started from it.
        drawn = case.family.theirs[task] == "FluxFillPipeline"
        start = [Img2Img(strength=1.0)] if drawn and strength == 1 else _starting(strength)
        return [Inpaint(mask=mask()), *start]

    return Comparison(
        f"{task}, strength {strength:g}",
        task,
        edits,
        lambda case: {"image": photograph(), "mask_image": mask(), "strength": strength},
        image=True,
        options=lambda family: {"in_channels": family.inpaint_channels} if own else {},
    )


def _control_inpaint(strength: float) -> Comparison:
    return Comparison(
        f"ControlNet + inpaint, strength {strength:g}",
        "control inpaint",
        lambda case: [case.control(), Inpaint(mask=mask()), *_starting(strength)],
        lambda case: {
            "image": photograph(),
            "mask_image": mask(),
            "control_image": hint(0),
            "strength": strength,
            "controlnet_conditioning_scale": 1.0,  # this pipeline's default is 0.5
        },
        image=True,
        nets=1,
    )


def _guided(guidance_embeds: bool, true: float | None) -> Comparison:
    kind = "guidance as an input" if guidance_embeds else "no guidance"
    return Comparison(
        f"img2img, {kind}" + (f", true guidance {true:g}" if true else ""),
        "distilled",
        lambda case: [Img2Img(strength=0.6)],
        lambda case: (
            {"image": photograph(), "strength": 0.6} | ({"true_cfg_scale": true} if true else {})
        ),
        image=True,
        options=lambda family: {"guidance_embeds": guidance_embeds},
        said={"true_guidance": true},
    )


def _led(family: Tiny) -> dict[str, Any]:
    return {"in_channels": 2 * family.channels}


COMPARISONS = (
    Comparison("text2img", "text2img"),
    Comparison(
        # Some families were trained without a prompt as zeros, which is then what is meant.
        "text2img without a negative prompt",
        "text2img",
        call=lambda case: {"negative": None},
        said={"negative": ""},
    ),
    Comparison(
        "text2img, v-prediction, zero terminal SNR",
        "v",
        options=lambda family: {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        schedulers=("ddim", "ddpm", "euler", "dpmpp_2m", "unipc"),
    ),
    Comparison(
        "text2img, perturbed attention",
        "pag",
        lambda case: [PerturbedAttention(scale=2.5)],
        lambda case: {"pag_scale": 2.5},
        schedulers=(None, "euler", "dpmpp_2m"),
    ),
    Comparison(
        "text2img, told of sizes", "told", options=lambda family: {"told": True}, schedulers=(None,)
    ),
    _img2img(1.0),
    _img2img(0.6),
    *(_guided(taken, true) for taken in (True, False) for true in (None, 3.0)),
    _inpaint(1.0, own=False),
    _inpaint(0.6, own=False),
    _inpaint(1.0, own=True),
    _inpaint(0.6, own=True),
    Comparison(
        "ControlNet",
        "control",
        lambda case: [case.control(weight=0.8)],
        lambda case: {case.family.hint: hint(0), "controlnet_conditioning_scale": 0.8},
        nets=1,
    ),
    Comparison(
        "ControlNet, true guidance 3",
        "control, true guidance",
        lambda case: [case.control(weight=0.8)],
        lambda case: {
            case.family.hint: hint(0),
            "controlnet_conditioning_scale": 0.8,
            "true_cfg_scale": 3.0,
        },
        nets=1,
        said={"true_guidance": 3.0},
    ),
    Comparison(
        "two ControlNets",
        "control",
        lambda case: [case.control(0, weight=0.8), case.control(1, weight=0.5)],
        lambda case: {
            case.family.hint: [hint(0), hint(1)],
            "controlnet_conditioning_scale": [0.8, 0.5],
        },
        nets=2,
        several=True,
    ),
    Comparison(
        "two hints of one ControlNet",
        "control",
        lambda case: [
            ControlNet(model="net0", kind="none", image=hint(number), weight=weight)
            for number, weight in ((0, 0.8), (1, 0.5))
        ],
        lambda case: {
            case.family.hint: [hint(0), hint(1)],
            "controlnet_conditioning_scale": [0.8, 0.5],
        },
        nets=1,
        union=True,
    ),
    Comparison(
        "ControlNet in a window",
        "control",
        lambda case: [case.control(start=0.2, end=0.7)],
        lambda case: {
            case.family.hint: hint(0),
            "control_guidance_start": 0.2,
            "control_guidance_end": 0.7,
        },
        nets=1,
        several=True,
    ),
    Comparison(
        "ControlNet + img2img",
        "control img2img",
        lambda case: [case.control(weight=0.8), Img2Img(strength=0.6)],
        lambda case: {
            "image": photograph(),
            "control_image": hint(0),
            "strength": 0.6,
            "controlnet_conditioning_scale": 0.8,
        },
        image=True,
        nets=1,
    ),
    _control_inpaint(1.0),
    _control_inpaint(0.6),
    Comparison(
        "ControlNet that sees the mask + inpaint",
        "control inpaint model",
        lambda case: [case.control(weight=0.8), Inpaint(mask=mask())],
        lambda case: {
            "image": photograph(),
            "mask_image": mask(),
            "control_image": hint(0),
            "controlnet_conditioning_scale": 0.8,
        },
        image=True,
        nets=1,
    ),
    Comparison(
        "ControlNet shown the hole + inpaint",
        "control of holes",
        lambda case: [
            ControlNet(model="net0", kind="inpaint", weight=0.8),
            Inpaint(mask=mask()),
        ],
        lambda case: {
            "image": photograph(),
            "mask_image": mask(),
            "control_image": holed(),
            "strength": 1.0,
            "controlnet_conditioning_scale": 0.8,
        },
        image=True,
        nets=1,
    ),
    Comparison(
        "ControlNet for inpainting + inpaint",
        "control for inpainting",
        lambda case: [case.control(weight=0.8), Inpaint(mask=mask())],
        lambda case: {
            "control_image": photograph(),
            "control_mask": mask(),
            "controlnet_conditioning_scale": 0.8,
        },
        image=True,
        nets=1,
        net={"inpainting": True},
    ),
    Comparison(
        "instruct",
        "instruct",
        lambda case: [Instruct(image_guidance=1.3)],
        lambda case: {"image": photograph(), "image_guidance_scale": 1.3},
        image=True,
        options=lambda family: family.options("instructed"),
    ),
    Comparison(
        "instruct, true guidance 3",
        "instruct, true guidance",
        lambda case: [Instruct()],
        lambda case: {"image": photograph(), "true_cfg_scale": 3.0},
        image=True,
        options=lambda family: family.options("instructed"),
        said={"true_guidance": 3.0},
    ),
    Comparison(
        "instruct, two pictures",
        "instruct by two",
        lambda case: [Instruct(id="a"), Instruct(image=hint(0), after="a")],
        lambda case: {"image": [photograph(), hint(0)]},
        image=True,
        options=lambda family: {"kind": getattr(diffusers, family.theirs["instruct by two"])},
    ),
    *(
        Comparison(
            f"instruct + inpaint, strength {strength:g}",
            "instruct inpaint",
            lambda case, strength=strength: [  # type: ignore[misc]
                Instruct(),
                Inpaint(mask=mask()),
                *_starting(strength),
            ],
            lambda case, strength=strength: {  # type: ignore[misc]
                "image": photograph(),
                "mask_image": mask(),
                "strength": strength,
            },
            image=True,
            options=lambda family: family.options("instructed"),
        )
        for strength in (1.0, 0.6)
    ),
    Comparison(
        "model that takes the hint itself",
        "hint model",
        lambda case: [ControlNet(kind="none", image=hint(0))],
        lambda case: {"control_image": hint(0)},
        options=_led,
    ),
    Comparison(
        "model that takes the hint itself + img2img",
        "hint model img2img",
        lambda case: [ControlNet(kind="none", image=hint(0)), Img2Img(strength=0.6)],
        lambda case: {"image": photograph(), "control_image": hint(0), "strength": 0.6},
        image=True,
        options=_led,
    ),
)


@dataclass(frozen=True)
class Row:
    """One comparison in one setting."""

    family: Tiny
    comparison: Comparison
    scheduler: str | None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        what = self.comparison.what.replace(" ", "_")
        return f"{self.family.name}-{what}-{self.scheduler or 'own'}-{kind}"

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ours and theirs."""
        one = self.comparison
        options = one.options(self.family)
        case = Case(self.family, self.scheduler, one.nets, self.dtype, one.net, **options)
        shown = photograph() if one.image else None
        ours = case.ours(*one.edits(case), image=shown, **one.said)
        return ours, case.theirs(one.task, **one.call(case))


def rows() -> Iterator[Row]:
    """All of them: every scheduler in float32, and the model's own in bfloat16 too."""
    for family, one in itertools.product(FAMILIES, COMPARISONS):
        if one.fits(family):
            taken = one.taken(family)
            yield from (Row(family, one, name) for name in taken)
            yield Row(family, one, taken[0], torch.bfloat16)
