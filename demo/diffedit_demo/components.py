"""What components of our own have in common."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from gradio.component_meta import ComponentMeta, updateable


class WithoutStub(ComponentMeta):
    """Gradio's metaclass less the stub file that it writes beside the source at import.

    An installed package may be read-only, and type checkers would believe the stub.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> WithoutStub:
        """Make a component class; see ``ComponentMeta``."""
        if "__init__" in attributes:
            attributes["__init__"] = updateable(attributes["__init__"])  # type: ignore[no-untyped-call]
        return ABCMeta.__new__(cls, name, bases, attributes)
