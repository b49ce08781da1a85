"""Editing by inversion: sampling starts from the noise that the picture itself inverts to.

Under the prompt that describes the picture that noise leads back to it, so that another prompt
changes what it speaks of and leaves more of the rest than fresh noise would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict, Field

from diffedit import Call, Contribution, Edit, Inversion, Run, Start, Step, errors, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Invert(Edit):
    """Vary the picture from its own noise: what the prompt does not speak of stays closer to it."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "invert"
    version: ClassVar[str] = "1.0.0"

    prompt: str = Field("", description="What the picture shows as it is", max_length=2000)
    strength: float = Field(
        0.8,
        gt=0,
        le=1,
        description="How far back towards noise: the fraction of the steps that is run",
        json_schema_extra={"step": 0.05},
    )
    kind: Literal["ddim", "edit_friendly"] = Field(
        "ddim",
        description="The path back: of samplers that draw nothing, or of those that draw"
        " (scheduler ddim with eta 1, or dpmpp_2m_sde)",
    )
    refinements: int = Field(
        1,
        ge=0,
        le=10,
        description="How many times each step back is taken again; each costs a call (ddim only)",
        json_schema_extra={"advanced": True},
    )

    def contribute(self, run: Run) -> Contribution:
        """Start from the inverted latents, and draw what the picture asks for."""
        if run.canvas.empty:
            raise errors.InputError("invert: needs a picture; this pass starts from nothing")
        found: list[Inversion] = []

        def prepare(run: Run) -> Iterator[Step]:
            found.append(
                (yield from run.invert(self.prompt, kind=self.kind, refinements=self.refinements))
            )

        def latents() -> Tensor:
            return found[0].latents

        def noise(call: Call) -> Tensor:
            return found[0].noise[call.index]

        return Contribution(
            start=Start(latents, at=self.strength, noised=True),
            prepare=prepare,
            noise=noise if self.kind == "edit_friendly" else None,
        )


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Invert]
