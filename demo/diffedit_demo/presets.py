"""What one begins with: stacks by name, as far as the edits they need are installed."""

from __future__ import annotations

from collections.abc import Container

from diffedit_demo.stack import EditItem, PassItem, Stack

_WANTED: dict[str, tuple[EditItem, ...]] = {
    "paint": (EditItem("inpaint", {"mask": "layer:A"}),),
    "restyle": (EditItem("img2img", {"strength": 0.5}), EditItem("style")),
    "vary": (EditItem("img2img", {"strength": 0.6}),),
    "make": (),
}


def presets(edits: Container[str]) -> dict[str, Stack]:
    """Stacks by the key of their text."""
    return {
        key: Stack((PassItem({"prompt": ""}, wanted),))
        for key, wanted in _WANTED.items()
        if all(one.name in edits for one in wanted)
    }
