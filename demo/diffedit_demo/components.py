"""What components of our own have in common."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from gradio.component_meta import ComponentMeta, updateable
from gradio.components.base import Component
from gradio.data_classes import GradioModel

_HERE = Path(__file__).parent


class WithoutStub(ComponentMeta):
    """Gradio's metaclass less the stub file that it writes beside the source at import.

    An installed package may be read-only, and type checkers would believe the stub.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> WithoutStub:
        """Make a component class; see ``ComponentMeta``."""
        if "__init__" in attributes:
            attributes["__init__"] = updateable(attributes["__init__"])  # type: ignore[no-untyped-call]
        return ABCMeta.__new__(cls, name, bases, attributes)


class Scripted(gr.HTML, metaclass=WithoutStub):
    """A component whose whole look and behaviour is a script of ours.

    The folder of its name holds ``NAME.js``, which fills ``<div class="diffedit-NAME">``, and
    ``NAME.css``. Its `data_model` says what the browser sends and gets: Gradio checks the paths of
    files in it.
    """

    data_model: type[GradioModel]
    folder: str

    def __init__(self, value: Any = None, **settings: Any) -> None:
        """Put it on the page.

        Args:
            value: What to show at first.
            settings: What the script finds in `props`, and what every component takes:
                `elem_id`, `visible`, …
        """
        folder = _HERE / self.folder
        # Props of a component in a tab that is not open yet do not reach its script: such a one
        # says what it has to know in its markup.
        markup = settings.pop("markup", f'<div class="diffedit-{self.folder}"></div>')
        super().__init__(
            value,
            html_template=markup,
            css_template=(folder / f"{self.folder}.css").read_text("utf-8"),
            js_on_load="".join(
                one.read_text("utf-8") for one in (_HERE / "dom.js", folder / f"{self.folder}.js")
            ),
            apply_default_css=False,
            **settings,
        )

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what is not there: gr.HTML takes every word of the script for an event."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def api_info(self) -> dict[str, Any]:
        """Describe the value by its model, not as the text that gr.HTML has."""
        return Component.api_info(self)

    def example_payload(self) -> Any:
        """Return what holds nothing."""
        return self.data_model().model_dump()

    def example_value(self) -> Any:
        """Return nothing to show."""
        return None


def flushed(places: Mapping[str, int]) -> str:
    """JavaScript for `js=` of an event that needs all that a browser holds.

    Gradio gathers an event's inputs before it calls its `js`, and awaits what that returns: so what
    was not sent yet is sent here, and the values are put in their places among the inputs.

    Args:
        places: which of the event's inputs each component is, by its `folder`.
    """
    puts = "".join(
        f" inputs[{at}] = await window.diffedit.{name}.flush();" for name, at in places.items()
    )
    return f"async (...inputs) => {{{puts} return inputs; }}"
