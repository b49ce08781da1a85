"""All that a model's networks are, so that what a pass leaves behind is seen (law 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffedit import Editor
from diffedit.guard import constituents

#: What is told of weights otherwise: by their bits.
_HELD = ("_parameters", "_buffers", "_modules")
#: Where diffusers' autoencoders of videos keep frames while they work, and begin anew each time.
_FRAMES = {
    f"{part}_{name}" for part in ("", "_enc") for name in ("conv_num", "conv_idx", "feat_map")
}


def state(editor: Editor) -> dict[str, Any]:
    """Every module, with what it has besides weights; every weight, to the bit; the vocabulary."""
    found: dict[str, Any] = {}
    for number, part in enumerate(editor.model.parts()):
        for name, module in part.named_modules(remove_duplicate=False):
            found[f"{number}.{name}"] = module, _own(module)
        for kind in ("named_parameters", "named_buffers"):
            for name, held in getattr(part, kind)(remove_duplicate=False):
                found[f"{number}.{name} ({kind})"] = (
                    id(held),
                    held.requires_grad,
                    [_frozen(one) for one in constituents(held)],
                )
    pipe: Any = getattr(editor.model, "pipe", None)
    for name, tokenizer in getattr(pipe, "components", {}).items():
        if name.startswith("tokenizer") and tokenizer is not None:
            found[name] = dict(tokenizer.get_vocab())
    return found


def unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Nothing of it is another."""
    assert before.keys() == after.keys()
    assert [key for key in before if not _equal(before[key], after[key])] == []


def _own(module: nn.Module) -> dict[str, Any]:
    """Hooks, mode, processor, ways of computing, and whatever else was set on a module."""
    own = {key: value for key, value in vars(module).items() if key not in {*_HELD, *_FRAMES}}
    if hasattr(own.get("processor"), "__dict__"):
        own["processor's"] = vars(own["processor"])
    return {key: _frozen(value) for key, value in own.items()}


def _frozen(value: Any) -> Any:
    """A copy of what may be changed in place; anything else is itself."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device, _bits(value)
    if isinstance(value, dict):
        return {key: _frozen(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(one) for one in value]
    return set(value) if isinstance(value, set) else value


def _bits(tensor: Tensor) -> Tensor:
    """Compared as they are: not a number is equal to itself, and -0 is not 0."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).clone()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and not isinstance(a, nn.Module) and bool(a == b))
