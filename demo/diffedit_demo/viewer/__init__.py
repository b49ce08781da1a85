"""What a run shows: previews while it goes, then the picture before and after, to compare."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, GradioModel

from diffedit_demo.components import WithoutStub

_HERE = Path(__file__).parent


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


class Viewer(gr.HTML, metaclass=WithoutStub):
    """Shows a `Shown`."""

    data_model = ViewerData

    def __init__(self, said: Mapping[str, str], **options: Any) -> None:
        # Props of a component in a tab that is not open yet do not reach its script: in the markup.
        template = (_HERE / "viewer.html").read_text("utf-8")
        super().__init__(
            value=None,
            html_template=template.replace("TEXTS", html.escape(json.dumps(dict(said)))),
            css_template=(_HERE / "viewer.css").read_text("utf-8"),
            js_on_load=(_HERE / "viewer.js").read_text("utf-8"),
            **options,
        )

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

    def api_info(self) -> dict[str, Any]:
        """What the API says of it."""
        return {"type": "object", "description": "what a run shows"}

    def example_payload(self) -> Any:
        """None to give."""
        return None

    def example_value(self) -> Any:
        """None to give."""
        return None
