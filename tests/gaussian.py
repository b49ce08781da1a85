"""Schedulers on the exact denoiser: the data are N(0.7, 0.25²), for which it has a closed form.

``gaussian_model`` plays the denoiser: it sees what a denoiser sees, the scaled latents and a
timestep, and takes the noise level of that timestep from the training schedule alone. The page of
the docs is measured by ``python -m tests.gaussian docs/samplers.md``.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffedit.inversion import Inversion, ddim, edit_friendly
from diffedit.schedule import Schedule
from diffedit.schedulers import SCHEDULERS, SchedulerInfo, build

MEAN, STD = 0.7, 0.25
FLOW = "flow_prediction"


def own_scheduler(prediction: str = "epsilon", zero_snr: bool = False, **more: Any) -> Any:
    """The scheduler of an SD model, or of a rectified flow, as its folder configures it."""
    if prediction == FLOW:
        return FlowMatchEulerDiscreteScheduler(**more)
    if zero_snr:
        more = {"timestep_spacing": "trailing"} | more
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr, **more,
    )  # fmt: skip


@functools.cache
def training_levels(zero_snr: bool = False) -> np.ndarray:
    """alphas_cumprod of ``own_scheduler``, from the papers' formulas, in double precision."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_snr:  # Lin et al. 2023, algorithm 1
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return kept


def level_of(t: float, zero_snr: bool, prediction: str = "epsilon") -> tuple[float, float]:
    """(a, s) of a timestep, which may lie between two training timesteps.

    Variance-preserving; of a flow, the share of data and that of noise.
    """
    if prediction == FLOW:
        return 1 - t / 1000, t / 1000
    kept = np.maximum(training_levels(zero_snr), 2**-24)
    log_sigma = np.interp(t, np.arange(1000), 0.5 * np.log((1 - kept) / kept))
    sigma = math.exp(float(log_sigma))
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def posterior_mean(x: Tensor, a: float, s: float) -> Tensor:
    return (a * STD**2 * x + s**2 * MEAN) / (a**2 * STD**2 + s**2)


def gaussian_model(prediction: str, zero_snr: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def predict(scaled: Tensor, t: Tensor) -> Tensor:
        a, s = level_of(float(t), zero_snr, prediction)
        x = scaled.double()
        x0 = posterior_mean(x, a, s)
        eps = (x - a * x0) / s
        made = {"epsilon": eps, "v_prediction": a * eps - s * x0, FLOW: eps - x0}
        return made[prediction].to(scaled.dtype)

    return predict


def latents_of(seed: int, batch: int = 1, size: int = 8) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + item) for item in range(batch)]
    return torch.cat([torch.randn(1, 4, size, size, generator=g) for g in generators])


