"""Image-to-image: sampling starts from the picture instead of from noise.

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
Equations" (arXiv:2108.01073).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from diffedit import Contribution, Edit, Run, Start, hookimpl


class Img2Img(Edit):
    """Vary the picture: the stronger, the further from the source."""

    name: ClassVar[str] = "img2img"
    version: ClassVar[str] = "1.0.0"

    strength: float = Field(
        0.6,
        gt=0,
        le=1,
        description="How far from the source: the fraction of the steps that is run",
        json_schema_extra={"step": 0.05},
    )

    def contribute(self, run: Run) -> Contribution:
        """Start from the canvas, noised to `strength`."""
        return Contribution(start=Start(run.canvas, at=self.strength))


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Img2Img]
