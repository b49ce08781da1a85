"""The user's object: a model and plugins; runs passes on pictures."""

from __future__ import annotations

import logging
import operator
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from diffedit import plugins as plugin_module
from diffedit.box import Box
from diffedit.canvas import Canvas, Frame
from diffedit.edit import Edit
from diffedit.embeddings import Embeddings
from diffedit.errors import Busy, DiffeditError, InputError, ModelError
from diffedit.fields import same_model
from diffedit.handover import Handover, Setting
from diffedit.images import ImageSource, Picture, open_picture
from diffedit.memory import exhausted, let_go, told
from diffedit.models import devices, loading, weights
from diffedit.models.protocol import LatentModel
from diffedit.models.turns import turns
from diffedit.passes import run_pass
from diffedit.plugins import Plugins
from diffedit.result import Result
from diffedit.sampler import Step
from diffedit.workflow import Pass, Workflow

log = logging.getLogger(__name__)

#: What can be run: a pass, several, or a workflow.
Runnable = Pass | Sequence[Pass] | Workflow


class Editor:
    """Runs passes on pictures, one thing at a time.

    Args:
        model: a loaded model.
        plugins: the plugins to use; None: all that are installed.
        source: what a workflow calls the model; None: what the model says of itself.

    Attributes:
        model: the loaded model: encode, decode, capabilities.
        source: what a workflow calls the model.
    """

    def __init__(
        self, model: LatentModel, plugins: Plugins | None = None, source: str | None = None
    ) -> None:
        self.model = model
        self.source = str(model.info["source"]) if source is None else source
        self.plugins = plugin_module.default() if plugins is None else plugins
        self._lock = threading.Lock()
        self._resources: dict[str, Any] = {}
        #: What the places were like that they came from.
        self._stamps: dict[str, object] = {}
        self._embeddings = Embeddings()
        #: With which the models that passes name are loaded, too.
        self._loading: Mapping[str, Any] = {}

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = loading.TINY,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        variant: str | None = None,
        compiled: bool | str = False,
        config: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        max_memory: int | str | None = None,
        low_memory: bool = False,
        plugins: Plugins | None = None,
    ) -> Editor:
        """Load a model and make an editor of it; arguments as in `diffedit.models.loading.load`.

        Raises:
            ModelError: the model cannot be loaded.
        """
        found = plugin_module.default() if plugins is None else plugins
        model = loading.load(
            source,
            found.families,
            device=device,
            dtype=dtype,
            revision=revision,
            variant=variant,
            compiled=compiled,
            config=config,
            vae=vae,
            max_memory=max_memory,
            low_memory=low_memory,
        )
        editor = cls(model, found, os.fspath(source))
        editor._loading = {
            "dtype": dtype,
            "max_memory": max_memory,
            "low_memory": low_memory,
            "variant": variant,
        }
        return editor

    @property
    def edits(self) -> Mapping[str, type[Edit]]:
        """Edit classes by name."""
        return self.plugins.edits

    def run(
        self,
        image: ImageSource | Result | None,
        what: Runnable,
        *,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        compat: bool = False,
    ) -> Result:
        """Edit a picture, or make one from nothing.

        Args:
            image: a path, bytes, PIL image or NumPy array; None: start from nothing; or a result
                whose last pass stopped early, from whose latents the first one goes on: a refiner's
                editor from those of a base model's.
            what: a pass, several in a row, or a workflow.
            seed: one, or several for as many pictures at once; None: the workflow's (0 for passes).
            size: (width, height) of a picture from nothing; None: the workflow's, else the model's
                own. Otherwise the result has the image's size.
            compat: for comparisons with diffusers' own pipelines only: their draw order, no crop.

        Raises:
            InputError: something in the image, the passes or the seeds is wrong.
            PluginError: an edit broke the contract; its effects are undone.
            OutOfMemory: there is too little memory, also with all that the model can give up.
            Busy: the editor is running something.
        """
        with self.stream(image, what, seed=seed, size=size, compat=compat) as events:
            for _ in events:
                pass
            return events.result

    def stream(
        self,
        image: ImageSource | Result | None,
        what: Runnable,
        *,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        compat: bool = False,
    ) -> Stream:
        """Like `run`, step by step: iterate over the steps, then read ``.result``.

        Leaving the ``with`` block cancels after the current model call and undoes everything.
        """
        workflow = self._workflow(what)
        seeds = _seeds(workflow.seed if seed is None else seed)
        size = workflow.size if size is None else _size(size)
        if isinstance(image, Result):
            if size is not None or (seed is not None and seeds != image.seeds):
                raise InputError("a run that goes on from a result has its size and its seeds")
            seeds = image.seeds
        if image is None and size is None:
            size = (self.model.sides[0],) * 2
        said = {"seed": seeds[0] if len(seeds) == 1 else seeds, "size": size}
        return Stream(self._steps(image, workflow.model_copy(update=said), seeds, compat))

    @torch.no_grad()  # as a decorator: a `with` around yields would reach into the caller's code
    def _steps(
        self,
        image: ImageSource | Result | None,
        workflow: Workflow,
        seeds: tuple[int, ...],
        compat: bool,
    ) -> Generator[Step, None, Result]:
        if not self._lock.acquire(blocking=False):
            raise Busy("this editor is running something; wait for it, or load another editor")
        try:
            return (yield from self._run(image, workflow, seeds, compat))
        except Exception as error:
            # A model that a pass names, and that does not fit, is told as itself.
            if isinstance(error, ModelError) or not exhausted(error):
                raise
            let_go(error)
            raise told("around the passes of this run") from None
        finally:
            self._lock.release()

    def _run(
        self,
        image: ImageSource | Result | None,
        workflow: Workflow,
        seeds: tuple[int, ...],
        compat: bool,
    ) -> Generator[Step, None, Result]:
        kept = self._embeddings
        setting = Setting(self.model, self.plugins, seeds, compat, self._resource, embeddings=kept)
        past: tuple[dict[str, Any], ...] = ()
        if isinstance(image, Result):
            given, source, past = self._unfinished(image), image.source, image.passes
            workflow = self._continued(image, workflow)
        else:
            source = None if image is None else open_picture(image)
            given = Handover(self._canvas(source, workflow.size))
        # Before anything runs: a model that is not there is told at once.
        settings = [self._setting(setting, one.model) for one in workflow.passes[len(past) :]]
        latents: torch.Tensor | None = None
        records: list[dict[str, Any]] = list(past)
        for index, where in enumerate(settings, len(past)):
            where = replace(where, position=(index, len(workflow.passes)))
            outcome = yield from run_pass(workflow.passes[index], given, where)
            given = outcome.handover
            latents = latents if outcome.latents is None else outcome.latents
            records.append(outcome.record)
        pictures = tuple(outcome.shown.picture(item) for item in range(len(seeds)))
        model = dict(self.model.info)
        loaded = tuple(sorted(self._resources))
        made = pictures, latents, seeds, workflow, tuple(records), model, source, loaded
        return Result(*made, given if given.unfinished else None)

    def _setting(self, setting: Setting, source: str | None) -> Setting:
        """The setting of a pass, which may be on another model; that is loaded once."""
        if source is None or same_model(source, self.source):
            return setting
        families, own = self.plugins.families, self.model
        asked = self._loading.get("dtype")
        said = {**self._loading, "dtype": asked if asked in devices.NARROW else own.dtype}
        model: LatentModel = self._resource(
            f"model:{source}",
            lambda: loading.load(source, families, device=own.device, **said),
        )

        def load(key: str, loader: Callable[[], Any], of: str | None = None) -> Any:
            return self._resource(f"{key} for {source}", loader, of)  # it may fit that model alone

        return replace(setting, model=model, load=load)

    def _continued(self, past: Result, workflow: Workflow) -> Workflow:
        """What was run and what is to be, as one workflow that makes the same again."""
        before = past.workflow
        passes = [
            one if one.model else one.model_copy(update={"model": workflow.model})
            for one in workflow.passes
        ]
        same = same_model(before.model, workflow.model)
        passes = list(workflow.passes) if same else passes
        return before.model_copy(update={"passes": (*before.passes, *passes)})

    def _unfinished(self, result: Result) -> Handover:
        """Where a run left off whose last pass stopped early, maybe on another model."""
        if result.handover is None:
            raise InputError(
                "this result is finished: its picture is result.pixels; a run goes on from one"
                " whose last pass has a stop below 1"
            )
        handover: Handover = result.handover
        return handover

    def _workflow(self, what: object) -> Workflow:
        if isinstance(what, Workflow):
            if not same_model(what.model, self.source):
                log.warning(
                    "the workflow asks for the model %r and runs on %r", what.model, self.source
                )
            return what.model_copy(update={"model": self.source})
        passes = tuple(what) if isinstance(what, list | tuple) else (what,)
        if not passes or not all(isinstance(one, Pass) for one in passes):
            said = ", ".join(type(one).__name__ for one in passes) or "nothing"
            raise InputError(
                f"cannot run {said}: give a Pass (edits go into Pass(edits=[...])), a list of"
                " them, or a Workflow (a file opens with Workflow.load)"
            )
        return Workflow(model=self.source, passes=passes)

    def _canvas(self, source: Picture | None, size: tuple[int, int] | None) -> Canvas:
        if source is None:
            assert size is not None
            width, height = size
            if min(width, height) < self.model.grid:
                raise InputError(f"size {width}x{height}: sides must be at least {self.model.grid}")
        else:
            width, height = source.size
            if size is not None and size != source.size:
                raise InputError(
                    f"size is for pictures made from nothing: the result has the image's own,"
                    f" {width}x{height}"
                )
        whole = Frame(Box(0, 0, width, height), (width, height), (width, height))
        return (
            Canvas.blank((width, height), whole) if source is None else Canvas.open(source, whole)
        )

    def forget(self) -> None:
        """Let go of what was loaded besides the model, and of prompts that were read."""
        self._resources.clear()
        self._stamps.clear()
        self._embeddings.clear()

    def _resource(self, key: str, loader: Callable[[], Any], of: str | None = None) -> Any:
        now = None if of is None else weights.stamp(of)
        gone = now is None and key in self._resources  # and is still here
        if not gone and (key not in self._resources or self._stamps.get(key) != now):
            if self._resources.pop(key, None) is not None:
                self._embeddings.clear()  # prompts may have been read with what it was
            self._resources[key], self._stamps[key] = loader(), now
        return self._resources[key]


