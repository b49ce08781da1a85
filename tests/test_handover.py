"""A pass that stops early, and one that goes on from its latents: on the same model, or another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from diffedit import Editor, Pass, Result, Workflow, errors
from diffedit.cli import main
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from tests.families import FAMILIES, FLUX, SD, SDXL, Tiny, xl_pipeline
from tests.laws.tools import Custom
from tests.parity.comparisons import GUIDANCE, NEGATIVE, PROMPT, SCHEDULERS, SEED, SIDE

PICTURE = data.coffee()[:64, :96]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def refiner() -> Any:
    """Of the base model's latents, with other weights and one text encoder."""
    return xl_pipeline(refiner=True, seed=5)


def half_and_full(name: str | None, stop: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' base pipeline hands over, and what its refiner makes of it."""
    generator = torch.Generator().manual_seed(SEED)

    def made(kind: Any, pipe: Any, **more: Any) -> Any:
        parts = {k: v for k, v in pipe.components.items() if v is not None}
        parts = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
        parts["scheduler"] = copy.deepcopy(pipe.scheduler)
        if name is not None:
            cls, options = SCHEDULERS[name]
            parts["scheduler"] = getattr(diffusers, cls).from_config(
                pipe.scheduler.config, **options
            )
        missing = {k: None for k in ("text_encoder", "tokenizer") if k not in parts}
        found = kind(**parts, **missing, **more)
        found.set_progress_bar_config(disable=True)
        return found

    said: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "generator": generator,
        "output_type": "latent",
    }
    base = made(diffusers.StableDiffusionXLPipeline, SDXL.pipeline())
    half = base(**said, denoising_end=stop, width=SIDE, height=SIDE).images
    refining = made(
        diffusers.StableDiffusionXLImg2ImgPipeline,
        refiner(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    return half, refining(**said, denoising_start=stop, image=half).images


@pytest.mark.parametrize("name", [None, "euler", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "heun"])
@pytest.mark.parametrize(("stop", "steps"), [(0.7, 10), (0.8, 6)])
def test_base_and_refiner_are_those_of_diffusers(name: str | None, stop: float, steps: int) -> None:
    half, full = half_and_full(name, stop, steps)
    said: dict[str, Any] = {"prompt": PROMPT, "negative": NEGATIVE, "steps": steps}
    said |= {"guidance": GUIDANCE, "scheduler": name}
    base, refining = Editor(SDXL.model(SDXL.pipeline())), Editor(SDXL.model(refiner()))
    first = base.run(None, Pass(**said, stop=stop), seed=SEED, size=(SIDE, SIDE), compat=True)
    second = refining.run(first, Pass(**said), seed=SEED, compat=True)
    assert first.latents is not None
    assert second.latents is not None
    assert (first.latents - half).abs().max() == 0
    assert (second.latents - full).abs().max() == 0
    assert full.std() > 0.1
    assert (full - half).abs().max() > 0.1


def run(editor: Editor, *passes: Pass, image: Any = None, seed: Any = 3) -> Result:
    size = (64, 64) if image is None else None
    return editor.run(image, list(passes), seed=seed, size=size)


@every_family
@pytest.mark.parametrize("seed", [3, (3, 4)])
def test_two_halves_are_the_whole(family: Tiny, seed: Any) -> None:
    editor = family.editor()
    # One that looks at one call at a time, and draws nothing.
    said: dict[str, Any] = {"prompt": "x", "steps": 5, "scheduler": "euler"}
    whole = run(editor, Pass(**said), seed=seed)
    halves = run(editor, Pass(**said, stop=0.3), Pass(**said), seed=seed)
    assert torch.equal(halves.latents, whole.latents)  # type: ignore[arg-type]
    assert (halves.pixels == whole.pixels).all()
    other = run(editor, Pass(**said, stop=0.3), Pass(**said | {"prompt": "y"}), seed=seed)
    assert not torch.equal(other.latents, whole.latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["heun", "dpm2", "ddim"])
@pytest.mark.parametrize("stop", [0.5, 0.8])
def test_steps_of_two_calls_are_not_cut_in_two(name: str, stop: float) -> None:
    editor = SD.editor()
    said: dict[str, Any] = {"prompt": "x", "steps": 10, "scheduler": name}
    whole = run(editor, Pass(**said))
    halves = run(editor, Pass(**said, stop=stop), Pass(**said))
    assert torch.equal(halves.latents, whole.latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [None, 0.75])
@pytest.mark.parametrize("again", [True, False])
def test_under_a_mask_too(strength: float | None, again: bool) -> None:
    """Which stays the mask of what goes on, whether that says it again or not."""
    editor = SD.editor()
    mask = np.zeros((200, 300), np.float32)
    mask[10:50, 20:70] = 1
    mask[30:50, 20:70] = np.linspace(0, 1, 50)  # changes late
    picture = data.coffee()[:200, :300]
    edits: tuple[Any, ...] = (Inpaint(mask=mask, feather=4),)
    start = (Img2Img(strength=strength),) if strength else ()
    said: dict[str, Any] = {"prompt": "x", "steps": 8, "scheduler": "euler"}
    whole = run(editor, Pass(**said, edits=edits + start), image=picture)
    last = Pass(**said, edits=edits if again else ())
    halves = run(editor, Pass(**said, stop=0.6, edits=edits + start), last, image=picture)
    assert torch.equal(halves.latents, whole.latents)  # type: ignore[arg-type]
    assert (halves.pixels == whole.pixels).all()
    assert (halves.pixels != picture).any()


def test_a_result_that_goes_on_says_all_that_made_it() -> None:
    editor = SD.editor()
    said: dict[str, Any] = {"prompt": "x", "steps": 5, "scheduler": "euler_a"}  # which draws
    whole = run(editor, Pass(**said, stop=0.5), Pass(**said), seed=(7, 8))
    first = run(editor, Pass(**said, stop=0.5), seed=(7, 8))
    second = editor.run(first, Pass(**said))
    assert torch.equal(second.latents, whole.latents)  # type: ignore[arg-type]
    assert second.seeds == (7, 8)
    assert second.workflow == whole.workflow
    assert len(second.passes) == 2


def test_to_a_sampler_that_holds_latents_otherwise() -> None:
    """Euler holds the picture's size, DDIM the noise's; both take the same path."""
    editor = SD.editor()
    said: dict[str, Any] = {"prompt": "x", "steps": 40, "guidance": 1.0}
    made = [
        run(editor, Pass(**said, scheduler=a, stop=0.5), Pass(**said, scheduler=b)).latents
        for a, b in (("euler", "euler"), ("euler", "ddim"), ("ddim", "euler"), ("ddim", "ddim"))
    ]
    spread = made[0].std()  # type: ignore[union-attr]
    for one in made[1:]:
        assert (one - made[0]).abs().mean() < 0.15 * spread  # type: ignore[operator]


def test_one_workflow_with_a_refiner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Script and command line make the same pixels of one file."""
    for name, pipe in (("base", SDXL.pipeline()), ("refiner", refiner())):
        SDXL.save(pipe, tmp_path / name)
    folder = str(tmp_path / "refiner")
    said: dict[str, Any] = {"prompt": "a red circle", "steps": 5}
    workflow = Workflow(
        model=str(tmp_path / "base"),
        seed=4,
        size=(64, 64),
        passes=(Pass(**said, stop=0.6), Pass(**said, model=folder)),
    )
    editor = Editor.load(workflow.model, device="cpu")
    made = editor.run(None, workflow)
    assert [one["model"] for one in made.passes] == [workflow.model, folder]
    alone = Editor.load(folder, device="cpu")
    first = editor.run(None, Pass(**said, stop=0.6), seed=4, size=(64, 64))
    continued = alone.run(first, [Pass(**said)], seed=4)
    # The numbers of a pass are its own: the second pass of a workflow has other noise, unused here.
    assert torch.equal(continued.latents, made.latents)  # type: ignore[arg-type]
    without = editor.run(None, Pass(**said), seed=4, size=(64, 64))
    assert not torch.equal(without.latents, made.latents)  # type: ignore[arg-type]
    workflow.save(tmp_path / "workflow.yaml")
    assert main(["run", str(tmp_path / "workflow.yaml"), "-o", str(tmp_path / "out.png")]) == 0
    assert (np.asarray(Image.open(tmp_path / "out.png")) == made.pixels).all()


def test_a_finished_pass_of_another_model_is_encoded_again() -> None:
    """Their latents are alike, but not the same autoencoder's."""
    first, second = SDXL.editor(), SDXL.editor(seed=9)
    first._resources["model:other"] = second.model
    step: dict[str, Any] = {"prompt": "x", "steps": 2, "edits": (Img2Img(strength=0.5),)}
    seen: list[torch.Tensor] = []
    encode = second.model.encode

    def watched(pixels: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        seen.append(pixels)
        return encode(pixels, *args, **more)

    second.model.encode = watched  # type: ignore[method-assign]
    run(first, Pass(**step), Pass(**step, model="other"), image=PICTURE)
    assert len(seen) == 1


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    editor = SD.editor()
    half = Pass(prompt="x", steps=4, stop=0.5)
    with pytest.raises(errors.ConflictError, match=r"img2img: .*this one goes on from there"):
        run(editor, half, Pass(prompt="x", edits=(Img2Img(),)), image=PICTURE)
    with pytest.raises(errors.InputError, match=r"stop is 0\.4, and the pass before has gone 0\.5"):
        run(editor, half, Pass(prompt="x", stop=0.4))
    mask = np.zeros((300, 400), np.uint8)
    mask[10:30, 10:30] = 255
    small, other = (Inpaint(mask=one) for one in (mask, mask[::-1]))
    first = Pass(prompt="x", steps=4, stop=0.5, edits=(small,))
    last = Pass(prompt="x", steps=4, edits=(other,))
    with pytest.raises(errors.InputError, match="beyond the region of the pass before"):
        run(editor, first, last, image=data.coffee()[:300, :400])
    finishing = Custom(parts={"finish": lambda pixels: pixels})
    with pytest.raises(errors.InputError, match="this one only finishes"):
        run(editor, half, Pass(edits=(finishing,)))
    with pytest.raises(errors.SchedulerError, match=r"none of 4 steps lies between 0 and 0\.001"):
        run(editor, Pass(prompt="x", steps=4, stop=0.001))
    start = (Img2Img(strength=0.5),)
    with pytest.raises(errors.SchedulerError, match=r"between strength 0\.5 and 0\.4"):
        run(editor, Pass(prompt="x", steps=20, stop=0.4, edits=start), image=PICTURE)
    said: dict[str, Any] = {"prompt": "x", "scheduler": "euler"}
    with pytest.raises(errors.InputError, match="give both the same number of steps"):
        run(editor, Pass(**said, steps=20, stop=0.8), Pass(**said, steps=3))
    with pytest.raises(errors.ConflictError, match=r"custom: finishes pixels, .* goes on"):
        run(editor, half.model_copy(update={"edits": (finishing,)}), Pass(prompt="x", steps=4))
    with pytest.raises(errors.InputError, match="this pass only finishes"):
        run(editor, Pass(stop=0.5, edits=(finishing,)), image=PICTURE)
    with pytest.raises(errors.SchedulerError, match=r"all 1 steps lie before 0\.5 of the way"):
        run(FLUX.editor(), Pass(prompt="x", steps=1, stop=0.5))
    finished = run(editor, Pass(prompt="x", steps=1))
    with pytest.raises(errors.InputError, match="this result is finished"):
        editor.run(finished, half)
    unfinished = run(editor, half)
    with pytest.raises(errors.InputError, match="latents are of another kind"):
        FLUX.editor().run(unfinished, Pass(prompt="x"))
    for more in ({"seed": [1, 2]}, {"size": (64, 64)}):
        with pytest.raises(errors.InputError, match="has its size and its seeds"):
            editor.run(unfinished, Pass(prompt="x", steps=4), **more)
    seen = len(editor._resources)
    with (
        pytest.raises(errors.ModelError),
        editor.stream(None, [half, Pass(prompt="x", model="nowhere/at-all/x")], size=(64, 64)) as s,
    ):
        next(s)  # told before the first pass has run
    assert len(editor._resources) == seen
    Workflow(size=(64, 64), passes=(Pass(prompt="x", model=str(tmp_path)),)).save(
        tmp_path / "w.yaml"
    )
    capsys.readouterr()
    assert main(["run", str(tmp_path / "w.yaml"), "-o", str(tmp_path / "o.png")]) == 2
    assert "no model_index.json" in capsys.readouterr().err
