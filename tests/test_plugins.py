"""Broken plugins are named and left out, and the others work."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from diffedit import API_VERSION, Edit, Preprocessor, hookimpl
from diffedit.errors import ParameterError, PluginError
from diffedit.plugins import GROUP, Plugins, load

GOOD = """
from diffedit import Contribution, Edit, hookimpl
class Made(Edit):
    name = "{name}"
    def contribute(self, run):
        return Contribution()
@hookimpl
def register_edits():
    return [Made]
"""

BROKEN = {
    "raises": ("1 / 0", "ZeroDivisionError"),
    "cannot import": ("import no_such_module_anywhere", "no_such_module_anywhere"),
    "exits": ("import sys; sys.exit(3)", "SystemExit"),
    "syntax": ("def", "SyntaxError"),
    "unknown argument": (
        "from diffedit import hookimpl\n@hookimpl\ndef step_done(step, more): pass",
        "more",
    ),
    "unknown hook": (
        "from diffedit import hookimpl\n@hookimpl\ndef register_edit(): return []",
        "register_edit",
    ),
    "half good": (
        GOOD.format(name="half") + "@hookimpl\ndef pass_started(nonsense): pass",
        "nonsense",
    ),
    "register raises": (
        "from diffedit import hookimpl\n@hookimpl\ndef register_edits(): raise KeyError('k')",
        "KeyError",
    ),
    "no list": ("from diffedit import hookimpl\n@hookimpl\ndef register_edits(): return 7", "int"),
    "no classes": (
        GOOD.format(name="i").replace("[Made]", "[Made()]"),
        "not an Edit class",
    ),
    "no name": (
        GOOD.format(name="n").replace("name =", "version ="),
        "without a name",
    ),
    "twice": (GOOD.format(name="t").replace("[Made]", "[Made, Made]"), "registered twice"),
    "taken": (GOOD.format(name="good"), "already registered"),
    "too new": (GOOD.format(name="n") + f"diffedit_api = {API_VERSION + 1}", "plugin API"),
    "strange version": (GOOD.format(name="s") + "diffedit_api = 'x'", "TypeError"),
}


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)

    def made(name: str, text: str) -> EntryPoint:
        module = f"plugin_{abs(hash((name, text)))}"
        (tmp_path / f"{module}.py").write_text(text)
        return EntryPoint(name, module, GROUP)

    yield made
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_plugin_is_named_and_the_others_work(what: str, point: Any) -> None:
    text, said = BROKEN[what]
    plugins = load(
        [
            point("first", GOOD.format(name="good")),
            point("bad", text),
            point("last", GOOD.format(name="fine")),
        ]
    )
    assert set(plugins.edits) == {"good", "fine"}
    assert set(plugins.broken) == {"bad"}
    assert said in plugins.broken["bad"]
    assert "\n" not in plugins.broken["bad"]
    assert plugins.manager.get_plugin("bad") is None
    assert not plugins.manager.hook.pass_started.get_hookimpls()
    with pytest.raises(ParameterError, match=r"good.*'bad' is broken"):
        plugins.edit("goood")


def test_two_plugins_of_one_name(point: Any) -> None:
    plugins = load([point("p", GOOD.format(name="a")), point("p", GOOD.format(name="b"))])
    assert set(plugins.edits) == {"a"}
    assert "under this name" in plugins.broken["p"]


def test_an_interrupt_while_loading_passes_through(point: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        load([point("p", "raise KeyboardInterrupt")])


def test_what_is_registered_and_whose_it_is() -> None:
    class Made(Edit):
        name: ClassVar[str] = "made"

    plugin = types.ModuleType("plugin")

    @hookimpl
    def register_edits() -> list[type[Edit]]:
        return [Made]

    @hookimpl
    def register_preprocessors() -> list[Preprocessor]:
        return [Preprocessor("p", lambda weights: lambda pixels: pixels, "nothing")]

    plugin.register_edits = register_edits  # type: ignore[attr-defined]
    plugin.register_preprocessors = register_preprocessors  # type: ignore[attr-defined]
    plugins = Plugins()
    plugins.register(plugin, "mine")
    assert plugins.edit("made") is Made
    assert plugins.owner("edit", "made") == plugins.owner("preprocessor", "p") == "mine"
    with pytest.raises(PluginError, match="under this name"):
        plugins.register(plugin, "mine")
    assert plugins.edit("made") is Made
    with pytest.raises(TypeError):
        plugins.edits["other"] = Made  # type: ignore[index]


def test_the_order_of_plugins_decides_nothing(point: Any) -> None:
    points = [point(n, GOOD.format(name=n)) for n in ("a", "b", "c")]
    one, other = load(points), load(points[::-1])
    assert dict(one.edits).keys() == dict(other.edits).keys()
    for name in one.edits:
        assert one.owner("edit", name) == other.owner("edit", name) == name
