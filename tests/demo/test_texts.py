"""Every text is there in every language, and takes the same values."""

from __future__ import annotations

import re
import string

import pytest

import diffedit
from diffedit import Pass
from diffedit_demo import texts
from diffedit_demo.forms import fields, pass_fields
from diffedit_demo.presets import presets
from diffedit_demo.settings import Settings
from diffedit_demo.texts import CANVAS, COMPOSER, KEYS, PAGE, VIEWER, WORDS, language, say

ALL = {"page": PAGE, "viewer": VIEWER, "composer": COMPOSER, "canvas": CANVAS}
SAME = {"title", "opened", "crosshair"}
"""Names and numbers alone."""


def values(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


@pytest.mark.parametrize("where", ALL)
def test_every_text_is_there_in_chinese_with_the_same_values(where: str) -> None:
    english, chinese = ALL[where]["en"], ALL[where]["zh"]
    assert set(chinese) == set(english)
    for key, text in english.items():
        assert values(chinese[key]) == values(text), key
        assert key in SAME or is_chinese(chinese[key]), key
        assert not is_chinese(text), key


def test_every_key_is_explained_in_chinese() -> None:
    assert len(KEYS["zh"]) == len(KEYS["en"])
    assert all(is_chinese(said) for said in KEYS["zh"].values())


def test_the_forms_of_what_we_ship_have_chinese_words() -> None:
    schemas = [edit.model_json_schema() for edit in diffedit.edits().values()]
    listed = [one for schema in schemas for one in fields(schema, {})]
    listed += pass_fields(Pass.model_json_schema(), {})
    listed += fields(Settings.model_json_schema(), {})
    said = {word for one in listed for word in (one.title, one.help)}
    assert said - set(WORDS["zh"]) == set()
    assert set(WORDS["zh"]) - said == set()  # none is left over
    assert all(is_chinese(word) for word in WORDS["zh"].values())


@pytest.mark.parametrize("where", ALL)
def test_no_text_is_unused(where: str) -> None:
    """Each key stands somewhere in the sources besides the texts themselves."""
    from pathlib import Path

    here = Path(texts.__file__).parent
    source = "".join(
        file.read_text("utf-8")
        for file in here.rglob("*")
        if file.suffix in (".py", ".js", ".html") and file.name != "texts.py"
    )
    built = {f"preset_{key}" for key in presets(diffedit.edits())}
    for key in ALL[where]["en"]:
        assert key in built or re.search(rf"\b{key}\b", source), key


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en;q=0.5, zh-TW;q=0.7", "zh"),
        ("de-DE, en", "en"),
        ("zh;q=0, en", "en"),
        ("fr", "en"),
        ("", "en"),
        ("zh;q=x", "en"),
    ],
)
def test_the_browsers_language_chooses(header: str, found: str) -> None:
    assert language(header) == found


def test_values_are_put_in() -> None:
    assert say("en", "opened", name="a", width=2, height=3) == "a, 2×3"
    assert say("xx", "run") == "Run"


def test_presets_need_their_edits() -> None:
    assert set(presets(diffedit.edits())) == {
        "paint",
        "remove",
        "restyle",
        "follow",
        "vary",
        "make",
    }
    assert set(presets({"img2img"})) == {"vary", "make"}
    assert all(f"preset_{key}" in COMPOSER["en"] for key in presets(diffedit.edits()))
