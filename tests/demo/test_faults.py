"""What the engine says is wrong stands beside the field that it is about."""

from __future__ import annotations

import pytest

from diffedit.errors import InputError
from diffedit_demo.composer import Fault
from diffedit_demo.faults import fault_of
from diffedit_demo.stack import EditItem, PassItem, Stack

STACK = Stack((PassItem(uid="p", edits=(EditItem("style", uid="e"),)),))


@pytest.mark.parametrize(
    ("said", "fault"),
    {
        "the page: passes.0.steps is 0, should be 1": Fault(
            "p", "steps", "steps is 0, should be 1"
        ),
        "the page: passes.0.edits.0.style.strength is 3": Fault("e", "strength", "strength is 3"),
        "the page: passes.0.edits.0.style lacks 'image', an image": Fault(
            "e", "image", "style lacks 'image', an image"
        ),
        "passes.0.edits.0.style.image: it is gone": Fault("e", "image", "it is gone"),
        "settings: seed is -1, should be 0": Fault("run", "seed", "seed is -1, should be 0"),
        "passes.7.steps is 0": Fault("", "", "passes.7.steps is 0"),
        "strength 0.1 of 2 steps leaves no step": Fault(
            "", "", "strength 0.1 of 2 steps leaves no step"
        ),
    }.items(),
)
def test_where_an_error_belongs(said: str, fault: Fault) -> None:
    assert fault_of(STACK, InputError(said)) == fault
