"""Finds plugins, loads them one by one, and says which of them are broken and why.

pluggy validates and calls. The entry points are loaded here and not by pluggy's
``load_setuptools_entrypoints``, because one plugin that cannot be imported would end the start, and
a name that is taken twice would be passed over without a word.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from diffedit import hookspecs
from diffedit.errors import DiffeditError, ParameterError, PluginError, nearest

if TYPE_CHECKING:
    from diffedit.edit import Edit
    from diffedit.models.protocol import ModelFamily
    from diffedit.preprocessors import Preprocessor

GROUP = "diffedit"
#: Grows when a plugin written for an older value could stop working.
API_VERSION = 1

log = logging.getLogger(__name__)


class Named(Protocol):
    """Something a plugin registers under a name."""

    @property
    def name(self) -> str:
        """What it is registered under."""


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Installed:
    """An installed plugin, as its entry point describes it.

    Attributes:
        name: the entry point's name.
        distribution: what it was installed from.
        version: that distribution's version.
        value: the module it names.
    """

    name: str
    distribution: str
    version: str
    value: str


def _found() -> list[EntryPoint]:
    """The entry points of the group; diffedit's own first, then by distribution and name."""

    def rank(point: EntryPoint) -> tuple[bool, str, str]:
        return _distribution(point) != "diffedit", _distribution(point), point.name

    return sorted(entry_points(group=GROUP), key=rank)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else ""


def installed() -> list[Installed]:
    """What is installed, from metadata alone: imports no plugin."""
    return [
        Installed(p.name, _distribution(p), p.dist.version if p.dist else "", p.value)
        for p in _found()
    ]


class Plugins:
    """Loaded plugins and what they register.

    Attributes:
        manager: pluggy's manager; its hooks call the plugins.
        edits: edit classes by name.
        preprocessors: preprocessors by name.
        families: model families by name.
        broken: plugins that could not be loaded, by name, and why.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self._edits: dict[str, type[Edit]] = {}
        self._preprocessors: dict[str, Preprocessor] = {}
        self._families: dict[str, ModelFamily] = {}
        self._broken: dict[str, str] = {}
        self._owners: dict[tuple[str, str], str] = {}

    @property
    def edits(self) -> Mapping[str, type[Edit]]:
        """Edit classes by name."""
        return MappingProxyType(self._edits)

    @property
    def preprocessors(self) -> Mapping[str, Preprocessor]:
        """Preprocessors by name."""
        return MappingProxyType(self._preprocessors)

    @property
    def families(self) -> Mapping[str, ModelFamily]:
        """Model families by name."""
        return MappingProxyType(self._families)

    @property
    def broken(self) -> Mapping[str, str]:
        """Why each plugin that could not be loaded was left out."""
        return MappingProxyType(self._broken)

    def edit(self, name: str) -> type[Edit]:
        """The edit class of that name.

        Raises:
            ParameterError: there is none; names the nearest.
        """
        if name not in self._edits:
            why = "".join(
                f"; plugin {plugin!r} is broken: {why}" for plugin, why in self.broken.items()
            )
            raise ParameterError(f"no edit {name!r}{nearest(name, self._edits)}{why}")
        return self._edits[name]

    def load(self, point: EntryPoint) -> None:
        """Load one entry point; a failure is recorded in `broken` and goes no further."""
        try:
            self.register(point.load(), point.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a script that was named as a plugin
            said = " ".join(str(error).split()) or "no message"
            self._broken[point.name] = f"{type(error).__name__}: {said}"
            log.warning("plugin %r was left out: %s", point.name, self._broken[point.name])

    def register(self, plugin: Any, name: str) -> None:
        """Register a module or object that implements hooks; all of it or, on failure, nothing.

        Raises:
            PluginError: it breaks the contract.
        """
        wants = getattr(plugin, "diffedit_api", API_VERSION)
        if wants > API_VERSION:
            raise PluginError(name, f"needs diffedit's plugin API {wants}; this is {API_VERSION}")
        if self.manager.has_plugin(name):
            raise PluginError(name, "another plugin is registered under this name")
        try:
            self.manager.register(plugin, name)
            self.manager.check_pending()
            edits = self._ask(name, "register_edits")
            preprocessors = self._ask(name, "register_preprocessors")
            families = self._ask(name, "register_models")
            from diffedit.edit import Edit  # here, so that listing plugins stays cheap

            for one in edits:
                if not (isinstance(one, type) and issubclass(one, Edit)):
                    raise PluginError(name, f"register_edits returned {one!r}, not an Edit class")
            self._check(name, edits, self._edits)
            self._check(name, preprocessors, self._preprocessors)
            self._check(name, families, self._families)
        except BaseException:
            if self.manager.get_plugin(name) is plugin:
                self.manager.unregister(name=name)
            raise
        for kind, given, into in (
            ("edit", edits, self._edits),
            ("preprocessor", preprocessors, self._preprocessors),
            ("family", families, self._families),
        ):
            for one in given:
                into[one.name] = one
                self._owners[kind, one.name] = name

    def owner(self, kind: str, name: str) -> str:
        """The plugin that registered an "edit", "preprocessor" or "family"."""
        return self._owners[kind, name]

    def notify(self, hook: str, **event: Any) -> None:
        """Call the observers of a hook.

        Raises:
            PluginError: one of them raised; names its plugin.
        """
        observers = {i.plugin_name for i in getattr(self.manager.hook, hook).get_hookimpls()}
        for name in sorted(observers):
            try:
                self._only(name, hook)(**event)
            except DiffeditError:
                raise
            except Exception as error:
                said = str(error).splitlines()[0] if str(error) else "no message"
                message = f"{hook} raised {type(error).__name__}: {said}"
                raise PluginError(name, message) from error

    def _only(self, name: str, hook: str) -> Any:
        """The caller of one plugin's implementation of a hook."""
        plugin = self.manager.get_plugin(name)
        return self.manager.subset_hook_caller(
            hook, [other for other in self.manager.get_plugins() if other is not plugin]
        )

    def _ask(self, name: str, hook: str) -> list[Any]:
        answers = self._only(name, hook)()
        if any(not isinstance(answer, list | tuple) for answer in answers):
            raise PluginError(name, f"{hook} returned {type(answers[0]).__name__}, not a list")
        given = [one for answer in answers for one in answer]
        if any(not isinstance(getattr(one, "name", None), str) for one in given):
            raise PluginError(name, f"{hook} returned something without a name")
        return given

    @staticmethod
    def _check(name: str, given: list[Any], taken: Mapping[str, Any]) -> None:
        for place, one in enumerate(given):
            if one.name in taken:
                raise PluginError(name, f"{one.name!r} is already registered by another plugin")
            if one.name in (other.name for other in given[:place]):
                raise PluginError(name, f"{one.name!r} is registered twice")


def load(points: list[EntryPoint] | None = None) -> Plugins:
    """A new plugin manager with every installed plugin loaded, diffedit's own families included."""
    from diffedit.models import families

    plugins = Plugins()
    plugins.register(families, "models")
    for point in _found() if points is None else points:
        plugins.load(point)
    return plugins


@functools.cache
def default() -> Plugins:
    """The installed plugins, loaded once per process."""
    return load()


def edits() -> Mapping[str, type[Edit]]:
    """Edit classes by name, from all installed plugins. Needs no model."""
    return default().edits
