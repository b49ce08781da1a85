"""What the engine itself costs per step: a model that does nothing, and the bare scheduler."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from bench import models
from diffedit import Contribution, Edit, Editor, ModelInput, Pass, Residuals, Run
from diffedit.guidance import classifier_free
from diffedit.models.protocol import Conditioning
from diffedit.schedule import Schedule
from diffedit.schedulers import build
from diffedit_inpaint import Inpaint

SIDE = 64
#: The one run on real modules: what they cost to ask and to guard shows only there.
ADAPTER = "no edit, Stable Diffusion with its UNet stubbed"


class Nothing:
    """A `LatentModel` whose denoiser returns what it is given, at once."""

    capabilities: frozenset[str] = frozenset()
    sized = False
    cell = grid = 8
    sides = (SIDE, SIDE)
    whole = SIDE
    channels = 4
    space = "bench"
    one_by_one = False
    roles: Mapping[str, int] = {}
    device = torch.device("cpu")
    dtype = torch.float32
    info: Mapping[str, Any] = {"source": "nothing", "family": "bench"}

    def __init__(self) -> None:
        self.scheduler: Any = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        return Conditioning({"text": torch.zeros(len(prompts), 1, 8)})

    def encode(
        self,
        pixels: Tensor,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        return F.avg_pool2d(pixels[:, [0, 1, 2, 0]], self.grid)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=self.grid).clamp(0, 1)

    def preview(self, x0: Tensor) -> Tensor:
        return x0[:, :3].clamp(0, 1)

    def schedule(
        self,
        name: str | None,
        steps: int,
        at: float = 1.0,
        *,
        shape: tuple[int, int, int] | None = None,
        eta: float | None = None,
        since: float = 0.0,
        until: float = 1.0,
        compat: bool = False,
    ) -> Schedule:
        more: dict[str, Any] = {"eta": eta, "since": since, "until": until, "compat": compat}
        return Schedule(build(name, self.scheduler), steps, at=at, **more)

    @property
    def compat_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def compat_source_dtype(self) -> torch.dtype:
        return self.dtype

    def control_roles(self, net: Any) -> frozenset[str]:
        return frozenset()

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        raise NotImplementedError

    def in_mode(self, net: Any, kind: str, mode: int | None) -> Any:
        raise NotImplementedError

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        raise NotImplementedError

    def load_textual_inversion(self, source: str, token: str | None = None) -> Any:
        raise NotImplementedError

    def add_textual_inversion(self, word: Any) -> Any:
        raise NotImplementedError

    def load_lora(self, source: str) -> Any:
        raise NotImplementedError

    def add_lora(self, lora: Any, weight: float) -> Any:
        raise NotImplementedError

    def load_ip_adapter(self, source: str, encoder: str | None, load: Any) -> Any:
        raise NotImplementedError

    def image_prompt(self, adapter: Any, picture: Any, weight: float, mask: Any = None) -> Any:
        raise NotImplementedError

    def attending(self, transform: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def predict(self, x: ModelInput) -> Tensor:
        return x.latents

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        return classifier_free(predictions, scale)

    def readers(self) -> Iterable[torch.nn.Module]:
        return []

    def forget(self) -> None:
        pass

    def save_memory(self) -> str | None:
        return None

    def parts(self) -> Iterable[torch.nn.Module]:
        return []


class Refining(Edit):
    """Has the core work out the clean latents in each step, and changes nothing."""

    name: ClassVar[str] = "bench-refine"

    def contribute(self, run: Run) -> Contribution:
        return Contribution(refine=lambda x0, step: x0)


class Cost(NamedTuple):
    """Milliseconds per step.

    Attributes:
        wall: of the loop, by the clock.
        cpu: of the loop, CPU time of this thread.
        whole: CPU time of the whole run, from the call to the result.
    """

    wall: float
    cpu: float
    whole: float


def engine_cost(rounds: int, steps: int) -> dict[str, Cost]:
    """Milliseconds per step by what was run; the scheduler's own step stands beside them."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:40, 16:40] = 255
    sets: dict[str, list[Edit]] = {
        "no edit": [],
        "inpaint (keep)": [Inpaint(mask=mask, feather=4)],
        "a refine": [Refining()],
        "both": [Inpaint(mask=mask, feather=4), Refining()],
    }
    made = Editor(Nothing())
    runs: dict[str, Callable[[], Cost]] = {
        name: _running(made, _pass(steps, edits)) for name, edits in sets.items()
    }
    real = models.editor("random")
    real.model.pipe.unet.forward = lambda latents, *_, **__: (latents,)  # type: ignore[attr-defined]
    runs[ADAPTER] = _running(real, _pass(steps, []))
    runs["scheduler alone"] = lambda: scheduler_alone(steps)
    found: dict[str, list[Cost]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            cost = run()
            if turn:  # the first turn warms up
                found[name].append(cost)
    return {
        name: Cost(*(median(each) for each in zip(*costs, strict=True)))
        for name, costs in found.items()
    }


def _pass(steps: int, edits: Sequence[Edit]) -> Pass:
    return Pass(prompt="", steps=steps, scheduler="ddim", guidance=5.0, edits=edits)


def _running(made: Editor, pass_: Pass) -> Callable[[], Cost]:
    """A small picture through a pass; the loop is timed from its first step to its last."""
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)

    def run() -> Cost:
        began = time.thread_time()
        with made.stream(image, pass_, seed=7) as events:
            next(events)
            wall, cpu = time.perf_counter(), time.thread_time()
            for step in events:
                if step.index + 1 == step.total:  # what follows is no part of the loop
                    loop = time.perf_counter() - wall, time.thread_time() - cpu
                    calls = step.total
        whole = time.thread_time() - began
        return Cost(1e3 * loop[0] / (calls - 1), 1e3 * loop[1] / (calls - 1), 1e3 * whole / calls)

    return run


@torch.no_grad()
def scheduler_alone(steps: int) -> Cost:
    """The scheduler's own step, in a loop that does nothing else."""
    scheduler = copy.deepcopy(build("ddim", Nothing().scheduler))
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    wall, cpu = time.perf_counter(), time.thread_time()
    for t in scheduler.timesteps:
        latents = scheduler.step(latents, t, latents, return_dict=False)[0]
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    return Cost(1e3 * wall / steps, 1e3 * cpu / steps, 1e3 * cpu / steps)
