"""Inversion: from a picture to the noise that a sampler would make it of.

Pure functions of a prediction, clean latents and a schedule; `Run.invert` gives them to edits. They
yield a `Step` per call of the model, so that they show progress and can be cancelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.errors import SchedulerError
from diffedit.sampler import Step
from diffedit.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Inversion:
    """What a picture was inverted to.

    Attributes:
        latents: ``(b, c, h, w)`` at the first noise level of the schedule, as samplers have them.
        noise: what the sampler is to draw at each of its calls, ``(b, c, h, w)`` each, in units of
            standard deviation; empty for a sampler that draws nothing.
    """

    latents: Tensor
    noise: tuple[Tensor, ...] = ()


#: ``(latents as the model sees them, index of the call) -> raw output``.
Predict = Callable[[Tensor, int], Tensor]


def ddim(
    predict: Predict, clean: Tensor, schedule: Schedule, refinements: int = 0
) -> Generator[Step, None, Inversion]:
    """The path of DDIM, backwards (Song et al. 2021, arXiv:2010.02502, eq. 13 and section 5.3).

    A step back needs the noise that the model would predict where the step leads. Taken to be what
    it predicts where the step begins, the way there and back is off by what falls with the length
    of steps; taking it again where the step has led (Pan et al. 2023, arXiv:2309.04907) lets it
    fall to nothing.

    Args:
        predict: at call i, of any latents; it is told call i's timestep.
        clean: ``(b, c, h, w)``.
        schedule: whose levels are taken, last to first. Nothing of it is used up.
        refinements: how many times each step is taken again.
    """
    levels = _natural(schedule)
    scale = schedule.coefficients(0)[1] / levels[0][1]
    calls, x = len(schedule), clean
    total = calls * (1 + refinements)
    for number, i in enumerate(reversed(range(calls))):
        (a, s), (below_a, below_s) = levels[i], levels[i + 1]
        if (a, s) == (below_a, below_s):
            continue  # two calls at one level, as of a solver that looks ahead
        of, by = _step(a, s, below_a, below_s, schedule.prediction_type)
        guess = x
        for again in range(1 + refinements):
            guess = (x - by * predict(guess, i)) / of
            yield Step(number * (1 + refinements) + again, total, guess * scale, _x0=lambda: clean)
        x = guess
    return Inversion(x * scale)


def edit_friendly(
    predict: Predict, clean: Tensor, schedule: Schedule, rng: Sequence[torch.Generator]
) -> Generator[Step, None, Inversion]:
    """Noise maps of a sampler that draws, in which structure stands where the picture has it.

    Huberman-Spiegelglas et al. 2024, "An Edit Friendly DDPM Noise Space" (arXiv:2304.06140): every
    level gets the picture under noise of its own, and what the sampler would have had to draw to
    come from one to the next is kept (eq. 5). Sampling with that noise gives the picture again:
    exactly with DDIM, up to their last step, which draws nothing, with others.

    Args:
        predict: at call i.
        clean: ``(b, c, h, w)``.
        schedule: of a sampler that takes its noise from outside; used up by this.
        rng: one generator per item.

    Raises:
        SchedulerError: the sampler draws nothing, or draws by itself.
    """
    calls = len(schedule)
    levels = _natural(schedule)
    path = []
    for i in range(calls):
        drawn = [torch.randn(clean.shape[1:], generator=one) for one in rng]
        path.append(schedule.add_noise(clean, torch.stack(drawn).to(clean), i))
    path.append(clean)
    noise: list[Tensor] = []
    for i in range(calls):
        output = predict(path[i] * (levels[i][1] / schedule.coefficients(i)[1]), i)
        still, spread = schedule.drawing(output, i, path[i])
        if not spread and i == 0 and calls > 1:
            raise SchedulerError(
                f"{type(schedule.scheduler).__name__} draws nothing, and this inversion keeps what"
                " a sampler draws: use ddim with eta 1, or dpmpp_2m_sde"
            )
        # Where the sampler draws nothing (some last steps), nothing can be kept.
        noise.append((path[i + 1] - still) / spread if spread else torch.zeros_like(clean))
        schedule.step(output, i, path[i], noise=noise[-1])
        yield Step(i, calls, path[i], _x0=lambda: clean)
    return Inversion(path[0], tuple(noise))


def _natural(schedule: Schedule) -> list[tuple[float, float]]:
    """The levels as the model knows them, the clean one last.

    Variance-exploding samplers hold latents larger than the model sees them.
    """
    if not schedule.tells_noise:
        raise SchedulerError(f"{type(schedule.scheduler).__name__} does not tell its noise levels")
    flow = schedule.prediction_type == "flow_prediction"
    levels = []
    for i in range(len(schedule)):
        a, s = schedule.coefficients(i)
        size = a + s if flow else math.hypot(a, s)
        levels.append((a / size, s / size))
    # Some end at the least noise that they were trained with, and take that for none.
    end = float(getattr(schedule.scheduler, "final_alpha_cumprod", 1.0))
    return [*levels, (math.sqrt(end), math.sqrt(1 - end))]


def _step(a: float, s: float, to_a: float, to_s: float, kind: str) -> tuple[float, float]:
    """DDIM's step as ``of * x + by * output``, from one level to another.

    Solved for x it is the step back. In terms of the output it is well behaved at all levels, where
    one in terms of noise is not at pure noise (a = 0).
    """
    match kind:
        case "epsilon":
            return to_a / a, to_s - to_a * s / a
        case "v_prediction":  # x0 = a x - s v, noise = a v + s x
            return to_a * a + to_s * s, to_s * a - to_a * s
        case "flow_prediction":  # x0 = x - s v, noise = x + a v
            return to_a + to_s, to_s * a - to_a * s
        case "sample":
            return to_s / s, to_a - to_s * a / s
        case _:
            raise SchedulerError(f"unknown prediction type {kind!r}")


__all__ = ["Inversion", "ddim", "edit_friendly"]