def trip(
    schedule: Schedule,
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    seeds: list[int],
    visit: Callable[[int, Tensor, Tensor], None] = lambda i, x, out: None,
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(seeds) == len(latents):
        schedule.seed(seeds, latents)
    for i, t in enumerate(schedule.timesteps):
        output = model(schedule.scale(latents, i), t)
        visit(i, latents, output)
        latents = schedule.step(output, i, latents, generators)
    return latents


#: How many steps the page measures with, and for the ways there and back.
COUNTS = (10, 20, 40, 80)
BACK = (10, 50, 200)

PAGE = """# Samplers, measured

On data that are normal, N(0.7, 0.25²), the best denoiser is known exactly, and so is the path that
noise takes to data. What a sampler makes of them is its own error. This page is measured by
`python -m tests.gaussian docs/samplers.md`; `diffedit schedulers` lists what each can do.

**Error** is the mean distance of the latents from the exact path, before the last call, in units of
the latents' scale, for 10, 20, 40 and 80 steps. **Order** is the slope from 20 to 80 steps: halving
the step divides the error by two to the power of the order. **Deviation** is that of what 30 steps
end with; exact is 0.25, and a last call that jumps to the posterior's mean makes it a little less.

Samplers that draw noise at each step follow no path, and have a deviation only. Models of noise and
velocity have integer timesteps, to which some spacings round (Karras, exponential and beta of the
multistep samplers), and a grid whose end moves with the number of steps: orders there are what is
left, not what a textbook says. Flows have real timesteps, and one-step samplers the textbook's
orders on them; the errors of multistep samplers change their sign at few steps.

![Error against steps](samplers.svg)

"""


BACK_AGAIN = """## Inversion

From data to the noise that they come from, and back with the same sampler: the mean distance from
where it began, in units of the data, whose deviation is 0.25. `run.invert` gives both kinds to
edits, and the edit `invert` to everyone. A refinement costs as many calls of the model as there are
steps.

"""


def error(name: str, prediction: str, steps: int) -> float:
    """The mean distance from the exact path before the last call."""
    schedule = Schedule(build(name, own_scheduler(prediction)), steps)
    start = latents_of(0, size=16).double() * schedule.initial_noise_scale
    visited: list[Tensor] = []
    model = gaussian_model(prediction, zero_snr=False)
    trip(schedule, model, start, [1], lambda i, x, out: visited.append(x))
    last = len(schedule) - 1
    (a0, s0), (a, s) = schedule.coefficients(0), schedule.coefficients(last)
    widened = math.hypot(a * STD, s) / math.hypot(a0 * STD, s0)
    exact = a * MEAN + widened * (start - a0 * MEAN)
    return float((visited[last] - exact).abs().mean()) / math.hypot(a, s)


def deviation(name: str, prediction: str, steps: int = 30) -> float:
    """The deviation of what the sampler ends with, from noise of exactly unit deviation."""
    schedule = Schedule(build(name, own_scheduler(prediction)), steps)
    noise = latents_of(0, size=32)
    noise = (noise - noise.mean()) / noise.std() * schedule.initial_noise_scale
    return float(trip(schedule, gaussian_model(prediction, zero_snr=False), noise, [1]).std())


def there_and_back(
    name: str, prediction: str, steps: int, refinements: int = 0, eta: float | None = None
) -> float:
    """The mean distance of data from what they become when they are inverted and sampled again.

    Args:
        eta: where the sampler draws: the edit-friendly inversion, instead of DDIM's.
    """
    model = gaussian_model(prediction, zero_snr=False)
    clean = MEAN + STD * latents_of(0, size=16).double()
    schedule, again = (
        Schedule(build(name, own_scheduler(prediction)), steps, eta=eta) for _ in "12"
    )

    def predict(seen: Tensor, i: int) -> Tensor:
        return model(seen, schedule.timesteps[i])

    if eta is None:
        found = result(ddim(predict, clean, schedule, refinements))
    else:
        rng = [torch.Generator().manual_seed(1)]
        found = result(edit_friendly(predict, clean, schedule, rng))
    x = found.latents
    for i, t in enumerate(again.timesteps):
        noise = found.noise[i] if found.noise else None
        x = again.step(model(again.scale(x, i), t), i, x, noise=noise)
    return float((x - clean).abs().mean())


def result(steps: Generator[Any, None, Inversion]) -> Inversion:
    """What a generator of steps returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Inversion = end.value
            return found


def order(errors: Sequence[float]) -> float:
    """The slope from the second count of steps to the last."""
    return math.log2(errors[1] / errors[-1]) / math.log2(COUNTS[-1] / COUNTS[1])


def samplers(prediction: str) -> list[SchedulerInfo]:
    """Those that a model of that prediction takes."""
    flow = prediction == FLOW
    return [info for info in SCHEDULERS.values() if info.flow or not flow]


def measured(prediction: str) -> tuple[str, dict[str, list[float]]]:
    """The table for models of one prediction, and the errors of those that follow a path."""
    head = "| sampler | " + " | ".join(f"{count} steps" for count in COUNTS)
    lines = [head + " | order | deviation |", "|---" * (len(COUNTS) + 3) + "|"]
    curves = {}
    for info in samplers(prediction):
        cells = ["–"] * (len(COUNTS) + 1)
        if not info.stochastic:
            errors = curves[info.name] = [error(info.name, prediction, n) for n in COUNTS]
            cells = [*(f"{one:.1e}" for one in errors), f"{order(errors):.1f}"]
        cells.append(f"{deviation(info.name, prediction):.3f}")
        lines.append(f"| `{info.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n", curves


#: Rows of the table of inversions: sampler, what the model predicts, refinements, eta.
INVERSIONS: tuple[tuple[str, str, int, float | None], ...] = (
    ("ddim", "epsilon", 0, None),
    ("ddim", "epsilon", 1, None),
    ("ddim", "epsilon", 3, None),
    ("euler", "epsilon", 0, None),
    ("euler", FLOW, 0, None),
    ("euler", FLOW, 3, None),
    ("ddim", "epsilon", 0, 1.0),
)


def inversions() -> str:
    """The table of ways there and back."""
    head = "| sampler | model of | inversion | " + " | ".join(f"{n} steps" for n in BACK)
    lines = [head + " |", "|---" * (len(BACK) + 3) + "|"]
    for name, prediction, refinements, eta in INVERSIONS:
        what = "flow" if prediction == FLOW else "noise"
        kind = "ddim" if eta is None else "edit-friendly, eta 1"
        kind += f", {refinements} refinement{'s' * (refinements > 1)}" if refinements else ""
        errors = [there_and_back(name, prediction, n, refinements, eta) for n in BACK]
        cells = " | ".join(f"{one:.1e}" for one in errors)
        lines.append(f"| `{name}` | {what} | {kind} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(every: Sequence[tuple[str, dict[str, list[float]]]]) -> str:
    """Errors against steps, both logarithmic, one panel for each kind of model, as SVG."""
    width, height, left, top = 420, 320, 60, 30
    low, high = -5.0, -0.5

    def x(steps: float) -> float:
        return left + math.log2(steps / COUNTS[0]) / 3 * (width - left - 110)

    def y(value: float) -> float:
        return top + (high - math.log10(value)) / (high - low) * (height - top - 40)

    def text(at: float, line: float, said: object, anchor: str) -> str:
        return f'<text x="{at:.1f}" y="{line:.1f}" text-anchor="{anchor}">{said}</text>'

    parts = []
    for panel, (title, curves) in enumerate(every):
        parts.append(f'<g transform="translate({panel * width} 0)">')
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{title}</text>')
        for power in range(-5, 0):
            at = y(10.0**power)
            parts.append(f'<path d="M{left} {at:.1f}H{x(80):.1f}" stroke="#ddd"/>')
            parts.append(
                f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>'
            )
        parts += [
            f'<text x="{x(n):.1f}" y="{height - 16}" text-anchor="middle">{n}</text>'
            for n in COUNTS
        ]
        ends = sorted((y(errors[-1]), name) for name, errors in curves.items())
        labels: dict[str, float] = {}
        for at, name in ends:  # names that would lie over each other are moved down
            labels[name] = max([at, *(lower + 12 for lower in labels.values())])
        for number, (name, errors) in enumerate(curves.items()):
            colour = f"hsl({number * 360 // len(curves)} 65% 42%)"
            points = " ".join(
                f"{x(n):.1f},{y(one):.1f}" for n, one in zip(COUNTS, errors, strict=True)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
            at = labels[name] + 4
            parts.append(f'<text x="{x(80) + 6:.1f}" y="{at:.1f}" fill="{colour}">{name}</text>')
        parts.append("</g>")
    style = 'font-family="sans-serif" font-size="11"'
    size = f'width="{width * len(every)}" height="{height}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main(to: str) -> None:
    """Measure, and write the page and its plot."""
    warnings.simplefilter("ignore")
    noise, flow = measured("epsilon"), measured(FLOW)
    titles = ("Models of noise", "Rectified flows")
    text = f"{PAGE}## {titles[0]}\n\n{noise[0]}\n## {titles[1]}\n\n{flow[0]}"
    text += f"\n{BACK_AGAIN}{inversions()}"
    Path(to).write_text(text, "utf-8")
    drawn = plot([(titles[0], noise[1]), (titles[1], flow[1])])
    Path(to).with_suffix(".svg").write_text(drawn, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
