"""What is measured beside diffusers' own pipelines, and how: by turns, on the same weights."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

# Before anything imports torch: nothing here is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from skimage import data

from bench import measure, models
from bench.engine import engine_cost
from bench.measure import Contestant, Ratio, Ratios, race, ratios
from bench.prompts import prompt_cost
from bench.report import Report, Target
from diffedit import Editor, Pass
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint

PROMPT, NEGATIVE, SEED, GUIDANCE = "a red circle", "blurry", 7, 5.0
#: Share of the picture that the inpainting mask covers.
COVERED = 0.05
STRENGTH = 0.6


@dataclass(frozen=True)
class Settings:
    """What all measurements share: as on the command line."""

    rounds: int
    steps: int
    side: int


# --- what is measured -----------------------------------------------------------------------------


def photograph(side: int) -> Image.Image:
    """A real photograph: Eileen Collins, NASA, in the public domain."""
    return Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.LANCZOS)


def square_mask(side: int) -> Image.Image:
    """A square in the middle of the picture that covers `COVERED` of it."""
    edge = round(math.sqrt(COVERED) * side)
    low = (side - edge) // 2
    mask = np.zeros((side, side), np.uint8)
    mask[low : low + edge, low : low + edge] = 255
    return Image.fromarray(mask)


def inpaint(model: str, settings: Settings) -> Report:
    """A small mask on a large picture: ours, diffusers on all of it, diffusers on the same crop."""
    made = models.editor(model)
    # Both sides sample with the UNet alone: theirs has no network of its own that leads.
    made.model.capabilities -= {"inpaint_control"}
    pipe = models.peer(StableDiffusionInpaintPipeline, made)
    image, mask = photograph(settings.side), square_mask(settings.side)
    pass_ = _pass(settings, Inpaint(mask=mask))
    where = made.run(image, _pass(settings, Inpaint(mask=mask), steps=1), seed=SEED).passes[0]
    left, _, right, _ = where["region"]
    width, height = where["working_size"]
    box = Inpaint(mask=mask, feather=0, margin=0).region(_picture(image))
    pad = (right - left - box.width) // 2

    def theirs(**crop: Any) -> Image.Image:
        return _theirs(pipe, settings, image=image, mask_image=mask, **crop)

    ours = Contestant("diffedit", lambda: made.run(image, pass_, seed=SEED).image, pipe)
    full = Contestant(
        f"diffusers, all {settings.side}×{settings.side}",
        lambda: theirs(width=settings.side, height=settings.side),
        pipe,
    )
    crop = Contestant(
        f"diffusers, padding_mask_crop={pad}",
        lambda: theirs(width=width, height=height, padding_mask_crop=pad),
        pipe,
    )
    race([ours, full, crop], settings.rounds)
    over_full, over_crop = ratios(full, ours), ratios(ours, crop)
    title = (
        f"inpaint: {box.width}×{box.height} mask ({COVERED:.0%}) on"
        f" {settings.side}×{settings.side}, {_called(made, model)}, {settings.steps} steps"
    )
    notes = [
        f"the crop: {right - left} px of the picture, worked on at {width}×{height}, on both sides"
    ]
    return _raced(
        title,
        [ours, full, crop],
        [
            _at_least("diffusers on the full picture takes ≥ 8× as long as diffedit", over_full),
            _not_slower("diffedit takes no longer than padding_mask_crop", over_crop),
        ],
        [*over_full, *over_crop],
        notes,
    )


def img2img(model: str, settings: Settings) -> Report:
    """The whole picture, at a size that the model takes without scaling; and diffusers twice."""
    made = models.editor(model)
    pipe = models.peer(StableDiffusionImg2ImgPipeline, made)
    side = min(settings.side, made.model.whole)
    image = photograph(side)
    pass_ = _pass(settings, Img2Img(strength=STRENGTH))

    return _beside(
        f"img2img: strength {STRENGTH}, all {side}×{side}, {_called(made, model)},"
        f" {settings.steps} steps",
        Contestant("diffedit", _run(made, image, pass_), pipe),
        lambda: _theirs(pipe, settings, image=image, strength=STRENGTH),
        settings,
    )


def nothing(model: str, settings: Settings) -> Report:
    """A picture from a prompt alone, at the model's own side; and diffusers twice."""
    made = models.editor(model)
    pipe = models.peer(StableDiffusionPipeline, made)
    side, settings = made.model.sides[0], replace(settings, steps=2 * settings.steps)
    pass_ = _pass(settings)

    def from_nothing() -> Image.Image:
        return made.run(None, pass_, size=(side, side), seed=SEED).image

    ours = Contestant("diffedit", from_nothing, pipe)
    report = _beside(
        f"nothing: from a prompt, {side}×{side}, {_called(made, model)}, {settings.steps} steps",
        ours,
        lambda: _theirs(pipe, settings, width=side, height=side),
        settings,
    )
    if model == "tiny" and settings.steps == 20 and torch.get_num_threads() <= 2:
        took = median(ours.seconds)
        says = "20 steps of the embedded model at 256 px take ≤ 2 s on two cores"
        report.targets.append(Target(says, f"{took:.2f} s", took <= 2))
    return report


