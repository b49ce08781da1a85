"""The page: what its events do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from diffedit import Editor, Workflow
from diffedit.errors import DiffeditError, InputError
from diffedit.plugins import default
from diffedit_demo.about import memory
from diffedit_demo.api import Endpoints
from diffedit_demo.canvas import Painted, Refused, Shown
from diffedit_demo.code import LANGUAGES
from diffedit_demo.components import flushed
from diffedit_demo.composer import Composed, Hint, Past, Tell
from diffedit_demo.desk import Candidate, Changes, Desk, Order, read_workflow
from diffedit_demo.faults import fault_of
from diffedit_demo.history import Node
from diffedit_demo.jobs import Cancelled, Models, run
from diffedit_demo.layout import Layout, status_line
from diffedit_demo.look import look
from diffedit_demo.sessions import Sessions
from diffedit_demo.stack import Stack, new_uid
from diffedit_demo.texts import language, progress, say
from diffedit_demo.viewer import Shown as Look
from diffedit_demo.workspace import Workspace

if TYPE_CHECKING:
    from diffedit_demo.server import Options

__all__ = ["build", "look", "page"]

log = logging.getLogger(__name__)

_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_FREE: dict[str, Any] = {**_QUIET, "concurrency_id": "desk", "concurrency_limit": 8}
"""Beside runs, but not in any number: they decode pictures."""

Updates = dict[Any, Any]


def build(sources: Sequence[str], sessions: Sessions, options: Options) -> gr.Blocks:
    """The page of a server.

    Args:
        sources: the models that it offers; the first is the one shown.
        sessions: where the pictures of its visitors lie.
    """
    from diffedit_demo.server import is_loopback

    load = partial(
        Editor.load,
        device=options.device,
        dtype=options.dtype,
        max_memory=options.max_memory,
        low_memory=options.low_memory,
    )
    trusted = is_loopback(options.host) and not (options.users or options.allow_hosts)
    return page(Workspace(Models(sources, load), sessions, default(), trusted))


def page(workspace: Workspace) -> gr.Blocks:
    """The page over a workspace."""
    blocks: gr.Blocks
    with gr.Blocks(title="diffedit", fill_width=True, analytics_enabled=False) as blocks:
        shown = _Page(workspace)
        shown.lay_out()
        shown.tie()
        Endpoints(workspace).lay_out()
        blocks.unload(shown.closed)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


class _Page(Layout):
    """What the events of the components do."""

    def tie(self) -> None:
        """Tie the events to what they do."""
        self.canvas.opened(self._opened, self.canvas, self.all(), **_FREE)
        self.composer.hint(
            self._hint, [self.canvas, self.composer], self.composer,
            js=flushed({"canvas": 0}), concurrency_id="hint", concurrency_limit=1,
            trigger_mode="always_last", **_QUIET,
        )  # fmt: skip
        self.composer.arrived(self._arrived, self.composer, self.all(), **_FREE)
        # What was on the page when Run was pressed is what runs, whenever its turn comes.
        begun = self.run.click(
            self._ordered, [self.canvas, self.composer], [self.run, self.cancel, self.status],
            js=flushed({"canvas": 0, "composer": 1}), queue=False, trigger_mode="multiple",
            **_QUIET,
        )  # fmt: skip
        ran = begun.then(
            self._runs, None, [*self.all(), self.run, self.cancel, self.download, self.save],
            concurrency_id="model", concurrency_limit=1, trigger_mode="multiple", **_QUIET,
        )  # fmt: skip
        ran.failure(
            self._turned_away, None, [self.run, self.cancel, self.status], queue=False, **_QUIET
        )
        self.cancel.click(
            self._cancelled, None, [self.status, self.run, self.cancel], queue=False, **_QUIET
        ).then(self._ended, None, self.status, queue=False, **_QUIET)
        self.keep.click(self._kept, None, self.all(), **_FREE)
        self.discard.click(self._discarded, None, self.all(), **_FREE)
        self.candidates.select(
            self._chosen, None, [self.viewer, self.changes, self.download, self.save], **_FREE
        )
        self.undo.click(self._undone, None, self.all(), **_FREE)
        self.redo.click(self._redone, None, self.all(), **_FREE)
        self.remove.click(self._removed, None, self.all(), **_FREE)
        self.history.select(self._gone, None, self.all(), **_FREE)
        self.language.input(
            self._written, [self.language, self.canvas, self.composer],
            [self.code, self.composer, self.status],
            js=flushed({"canvas": 1, "composer": 2}), **_FREE,
        )  # fmt: skip
        self.load.upload(self._loaded, self.load, [self.composer, self.status], **_FREE)

    def closed(self, request: gr.Request) -> None:
        """End what a closed tab asked for."""
        self.workspace.leave(_session(request))

    def _arrived(self, composed: Composed, request: gr.Request) -> Updates:
        """A page was opened, or loaded again: then all is as it was."""
        session = _session(request)
        if not self.workspace.back(session, composed.session):
            return {self.composer: Tell(session=session)}
        shown = self._show(self.workspace.desk(session), request)
        return shown | {self.composer: replace(shown[self.composer], session=session)}

    def _desk(self, request: gr.Request) -> Desk:
        return self.workspace.desk(_session(request))

    # --- running ----------------------------------------------------------------------------------

    def _ordered(self, painted: Painted, composed: Composed, request: gr.Request) -> Updates:
        self._desk(request).order((painted, composed))
        return {
            self.run: gr.update(interactive=False),
            self.cancel: gr.update(interactive=True),
            self.status: status_line(say(_language(request), "waiting")),
        }

    def _turned_away(self, request: gr.Request) -> Updates:
        """The queue is full, or the connection broke: nothing waits any more."""
        self._desk(request).cancel()
        said = say(_language(request), "full")
        return {**self._idle(), self.status: status_line(said, alert=True)}

    def _idle(self) -> Updates:
        """Nothing runs or waits: one can press Run."""
        return {
            self.run: gr.update(interactive=True),
            self.cancel: gr.update(interactive=False),
        }

    def _runs(self, request: gr.Request) -> Iterator[Updates]:
        desk, tongue = self._desk(request), _language(request)
        order = desk.begin()
        if order is None:
            yield {self.status: gr.skip()}
            return
        painted, composed = order.what
        made: list[Candidate] = []
        ended, said = self._idle(), ""
        began = time.monotonic()
        try:
            yield from self._run(desk, order, painted, composed, made, tongue)
            seconds = f"{time.monotonic() - began:.1f}"
            said = status_line(say(tongue, "done", seconds=seconds, memory=memory()))
        except Cancelled:
            said = status_line(say(tongue, "cancelled"))
        except DiffeditError as error:
            refused = self._refused(composed, error, request)
            said = refused.pop(self.status)
            ended |= refused
        except Exception:
            log.exception("a run failed")
            said = status_line(say(tongue, "failed"), alert=True)
        finally:
            desk.running, desk.outcome = None, said
            if made:
                desk.propose(made)
        # All in one: of two updates within a frame, browsers may show the later one only.
        yield {**ended, **self._shown(desk, tongue), self.status: said}

    def _run(
        self, desk: Desk, order: Order, painted: Painted, composed: Composed,
        made: list[Candidate], tongue: str,
    ) -> Iterator[Updates]:  # fmt: skip
        source = order.source
        workflow = self._workflow(desk, painted, composed, source)
        models = self.workspace.models
        yield {
            self.status: status_line(
                say(tongue, "preparing")
                if models.loaded == workflow.model
                else say(tongue, "loading", model=workflow.model)
            ),
            self.composer: Tell(faults=[]),
            self.tabs: gr.update(selected="result"),
            self.candidates: gr.update(value=[], visible=False),
            self.keep: gr.update(interactive=False),
            self.discard: gr.update(interactive=False),
            self.changes: "",
        }
        with models.editor(workflow.model, workflow.passes) as editor:
            file = None if source is None else source.file
            for one in run(
                editor,
                file,
                workflow,
                order.cancel,
                lambda result: made.extend(desk.made(result, source)),
            ):
                update: Updates = {self.status: status_line(progress(tongue, one), one)}
                if one.preview is not None:
                    update[self.viewer] = Look(preview=one.preview)
                yield update

    def _workflow(
        self, desk: Desk, painted: Painted, composed: Composed, source: Node | None
    ) -> Workflow:
        settings = self.workspace.settings(composed.settings)
        pictures = _pictures(painted, composed)
        return self.workspace.workflow(desk, composed.stack, settings, pictures, source)

    def _cancelled(self, request: gr.Request) -> Updates:
        tongue = _language(request)
        if self._desk(request).cancel():
            return {self.status: status_line(say(tongue, "cancelling"))}
        return {**self._idle(), self.status: status_line(say(tongue, "cancelled"))}

    def _ended(self, request: gr.Request) -> Any:
        """The answer to Cancel may arrive after the end of the run, which it would hide."""
        outcome = self._desk(request).outcome
        return outcome or gr.skip()

    def _hint(self, painted: Painted, composed: Composed, request: gr.Request) -> Tell:
        uid = composed.asked or ""
        try:
            file = self.workspace.hint(
                self._desk(request), composed.stack, uid, _pictures(painted, composed)
            )
        except DiffeditError as error:
            return Tell(hint=Hint(uid, said=str(error)))
        except Exception:
            log.exception("a preprocessor failed")
            return Tell(hint=Hint(uid, said=say(_language(request), "failed")))
        return Tell(hint=Hint(uid, file))

    # --- what was made ----------------------------------------------------------------------------

    def _shown(self, desk: Desk, tongue: str) -> Updates:
        """The results; without them one can at least run again."""
        try:
            return self._results(desk, tongue)
        except Exception:
            log.exception("results cannot be shown")
            return {}

    def _results(self, desk: Desk, tongue: str) -> Updates:
        """What was made, beside what it was made of."""
        made = desk.candidates
        if not made:
            return {self.viewer: None, self.tabs: gr.update(selected="edit")}
        return {
            self.candidates: gr.update(
                value=[(str(one.shown), say(tongue, "seed_title", seed=one.seed)) for one in made],
                visible=len(made) > 1,
                selected_index=desk.chosen,
            ),
            self.keep: gr.update(interactive=True),
            self.discard: gr.update(interactive=True),
            **self._candidate(desk, desk.chosen, tongue),
        }

    def _candidate(self, desk: Desk, index: int, tongue: str) -> Updates:
        desk.chosen = index
        one = desk.candidates[index]
        workflow = desk.session.folder / "workflow.yaml"
        workflow.write_text(one.workflow, "utf-8")
        return {
            self.viewer: Look(
                one.parent.shown if one.parent and one.parent.size == one.size else None, one.shown
            ),
            self.changes: _counted(tongue, desk.changes(one)),
            self.download: gr.update(value=str(one.file), interactive=True),
            self.save: gr.update(value=str(workflow), interactive=True),
        }

    def _chosen(self, event: gr.SelectData, request: gr.Request) -> Updates:
        desk = self._desk(request)
        index = int(event.index)
        if not 0 <= index < len(desk.candidates):
            return {self.changes: gr.skip()}
        return self._candidate(desk, index, _language(request))

    def _kept(self, request: gr.Request) -> Updates:
        desk = self._desk(request)
        try:
            desk.accept(desk.chosen)
        except InputError as error:
            return {self.status: status_line(str(error), alert=True)}
        return self._show(desk, request)

    def _discarded(self, request: gr.Request) -> Updates:
        desk = self._desk(request)
        desk.discard()
        return self._show(desk, request)

    # --- pictures and workflows -------------------------------------------------------------------

    def _opened(self, painted: Painted, request: gr.Request) -> Updates:
        desk = self._desk(request)
        if painted.upload is None:
            return {self.status: gr.skip()}
        try:
            node = desk.open(painted.upload, painted.name)
        except InputError as error:
            return {self.canvas: Refused(str(error))}
        width, height = node.size
        said = say(_language(request), "opened", name=node.title, width=width, height=height)
        return self._show(desk, request, said)

    def _undone(self, request: gr.Request) -> Updates:
        desk = self._desk(request)
        desk.history.undo()
        return self._show(desk, request)

    def _redone(self, request: gr.Request) -> Updates:
        desk = self._desk(request)
        desk.history.redo()
        return self._show(desk, request)

    def _gone(self, event: gr.SelectData, request: gr.Request) -> Updates:
        desk = self._desk(request)
        shown = list(desk.history)
        if 0 <= int(event.index) < len(shown):
            desk.history.go(shown[int(event.index)].id)
        return self._show(desk, request)

    def _removed(self, request: gr.Request) -> Updates:
        desk = self._desk(request)
        try:
            desk.remove()
        except InputError as error:
            return {self.status: status_line(str(error), alert=True)}
        return self._show(desk, request)

    def _show(self, desk: Desk, request: gr.Request, said: str = "") -> Updates:
        """Show the desk as it is: the present picture, the history, nothing made."""
        now, history = desk.history.now, desk.history
        shown = now and Shown(
            picture=now.shown, name=now.title, width=now.size[0], height=now.size[1],
            # What is made of a picture has its size: its masks stay good, back and forth.
            revision=desk.number + now.origin,
        )  # fmt: skip
        made = self._results(desk, _language(request)) if desk.candidates else {}
        return {
            self.canvas: shown,
            self.composer: Tell(pictures=[Past(one.id, one.title, one.shown) for one in history]),
            self.history: gr.update(
                value=[(str(one.shown), one.title) for one in history],
                selected_index=None if now is None else list(history).index(now),
            ),
            self.remove: gr.update(interactive=now is not None),
            self.undo: gr.update(interactive=now is not None and now.parent is not None),
            self.redo: gr.update(interactive=history.can_redo),
            self.viewer: None,
            self.candidates: gr.update(value=[], visible=False),
            self.keep: gr.update(interactive=False),
            self.discard: gr.update(interactive=False),
            self.changes: "",
            self.status: status_line(said or say(_language(request), "ready")),
            self.tabs: gr.update(selected="edit"),
            # What was made and is neither kept nor discarded stays where it is.
            **{part: update for part, update in made.items() if part in self.all()},
        }

    def _written(
        self, chosen: str, painted: Painted, composed: Composed, request: gr.Request
    ) -> Updates:
        """What is on the page, in a language to copy it in."""
        desk = self._desk(request)
        try:
            workflow = self._workflow(desk, painted, composed, desk.history.now)
        except InputError as error:
            return self._refused(composed, error, request) | {
                self.code: gr.update(value="", visible=False)
            }
        now = desk.history.now
        # What was made here has to be downloaded first.
        source = None
        if now is not None:
            source = "picture.png" if now.workflow else now.title
        said = LANGUAGES[chosen](workflow, source)
        return {self.code: gr.update(value=said, visible=True)}

    def _refused(self, composed: Composed, error: DiffeditError, request: gr.Request) -> Updates:
        fault = fault_of(composed.stack, error)
        said = say(_language(request), "wrong", why=fault.said)
        return {self.status: status_line(said, alert=True), self.composer: Tell(faults=[fault])}

    def _loaded(self, file: str, request: gr.Request) -> Updates:
        desk, files = self._desk(request), dict[str, Path]()
        try:
            workflow = read_workflow(Path(file), self.workspace.plugins)

            def keep(data: str) -> str:
                pick = f"own:{new_uid()}"
                files[pick] = desk.keep(data)
                return pick

            stack = Stack.of(workflow, keep)
        except InputError as error:
            return {self.status: status_line(str(error), alert=True)}
        settings: dict[str, Any] = {"seed": workflow.seeds[0], "count": len(workflow.seeds)}
        tongue = _language(request)
        said = say(tongue, "loaded")
        if workflow.model in self.workspace.models.sources:
            settings["model"] = workflow.model
        else:
            said += say(tongue, "loaded_model", model=workflow.model)
        first = workflow.seeds[0]
        if list(workflow.seeds) != list(range(first, first + len(workflow.seeds))):
            said += say(tongue, "loaded_seeds")
        if workflow.size is not None:
            settings |= dict(zip(("width", "height"), workflow.size, strict=True))
        return {
            self.composer: Tell(load=(stack, settings), files=files, faults=[]),
            self.status: status_line(said),
        }


def _pictures(painted: Painted, composed: Composed) -> dict[str, Path]:
    """What picks can name of what a browser sent."""
    return {**{f"layer:{name}": one for name, one in painted.masks.items()}, **composed.files}


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _language(request: gr.Request) -> str:
    return language(request.headers.get("accept-language", ""))


def _counted(tongue: str, found: Changes | None) -> str:
    if found is None:
        return ""
    if not found.masked:
        return status_line(say(tongue, "changes_all", outside=found.outside))
    said = say(tongue, "changes", inside=found.inside, outside=found.outside)
    if found.outside:
        said += say(tongue, "changes_reach", reach=int(-(-found.reach // 1)))
    return status_line(said)
