"""What one begins with: stacks by name, as far as the edits they need are installed."""

from __future__ import annotations

from collections.abc import Container

from diffedit_demo.stack import Pick, Stack

_PAINTED = Pick("layer:A")


def presets(edits: Container[str]) -> dict[str, Stack]:
    """Stacks by the key of their text."""
    wanted: dict[str, list[tuple[str, dict[str, object]]]] = {
        "paint": [("inpaint", {"mask": _PAINTED})],
        "restyle": [("img2img", {"strength": 0.6}), ("style", {"image": Pick("source")})],
        "vary": [("img2img", {"strength": 0.6})],
        "make": [],
    }
    found = {}
    for key, needs in wanted.items():
        if all(name in edits for name, _ in needs):
            stack = Stack().add_pass({"prompt": ""})
            for name, values in needs:
                stack = stack.add_edit(stack.passes[0].uid, name, values)
            found[key] = stack
    return found
