"""Models of full size beside diffusers' own pipelines: time of a step, memory; see README.md.

python -m bench.full_size --model sd15,sdxl,flux --device cuda

The models are those of `bench.sizes`; diffusers' pipelines run on the very same components.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from PIL import Image

from bench import measure
from bench.races import COVERED, photograph, square_mask
from bench.sizes import MODELS, SEED, made
from diffedit import Edit, Editor, Pass
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint

RESULTS = Path(__file__).parent / "results"
PROMPT, NEGATIVE, STRENGTH = "a red circle", "blurry", 0.6
#: A picture with a small mask is this many times as large as the model's own size.
LARGER = 1.5
EAGER, COMPILED = 1.05, 2.0


# --- how ------------------------------------------------------------------------------------------


class Watch:
    """Times the steps of a run, from the denoiser's first call to the decoder's.

    Both sides are timed at the same places, with the device's work done.

    Attributes:
        calls: of the denoiser.
        seconds: between the two.
    """

    def __init__(self, denoiser: torch.nn.Module, vae: Any, wait: Callable[[], None]) -> None:
        self.denoiser, self.vae, self.wait = denoiser, vae, wait
        self.calls, self.began, self.seconds = 0, 0.0, 0.0
        self.shape: tuple[int, ...] = ()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, a run is timed."""
        hook = self.denoiser.register_forward_pre_hook(self._called, with_kwargs=True)
        decode = self.vae.decode
        self.vae.decode = self._decoding(decode)
        try:
            yield
        finally:
            hook.remove()
            del self.vae.decode

    def _called(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.calls:
            self.wait()
            self.began = time.perf_counter()
            self.shape = tuple((args[0] if args else kwargs["hidden_states"]).shape)
        self.calls += 1

    def _decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            self.seconds = time.perf_counter() - self.began
            return decode(*args, **kwargs)

        return timed


@dataclass
class Side:
    """One side of a comparison.

    Attributes:
        name: what the table calls it.
        run: does the work once.
        step_ms: what a call of the denoiser took in each round, with all that is between two.
        seconds: what the whole run took in each round.
        peak_mib: most memory above what stood before, of the first run.
        first_s: the first run, with what is compiled in it.
        work: what the denoiser was asked to do.
    """

    name: str
    run: Callable[[], Any]
    step_ms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    first_s: float = 0.0
    work: str = ""


class Bench:
    """A model on a device, and what runs on it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.size, self.options = name, MODELS[name], options
        self.device = torch.device(options.device)
        self.pipe = made(self.size, self.device)
        own = self.size.side
        self.model = self.size.model(self.pipe, f"{name} (random weights)", (own, 2 * own, 2 * own))
        self.editor = Editor(self.model)
        self.compiles = False

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def flux(self) -> bool:
        """Whether it has no negative prompt, and its image to image wants a size."""
        return not self.size.negative

    def peer(self, task: str) -> Any:
        """A pipeline of diffusers on the same components, with a scheduler of its own."""
        kind = getattr(diffusers, self.size.peers[task])
        parts = self.pipe.components | {"scheduler": copy.deepcopy(self.pipe.scheduler)}
        if kind.__name__.startswith("StableDiffusion") and "XL" not in kind.__name__:
            parts["requires_safety_checker"] = False
        pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sides(self, task: str) -> list[Side]:
        """Both sides of a task, and where a part of the picture is edited theirs on that part."""
        pipe, own = self.peer(task), self.size.side
        if task == "inpaint":
            own = int(LARGER * own) // 16 * 16
        image, mask = photograph(own), square_mask(own)
        given: Image.Image | None = image
        edits: tuple[Edit, ...] = ()
        call: dict[str, Any] = {"width": own, "height": own}
        if task == "text2img":
            given = None
        elif task == "img2img":
            edits = (Img2Img(strength=STRENGTH),)
            # Only Flux's pipeline is told the size of the picture that it is given.
            call = {"image": image, "strength": STRENGTH} | (call if self.flux else {})
        else:
            edits = (Inpaint(mask=mask),)
            call |= {"image": image, "mask_image": mask, "strength": 1.0}
        found = [
            Side("diffedit", lambda: self.ours(given, edits)),
            Side("diffusers", lambda: self.theirs(pipe, **call)),
        ]
        if task == "inpaint":
            found.append(self.cropped(pipe, image, mask))
        return found

    def cropped(self, pipe: Any, image: Image.Image, mask: Image.Image) -> Side:
        """diffusers on the part of the picture that diffedit chooses by itself."""
        where = self.ours(image, (Inpaint(mask=mask),), steps=1).passes[0]
        left, _, right, _ = where["region"]
        width, height = where["working_size"]
        bounds = mask.getbbox()
        assert bounds is not None
        pad = (right - left - (bounds[2] - bounds[0])) // 2
        call: dict[str, Any] = {"width": width, "height": height, "padding_mask_crop": pad}
        call |= {"image": image, "mask_image": mask, "strength": 1.0}
        return Side(f"diffusers, padding_mask_crop={pad}", lambda: self.theirs(pipe, **call))

    def ours(self, image: Any, edits: Sequence[Edit], steps: int | None = None) -> Any:
        """A run of diffedit."""
        pass_ = Pass(
            prompt=PROMPT,
            negative=NEGATIVE if self.size.negative else "",
            guidance=self.size.guidance,
            steps=steps or self.options.steps,
            edits=tuple(edits),
        )
        size = None if image is not None else (self.size.side,) * 2
        return self.editor.run(image, pass_, seed=SEED, size=size)

    def theirs(self, pipe: Any, **call: Any) -> Any:
        """A run of diffusers."""
        if self.size.negative:
            call["negative_prompt"] = NEGATIVE
        return pipe(
            prompt=PROMPT,
            num_inference_steps=self.options.steps,
            guidance_scale=self.size.guidance,
            generator=torch.Generator().manual_seed(SEED),
            **call,
        )

    def measured(self, task: str) -> list[Side]:
        """The sides of a task, timed in turns: as written, and with compiled steps."""
        written = self.sides(task)
        modes = [(side, False) for side in written]
        if self.options.compile:
            if not self.compiles:
                self.model.compile(self.options.compile)
                self.compiles = True
            modes += [(Side(f"{one.name}, compiled", one.run), True) for one in written]
        for side, compiled in modes:
            self.first(side, compiled)
        for _ in range(self.options.rounds):
            for side, compiled in modes:
                watch = self.timed(side, compiled)
                side.step_ms.append(1000 * watch.seconds / watch.calls)
        return [side for side, _ in modes]

    def first(self, side: Side, compiled: bool) -> None:
        """An untimed run: it compiles, fills caches, and takes the memory's peak."""
        began = time.perf_counter()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            watch = self.timed(side, compiled)
            most = torch.cuda.max_memory_allocated(self.device)
            side.peak_mib = (most - before) / 2**20
        else:
            with measure.Peak() as peak:
                watch = self.timed(side, compiled)
            side.peak_mib = peak.mib
        side.first_s = time.perf_counter() - began
        side.seconds.clear()
        side.work = f"{watch.calls} × {'×'.join(map(str, watch.shape))}"

    def timed(self, side: Side, compiled: bool) -> Watch:
        """One run."""
        watch = Watch(self.model.denoiser, self.pipe.vae, self.wait)
        gc.collect()
        how = contextlib.nullcontext() if compiled else self.model.as_written()
        with torch.no_grad(), how, watch.watching():
            self.wait()
            began = time.perf_counter()
            side.run()
            self.wait()
            side.seconds.append(time.perf_counter() - began)
        return watch


# --- what is written ------------------------------------------------------------------------------


def ratio(over: Side, under: Side) -> str:
    """How many times as long a step of one takes: median, least and most of the rounds' own."""
    each = sorted(a / b for a, b in zip(over.step_ms, under.step_ms, strict=True))
    return f"{median(each):.2f}× ({each[0]:.2f}–{each[-1]:.2f})"


COLUMNS = (
    "ms per step",
    "diffusers' step takes",
    "whole run, s",
    "peak MiB",
    "first run, s",
    "denoiser",
)


def table(title: str, sides: Sequence[Side]) -> str:
    """What one task took, as Markdown."""
    theirs = next(side for side in sides if side.name == "diffusers")
    lines = [
        f"### {title}",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"| {' | '.join(['---'] * (len(COLUMNS) + 1))} |",
    ]
    lines += [
        f"| {one.name} | **{median(one.step_ms):.2f}** | {ratio(theirs, one)} |"
        f" {median(one.seconds):.3f} | {one.peak_mib or 0:.0f} | {one.first_s:.1f} | {one.work} |"
        for one in sides
    ]
    ours = sides[0]
    said = [(EAGER, ours)]
    said += [(COMPILED, one) for one in sides if one.name == "diffedit, compiled"]
    lines.append("")
    for most, one in said:
        found = median(a / b for a, b in zip(theirs.step_ms, one.step_ms, strict=True))
        reached = "reached" if found >= most else "NOT REACHED"
        lines.append(f"- {one.name}: ≥ {most}× asked, {found:.2f}×: {reached}")
    return "\n".join([*lines, ""])


def device_name(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(measure.machine("")["cpu"])


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="sd15,sdxl,flux", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--task", default="text2img,img2img,inpaint", help="of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="of a run (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (default 5)")
    parser.add_argument(
        "--compile", default="reduce-overhead", help="a mode of torch.compile; '': none"
    )
    parser.add_argument("--json", type=Path, help="where to write; a .md is written beside it")
    options = parser.parse_args(arguments)
    about = {
        "date": measure.today(),
        "commit": measure.commit(),
        "device": device_name(torch.device(options.device)),
        "machine": measure.machine("each model's own"),
        "options": {k: str(v) for k, v in vars(options).items() if k != "json"},
    }
    text = (
        f"{about['date']}, commit {about['commit']}, {about['device']}: torch {torch.__version__},"
        f" diffusers {diffusers.__version__}; random weights, {options.steps} steps,"
        f" {options.rounds} rounds, medians; seed {SEED}. A step is a call of the denoiser with all"
        f" that lies between two. inpaint: a square mask of {COVERED:.0%} on a picture of"
        f" {LARGER} times the model's own side. compiled: torch.compile, {options.compile!r}.\n"
    )
    print(text, flush=True)
    target = options.json or RESULTS / f"{about['date']}-{about['commit']}-full-size.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for name in options.model.split(","):
        bench = Bench(name, options)
        counts = bench.model.info["parameters"]
        billions = sum(counts.values()) / 1e9
        for task in options.task.split(","):
            sides = bench.measured(task)
            own = bench.size
            title = f"{name}, {task}: {billions:.2f} G weights, {own.dtype}".replace("torch.", "")
            part = table(title, sides)
            print(part, flush=True)
            text += "\n" + part
            found.append(
                {
                    "model": name,
                    "task": task,
                    "parameters": counts,
                    "sides": [{k: v for k, v in vars(one).items() if k != "run"} for one in sides],
                }
            )
            # What is done is kept: a device may be taken away.
            target.write_text(json.dumps(about | {"measured": found}, indent=1) + "\n", "utf-8")
            target.with_suffix(".md").write_text(text, "utf-8")
        del bench
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return text


if __name__ == "__main__":
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    main()
