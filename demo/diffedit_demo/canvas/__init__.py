"""The mask canvas: a picture in the browser, and masks painted over it.

The browser keeps strokes and masks; the server sees a mask only when the page asks for it before a
run, and the picture's own bytes only when it is opened. A mask is white (255) where the picture may
change, and as large as the copy that is shown, whatever the size of the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, GradioModel
from gradio.events import EventListener
from pydantic import Field

from diffedit_demo.components import Scripted
from diffedit_demo.texts import CANVAS

__all__ = [
    "LAYERS",
    "Canvas",
    "CanvasData",
    "Painted",
    "Refused",
    "Shown",
]

LAYERS = ("A", "B", "C", "D")
"""The names of the masks that can be painted."""


class CanvasData(GradioModel):
    """What server and browser tell each other; Gradio checks every path in it."""

    picture: FileData | None = None
    """The copy that is shown."""
    name: str = ""
    width: int = 0
    height: int = 0
    """Of the original, in pixels."""
    mask: str = LAYERS[0]
    """The active layer."""
    masks: dict[str, FileData] = Field(default_factory=dict)
    """The painted layers that were sent."""
    feather: int = 0
    """Of the previewed edge, in the original's pixels."""
    revision: int = 0
    """Another number is another picture: the browser drops its strokes."""
    upload: FileData | None = None
    """The file that was just opened, as it is."""
    painted: list[str] = Field(default_factory=list)
    """The layers with something on them, sent or not."""
    problem: str = ""
    """Why what was opened is not shown."""


@dataclass(frozen=True)
class Painted:
    """What came from the browser.

    Attributes:
        upload: The file that the user just opened, byte for byte; None in every event but `opened`.
        name: That file's own name, as the browser told it (never a path to trust).
        masks: The painted layers by name: 8-bit grey PNGs as large as the shown copy.
        active: The layer being painted.
        painted: The layers with something on them; complete even where `masks` was not asked for.
        revision: Which picture the masks were painted on.
    """

    upload: Path | None = None
    name: str = ""
    masks: Mapping[str, Path] = field(default_factory=dict)
    active: str = LAYERS[0]
    painted: tuple[str, ...] = ()
    revision: int = 0


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture for the canvas.

    Attributes:
        picture: A copy that any browser reads, at most `desk.SHOWN_SIDE` pixels on its longer side.
        name: What the picture is called.
        width: Of the original, in pixels.
        height: Of the original, in pixels.
        feather: How far the previewed edge fades, in the original's pixels; 0 shows none.
        revision: To be raised with every other picture; the same number keeps the strokes.
    """

    picture: Path
    name: str
    width: int
    height: int
    feather: int = 0
    revision: int = 1


@dataclass(frozen=True)
class Refused:
    """Why an opened file is no picture for the canvas, in one line; what was shown stays."""

    problem: str


class Canvas(Scripted):
    """A picture with masks to paint over it.

    Events: `opened` when the user gave a file (its handler returns a `Shown` or a `Refused`),
    `painted` when a layer stopped or began to be empty.
    """

    data_model = CanvasData
    folder = "canvas"
    opened = EventListener("opened").listener
    painted = EventListener("painted").listener

    def __init__(
        self,
        value: Shown | None = None,
        *,
        texts: Mapping[str, Mapping[str, str]] | None = None,
        **settings: Any,
    ) -> None:
        """Put a canvas on the page.

        Args:
            value: What to show at first.
            texts: What it says, by language.
            settings: As for every component: `elem_id`, `visible`, `key`, …
        """
        super().__init__(value, texts=texts or CANVAS, **settings)

    def preprocess(self, payload: CanvasData | None) -> Painted:  # type: ignore[override]
        """Give handlers what the browser sent.

        Raises:
            gr.Error: A layer has a name that there is not.
        """
        if payload is None:
            return Painted()
        named = {payload.mask, *payload.masks, *payload.painted}
        if not named <= set(LAYERS):
            raise gr.Error("There is no such mask.", print_exception=False)
        return Painted(
            upload=Path(payload.upload.path) if payload.upload else None,
            name=(payload.upload and payload.upload.orig_name) or "",
            masks={name: Path(file.path) for name, file in sorted(payload.masks.items())},
            active=payload.mask,
            painted=tuple(sorted(payload.painted)),
            revision=payload.revision,
        )

    def postprocess(self, value: Shown | Refused | None) -> CanvasData:  # type: ignore[override]
        """Give the browser what a handler returned; None shows no picture."""
        if value is None:
            return CanvasData()
        if isinstance(value, Refused):
            return CanvasData(problem=value.problem)
        return CanvasData(
            picture=FileData(path=str(value.picture)),
            name=value.name,
            width=value.width,
            height=value.height,
            feather=value.feather,
            revision=value.revision,
        )
