"""From the fields of a form to Gradio's widgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from diffedit_demo.forms import Field
from diffedit_demo.texts import ENGLISH

Choices = Sequence[tuple[str, str]]
"""(what is shown, value)"""


def widget(one: Field, value: Any, key: str, pictures: Choices, unset: str) -> Any:
    """The widget of a field.

    Args:
        value: what was set; None: nothing was.
        key: by which the page knows it again when the form is drawn anew.
        pictures: what a picture or mask may be picked from.
        unset: what leaving a choice open is called.
    """
    common: dict[str, Any] = {
        "label": one.title,
        "info": one.help or None,
        "interactive": True,
        "key": key,
        "elem_id": f"field-{key}",
    }
    shown = one.shown(value)
    match one.kind:
        case "slider":
            assert one.low is not None
            assert one.high is not None
            return gr.Slider(one.low, one.high, shown, step=one.step, **common)
        case "number":
            precision = 0 if one.whole else None
            return gr.Number(
                shown, precision=precision, minimum=one.low, maximum=one.high, **common
            )
        case "switch":
            return gr.Checkbox(bool(shown), **common)
        case "choice":
            listed: list[tuple[str, Any]] = [(name, name) for name in one.choices]
            if one.nullable:
                listed.insert(0, (unset, ""))
                shown = "" if shown is None else shown
            return gr.Dropdown(listed, value=shown, allow_custom_value=one.free, **common)
        case "image" | "mask":
            listed = [*([] if one.required else [(unset, "")]), *pictures]
            known = [entry for _, entry in listed]
            if shown and shown not in known:
                inline = str(shown).startswith("data:")
                listed.append((ENGLISH["inline"] if inline else str(shown), shown))
            return gr.Dropdown(listed, value=shown or (known[0] if known else None), **common)
        case "text":
            lines = 2 if one.name == "prompt" else 1
            return gr.Textbox(shown, lines=lines, max_length=one.longest, **common)
