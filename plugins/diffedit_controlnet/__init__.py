"""ControlNet: the picture follows a hint, such as edges, depth or a pose.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"
(arXiv:2302.05543). T2I-Adapters and unions of control networks are given as the model, too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from diffedit import (
    Contribution,
    Edit,
    ImageField,
    ModelField,
    Pixels,
    Preprocessor,
    Run,
    Windowed,
    errors,
    hookimpl,
)
from diffedit_controlnet.preprocessors import PREPROCESSORS

if TYPE_CHECKING:
    from torch import Tensor


class ControlNet(Windowed):
    """Follow a hint. Any number of these may act together; what they say is added."""

    name: ClassVar[str] = "controlnet"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"control"})

    model: ModelField | None = Field(
        None,
        description="Folder or hub id of the control network or T2I-Adapter; none: the loaded"
        " model's own",
    )
    kind: str = Field(
        "canny",
        description='How the hint is made from the image: a preprocessor\'s name, or "none" if the'
        " image is a hint already",
        max_length=64,
        json_schema_extra={"registry": "preprocessors"},
    )
    mode: int | None = Field(
        None,
        ge=0,
        description="Which one of a union of control networks; none: by the kind",
        json_schema_extra={"advanced": True},
    )
    image: ImageField | None = Field(
        None, description="What to take the hint from; none: the picture being edited"
    )
    weight: float = Field(
        1.0, ge=0, le=4, description="How strongly it acts", json_schema_extra={"step": 0.05}
    )
    weights: ModelField | None = Field(
        None,
        description="Folder or hub id of the preprocessor's weights; none: its usual ones",
        json_schema_extra={"advanced": True},
    )

    def contribute(self, run: Run) -> Contribution:
        """The residuals of the control network under the hint, made when first needed.

        A model that itself takes a hint, and is asked for no other network, gets it as an input.
        """
        own = self.model is None and "hint" in run.model.roles
        if self.image is None and run.canvas.empty:
            raise errors.InputError("controlnet: needs an image; this pass starts from nothing")
        preprocess = None if self.kind == "none" else run.preprocess(self.kind, self.weights)

        @functools.cache
        def hint() -> Tensor:
            canvas = run.canvas
            shown = canvas.pixels if self.image is None else canvas.hint(self.image.picture)
            if preprocess is None:
                return shown
            import torch

            made = []
            for one in shown:  # (3, h, w) in [0, 1]
                pixels = (one.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
                made.append(torch.from_numpy(preprocess(pixels)).permute(2, 0, 1).float() / 255)
            return torch.stack(made)

        if own:
            if (self.weight, self.start, self.end) != (1.0, 0.0, 1.0):
                raise errors.InputError(
                    "controlnet: this model itself takes the hint, which has no weight, start or"
                    " end"
                )
            if self.kind == "inpaint":
                raise errors.InputError("controlnet: this model takes a hint, and no hole in one")
            return Contribution(channels={"hint": Pixels(hint)})
        net = run.control_net(self.model, self.kind, self.mode)
        if self.kind == "inpaint" and not run.model.control_roles(net):
            raise errors.InputError(
                "controlnet: kind inpaint is for control networks that are shown the hole in a"
                " picture, and this one is none of these"
            )

        return Contribution(
            residuals=run.led_by(net, hint, self.weight),
            sees=run.model.control_roles(net),
            during=self.during,
        )


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [ControlNet]


@hookimpl
def register_preprocessors() -> list[Preprocessor]:
    """Canny, and the detectors of controlnet_aux by name."""
    return list(PREPROCESSORS)
