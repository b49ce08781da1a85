"""What a session has on its desk: the picture, its history, what was just made. Knows no Gradio."""

from __future__ import annotations

import base64
import io
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from diffedit import Picture, Result, Workflow
from diffedit.errors import ImageError, InputError, MaskError, WorkflowError
from diffedit.images import encode_png, open_picture, read_mask
from diffedit.plugins import Plugins
from diffedit_demo.history import History, Node
from diffedit_demo.sessions import Session
from diffedit_demo.settings import Settings
from diffedit_demo.stack import Stack, picture_parameters

SHOWN_SIDE = 2048
"""Pixels on the longer side of what a browser is given to show; masks are drawn on its grid."""

MOST_PIXELS = 64_000_000
"""Of a picture that a visitor sends, in whatever way."""

MOST_WRITTEN = 1 << 17
"""Characters of a workflow, besides the pictures in it: reading so many takes seconds."""

_PICTURE = re.compile(r";base64,[A-Za-z0-9+/=]*")

KEYWORD = "diffedit"
"""The PNG text that holds the workflow a picture was made by."""


@dataclass(frozen=True)
class Candidate:
    """A picture that was made and is not accepted yet."""

    file: Path
    shown: Path
    seed: int
    workflow: str
    size: tuple[int, int]
    parent: Node | None


@dataclass(frozen=True)
class Changes:
    """How two pictures differ, in pixels.

    Attributes:
        inside: changed where some mask of the workflow is white or grey.
        outside: changed where none is; without masks, all that changed.
        reach: how far from the masks the farthest of those lies; 0 without any.
        masked: whether the workflow had masks.
    """

    inside: int
    outside: int
    reach: float
    masked: bool


@dataclass(frozen=True)
class Order:
    """What is to be run, as the page was when Run was pressed."""

    what: Any
    source: Node | None
    cancel: threading.Event = field(default_factory=threading.Event)


