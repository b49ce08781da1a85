"""Tiny random models of each family, and the pipelines of diffusers that they stand beside."""

from tests.families.chroma import CHROMA
from tests.families.flux import FLUX
from tests.families.pixart import PIXART
from tests.families.qwen_image import QWEN_IMAGE
from tests.families.sana import SANA
from tests.families.stable_diffusion import SD
from tests.families.stable_diffusion_3 import SD3
from tests.families.stable_diffusion_xl import SDXL, xl_pipeline
from tests.families.tiny import Tiny
from tests.families.z_image import Z_IMAGE

FAMILIES = (SD, SDXL, SD3, FLUX, CHROMA, PIXART, SANA, QWEN_IMAGE, Z_IMAGE)
CONTROLLED = tuple(family for family in FAMILIES if family.nets)
"""Those that have control networks."""

__all__ = [
    "CHROMA",
    "CONTROLLED",
    "FAMILIES",
    "FLUX",
    "PIXART",
    "QWEN_IMAGE",
    "SANA",
    "SD",
    "SD3",
    "SDXL",
    "Z_IMAGE",
    "Tiny",
    "xl_pipeline",
]
