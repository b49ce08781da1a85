"""The README's tour runs as it stands: script, workflow, and the plugin, really installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PLUGIN = ROOT / "examples" / "diffedit-vignette"


def block(name: str) -> str:
    found = re.findall(rf"^<!-- {name} -->\n```\w+\n(.*?)^```$", README, re.M | re.S)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it and the plugin installed beside it."""
    folder = tmp_path_factory.mktemp("tour")
    shutil.copytree(ROOT / "examples", folder / "examples")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--target", str(folder / "site"), str(PLUGIN)]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    return folder


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(place / "site")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_script(place: Path) -> None:
    said = run(place, "-c", block("script")).stdout
    assert said.splitlines()[-1].startswith("20 of 20")
    source = np.asarray(Image.open(place / "examples/coffee.png"))
    for name in ("star.png", "ring-1.png", "ring-2.png"):
        made = np.asarray(Image.open(place / name))
        assert made.shape == source.shape
        assert 0 < (made != source).any(-1).mean() < 0.5
    assert Image.open(place / "heart.png").width == Image.open(place / "heart.png").height


def test_workflow_with_the_plugin(place: Path) -> None:
    (place / "workflow.yaml").write_text(block("workflow"), "utf-8")
    arguments = ["run", "workflow.yaml", "examples/coffee.png", "-o", "out.png"]
    run(place, "-m", "diffedit", *arguments, "--set", "passes.0.prompt=a cyan triangle")
    source = np.asarray(Image.open(place / "examples/coffee.png")).astype(int)
    made = np.asarray(Image.open(place / "out.png")).astype(int)
    assert made[0, 0].sum() < source[0, 0].sum()  # the vignette's corner
    assert (made[200, 300] == source[200, 300]).all()  # and its middle


def test_plugin_is_the_one_in_the_examples() -> None:
    assert block("plugin") == (PLUGIN / "diffedit_vignette.py").read_text("utf-8")


def test_plugin_is_listed(place: Path) -> None:
    said = run(place, "-m", "diffedit", "plugins", "list").stdout
    assert "vignette" in said
    assert "amount" in run(place, "-m", "diffedit", "plugins", "show", "vignette").stdout
