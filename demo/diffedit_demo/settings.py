"""What holds for a whole run, beside its passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffedit.explain import explained

MOST_PICTURES = 8
MOST_SIDE = 2048


Side = Annotated[
    int,
    Field(
        ge=8,
        le=MOST_SIDE,
        description="Of a picture made from nothing; otherwise the picture's own",
        json_schema_extra={"advanced": True},
    ),
]
"""In pixels."""


class Settings(BaseModel):
    """The settings of a run, as its form has them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: int = Field(
        0,
        ge=0,
        le=2**53 - 1 - MOST_PICTURES,  # what a browser's numbers hold exactly
        description="The same seed gives the same picture",
        json_schema_extra={"random": True},
    )
    count: int = Field(
        1, ge=1, le=MOST_PICTURES, title="Pictures", description="One for each of so many seeds"
    )
    model: str = Field(
        "tiny",
        description="What paints; its licence and limits are in its card",
        json_schema_extra={"registry": "models", "free": False, "advanced": True},
    )
    width: Side = 256
    height: Side = 256

    @property
    def seeds(self) -> int | list[int]:
        """As a workflow says them."""
        if self.count == 1:
            return self.seed
        return [self.seed + k for k in range(self.count)]

    @classmethod
    def from_page(cls, said: Mapping[str, Any]) -> Self:
        """What a browser sent.

        Raises:
            InputError: says which, as ``settings: seed is …``.
        """
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            raise explained(error, (cls, cls), "settings", {}, None) from None
