"""What one begins with: stacks by name, as far as the edits they need are installed."""

from __future__ import annotations

from collections.abc import Container

from diffedit_demo.stack import EditItem, PassItem, Stack

_PAINTED = EditItem("inpaint", {"mask": "layer:A"})

_WANTED: dict[str, PassItem] = {
    "paint": PassItem({}, (_PAINTED,)),
    # Without a prompt what lies around the mask is carried on, and nothing has to be guided.
    "remove": PassItem({"prompt": "", "guidance": 1.0}, (_PAINTED,)),
    "restyle": PassItem({}, (EditItem("img2img", {"strength": 0.5}), EditItem("style"))),
    "follow": PassItem({}, (EditItem("controlnet", {"kind": "canny"}),)),
    "vary": PassItem({}, (EditItem("img2img", {"strength": 0.6}),)),
    "make": PassItem(),
}


def presets(edits: Container[str]) -> dict[str, Stack]:
    """Stacks by the key of their text."""
    return {
        key: Stack((wanted,))
        for key, wanted in _WANTED.items()
        if all(one.name in edits for one in wanted.edits)
    }
