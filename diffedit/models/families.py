"""diffedit's own model families, registered through the same hook as anyone's."""

from __future__ import annotations

import importlib

from diffedit.hookspecs import hookimpl
from diffedit.models.protocol import ModelFamily

#: The modules of this package that hold a family each.
MODULES = (
    "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "chroma", "pixart",
    "sana", "qwen_image", "z_image",
)  # fmt: skip


@hookimpl
def register_models() -> list[ModelFamily]:
    """Stable Diffusion 1 and 2, XL, and 3; Flux; Chroma; PixArt; Sana; Qwen-Image; Z-Image."""
    modules = [importlib.import_module(f"diffedit.models.{name}") for name in MODULES]
    return [module.Family() for module in modules]
