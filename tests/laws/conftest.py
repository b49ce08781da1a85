"""The laws hold on every family of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.families import FAMILIES, Tiny
from tests.laws import tools


@pytest.fixture(scope="module", autouse=True, params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """The family that the tools make models of."""
    chosen: Tiny = request.param
    before = tools.CHOSEN.family
    tools.CHOSEN.family = chosen
    yield chosen
    tools.CHOSEN.family = before  # tests outside this folder use the tools too
