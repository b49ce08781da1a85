"""LoRA: small additions to a model's weights, as for a style, a subject, or fewer steps.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from diffedit import Contribution, Edit, ModelField, Patch, Run, hookimpl


class LoRA(Edit):
    """Draw as low-rank additions to the weights have it. Any number may act; they are summed."""

    name: ClassVar[str] = "lora"
    version: ClassVar[str] = "1.1.0"
    needs: ClassVar[frozenset[str]] = frozenset({"lora"})

    model: ModelField = Field(
        description="Folder, .safetensors file or hub id; or the name of one of the model's own"
    )
    weight: float = Field(
        1.0,
        ge=-4,
        le=4,
        description="How much of them is added; below 0 it is taken away",
        json_schema_extra={"step": 0.05},
    )

    def contribute(self, run: Run) -> Contribution:
        """A change of the weights, which is there while prompts are embedded, too."""
        lora = run.lora(self.model)
        if not self.weight:
            return Contribution()
        return Contribution(patches=(Patch(lambda model: model.add_lora(lora, self.weight)),))


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [LoRA]
