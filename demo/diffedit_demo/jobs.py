"""Runs, one at a time per machine: models, progress, previews and cancelling. Knows no Gradio."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffedit import Editor, Pass, Result, Step, Workflow
from diffedit.errors import InputError, nearest

log = logging.getLogger(__name__)

PREVIEW_SIDE = 320
"""Pixels on the longer side of a preview."""

_EVERY = 0.2
"""Seconds between previews: more of them would only queue up on the way to the page."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        pass_index, passes: which pass of how many, counted from 0.
        step, steps: how many steps of this pass are done, of how many.
        picture, pictures: which seed of how many, counted from 0.
        seconds_left: for this pass; None before one can tell.
        preview: a JPEG of what is coming; None where the last one is fresh enough.
    """

    pass_index: int
    passes: int
    step: int
    steps: int
    picture: int
    pictures: int
    seconds_left: float | None
    preview: bytes | None


class Cancelled(Exception):
    """The run was cancelled; the model is as it was."""


class Models:
    """The models that the page offers; one is loaded at a time.

    Args:
        sources: what may be asked for: ``"tiny"``, folders, hub ids.
        load: makes an editor of one.
    """

    def __init__(self, sources: Sequence[str], load: Callable[[str], Editor]) -> None:
        if not sources:
            raise InputError("no model to offer: name one with --model")
        self.sources = tuple(dict.fromkeys(sources))
        self._load = load
        self._loaded: tuple[str, Editor] | None = None
        self._turn = threading.Lock()

    @property
    def loaded(self) -> str | None:
        """What is loaded now."""
        return self._loaded[0] if self._loaded else None

    @contextmanager
    def editor(self, source: str, passes: Iterable[Pass] = ()) -> Iterator[Editor]:
        """An editor for one run; whoever comes meanwhile waits.

        Args:
            source: the model of the run.
            passes: of the run, which may name others.

        Raises:
            InputError: a source that was not offered: a page may not name any folder it likes.
            ModelError: it cannot be loaded.
        """
        for name in (source, *(one.model for one in passes)):
            if name is not None and name not in self.sources:
                raise InputError(f"model {name!r} is not offered here{nearest(name, self.sources)}")
        with self._turn:
            if self._loaded is None or self._loaded[0] != source:
                self._loaded = None  # both at once may be more than fits
                self._loaded = (source, self._load(source))
            editor = self._loaded[1]
            try:
                yield editor
            finally:
                if any(one.model not in (None, source) for one in passes):
                    editor.forget()


def run(
    editor: Editor,
    image: Path | None,
    workflow: Workflow,
    cancel: threading.Event,
    done: Callable[[Result], None],
) -> Iterator[Progress]:
    """Run a workflow; leaving the iterator, or `cancel`, ends it after the step under way.

    Its seeds run one after another: each picture then has the very pixels that its seed gives
    alone, and is there to look at while the next is made.

    Args:
        image: the picture to edit; None: from nothing.
        done: takes the result of each seed.

    Raises:
        Cancelled: `cancel` was set.
        InputError: something in the workflow or the picture is wrong.
    """
    for picture, seed in enumerate(workflow.seeds):
        clock = _Clock(picture, len(workflow.seeds))
        with editor.stream(image, workflow.model_copy(update={"seed": seed})) as events:
            while True:
                if cancel.is_set():
                    raise Cancelled
                step = next(events, None)
                if step is None:
                    break
                yield clock.progress(step)
            if cancel.is_set():
                raise Cancelled
            done(events.result)


class _Clock:
    """How long a step takes, and when the last preview was made."""

    def __init__(self, picture: int, pictures: int) -> None:
        self.picture, self.pictures = picture, pictures
        self.began: tuple[int, float] = (-1, 0.0)
        self.shown = 0.0

    def progress(self, step: Step) -> Progress:
        now = time.monotonic()
        left: float | None = None
        if self.began[0] != step.pass_index:
            self.began = (step.pass_index, now)  # at the end of the first step: it alone warms up
        elif step.index:
            left = (now - self.began[1]) / step.index * (step.total - step.index - 1)
        preview: bytes | None = None
        if now - self.shown >= _EVERY:
            preview = jpeg(step)
            self.shown = time.monotonic()
        return Progress(
            step.pass_index,
            step.passes,
            step.index + 1,
            step.total,
            self.picture,
            self.pictures,
            left,
            preview,
        )


def jpeg(step: Step, side: int = PREVIEW_SIDE) -> bytes:
    """What is coming, small."""
    import PIL.Image

    look = step.preview()[0].float().clamp(0, 1).cpu()
    picture = PIL.Image.fromarray((look * 255).round().byte().permute(1, 2, 0).numpy())
    scale = side / max(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, PIL.Image.Resampling.BILINEAR)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return data.getvalue()
