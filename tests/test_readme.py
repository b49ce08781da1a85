"""The README's commands are what `.ci/run` runs, and they do what the README says."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def command(name: str, document: str) -> str:
    """The one line in the fenced block behind the mark `name`."""
    blocks = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", document, re.M | re.S)
    assert len(blocks) == 1, f"one block marked {name}, not {len(blocks)}"
    assert "\n" not in blocks[0], f"the block marked {name} is one command on one line"
    return str(blocks[0])


def edit_arguments() -> list[str]:
    """The arguments of `diffedit` in the README's first command."""
    last = command("install", README).split(" && ")[-1]
    program, *arguments = shlex.split(last)
    assert program == "diffedit"
    return arguments


def test_ci_runs_the_readme() -> None:
    listed = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--list"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert listed.stdout.splitlines() == [
        command("install", README),
        command("check", CONTRIBUTING),
        command("test", README),
    ]


def test_readme_commands_come_first_and_start_from_nothing() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)\n```$", README, re.M | re.S)
    assert blocks[:2] == [command("install", README), command("test", README)]
    # Each works in a shell of its own.
    assert blocks[0].startswith("python3 -m venv .venv && . .venv/bin/activate && ")
    assert blocks[1].startswith(". .venv/bin/activate && pytest")


def test_contributing_uses_the_same_commands() -> None:
    install = command("install", README).rpartition(" && ")[0]
    assert install in CONTRIBUTING
    assert command("test", README) in CONTRIBUTING


def test_first_command_edits_the_photograph_inside_the_mask_only(tmp_path: Path) -> None:
    arguments = edit_arguments()
    assert arguments[0] == "edit"
    source = arguments[1]
    where = arguments.index("-o") + 1
    output = tmp_path / arguments[where]
    arguments[where] = str(output)
    (inpaint,) = (a for a in arguments if a.startswith("inpaint:"))
    parameters = dict(p.split("=") for p in inpaint.removeprefix("inpaint:").split(","))

    subprocess.run(
        [sys.executable, "-c", "from diffedit.cli import main; main()", *arguments],
        check=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )

    before = np.asarray(Image.open(ROOT / source))
    after = np.asarray(Image.open(output))
    mask = np.asarray(Image.open(ROOT / parameters["mask"]).convert("L")) >= 128
    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    assert changed[mask].mean() > 0.9
    # No changed pixel lies further than `feather` from the mask.
    rows, columns = np.nonzero(mask)
    apart = [
        np.hypot(rows - y, columns - x).min()
        for y, x in zip(*np.nonzero(changed & ~mask), strict=True)
    ]
    assert max(apart, default=0.0) <= int(parameters["feather"])


def test_readme_warns_of_the_second_opencv() -> None:
    assert re.search(r"Do not install `opencv-python`", README)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<img[^>]*\ssrc=\"([^\"]+)\"", text)
    local = [a or b for a, b in links if not re.match(r"[a-z]+:", a or b)]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing


def test_constraints_pin_every_dependency_within_its_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        assert name in pins, f"constraints.txt has no version of {wanted.name}"
        assert pins[name] in wanted.specifier, f"{pins[name]} is not {wanted}"
