"""diffedit's own model families, registered through the same hook as anyone's."""

from __future__ import annotations

from diffedit.hookspecs import hookimpl
from diffedit.models.protocol import ModelFamily


@hookimpl
def register_models() -> list[ModelFamily]:
    """The Stable-Diffusion UNet family."""
    from diffedit.models.stable_diffusion import Family

    return [Family()]
