"""Inpainting: only what the mask shows changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import cv2
import numpy as np
from pydantic import Field

from diffedit import Box, Contribution, Edit, MaskField, Picture, Run, errors, hookimpl

if TYPE_CHECKING:
    import numpy.typing as npt


class Inpaint(Edit):
    """Repaint what is white in the mask, and nothing else.

    Where the loaded model is an inpainting model, the core gives it the mask and the picture around
    it; any other model is held to the picture outside the mask step by step, and led by its own
    control network for inpainting if it has one.
    """

    name: ClassVar[str] = "inpaint"
    version: ClassVar[str] = "1.1.0"

    mask: MaskField = Field(description="White where the picture is to change; greys change later")
    feather: int = Field(
        8,
        ge=0,
        le=512,
        description="Pixels outside the mask over which the edit fades; 0 touches none of them",
    )
    margin: int = Field(
        32,
        ge=0,
        le=4096,
        description="Pixels around the mask that the model sees as context",
        json_schema_extra={"advanced": True},
    )

    def region(self, image: Picture) -> Box:
        """The mask's box, with what the feather reaches and the context margin."""
        ys, xs = np.nonzero(self._fitting(image.size))
        box = Box(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        return box.grown(self.feather + self.margin)

    def contribute(self, run: Run) -> Contribution:
        """The mask, and an edge that fades over `feather` pixels outside it."""
        import torch

        mask = self._fitting(run.canvas.image_size)
        alpha = feathered(mask, 0 if run.compat else self.feather)
        return Contribution(
            mask=torch.tensor(mask)[None, None], alpha=torch.tensor(alpha)[None, None]
        )

    def _fitting(self, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        mask = self.mask.mask
        if (mask.shape[1], mask.shape[0]) != size:
            raise errors.MaskError(
                f"inpaint: the mask is {mask.shape[1]}x{mask.shape[0]} and the picture"
                f" {size[0]}x{size[1]}: they must be of one size"
            )
        if not mask.any():
            raise errors.MaskError(
                "inpaint: the mask is empty: white is where the picture is to change"
            )
        return mask


def feathered(mask: npt.NDArray[np.float32], feather: int) -> npt.NDArray[np.float32]:
    """The mask, with a smooth ramp that falls to 0 over `feather` pixels outside it.

    Args:
        mask: ``(h, w)`` in [0, 1].
        feather: a pixel at Euclidean distance d from the nearest masked one gets ``1 - s(d /
            (feather + 1))`` of that pixel's value, where s(t) = 3t² - 2t³, and 0 beyond `feather`.
            The eye sees where a linear ramp has its kinks (Mach bands).
    """
    if feather == 0:
        return mask
    # Only what the ramp can reach: on a large photograph the rest costs more than the edit.
    ys, xs = np.nonzero(mask)
    top, left = max(0, ys.min() - feather), max(0, xs.min() - feather)
    window = np.s_[top : ys.max() + feather + 1, left : xs.max() + feather + 1]
    part = mask[window]
    outside = (part == 0).astype(np.uint8)
    # The labelled transform knows no exact distances, so those come from a second one.
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Its roots differ in the last bit from call to call; what they are of are whole numbers.
    distance = np.sqrt(np.rint(np.square(distance, dtype=np.float64))).astype(np.float32)
    _, label = cv2.distanceTransformWithLabels(
        outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros(int(label.max()) + 1, np.float32)
    values[label[outside == 0]] = part[outside == 0]
    t = distance / (feather + 1)
    ramp = np.where(distance <= feather, 1 - t * t * (3 - 2 * t), 0).astype(np.float32)
    faded = np.zeros_like(mask)
    faded[window] = np.where(outside == 0, part, ramp * values[label])
    return faded


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Inpaint]
