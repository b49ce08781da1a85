"""Every text is there in every language, and takes the same values."""

from __future__ import annotations

import re
import string

import pytest

import diffedit
from diffedit_demo.presets import presets
from diffedit_demo.texts import CHINESE, ENGLISH, language, say


def values(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("key", ENGLISH)
def test_every_text_is_there_in_chinese_with_the_same_values(key: str) -> None:
    assert values(CHINESE[key]) == values(ENGLISH[key])
    assert key in ("title", "opened") or re.search(r"[\u4e00-\u9fff]", CHINESE[key])


def test_no_text_is_left_over() -> None:
    assert set(CHINESE) == set(ENGLISH)


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
    assert say("en", "pass", number=2) == "Pass 2"
    assert say("xx", "run") == "Run"


def test_presets_need_their_edits() -> None:
    assert set(presets(diffedit.edits())) == {"paint", "restyle", "vary", "make"}
    assert set(presets({"img2img"})) == {"vary", "make"}
    assert all(key in ENGLISH for key in presets(diffedit.edits()))
