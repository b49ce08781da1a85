"""What the tests of the laws share: a watched editor, and edits that do one thing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ConfigDict

from diffedit import Contribution, Edit, Editor, Run
from diffedit.plugins import Plugins
from tests.families import SD, Tiny


class Custom(Edit):
    """Contributes what it is given: fields of a `Contribution`, or a function of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str] = "custom"
    version: ClassVar[str] = "1.0.0"
    parts: Any = None

    @property
    def digest(self) -> str:
        return f"{id(self.parts):x}"

    def contribute(self, run: Run) -> Contribution:
        parts = self.parts(run) if callable(self.parts) else self.parts
        return parts if isinstance(parts, Contribution) else Contribution(**(parts or {}))


class Other(Custom):
    """The same under another name."""

    name: ClassVar[str] = "other"


@dataclass
class Chosen:
    """The family that tests are about at present; `conftest` says it."""

    family: Tiny = SD


CHOSEN = Chosen()
Made = TypeVar("Made")


def per_family(make: Callable[..., Made]) -> Callable[..., Made]:
    """Make something once for each family and set of arguments."""

    @functools.cache
    def kept(family: str, *args: Any, **kwargs: Any) -> Made:
        return make(*args, **kwargs)

    return lambda *args, **kwargs: kept(CHOSEN.family.name, *args, **kwargs)


class Watched:
    """An editor that notes every input and output of its denoiser, and every call of its VAE."""

    def __init__(self, plugins: Plugins | None = None, **options: Any) -> None:
        self.editor: Editor = CHOSEN.family.editor(plugins, **options)
        model: Any = self.editor.model
        self.model = model
        for number in (1, 2):
            net = CHOSEN.family.control_net(self.model.pipe, seed=number)
            self.editor._resources[f"control:net{number}:"] = net
        self.inputs: list[Any] = []
        self.outputs: list[torch.Tensor] = []
        self.encoded: list[torch.Tensor] = []
        self.embedded: list[str] = []
        self._wrap("predict", self._predicted)
        self._wrap("encode", lambda pixels, made: self.encoded.append(pixels))
        self._wrap("embed", lambda prompts, made: self.embedded.extend(prompts))

    def _predicted(self, x: Any, made: torch.Tensor) -> None:
        self.inputs.append(x)
        self.outputs.append(made)

    def _wrap(self, name: str, note: Callable[[Any, Any], Any]) -> None:
        original = getattr(self.model, name)

        def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(first, *args, **kwargs)
            note(first, made)
            return made

        setattr(self.model, name, wrapped)

    @property
    def calls(self) -> int:
        """How often any part of the model was called."""
        return len(self.inputs) + len(self.encoded) + len(self.embedded)

    def rows(self, call: int, reference: str | None = None, branch: str = "positive") -> Any:
        """The latents of some rows in a call, in item order."""
        x = self.inputs[call]
        at = [
            i
            for i, key in enumerate(x.rows.keys)
            if key.branch == branch and key.reference == reference
        ]
        return x.latents[at]