def engine(settings: Settings) -> Report:
    """The engine's own cost per step, beyond the scheduler's, on a denoiser that does nothing."""
    steps = settings.steps
    costs = engine_cost(settings.rounds, steps)
    bare = costs.pop("scheduler alone")
    own = {name: [c - b for c, b in zip(cost, bare, strict=True)] for name, cost in costs.items()}
    worst = max(cpu for _, cpu, _ in own.values())
    return Report(
        f"engine: its own cost per step, {steps} steps of ddim, 2 branches of 4×8×8 latents",
        ["edits", "loop, CPU ms", "engine's own", "by the clock", "engine's own with setup"],
        [
            *(
                [name, *(f"{ms:.3f}" for ms in (costs[name].cpu, cpu, wall, whole))]
                for name, (wall, cpu, whole) in own.items()
            ),
            ["scheduler.step alone", f"{bare.cpu:.3f}", "–", "–", "–"],
        ],
        [Target("≤ 0.5 ms of CPU per step", f"{worst:.3f} ms", worst <= 0.5)],
        [
            "ms per step; the engine's own is what the scheduler's own step leaves of it",
            "by the clock: on a busy machine that counts the time that others had the core",
            "with setup: the whole run, from the call to the result, shared out over the steps",
            "with Stable Diffusion, the setup includes a real text encoder and VAE",
        ],
        {"scheduler_ms": bare._asdict(), **{n: c._asdict() for n, c in costs.items()}},
    )


def help_(settings: Settings) -> Report:
    """What ``diffedit --help`` costs; its imports decide that."""
    script = Path(sys.executable).with_name("diffedit")
    cli = [str(script), "--help"]
    python = [sys.executable, "-c", "pass"]
    runs: dict[str, list[float]] = {"diffedit --help": [], "python -c pass": []}
    for turn in range(max(10, settings.rounds) + 1):
        for (_, times), command in zip(runs.items(), (cli, python), strict=True):
            seconds = measure.cpu_seconds(command)
            if turn:
                times.append(seconds)
    found = median(runs["diffedit --help"])
    return Report(
        "help: CPU time (user + system) of a process",
        ["command", "median s", "least", "most"],
        [
            [f"`{name}`", f"{median(t):.3f}", f"{min(t):.3f}", f"{max(t):.3f}"]
            for name, t in runs.items()
        ],
        [Target("`diffedit --help` takes < 0.3 s of CPU", f"{found:.3f} s", found < 0.3)],
        [],
        runs,
    )


def prompts(model: str, settings: Settings) -> Report:
    """A prompt that was read before, beside reading it."""
    made = models.editor(model)
    cost = prompt_cost(made, PROMPT, 10 * settings.rounds)
    share = cost.kept / cost.read
    return Report(
        f"prompts: the same one again, {_called(made, model)}",
        ["", "CPU ms", "of reading it"],
        [
            ["reading a prompt", f"{cost.read:.3f}", "–"],
            ["one that was read before", f"{cost.kept:.4f}", f"{share:.2%}"],
            ["the check of a pass", f"{cost.check:.4f}", f"{cost.check / cost.read:.2%}"],
        ],
        [
            Target(
                "a prompt that was read before costs ≤ 1 % of reading it",
                f"{share:.2%}",
                share <= 0.01,
            )
        ],
        ["the check, that the text encoders are as they were, is made once for all of a pass"],
        cost._asdict(),
    )


