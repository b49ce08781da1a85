"""What the page works on: models, plugins, and the desk of each session. Knows no Gradio."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diffedit import Pass, Picture, Workflow
from diffedit.errors import InputError, nearest
from diffedit.plugins import Plugins
from diffedit.preprocessors import Preprocess
from diffedit.schedulers import SCHEDULERS
from diffedit_demo.desk import Desk
from diffedit_demo.forms import Field, fields, pass_fields
from diffedit_demo.history import Node
from diffedit_demo.jobs import Models
from diffedit_demo.presets import presets
from diffedit_demo.sessions import Sessions
from diffedit_demo.settings import MOST_PICTURES, MOST_SIDE, Settings
from diffedit_demo.stack import MOST_EDITS, MOST_PASSES, EditItem, Stack, parameters_of
from diffedit_demo.texts import WORDS

MOST_STEPS = 20_000
"""Of all passes and seeds of a run."""

HINT_SIDE = 512
"""Pixels on the longer side of the picture that a hint is shown for."""


@dataclass
class Workspace:
    """All that is behind the page.

    Attributes:
        models: what it can run.
        sessions: where the pictures of its visitors lie.
        plugins: the edits it offers.
        trusted: whether visitors may name folders and hub ids of this machine: only where nobody
            but its own user gets in.
    """

    models: Models
    sessions: Sessions
    plugins: Plugins
    trusted: bool = True
    _desks: dict[str, Desk] = field(default_factory=dict)
    _ready: dict[str, Preprocess] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def desk(self, session: str) -> Desk:
        """The desk of a session."""
        with self._lock:
            for gone in [name for name in self._desks if name not in self.sessions]:
                del self._desks[gone]
            if session not in self._desks:
                self._desks[session] = Desk(self.sessions[session])
            return self._desks[session]

    def leave(self, session: str) -> None:
        """A tab was closed, or its connection broke: what it asked for ends.

        Its pictures stay until the sessions' own clean-up: the same tab may be back in a moment.
        """
        with self._lock:
            desk = self._desks.get(session)
        if desk is not None:
            desk.left = True
            desk.cancel()

    def back(self, session: str, before: str) -> bool:
        """A tab was loaded again: give it the desk that it left.

        Args:
            before: its session before; the browser says so, and it has to be its own.

        Returns:
            Whether it has it now.
        """
        with self._lock:
            desk = self._desks.get(before)
            if desk is None or not desk.left or not self.sessions.move(before, session):
                return False
            del self._desks[before]
            self._desks[session] = desk
            desk.left = False
            return True

    # --- forms ------------------------------------------------------------------------------------

    @cached_property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        """The JSON Schema of each edit."""
        return {name: edit.model_json_schema() for name, edit in self.plugins.edits.items()}

    def form(self, edit: str) -> list[Field]:
        """The form of an edit."""
        names = {"preprocessors": ["none", *sorted(self.plugins.preprocessors)]}
        hidden = frozenset() if self.trusted else self._sources(edit)
        return [one for one in fields(self.schemas[edit], names) if one.name not in hidden]

    def forms(self) -> dict[str, Any]:
        """All forms, as the composer takes them."""
        settings = fields(Settings.model_json_schema(), {"models": self.models.sources})
        default = {"model": self.models.sources[0]}
        return {
            "edits": {
                name: {
                    "help": str(self.schemas[name].get("description", "")).partition("\n")[0],
                    "fields": [one.to_page() for one in self.form(name)],
                    "advanced": bool(self.schemas[name].get("advanced")),
                }
                for name in sorted(self.plugins.edits)
            },
            "pass": [
                one.to_page()
                for one in pass_fields(
                    Pass.model_json_schema(),
                    {"schedulers": sorted(SCHEDULERS), "models": self.models.sources},
                )
            ],
            "settings": [
                one.to_page() | {"default": default.get(one.name, one.default)} for one in settings
            ],
            "presets": [
                {"key": key, "title": f"preset_{key}", "passes": stack.to_page()}
                for key, stack in presets(self.plugins.edits).items()
            ],
            "words": {tag: dict(words) for tag, words in WORDS.items()},
        }

    def _sources(self, edit: str) -> frozenset[str]:
        """The parameters of an edit that name a folder or a hub id."""
        return parameters_of(self.schemas[edit], ("model",))

    # --- runs and hints ---------------------------------------------------------------------------

    def settings(self, said: Mapping[str, Any]) -> Settings:
        """The settings that a browser sent.

        Raises:
            InputError: says which, as ``settings: seed is …``.
        """
        return Settings.from_page({"model": self.models.sources[0], **said})

    def workflow(
        self,
        desk: Desk,
        stack: Stack,
        settings: Settings,
        pictures: Mapping[str, Path],
        source: Node | None,
    ) -> Workflow:
        """What the page asks for; see `Desk.workflow`.

        Raises:
            InputError: it cannot be run, or names what a visitor may not name.
        """
        made = desk.workflow(stack, settings, pictures, source, plugins=self.plugins)
        self.check(made)
        return made

    def check(self, workflow: Workflow) -> None:
        """Refuse what visitors may not ask for: more than pages make, folders and hub ids.

        Raises:
            InputError: says what.
        """
        most = max(len(one.edits) for one in workflow.passes)
        width, height = workflow.size or (1, 1)
        for found, limit, what in (
            (len(workflow.passes), MOST_PASSES, "passes"),
            (most, MOST_EDITS, "edits in a pass"),
            (len(workflow.seeds), MOST_PICTURES, "seeds"),
            (max(width, height), MOST_SIDE, "pixels to a side"),
            (len(workflow.seeds) * sum(one.steps for one in workflow.passes), MOST_STEPS, "steps"),
        ):
            if found > limit:
                raise InputError(f"{found} {what} are more than a visitor may ask for, {limit}")
        if not self.trusted:
            for edit in (edit for one in workflow.passes for edit in one.edits):
                for name in sorted(self._sources(edit.name)):
                    if getattr(edit, name, None) is not None:
                        raise InputError(f"{edit.name}.{name} is not for visitors to choose")

    def hint(self, desk: Desk, stack: Stack, uid: str, pictures: Mapping[str, Path]) -> Path:
        """What the preprocessor of an edit makes of its picture: a file of the session.

        Raises:
            InputError: there is no picture, no such preprocessor, or it cannot be loaded.
        """
        edit = stack.find(uid)
        if not isinstance(edit, EditItem) or edit.name not in self.schemas:
            raise InputError("this edit is not here any more")
        form = self.form(edit.name)
        values = {one.name: edit.values.get(one.name, one.default) for one in form}
        kind = next((values[one.name] for one in form if one.registry == "preprocessors"), None)
        image = next((values[one.name] for one in form if one.kind == "image"), None)
        picture = desk.picked(image or "source", pictures, desk.history.now)
        if not isinstance(picture, Picture):
            raise InputError("a hint is made of a picture, not of a mask")
        scale = min(1.0, HINT_SIDE / max(picture.size))
        width, height = (max(8, round(side * scale)) for side in picture.size)
        pixels = (picture.resized((width, height)).rgb() * 255).round().astype(np.uint8)
        if kind != "none":
            pixels = self._preprocessor(str(kind), values.get("weights"))(pixels)
        data = io.BytesIO()
        PIL.Image.fromarray(pixels).save(data, "PNG", compress_level=1)
        return desk.session.add(data.getvalue(), ".png")

    def _preprocessor(self, kind: str, weights: Any) -> Preprocess:
        known = self.plugins.preprocessors
        if kind not in known:
            raise InputError(f"no preprocessor {kind!r}{nearest(kind, known)}")
        key = f"{kind}:{weights}"
        if key not in self._ready:
            self._ready[key] = known[kind].load(weights)
        return self._ready[key]
