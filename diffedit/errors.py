"""Every error diffedit raises on purpose.

    DiffeditError
    ├── InputError               the user's input is wrong; the command line exits with 2
    │   ├── ImageError           an image that is missing, broken or of the wrong kind
    │   ├── MaskError            a mask of another size, or one that selects nothing
    │   ├── OutputError          a place that must not be written to
    │   ├── ParameterError       an unknown edit or parameter, or a value out of range
    │   ├── SchedulerError       an unknown scheduler, or one that cannot do what the pass asks
    │   ├── WorkflowError        a workflow file that cannot be read
    │   ├── ModelError           a model that cannot be loaded
    │   │   └── UnsafeWeights    pickled weights, which could run code when loaded
    │   ├── CapabilityError      a model that cannot carry an edit
    │   └── ConflictError        two edits of one pass claim the same exclusive thing
    ├── PluginError              a plugin failed; names the plugin, its effects are undone
    ├── OutOfMemory              there was no memory left, also when less was asked for
    └── Busy                     the editor is already running something

Values (`Pass`, `Workflow`, edits) are pydantic models: made in Python with a wrong parameter they
raise pydantic's ValidationError, a ValueError like `InputError`; read from a file or a command line
they raise `ParameterError` or `WorkflowError`.

Messages are one line that says what is wrong, where, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffeditError(Exception):
    """Base of all errors that diffedit raises on purpose."""


class InputError(DiffeditError, ValueError):
    """The user's input is wrong. Also a ``ValueError``, so that pydantic can collect it."""


class ImageError(InputError):
    """An image is missing, cannot be decoded, or has the wrong kind of pixels."""


class MaskError(InputError):
    """A mask has another size than its image, or selects nothing."""


class OutputError(InputError):
    """An output path that exists, is an input, or cannot hold the result."""


class ParameterError(InputError):
    """An unknown edit or parameter, or a value out of its range."""


class SchedulerError(InputError):
    """An unknown scheduler, or one that cannot do what the pass asks of it."""


class WorkflowError(InputError):
    """A workflow file that cannot be read."""


class ModelError(InputError):
    """A model, or a part of one, that cannot be loaded."""


class UnsafeWeights(ModelError):
    """Weights stored as a Python pickle: loading them could run any code."""


class CapabilityError(InputError):
    """The loaded model cannot carry what an edit contributes."""


def lacking(
    who: str, missing: Iterable[str], has: Iterable[str], what: str = "the loaded model"
) -> CapabilityError:
    """The refusal of an edit that a model (or a family of them: `what`) cannot carry."""
    said = " and no ".join(repr(one) for one in sorted(missing))
    return CapabilityError(f"{who}: {what} has no {said}; it has: {', '.join(sorted(has)) or '-'}")


class ConflictError(InputError):
    """Two edits of one pass claim the same exclusive thing; the message names both."""


class PluginError(DiffeditError):
    """A plugin raised, or returned something that breaks the contract.

    Attributes:
        plugin: name of the edit or plugin at fault.
    """

    def __init__(self, plugin: str, message: str) -> None:
        super().__init__(f"{plugin}: {message}")
        self.plugin = plugin


class OutOfMemory(DiffeditError):
    """There was no memory left for what was asked; the editor stays usable."""


class Busy(DiffeditError):
    """The editor runs one thing at a time, and it is running one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'inpaint'?)"`` or the list of what there is, for error messages."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(choices)})" if choices else ""