def bf16(model: str, settings: Settings) -> Report:
    """bfloat16 beside float32: how much faster, and how different the pictures are."""
    kinds = {kind: models.editor(model, kind) for kind in ("float32", "bfloat16")}
    largest = kinds["float32"].model.whole
    whole, photo = photograph(min(settings.side, largest)), photograph(settings.side)
    jobs = {
        "inpaint": (photo, _pass(settings, Inpaint(mask=square_mask(settings.side)))),
        "img2img": (whole, _pass(settings, Img2Img(strength=STRENGTH))),
    }
    raced: list[Contestant] = []
    notes: list[str] = []
    found: list[Ratio] = []
    for job, (image, pass_) in jobs.items():
        pair = [
            Contestant(f"{job}, {kind}", _run(made, image, pass_), made.model.pipe)  # type: ignore[attr-defined]
            for kind, made in kinds.items()
        ]
        race(pair, settings.rounds)
        exact, rough = (made.run(image, pass_, seed=SEED).pixels for made in kinds.values())
        changed = np.asarray(image) != exact
        gain = ratios(*pair)
        found += gain
        notes.append(
            f"{job}: float32 takes {gain} as long as bfloat16; the pictures are"
            f" {psnr(exact, rough):.1f} dB PSNR apart,"
            f" {psnr(exact[changed], rough[changed]):.1f} dB where they changed"
        )
        raced += pair
    title = f"bf16: {_called(kinds['float32'], model)}, {settings.steps} steps"
    return _raced(title, raced, [], found, notes)


# --- how ------------------------------------------------------------------------------------------


def _pass(settings: Settings, *edits: Any, steps: int | None = None) -> Pass:
    return Pass(
        prompt=PROMPT,
        negative=NEGATIVE,
        steps=steps or settings.steps,
        guidance=GUIDANCE,
        edits=edits,
    )


def _run(made: Editor, image: Image.Image, pass_: Pass) -> Callable[[], Image.Image]:
    return lambda: made.run(image, pass_, seed=SEED).image


def _theirs(pipe: Any, settings: Settings, **call: Any) -> Image.Image:
    made: Image.Image = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=settings.steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        **call,
    ).images[0]
    return made


def _picture(image: Image.Image) -> Any:
    from diffedit.images import open_picture

    return open_picture(image)


def _called(made: Editor, model: str) -> str:
    counts = made.model.info["parameters"]
    said = ", ".join(f"{part} {counts[part] / 1e6:.1f} M" for part in ("unet", "vae"))
    return f"model {model} ({said})"


def _at_least(says: str, found: Ratios) -> Target:
    return Target(says, str(found), min(one.value for one in found) >= 8)


def _not_slower(says: str, found: Ratios) -> Target:
    """A ratio of at most 1, give or take 2 %."""
    return Target(says, str(found), max(one.value for one in found) <= 1.02)


def psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio of 8-bit values, in dB; infinite where they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean()) if a.size else 0.0
    return 10 * math.log10(255**2 / error) if error else math.inf


def _beside(
    title: str, ours: Contestant, theirs: Callable[[], Image.Image], settings: Settings
) -> Report:
    """diffedit and diffusers in turns; and diffusers twice, for the machine's noise."""
    peer = Contestant("diffusers", theirs, ours.pipe)
    again = Contestant("diffusers again", theirs, ours.pipe)
    race([ours, peer, again], settings.rounds)
    found, noise = ratios(ours, peer), ratios(again, peer)
    return _raced(
        title,
        [ours, peer, again],
        [_not_slower("diffedit takes no longer than diffusers", found)],
        [*found, *noise],
        [f"noise: diffusers against itself {noise}"],
    )


def _raced(
    title: str,
    contestants: Sequence[Contestant],
    targets: list[Target],
    ratios: Sequence[Ratio],
    notes: list[str],
) -> Report:
    phases = ["text", "encode", "unet", "decode", "rest"]
    rows = [
        [
            one.name,
            f"**{median(one.seconds):.3f}** ({min(one.seconds):.3f}–{max(one.seconds):.3f})",
            f"{median(one.cpu):.3f}",
            *(f"{one.phase(phase):.3f}" for phase in phases),
            "–" if one.peak_mib is None else f"{one.peak_mib:.0f}",
            one.work,
        ]
        for one in contestants
    ]
    return Report(
        title,
        ["", "s (least–most)", "CPU s", *phases, "peak MiB", "UNet calls × input"],
        rows,
        targets,
        notes,
        {
            "contestants": [one.record() for one in contestants],
            "ratios": [one._asdict() for one in ratios],
        },
    )
