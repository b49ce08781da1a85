"""What all tests share: an offline, quiet machine, and how hypothesis runs."""

import os

# Before anything imports torch. Workers that each take all cores slow each other down.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no bug, and a failure must come back in the next run.
settings.register_profile("diffedit", deadline=None, derandomize=True)
settings.load_profile("diffedit")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return Path(__file__).resolve().parent.parent
