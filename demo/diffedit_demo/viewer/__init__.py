"""What a run shows: previews while it goes, then the picture before and after, to compare."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio.data_classes import FileData, GradioModel

from diffedit_demo.components import Scripted


class ViewerData(GradioModel):
    """What the browser gets: a preview, or pictures to compare."""

    before: FileData | None = None
    after: FileData | None = None
    preview: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Shown:
    """What to show.

    Attributes:
        before, after: pictures that a browser can show; without `before` there is no comparison.
        preview: a JPEG of what is coming, in their place.
        name: what screen readers call it.
    """

    before: Path | None = None
    after: Path | None = None
    preview: bytes | None = None
    name: str = ""


class Viewer(Scripted):
    """Shows a `Shown`."""

    data_model = ViewerData
    folder = "viewer"

    def __init__(self, texts: Mapping[str, Mapping[str, str]], **options: Any) -> None:
        """Put it on the page; `texts` is what it says, by language."""
        markup = Path(__file__).with_name("viewer.html").read_text("utf-8")
        said = json.dumps({tag: dict(one) for tag, one in texts.items()})
        super().__init__(markup=markup.replace("TEXTS", html.escape(said)), **options)

    def preprocess(self, payload: ViewerData | None) -> None:  # type: ignore[override]
        """Nothing comes back from it."""

    def postprocess(self, value: Shown | None) -> ViewerData | None:  # type: ignore[override]
        """Files for the browser, and the preview within the message."""
        if value is None:
            return None
        preview = None
        if value.preview is not None:
            preview = "data:image/jpeg;base64," + base64.b64encode(value.preview).decode()
        return ViewerData(
            before=FileData(path=str(value.before)) if value.before else None,
            after=FileData(path=str(value.after)) if value.after else None,
            preview=preview,
            name=value.name,
        )
