"""A prompt of its own for a part of the picture."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffedit import Branch, Contribution, Edit, MaskField, Run, Windowed, errors, hookimpl


class Region(Windowed):
    """Draw something else where the mask is white; several regions act side by side.

    One more prediction of the picture is made under the region's prompt, and what guidance works on
    is put together of it and the prediction under the pass's prompt (Bar-Tal et al. 2023,
    "MultiDiffusion", arXiv:2302.08113). So inside the mask guidance is that of the region's prompt,
    whichever kind the pass has, and outside it is what it would be without. Where regions overlap,
    they share the place. Nothing is held to the picture: that is inpaint's.
    """

    name: ClassVar[str] = "region"
    version: ClassVar[str] = "1.0.0"

    prompt: str = Field(description="What this part of the picture is to show", max_length=2000)
    mask: MaskField = Field(description="White where the prompt holds; in greys it holds in part")
    negative: str = Field(
        "",
        description="What this part is not to show; empty: the negative prompt of the pass",
        max_length=2000,
    )
    weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="How far the prompt takes the place of the pass's; 0 leaves it as it is",
        json_schema_extra={"step": 0.05},
    )
    feather: int = Field(
        16,
        ge=0,
        le=512,
        description="Pixels outside the mask over which the prompt fades",
    )

    def contribute(self, run: Run) -> Contribution:
        """A prediction under the region's prompt, and one under its negative prompt if it has one.

        Without guidance there is no negative prediction that the latter could take the place of.
        """
        within = self.weight * self._grid(run)
        if not within.any():  # weight 0, or a mask outside of what is being worked on
            return Contribution()
        name = self.digest[:16]  # so that several regions need no ids
        branches = [Branch(name, self.prompt, within=within)]
        if self.negative and run.guidance > 1:
            branches.append(Branch(f"{name}-not", self.negative, negative=True, within=within))
        return Contribution(branches=tuple(branches), during=self.during)

    def _grid(self, run: Run) -> Tensor:
        """The mask with its soft edge over the latent grid, ``(1, 1, h, w)`` in [0, 1]."""
        mask, canvas = self.mask.mask, run.canvas
        height, width = mask.shape
        if (width, height) != canvas.image_size:
            raise errors.MaskError(
                f"region: the mask is {width}x{height} and the picture"
                f" {canvas.image_size[0]}x{canvas.image_size[1]}: they must be of one size"
            )
        if not mask.any():
            raise errors.MaskError("region: the mask is empty: white is where the prompt holds")
        work = canvas.mask_to_work(torch.tensor(mask)[None, None])
        scale = canvas.frame.content[0] / canvas.frame.region.width
        soft = softened(work, round(self.feather * scale))
        return F.avg_pool2d(soft, run.model.cell).to(run.model.device)


def softened(mask: Tensor, reach: int) -> Tensor:
    """A mask ``(n, 1, h, w)`` that fades over `reach` pixels around it, and is never less inside.

    Grown by half as many pixels and then averaged over as many, so that white stays 1 to the bit.
    """
    half = math.ceil(reach / 2)
    side = 2 * half + 1
    for kernel, padding in (((1, side), (0, half)), ((side, 1), (half, 0))):
        mask = F.max_pool2d(mask, kernel, stride=1, padding=padding)
    for kernel, padding in (((1, side), (0, half)), ((side, 1), (half, 0))):
        mask = F.avg_pool2d(mask, kernel, stride=1, padding=padding, count_include_pad=False)
    return mask


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Region]
