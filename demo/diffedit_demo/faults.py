"""From what the engine says is wrong to the field of the page that it belongs to."""

from __future__ import annotations

import re

from diffedit.errors import DiffeditError
from diffedit_demo.composer import Fault
from diffedit_demo.stack import Stack

_PLACE = re.compile(r"^(?:the page: )?(passes\.\d+(?:\.\w+)*)(: )?|^settings: (?P<setting>\w+)")
_LACKS = re.compile(r" lacks '(\w+)'")


def fault_of(stack: Stack, error: DiffeditError) -> Fault:
    """Beside which field an error belongs, and what is to be said there."""
    said = str(error)
    found = _PLACE.match(said)
    if found is None:
        return Fault("", "", said)
    if found["setting"]:
        return Fault("run", found["setting"], said.removeprefix("settings: "))
    at = stack.at(found[1])
    if at is None:
        return Fault("", "", said)
    uid, name = at
    rest = said[found.end() :]
    if lacks := _LACKS.match(rest):
        name = lacks[1]
    # "steps is 0, should be …": the place itself stands beside it on the page.
    return Fault(uid, name, rest if found[2] else found[1].rpartition(".")[2] + rest)
