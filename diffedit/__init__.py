"""Image editing on latent diffusion: one sampling loop, and edits that combine.

The names below are the public surface. They are imported when first used, so that
``diffedit --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffedit import errors as errors
    from diffedit.attention import QKV as QKV
    from diffedit.attention import Beside as Beside
    from diffedit.attention import Site as Site
    from diffedit.box import Box as Box
    from diffedit.contribution import Branch as Branch
    from diffedit.contribution import Contribution as Contribution
    from diffedit.contribution import Guidance as Guidance
    from diffedit.contribution import Patch as Patch
    from diffedit.contribution import Pixels as Pixels
    from diffedit.contribution import Row as Row
    from diffedit.contribution import Start as Start
    from diffedit.contribution import Tokens as Tokens
    from diffedit.edit import Edit as Edit
    from diffedit.edit import Windowed as Windowed
    from diffedit.editor import Editor as Editor
    from diffedit.fields import ImageField as ImageField
    from diffedit.fields import MaskField as MaskField
    from diffedit.fields import ModelField as ModelField
    from diffedit.hookspecs import hookimpl as hookimpl
    from diffedit.images import Picture as Picture
    from diffedit.inversion import Inversion as Inversion
    from diffedit.models.protocol import Conditioning as Conditioning
    from diffedit.models.protocol import LatentModel as LatentModel
    from diffedit.models.protocol import ModelFamily as ModelFamily
    from diffedit.models.protocol import ModelInput as ModelInput
    from diffedit.models.protocol import Residuals as Residuals
    from diffedit.plugins import API_VERSION as API_VERSION
    from diffedit.plugins import edits as edits
    from diffedit.preprocessors import Preprocessor as Preprocessor
    from diffedit.result import Result as Result
    from diffedit.rows import RowMap as RowMap
    from diffedit.run import Run as Run
    from diffedit.sampler import Step as Step
    from diffedit.schedule import Call as Call
    from diffedit.schedule import Schedule as Schedule
    from diffedit.workflow import Pass as Pass
    from diffedit.workflow import Workflow as Workflow

_HOMES = {
    "API_VERSION": "plugins",
    "Beside": "attention",
    "Box": "box",
    "Branch": "contribution",
    "Call": "schedule",
    "Conditioning": "models.protocol",
    "Contribution": "contribution",
    "Edit": "edit",
    "Editor": "editor",
    "Guidance": "contribution",
    "ImageField": "fields",
    "Inversion": "inversion",
    "LatentModel": "models.protocol",
    "MaskField": "fields",
    "ModelField": "fields",
    "ModelFamily": "models.protocol",
    "ModelInput": "models.protocol",
    "Pass": "workflow",
    "Patch": "contribution",
    "Picture": "images",
    "Pixels": "contribution",
    "Preprocessor": "preprocessors",
    "QKV": "attention",
    "Residuals": "models.protocol",
    "Result": "result",
    "Row": "contribution",
    "RowMap": "rows",
    "Run": "run",
    "Schedule": "schedule",
    "Site": "attention",
    "Start": "contribution",
    "Step": "sampler",
    "Tokens": "contribution",
    "Windowed": "edit",
    "Workflow": "workflow",
    "edits": "plugins",
    "hookimpl": "hookspecs",
}

__all__ = [
    "API_VERSION",
    "QKV",
    "Beside",
    "Box",
    "Branch",
    "Call",
    "Conditioning",
    "Contribution",
    "Edit",
    "Editor",
    "Guidance",
    "ImageField",
    "Inversion",
    "LatentModel",
    "MaskField",
    "ModelFamily",
    "ModelField",
    "ModelInput",
    "Pass",
    "Patch",
    "Picture",
    "Pixels",
    "Preprocessor",
    "Residuals",
    "Result",
    "Row",
    "RowMap",
    "Run",
    "Schedule",
    "Site",
    "Start",
    "Step",
    "Tokens",
    "Windowed",
    "Workflow",
    "edits",
    "errors",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("diffedit.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'diffedit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffedit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
