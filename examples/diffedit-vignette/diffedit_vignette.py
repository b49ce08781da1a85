"""A diffedit plugin: darken the corners."""

from typing import ClassVar

import torch
from pydantic import Field

from diffedit import Contribution, Edit, Run, hookimpl


class Vignette(Edit):
    """Darken the picture towards its corners."""

    name: ClassVar[str] = "vignette"
    version: ClassVar[str] = "1.0.0"
    stage: ClassVar = "late"
    amount: float = Field(0.5, ge=0, le=1, description="How dark the corners become")

    def contribute(self, run: Run) -> Contribution:
        def finish(pixels: torch.Tensor) -> torch.Tensor:  # (b, 3, h, w) in [0, 1]
            y, x = (torch.linspace(-1, 1, side) for side in pixels.shape[-2:])
            return pixels * (1 - self.amount * (y[:, None] ** 2 + x**2) / 2)

        return Contribution(finish=finish)


@hookimpl
def register_edits() -> list[type[Edit]]:
    return [Vignette]
