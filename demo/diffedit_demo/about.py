"""What stands around the work: the heading, the keys, the cards of the models, the memory."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path

from diffedit_demo.texts import KEYS, PAGE

_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def heading() -> str:
    """The name, and the keys in a sheet that a button opens."""
    # Both languages are in the page, and its own language says which is seen: no script is needed.
    sheets = "".join(_sheet(tag, KEYS[tag]) for tag in KEYS)
    names = " / ".join(dict.fromkeys(one["keys"] for one in PAGE.values()))
    return (
        '<div class="heading"><h1>diffedit</h1>'
        f'<button type="button" popovertarget="keys" aria-label="{html.escape(names)}">?</button>'
        f'</div><div id="keys" popover>{sheets}</div>'
    )


def _sheet(tag: str, keys: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th scope='row'><kbd>{html.escape(key)}</kbd></th><td>{html.escape(said)}</td></tr>"
        for key, said in keys.items()
    )
    return f'<table lang="{tag}"><caption>{PAGE[tag]["keys"]}</caption>{rows}</table>'


def card(source: str) -> str:
    """What a model's maker says of it, as Markdown: its licence, what it can do and what not."""
    from diffedit.models.loading import EMBEDDED

    folder = EMBEDDED if source == "tiny" else Path(source).expanduser()
    file = folder / "README.md"
    if file.is_file():
        text = file.read_text("utf-8", errors="replace")
        return _PICTURE.sub("", _FRONT.sub("", text))
    if not folder.exists() and source.count("/") == 1:
        return f"`{source}`: https://huggingface.co/{source}"
    return f"`{source}` has no card (README.md)."


def memory() -> str:
    """What this process takes: of the accelerator where there is one, and of the machine."""
    import psutil
    import torch

    said = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"
    if torch.cuda.is_available():
        said += f", GPU {torch.cuda.memory_allocated() / 1e9:.1f} GB"
    return said
