"""What a prompt costs that was read before, beside reading it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from diffedit import Editor, Pass
from diffedit.box import Box
from diffedit.canvas import Canvas, Frame
from diffedit.guard import Guard
from diffedit.handover import Handover, Setting
from diffedit.plan import Plan


class Reading(NamedTuple):
    """CPU milliseconds, medians of the rounds.

    Attributes:
        read: of reading a prompt.
        kept: of having one that was read, from the question to its conditioning.
        check: of making sure that the text encoders are as they were, once for a pass.
    """

    read: float
    kept: float
    check: float


@torch.no_grad()
def prompt_cost(made: Editor, prompt: str, rounds: int) -> Reading:
    """Ask a pass for its prompt again and again, with and without what is kept."""
    side = made.model.sides[0]
    whole = Frame(Box(0, 0, side, side), (side, side), (side, side))
    setting = Setting(made.model, made.plugins, (0,))
    pass_ = Pass(prompt=prompt, steps=1)
    plan = Plan(pass_, Handover(Canvas.blank((side, side), whole)), setting, Guard())
    kept = setting.embeddings

    def read() -> None:
        kept.clear()
        plan.embed(prompt)

    def check() -> None:
        with kept.of(made.model):
            pass

    def again() -> None:
        plan.embed(prompt)

    times: dict[Callable[[], None], list[float]] = {read: [], again: [], check: []}
    for turn in range(rounds + 1):
        for job, found in times.items():
            with kept.of(made.model):
                plan.embed(prompt)
                count = 1 if job is read else 100  # what is quick is timed together
                began = time.thread_time()
                for _ in range(count):
                    job()
                if turn:
                    found.append(1e3 * (time.thread_time() - began) / count)
    return Reading(*(median(times[job]) for job in (read, again, check)))