@dataclass
class Desk:
    """One session's work."""

    session: Session
    history: History = field(default_factory=History)
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int = 0
    waiting: Order | None = None
    running: Order | None = None
    outcome: str = ""
    """What was said of the last run when it ended; nothing while one waits or runs."""
    left: bool = False
    """Whether its page was closed: then the same tab may come back to it."""
    number: int = field(default_factory=lambda: secrets.randbelow(1 << 40))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- orders -----------------------------------------------------------------------------------

    def order(self, what: Any) -> None:
        """Have something run once it is this session's turn, in place of what waited."""
        with self._lock:
            self.waiting, self.outcome = Order(what, self.history.now), ""

    def begin(self) -> Order | None:
        """Its turn has come; None where it was cancelled meanwhile."""
        with self._lock:
            self.running, self.waiting = self.waiting, None
            return self.running

    def cancel(self) -> bool:
        """End what waits or runs. Whether something runs, which ends after its step under way."""
        with self._lock:
            self.waiting = None
            if self.running is not None:
                self.running.cancel.set()
            return self.running is not None

    # --- opening ----------------------------------------------------------------------------------

    def open(self, upload: Path, name: str = "") -> Node:
        """Put a picture on the desk; its bytes are kept as they came.

        Raises:
            ImageError: not a picture, or one too large to work on here.
        """
        picture = self.checked(upload, name or upload.name)
        file = self.session.add(upload, upload.suffix.lower() or ".png", pinned=True)
        shown = self.show(picture)
        return self.history.add(file, shown, name or upload.name, picture.size)

    @staticmethod
    def checked(file: Path, name: str = "this picture") -> Picture:
        """A picture that a visitor sent, in memory.

        Raises:
            ImageError: no picture; or one whose header alone says that it would fill the memory.
        """
        try:
            with PIL.Image.open(file) as header:
                width, height = header.size
        except PIL.Image.DecompressionBombError:  # `bound_pictures`, or Pillow's own limit
            width = height = 1 << 20
        except Exception:  # what Pillow does not know, diffedit.images may, or says why not
            width = height = 0
        if width * height > MOST_PIXELS:
            most = MOST_PIXELS // 10**6
            raise ImageError(f"{name} has more than {most} million pixels: scale it down first")
        return open_picture(file.read_bytes())

    def show(self, picture: Picture, side: int = SHOWN_SIDE) -> Path:
        """A copy that a browser can show: 8 bits, no larger than `side`."""
        image = picture.to_pil()
        if image.mode not in ("RGB", "RGBA", "L"):
            image = image.convert("RGBA" if picture.has_alpha else "RGB")
        image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "PNG", compress_level=1)
        return self.session.add(data.getvalue(), ".png", pinned=True)

    def remove(self) -> None:
        """Take the present picture out of the history, and delete its files.

        Raises:
            InputError: there is none, or something is being made of it.
        """
        now = self.history.now
        if now is None:
            raise InputError("there is no picture to remove: open one")
        with self._lock:
            at_work = [one.source for one in (self.waiting, self.running) if one is not None]
        used = (*at_work, *(one.parent for one in self.candidates))
        if any(one is not None and one.id == now.id for one in used):
            raise InputError(
                "this picture is being edited: keep or discard what is made of it, then remove it"
            )
        self.history.remove(now.id)
        self.session.remove(now.file)
        self.session.remove(now.shown)

    # --- from the page to a workflow --------------------------------------------------------------

    def workflow(
        self,
        stack: Stack,
        settings: Settings,
        pictures: Mapping[str, Path],
        source: Node | None,
        *,
        plugins: Plugins,
    ) -> Workflow:
        """The workflow that the page shows; its pictures are in memory, so that it goes anywhere.

        Args:
            pictures: what the browser sent: painted masks by ``"layer:A"``, files by ``"own:…"``.
            source: the picture to edit; None: one is made from nothing.

        Raises:
            InputError: says where, as ``passes.0.edits.1.inpaint.mask``.
        """
        parameters = {
            name: picture_parameters(edit.model_json_schema())
            for name, edit in plugins.edits.items()
        }

        known: dict[str, Any] = {}

        def picked(where: str, pick: Any) -> Any:
            try:
                if str(pick) not in known:  # decoded once, however many edits take it
                    known[str(pick)] = self.picked(pick, pictures, source)
                return known[str(pick)]
            except InputError as error:
                raise type(error)(f"{where}: {error}") from None

        data = stack.data(parameters, picked)
        if not data["passes"]:
            raise WorkflowError("there is no pass to run: add one, or switch one on")
        data |= {"model": settings.model, "seed": settings.seeds}
        if source is None:
            data["size"] = [settings.width, settings.height]
        return Workflow.from_data(data, where="the page", plugins=plugins, files=False)

    def picked(self, pick: Any, pictures: Mapping[str, Path], source: Node | None) -> Any:
        """The picture that a pick stands for.

        Raises:
            InputError: nothing is painted, or there is no such picture.
        """
        kind, _, name = str(pick).partition(":")
        if kind == "layer":
            return self._painted(name, pictures.get(pick), source)
        if kind == "source":
            if source is None:
                raise InputError("there is no picture yet: open one")
            return open_picture(source.file.read_bytes())
        if kind == "result" and name.isdecimal() and int(name) in self.history.nodes:
            return open_picture(self.history.nodes[int(name)].file.read_bytes())
        if kind == "own" and pick in pictures:
            return self._own(pictures[pick])
        raise InputError("this picture is not here any more: choose another")

    def _own(self, file: Path) -> Picture:
        # Whose file it is was checked when it came in: by the gate, for every path.
        if not file.is_file():
            raise InputError("this picture is not here any more: choose it again")
        return self.checked(file)

    def keep(self, data: str) -> Path:
        """A file of the session with a picture that a workflow brought as a data URI."""
        _, _, content = data.partition(",")
        return self.session.add(base64.b64decode(content), ".png", pinned=True)

    def _painted(self, name: str, file: Path | None, source: Node | None) -> npt.NDArray[np.uint8]:
        if source is None or file is None:
            raise MaskError(f"nothing is painted on mask {name}: paint where it is to change")
        mask = read_mask(self.checked(file, f"mask {name}"))
        image = PIL.Image.fromarray((mask * 255).round().astype(np.uint8))
        if image.size != source.size:
            image = image.resize(source.size, PIL.Image.Resampling.BILINEAR)
        # Strokes have soft edges on the screen; a mask's greys would mean "change later".
        binary = np.where(np.asarray(image) >= 128, 255, 0).astype(np.uint8)
        if not binary.any():
            raise MaskError(f"nothing is painted on mask {name}: paint where it is to change")
        return binary

    # --- what came of it --------------------------------------------------------------------------

    def made(self, result: Result, parent: Node | None) -> list[Candidate]:
        """What came of a run, as files, each with the workflow that makes just it."""
        found = []
        for picture, seed in zip(result.pictures, result.seeds, strict=True):
            one = result.workflow.model_copy(update={"seed": seed})
            text = one.to_yaml()
            file = self.session.add(encode_png(picture, {KEYWORD: text}), ".png", pinned=True)
            found.append(Candidate(file, self.show(picture), seed, text, picture.size, parent))
        return found

    def propose(self, candidates: list[Candidate]) -> None:
        """Lay these out to choose from, in place of those that lay there."""
        self.discard()
        self.candidates, self.chosen = candidates, 0

    def accept(self, index: int) -> Node:
        """Go on with a candidate.

        Raises:
            InputError: there is none.
        """
        if not 0 <= index < len(self.candidates):
            raise InputError("there is nothing to keep: run something first")
        one = self.candidates[index]
        title = f"seed {one.seed}"
        parent = None if one.parent is None else one.parent.id
        del self.candidates[index]
        self.discard()
        return self.history.add(one.file, one.shown, title, one.size, one.workflow, parent)

    def discard(self) -> None:
        """Let go of the candidates and of their files, which a page may still be loading."""
        for one in self.candidates:
            self.session.retire(one.file)
            self.session.retire(one.shown)
        self.candidates = []

    def changes(self, candidate: Candidate) -> Changes | None:
        """What a candidate changed of what it was made from; None if they cannot be compared."""
        source = candidate.parent
        if source is None or source.size != candidate.size:
            return None
        before, after = (open_picture(one).pixels for one in (source.file, candidate.file))
        if before.shape != after.shape:
            return None
        where = before != after
        where = where.any(axis=2) if where.ndim == 3 else where
        masks = masks_of(Workflow.from_yaml(candidate.workflow))
        if any(one.shape != where.shape for one in masks):
            return None
        if not masks:
            return Changes(0, int(where.sum()), 0.0, False)
        inside = np.maximum.reduce(masks) > 0
        outside = where & ~inside
        reach = 0.0
        if outside.any():
            import cv2

            away = cv2.distanceTransform(
                (~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
            )
            # Distances squared are whole numbers; OpenCV's roots of them are not exact.
            reach = float(np.sqrt(np.rint(away[outside].max().astype(float) ** 2)))
        return Changes(int((where & inside).sum()), int(outside.sum()), reach, True)


def bound_pictures() -> None:
    """Have no picture decoded in this process that says it is larger than `MOST_PIXELS`.

    `Desk.checked` says so in better words, but pictures also stand in workflows and parameters.
    """
    PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses above twice its limit


def masks_of(workflow: Workflow) -> list[npt.NDArray[np.float32]]:
    """All masks that the edits of a workflow name."""
    from diffedit import MaskField

    return [
        value.mask
        for one in workflow.passes
        for edit in one.edits
        for value in (getattr(edit, name) for name in type(edit).model_fields)
        if isinstance(value, MaskField)
    ]


def visitors_workflow(text: str, where: str, plugins: Plugins | None = None) -> Workflow:
    """A workflow that a visitor sent as text.

    It may name no picture of this machine: they stand in it as data, as this page writes them. The
    models that it names are checked where it is run.

    Raises:
        InputError: it is none, is too long to be read here, or names files.
    """
    written = len(text) - sum(len(one[0]) for one in _PICTURE.finditer(text))
    if written > MOST_WRITTEN:
        raise WorkflowError(
            f"{where} has {written} characters besides its pictures, should have {MOST_WRITTEN}"
            " at most"
        )
    return Workflow.from_yaml(text, where=where, plugins=plugins, files=False)


def read_workflow(file: Path, plugins: Plugins | None = None) -> Workflow:
    """A workflow from a visitor's file, or from a picture that was made by one.

    Raises:
        InputError: there is none, or one that `visitors_workflow` refuses.
    """
    data = file.read_bytes()
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        try:
            with PIL.Image.open(io.BytesIO(data)) as picture:
                text = getattr(picture, "text", {}).get(KEYWORD)
        except Exception as error:  # Pillow raises anything for what is damaged
            raise WorkflowError(f"{file.name} cannot be read ({error})") from None
        if text is None:
            raise WorkflowError(f"{file.name} is a picture without a workflow in it")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise WorkflowError(f"{file.name} is no workflow: it is not UTF-8 text") from None
    return visitors_workflow(text, file.name, plugins)
