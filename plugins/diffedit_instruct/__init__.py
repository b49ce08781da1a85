"""Edits by instruction: the prompt says what to change in a picture that the model is shown.

For models trained to it: those that take the picture as further channels (Brooks et al. 2023,
"InstructPix2Pix", arXiv:2211.09800), and those that take it as part of their sequence (Black Forest
Labs 2025, "FLUX.1 Kontext", arXiv:2506.15742).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from diffedit import (
    Branch,
    Call,
    Contribution,
    Edit,
    ImageField,
    Pixels,
    Run,
    Tokens,
    errors,
    hookimpl,
)


class Instruct(Edit):
    """Do what the prompt says to the picture: "make it winter", "give him a hat"."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "instruct"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"instructions"})

    image: ImageField | None = Field(
        None,
        description="The picture that the prompt speaks of; none: the one being edited",
    )
    image_guidance: float = Field(
        1.5,
        ge=1,
        le=10,
        description="How closely to keep to the picture; for models that take it as channels only",
        json_schema_extra={"step": 0.1},
    )

    def contribute(self, run: Run) -> Contribution:
        """The picture, and where it is a channel, a prediction that does not see it."""
        if self.image is None and run.canvas.empty:
            raise errors.InputError("instruct: needs an image; this pass starts from nothing")
        if "image" not in run.model.roles:
            return Contribution(tokens=(Tokens(Pixels(self._fitted(run)), "reference"),))
        shown = run.canvas.pixels if self.image is None else run.canvas.hint(self.image.picture)
        channels = {"image": Pixels(shown)}
        if run.guidance <= 1:
            return Contribution(channels=channels)
        blind = Branch("blind", run.negative, negative=True, without=frozenset(channels))
        name = f"{self.scope}/{blind.name}"
        scales = run.guidance, self.image_guidance

        def combine(predictions: Mapping[str, Tensor], call: Call) -> Tensor:
            return instructed(predictions, name, *scales)

        return Contribution(channels=channels, branches=(blind,), combine=combine)

    def _fitted(self, run: Run) -> Tensor:
        """The picture in its own proportions, about as large as what is being worked on."""
        if self.image is None:
            return run.canvas.pixels
        pixels = torch.as_tensor(self.image.picture.rgb()).permute(2, 0, 1)[None]
        height, width = pixels.shape[2:]
        scale = math.sqrt(math.prod(run.canvas.size) / (height * width))
        grid = run.model.grid
        size = [max(1, round(side * scale / grid)) * grid for side in (height, width)]
        scaled = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        return scaled.clamp(0, 1).contiguous()


def instructed(
    predictions: Mapping[str, Tensor], blind: str, guidance: float, image_guidance: float
) -> Tensor:
    """Guidance by the instruction and by the picture (Brooks et al. 2023, eq. 3).

    Args:
        predictions: under the prompt ("positive") and under the negative prompt ("negative"), both
            of which see the picture, and one of the latter that does not.
        blind: the name of that one.
        guidance: how far towards the prompt.
        image_guidance: how far towards the picture.
    """
    without, negative = predictions[blind], predictions["negative"]
    toward = without + guidance * (predictions["positive"] - negative)
    return toward + image_guidance * (negative - without)


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Instruct]
