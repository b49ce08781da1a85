"""The composer: the settings of a run and its stack of passes, as forms in the browser.

The browser holds what is typed and every change of structure; the server sees it all at once, as
one value, when something is run. So nothing typed or clicked can be lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, GradioModel
from gradio.events import EventListener
from pydantic import Field

from diffedit.errors import InputError
from diffedit_demo.components import Scripted
from diffedit_demo.stack import Stack

__all__ = ["Composed", "Composer", "ComposerData", "Fault", "Hint", "Past", "Tell"]

MOST_FILES = 64


@dataclass(frozen=True)
class Fault:
    """What is wrong, and beside which field it is to be said.

    Attributes:
        uid: of the pass or edit; ``"run"``: of the settings; empty: of the whole.
        field: the parameter.
        said: one line.
    """

    uid: str
    field: str
    said: str


@dataclass(frozen=True)
class Past:
    """A picture of the history, to pick from."""

    id: int
    title: str
    file: Path


@dataclass(frozen=True)
class Hint:
    """What a preprocessor makes of a picture; without a file, why there is none."""

    uid: str
    file: Path | None = None
    said: str = ""


@dataclass(frozen=True)
class Tell:
    """What the server has to say; what is None stays as it is in the browser.

    Attributes:
        load: a stack to show instead of the present one, and settings that come with it.
        files: the pictures that the stack's picks name.
        pictures: all that can be picked from the history.
        faults: all that is wrong; empty: nothing any more.
        session: what the browser is to say when it comes back.
    """

    load: tuple[Stack, Mapping[str, Any]] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    pictures: Sequence[Past] | None = None
    faults: Sequence[Fault] | None = None
    hint: Hint | None = None
    session: str = ""


@dataclass(frozen=True)
class Composed:
    """What came from the browser.

    Attributes:
        stack: the passes, in order.
        settings: of the run, unchecked.
        files: the pictures that picks name, by pick.
        asked: the uid of the edit whose hint is asked for.
        session: the one before, where the page has just been loaded again.
    """

    stack: Stack = field(default_factory=Stack)
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    asked: str | None = None
    session: str = ""


class _Past(GradioModel):
    id: int
    title: str
    file: FileData


class _Hint(GradioModel):
    uid: str
    said: str = ""
    file: FileData | None = None


class ComposerData(GradioModel):
    """What server and browser tell each other.

    Stacks are JSON text: Gradio takes any record with a ``path`` for a file, and a parameter may
    well be called so.
    """

    stack: str = ""
    """``{"settings": {…}, "passes": […]}``."""
    files: dict[str, FileData] = Field(default_factory=dict)
    asked: str | None = None
    told: bool = False
    """Whether the server says it."""
    pictures: list[_Past] | None = None
    faults: list[dict[str, str]] | None = None
    hint: _Hint | None = None
    session: str = ""


class Composer(Scripted):
    """The settings of a run, and its passes with their edits.

    Events: `hint` when the browser wants to see what a preprocessor makes (its handler returns a
    `Tell` with a `Hint`), `arrived` when the page has been loaded, for the first time or again.
    """

    data_model = ComposerData
    folder = "composer"
    hint = EventListener("hint").listener
    arrived = EventListener("arrived").listener

    def __init__(
        self,
        *,
        forms: Mapping[str, Any],
        texts: Mapping[str, Mapping[str, str]],
        **settings: Any,
    ) -> None:
        """Put a composer on the page.

        Args:
            forms: ``edits`` (by name: ``help`` and ``fields``), ``pass`` and ``settings`` (fields),
                ``presets`` (``key``, ``title``, ``passes``), ``words`` (translations by language).
            texts: what it says itself, by language.
            settings: as for every component.
        """
        super().__init__(None, forms=forms, texts=texts, **settings)

    def preprocess(self, payload: ComposerData | None) -> Composed:  # type: ignore[override]
        """Give handlers what the browser sent.

        Raises:
            gr.Error: It is no stack.
        """
        if payload is None or not payload.stack:
            return Composed()
        if len(payload.files) > MOST_FILES:
            raise gr.Error(f"At most {MOST_FILES} pictures.", print_exception=False)
        try:
            said = json.loads(payload.stack)
            settings = said.get("settings", {})
            stack = Stack.from_page(said.get("passes", []))
            if not isinstance(settings, dict):
                raise InputError("settings should be a record")
        except (ValueError, AttributeError, RecursionError, InputError):
            raise gr.Error("This is no stack of passes.", print_exception=False) from None
        files = {name: Path(file.path) for name, file in payload.files.items()}
        return Composed(stack, settings, files, payload.asked, payload.session)

    def postprocess(self, value: Tell | None) -> ComposerData:  # type: ignore[override]
        """Give the browser what a handler returned."""
        if value is None:
            return ComposerData()
        stack = ""
        if value.load is not None:
            shown, settings = value.load
            stack = json.dumps({"settings": dict(settings), "passes": shown.to_page()})
        hint = value.hint and _Hint(
            uid=value.hint.uid,
            said=value.hint.said,
            file=FileData(path=str(value.hint.file)) if value.hint.file else None,
        )
        return ComposerData(
            told=True,
            stack=stack,
            files={name: FileData(path=str(file)) for name, file in value.files.items()},
            pictures=None
            if value.pictures is None
            else [
                _Past(id=one.id, title=one.title, file=FileData(path=str(one.file)))
                for one in value.pictures
            ],
            faults=None if value.faults is None else [vars(one) for one in value.faults],
            hint=hint,
            session=value.session,
        )
