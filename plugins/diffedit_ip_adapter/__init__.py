"""A picture as a prompt: its subject, its look, or both, beside what the text says.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion
Models" (arXiv:2308.06721).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ConfigDict, Field

from diffedit import (
    Contribution,
    Edit,
    ImageField,
    MaskField,
    ModelField,
    Run,
    Windowed,
    errors,
    hookimpl,
)


class IPAdapter(Windowed):
    """Show the model a picture. Any number of these may act together, each where its mask says."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "ip_adapter"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"image_prompt"})

    model: ModelField = Field(
        description="The adapter: a .safetensors file, a folder that holds one, or"
        " owner/name/file.safetensors on the hub",
    )
    image: ImageField = Field(description="The picture that the model is shown")
    weight: float = Field(
        0.6, ge=0, le=2, description="How strongly it acts", json_schema_extra={"step": 0.05}
    )
    mask: MaskField | None = Field(
        None, description="White where it acts; none: everywhere. Of the size of the result"
    )
    encoder: ModelField | None = Field(
        None,
        description="Folder of the image encoder it was trained with, or owner/name/folder on the"
        " hub; none: image_encoder beside the file, or in models beside its folder",
        json_schema_extra={"advanced": True},
    )

    def contribute(self, run: Run) -> Contribution:
        """An attention to the picture, beside that to the text."""
        if self.weight == 0:
            return Contribution()
        where = self._where(run)
        adapter = run.ip_adapter(self.model, self.encoder)
        beside = run.model.image_prompt(adapter, self.image.picture, self.weight, where)
        return Contribution(beside=beside, during=self.during)

    def _where(self, run: Run) -> torch.Tensor | None:
        """The mask over what is being worked on."""
        if self.mask is None:
            return None
        mask, size = self.mask.mask, run.canvas.image_size
        if (mask.shape[1], mask.shape[0]) != size:
            raise errors.MaskError(
                f"ip_adapter: the mask is {mask.shape[1]}x{mask.shape[0]} and the picture"
                f" {size[0]}x{size[1]}: they must be of one size"
            )
        return run.canvas.to_work(torch.tensor(mask)[None, None])


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [IPAdapter]