class Stream(Iterator[Step]):
    """The steps of a run; a context manager, so that leaving it cancels the run."""

    def __init__(self, steps: Generator[Step, None, Result]) -> None:
        self._steps = steps
        self._result: Result | None = None

    def __next__(self) -> Step:
        try:
            with turns.running():
                return next(self._steps)
        except StopIteration as end:
            if end.value is not None:
                self._result = end.value
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the run, if it is still going; the model is left as it was."""
        self._steps.close()  # undoing makes no layers, so it needs no turn

    @property
    def result(self) -> Result:
        """The result, once the steps are used up.

        Raises:
            DiffeditError: the run is not finished, or was cancelled.
        """
        if self._result is None:
            raise DiffeditError("there is no result: the run is not finished, or was cancelled")
        return self._result


def _size(size: object) -> tuple[int, int]:
    """A checked (width, height)."""
    try:
        width, height = (operator.index(side) for side in size)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InputError(f"size {size!r}: needs (width, height) in whole pixels") from None
    return width, height


def _seeds(seed: object) -> tuple[int, ...]:
    """Checked seeds, one per picture."""
    given: list[Any] = list(seed) if isinstance(seed, Iterable) else [seed]
    if not given:
        raise InputError("no seed given: one per picture")
    try:
        seeds = tuple(operator.index(one) for one in given)
    except TypeError:
        raise InputError(f"seed {seed!r}: needs a whole number from 0 to 2**63 - 1") from None
    for one in seeds:
        if not 0 <= one < 2**63:
            raise InputError(f"seed {one!r}: needs a whole number from 0 to 2**63 - 1")
    if len(set(seeds)) < len(seeds):
        raise InputError("a seed stands twice, and each makes a picture of its own: give it once")
    return seeds
