"""The page: a picture with masks on the left, the stack of passes on the right.

What is typed stays in the widgets; every event brings all of it here (`_Form.read`), so that the
order in which a browser sends things loses nothing.
"""

from __future__ import annotations

import html
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from diffedit import Editor, Pass
from diffedit.errors import DiffeditError, InputError
from diffedit.plugins import Plugins, default
from diffedit.schedulers import SCHEDULERS
from diffedit_demo.canvas import LAYERS, Canvas, Painted, Refused, Shown, flushed
from diffedit_demo.desk import Changes, Desk, read_workflow
from diffedit_demo.forms import Field, fields, pass_fields
from diffedit_demo.jobs import Cancelled, Models, Progress, run
from diffedit_demo.presets import presets
from diffedit_demo.sessions import Sessions
from diffedit_demo.stack import EditItem, Stack
from diffedit_demo.texts import ENGLISH, LANGUAGES, language, say
from diffedit_demo.viewer import Shown as Look
from diffedit_demo.viewer import Viewer
from diffedit_demo.widgets import widget

if TYPE_CHECKING:
    from diffedit_demo.server import Options

log = logging.getLogger(__name__)

MOST_PICTURES = 8
QUEUE = 24
"""Runs that may wait; whoever comes then is told to come again."""

_PLACE = re.compile(r"passes\.\d+(?:\.[A-Za-z_]\w*|\.\d+)*")
_CSS = """
.run-bar { position: sticky; top: 0; z-index: 20; background: var(--body-background-fill); }
.fault { color: var(--error-text-color); font-weight: 600; margin: 0; }
@media (max-width: 640px) {
  .run-bar { position: fixed; inset: auto 0 0 0; padding: 8px;
    border-top: 1px solid var(--border-color-primary); }
  .gradio-container { padding-bottom: 88px !important; }
}
"""

Fault = tuple[str, str, str]
"""The uid, the field and the message of an error; uid and field are empty for a general one."""


def translations() -> gr.I18n:
    """The texts, for what the browser translates itself."""
    return gr.I18n(**{tag: dict(texts) for tag, texts in LANGUAGES.items()})


@dataclass
class Workspace:
    """What the page's events work on: models, plugins, and the desk of each session."""

    models: Models
    sessions: Sessions
    plugins: Plugins
    _desks: dict[str, Desk] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def desk(self, request: gr.Request) -> Desk:
        """The desk of whoever asks."""
        name = str(request.session_hash)
        with self._lock:
            if name not in self._desks:
                self._desks[name] = Desk(self.sessions[name])
            return self._desks[name]

    def close(self, request: gr.Request) -> None:
        """A tab was closed: what runs for it ends, its files go."""
        name = str(request.session_hash)
        with self._lock:
            desk = self._desks.pop(name, None)
        if desk is not None:
            desk.cancel.set()
        self.sessions.close(name)

    def forms(self, edit: EditItem) -> list[Field]:
        """The form of an edit."""
        names = {"preprocessors": ["none", *sorted(self.plugins.preprocessors)]}
        return fields(self.plugins.edits[edit.name].model_json_schema(), names)

    def pass_form(self) -> list[Field]:
        """The form of a pass."""
        return pass_fields(Pass.model_json_schema(), sorted(SCHEDULERS))


def build(sources: Sequence[str], sessions: Sessions, options: Options) -> gr.Blocks:
    """The page of a server.

    Args:
        sources: the models that it offers; the first is the one shown.
        sessions: where the pictures of its visitors lie.
    """
    load = partial(Editor.load, device=options.device, dtype=options.dtype)
    return page(Workspace(Models(sources, load), sessions, default()))


def page(workspace: Workspace) -> gr.Blocks:
    """The page over a workspace."""
    t = translations()
    blocks: gr.Blocks
    with gr.Blocks(title="diffedit", fill_width=True, analytics_enabled=False) as blocks:
        _Page(workspace, t).lay_out()
        blocks.unload(workspace.close)
    blocks.queue(max_size=QUEUE, default_concurrency_limit=None, api_open=False)
    return blocks


def look() -> dict[str, Any]:
    """What `gr.mount_gradio_app` has to be told besides the page."""
    return {"css": _CSS, "i18n": translations(), "theme": theme()}


def theme() -> gr.themes.Base:
    """Gradio's own, with system fonts and text that has contrast."""
    fonts = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    made = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)
    return made.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        error_text_color="#b42318",
        error_text_color_dark="#fda29b",
    )


class _Form:
    """The widgets of the stack as it is drawn, and what stands in them."""

    def __init__(self) -> None:
        self.widgets: list[Any] = []
        self.later: list[Callable[[], Any]] = []
        self._of: list[tuple[str, Field | None]] = []

    def add(self, uid: str, one: Field | None, made: Any) -> Any:
        """A widget of a pass or edit; without a field, its switch."""
        self.widgets.append(made)
        self._of.append((uid, one))
        return made

    def read(self, stack: Stack, raw: Sequence[Any]) -> Stack:
        """The stack with all that stands in the widgets."""
        values: dict[str, dict[str, Any]] = {}
        for (uid, one), given in zip(self._of, raw, strict=True):
            if one is None:
                stack = stack.enabled(uid, bool(given))
                continue
            value = one.read(given)
            item = stack.find(uid)
            # What was never set and is not touched stays unset: workflows say what people said.
            if item is not None and (one.name in item.values or value != one.read(one.shown(None))):
                values.setdefault(uid, {})[one.name] = value
        return stack.with_values(values)


class _Page:
    """The components, and what their events do."""

    def __init__(self, workspace: Workspace, t: Any) -> None:
        self.workspace, self.t = workspace, t

    # --- layout -----------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Put everything on the page, and tie the events."""
        found = presets(self.workspace.plugins.edits)
        first = next(iter(found.values()))
        gr.HTML("<h1>diffedit</h1>", padding=False)
        self.stack = gr.State(first)
        self.fault = gr.State(None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._left()
            with gr.Column(scale=2, min_width=320):
                self._right(found)
        self._tie()

    def _left(self) -> None:
        t = self.t
        with gr.Tabs(selected="edit") as self.tabs:
            with gr.Tab(t("tab_edit"), id="edit"):
                self.canvas = Canvas(elem_id="canvas")
            with gr.Tab(t("tab_result"), id="result"):
                names = ("before", "after", "compare", "hold", "difference", "nothing")
                self.viewer = Viewer({name: ENGLISH[name] for name in names}, elem_id="viewer")
                self.changes = gr.HTML(elem_id="changes")
                self.candidates = gr.Gallery(
                    label=t("candidates"), columns=MOST_PICTURES, height=120, allow_preview=False,
                    interactive=False, visible=False, elem_id="candidates",
                )  # fmt: skip
                with gr.Row():
                    self.keep = gr.Button(t("keep"), variant="primary", interactive=False)
                    self.discard = gr.Button(t("discard"), interactive=False)
                    self.download = gr.DownloadButton(t("download"), interactive=False)
        self.history = gr.Gallery(
            label=t("history"), columns=8, height=150, allow_preview=False, interactive=False,
            object_fit="contain", elem_id="history",
        )  # fmt: skip
        with gr.Row():
            self.undo = gr.Button(t("undo"), interactive=False)
            self.redo = gr.Button(t("redo"), interactive=False)

    def _right(self, found: Mapping[str, Stack]) -> None:
        t = self.t
        with gr.Row(elem_classes="run-bar"):
            self.run = gr.Button(t("run"), variant="primary", elem_id="run")
            self.cancel = gr.Button(t("cancel"), variant="stop", interactive=False)
        self.status = gr.HTML(_status(ENGLISH["ready"]), elem_id="status")
        for name, why in self.workspace.plugins.broken.items():
            gr.HTML(f'<p class="fault">{html.escape(say("en", "broken", name=name, why=why))}</p>')
        with gr.Row():
            self.seed = gr.Number(
                0,
                precision=0,
                minimum=0,
                label=t("seed"),
                info=t("seed_help"),
                elem_id="seed",
                interactive=True,
            )
            self.count = gr.Slider(
                1,
                MOST_PICTURES,
                1,
                step=1,
                label=t("count"),
                info=t("count_help"),
                interactive=True,
            )
        listed = [(ENGLISH[key], key) for key in found]
        self.preset = gr.Dropdown(
            listed, value=listed[0][1], label=t("preset"), interactive=True, elem_id="preset"
        )
        self.preset.input(
            lambda key: (found[key], None), self.preset, [self.stack, self.fault],
            concurrency_limit=None, api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        self._stack()
        sources = list(self.workspace.models.sources)
        with gr.Accordion(t("more"), open=False):
            self.model = gr.Dropdown(sources, value=sources[0], label=t("model"), interactive=True)
            with gr.Row():
                size = {
                    "precision": 0, "minimum": 8, "maximum": 2048, "info": t("size_help"),
                    "interactive": True,
                }  # fmt: skip
                self.width = gr.Number(256, label=t("width"), **size)
                self.height = gr.Number(256, label=t("height"), **size)
        with gr.Accordion(t("workflow"), open=False):
            self.load = gr.UploadButton(
                t("load"), file_types=[".yaml", ".yml", ".json", ".png"], type="filepath"
            )
            self.save = gr.DownloadButton(t("save"), interactive=False)

    def _stack(self) -> None:
        @gr.render(inputs=[self.stack, self.fault], concurrency_limit=None, show_progress="hidden")  # type: ignore[untyped-decorator, unused-ignore]
        def drawn(stack: Stack, fault: Fault | None) -> None:
            form = _Form()
            changed = partial(self._changed, form)
            if fault is not None and not fault[0]:
                gr.HTML(_fault(fault[2]), padding=False)
            for number, one in enumerate(stack.passes, 1):
                with gr.Group(key=f"pass-{one.uid}"):
                    self._head(
                        form, changed, one.uid, say("en", "pass", number=number), one.enabled
                    )
                    self._fields(form, one.uid, self.workspace.pass_form(), one.values, fault)
                    for edit in one.edits:
                        with gr.Group(key=f"edit-{edit.uid}"):
                            self._edit(form, changed, edit, fault)
                    with gr.Row(elem_classes="adding"):
                        for name in sorted(self.workspace.plugins.edits):
                            adding = gr.Button(
                                f"+ {name}", size="sm", min_width=80, key=f"add-{name}-{one.uid}",
                                elem_classes=f"add-{name}",
                            )  # fmt: skip
                            changed(
                                adding.click, partial(Stack.add_edit, pass_uid=one.uid, name=name)
                            )
            more = gr.Button(self.t("add_pass"), elem_id="add-pass", key="add-pass")
            changed(more.click, lambda s: s.add_pass({"prompt": ""}))
            self._tie_run(form)

    def _edit(self, form: _Form, changed: Any, edit: EditItem, fault: Fault | None) -> None:
        if edit.name not in self.workspace.plugins.edits:
            gr.HTML(_fault(f"{edit.name}: not installed"))
            return
        self._head(form, changed, edit.uid, edit.name, edit.enabled)
        self._fields(form, edit.uid, self.workspace.forms(edit), edit.values, fault)

    def _head(self, form: _Form, changed: Any, uid: str, title: str, enabled: bool) -> None:
        with gr.Row(elem_classes="head"):
            form.add(
                uid, None,
                gr.Checkbox(enabled, label=title, interactive=True, key=f"{uid}.on",
                            elem_id=f"on-{uid}", scale=3),
            )  # fmt: skip
            actions: dict[str, tuple[str, Callable[[Stack], Stack]]] = {
                "up": ("↑", lambda s: s.moved(uid, -1)),
                "down": ("↓", lambda s: s.moved(uid, 1)),
                "copy": ("+", lambda s: s.duplicated(uid)),
                "remove": ("✕", lambda s: s.removed(uid)),
            }
            for name, (sign, change) in actions.items():
                button = gr.Button(
                    sign, size="sm", min_width=44, scale=0, key=f"{uid}.{name}",
                    elem_id=f"{name}-{uid}", elem_classes=f"act-{name}",
                )  # fmt: skip
                changed(button.click, change)

    def _fields(
        self, form: _Form, uid: str, listed: list[Field], values: Mapping[str, Any],
        fault: Fault | None,
    ) -> None:  # fmt: skip
        plain = [one for one in listed if not one.advanced]
        self._widgets(form, uid, plain, values, fault)
        if folded := [one for one in listed if one.advanced]:
            wrong = fault is not None and fault[0] == uid and fault[1] in {f.name for f in folded}
            with gr.Accordion(self.t("more"), open=wrong, key=f"more-{uid}", elem_id=f"more-{uid}"):
                self._widgets(form, uid, folded, values, fault)

    def _widgets(
        self, form: _Form, uid: str, listed: list[Field], values: Mapping[str, Any],
        fault: Fault | None,
    ) -> None:  # fmt: skip
        layers = [(say("en", "mask_layer", name=name), f"layer:{name}") for name in LAYERS]
        source = [(ENGLISH["source"], "source")]
        for one in listed:
            choices = layers if one.kind == "mask" else source
            made = widget(one, values.get(one.name), f"{uid}.{one.name}", choices, ENGLISH["unset"])
            form.add(uid, one, made)
            if fault is not None and fault[:2] == (uid, one.name):
                gr.HTML(_fault(fault[2]), padding=False)

    def _changed(self, form: _Form, event: Any, change: Callable[..., Stack], *more: Any) -> None:
        """Tie an event that changes the stack, after taking over what stands in the widgets."""

        def happened(stack: Stack, *raw: Any) -> tuple[Stack, None]:
            values, extra = raw[: len(form.widgets)], raw[len(form.widgets) :]
            return change(form.read(stack, values), *extra), None

        # At the end of the drawing, when all widgets are there.
        form.later.append(
            lambda: event(
                happened, [self.stack, *form.widgets, *more], [self.stack, self.fault],
                concurrency_limit=None, api_visibility="private", show_progress="hidden",
            )
        )  # fmt: skip

    # --- events -----------------------------------------------------------------------------------

    def _tie_run(self, form: _Form) -> None:
        """Tie the stack's own events, and Run, whose inputs the widgets are."""
        for tie in form.later:
            tie()
        settings = [self.model, self.seed, self.count, self.width, self.height]

        def start(
            painted: Painted, stack: Stack, *raw: Any, request: gr.Request
        ) -> Iterator[dict[Any, Any]]:
            model, seed, count, width, height = raw[: len(settings)]
            shown = form.read(stack, raw[len(settings) :])
            yield from self._start(
                request, painted, shown, str(model), seed, count, (width, height)
            )

        def begin(request: gr.Request) -> tuple[Any, Any, str]:
            self.workspace.desk(request).cancel.clear()
            said = say(_language(request), "waiting")
            return gr.update(interactive=False), gr.update(interactive=True), _status(said)

        begun = self.run.click(
            begin, None, [self.run, self.cancel, self.status],
            queue=False, api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        begun.then(
            _with_request(start), [self.canvas, self.stack, *settings, *form.widgets],
            [self.status, self.viewer, self.candidates, self.tabs, self.run, self.cancel,
             self.keep, self.discard, self.download, self.changes, self.fault, self.save],
            js=flushed(), concurrency_id="model", concurrency_limit=1,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        desk_parts = [
            self.canvas, self.history, self.undo, self.redo, self.viewer, self.candidates,
            self.keep, self.discard, self.changes, self.status, self.tabs,
        ]  # fmt: skip
        self.canvas.opened(self._opened, self.canvas, desk_parts, concurrency_limit=None, **quiet)
        self.cancel.click(self._cancelled, None, self.status, queue=False, **quiet)
        for button, act in ((self.keep, self._kept), (self.discard, self._discarded)):
            button.click(act, None, desk_parts, concurrency_limit=None, **quiet)
        self.candidates.select(
            self._chosen, None, [self.viewer, self.changes, self.download, self.save],
            concurrency_limit=None, **quiet,
        )  # fmt: skip
        self.undo.click(self._undone, None, desk_parts, concurrency_limit=None, **quiet)
        self.redo.click(self._redone, None, desk_parts, concurrency_limit=None, **quiet)
        self.history.select(self._gone, None, desk_parts, concurrency_limit=None, **quiet)
        self.load.upload(
            self._loaded, self.load, [self.stack, self.fault, self.seed],
            concurrency_limit=None, **quiet,
        )  # fmt: skip

    def _start(
        self,
        request: gr.Request,
        painted: Painted,
        stack: Stack,
        model: str,
        seed: Any,
        count: Any,
        size: tuple[Any, Any],
    ) -> Iterator[dict[Any, Any]]:
        desk, tongue = self.workspace.desk(request), _language(request)
        ended: dict[Any, Any] = {
            self.run: gr.update(interactive=True),
            self.cancel: gr.update(interactive=False),
        }
        began = time.monotonic()
        try:
            desk.discard()
            seeds = [int(seed) + k for k in range(int(count))]
            sides = (int(size[0]), int(size[1]))
            workflow = desk.workflow(
                stack, painted.masks, model=model, seeds=seeds, size=sides,
                plugins=self.workspace.plugins,
            )  # fmt: skip
            yield {
                self.status: _status(say(tongue, "preparing")),
                self.fault: None,
                self.tabs: gr.update(selected="result"),
                self.candidates: gr.update(value=[], visible=False),
                self.changes: "",
            }
            if self.workspace.models.loaded != model:
                yield {self.status: _status(say(tongue, "loading", model=model))}
            now = desk.history.now
            with self.workspace.models.editor(model) as editor:
                file = None if now is None else now.file
                for one in run(editor, file, workflow, desk.cancel, desk.finished):
                    update: dict[Any, Any] = {self.status: _status(_said(tongue, one), one)}
                    if one.preview is not None:
                        update[self.viewer] = Look(preview=one.preview)
                    yield update
            seconds = f"{time.monotonic() - began:.1f}"
            yield {
                **ended,
                **self._results(desk, tongue),
                self.status: _status(say(tongue, "done", seconds=seconds)),
            }
        except Cancelled:
            yield {
                **ended,
                self.status: _status(say(tongue, "cancelled")),
                self.viewer: None,
                self.tabs: gr.update(selected="edit"),
            }
        except DiffeditError as error:
            yield {
                **ended,
                self.status: _status(str(error), alert=True),
                self.fault: _place(stack, error),
                self.viewer: None,
                self.tabs: gr.update(selected="edit"),
            }
        except Exception:
            log.exception("a run failed")
            yield {
                **ended,
                self.status: _status(say(tongue, "failed"), alert=True),
                self.viewer: None,
            }

    def _results(self, desk: Desk, tongue: str) -> dict[Any, Any]:
        """What was made, beside what it was made of."""
        made = desk.candidates
        if not made:
            return {self.viewer: None}
        return {
            self.candidates: gr.update(
                value=[(str(one.shown), f"{ENGLISH['seed']} {one.seed}") for one in made],
                visible=len(made) > 1,
                selected_index=0,
            ),
            self.keep: gr.update(interactive=True),
            self.discard: gr.update(interactive=True),
            **self._candidate(desk, 0, tongue),
        }

    def _candidate(self, desk: Desk, index: int, tongue: str) -> dict[Any, Any]:
        desk.chosen = index
        one, now = desk.candidates[index], desk.history.now
        workflow = desk.session.folder / "workflow.yaml"
        workflow.write_text(one.workflow, "utf-8")
        return {
            self.viewer: Look(
                now.shown if now is not None and now.size == one.size else None, one.shown
            ),
            self.changes: _counted(tongue, desk.changes(one)),
            self.download: gr.update(value=str(one.file), interactive=True),
            self.save: gr.update(value=str(workflow), interactive=True),
        }

    def _chosen(self, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        index = int(event.index)
        if not 0 <= index < len(desk.candidates):
            return {self.status: gr.skip()}
        return self._candidate(desk, index, _language(request))

    def _cancelled(self, request: gr.Request) -> str:
        self.workspace.desk(request).cancel.set()
        return _status("…")

    def _opened(self, painted: Painted, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        if painted.upload is None:
            return {self.status: gr.skip()}
        try:
            node = desk.open(painted.upload, painted.name)
        except InputError as error:
            return {self.canvas: Refused(str(error))}
        width, height = node.size
        said = say(_language(request), "opened", name=node.title, width=width, height=height)
        return self._desk(desk, said)

    def _kept(self, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        try:
            desk.accept(desk.chosen)
        except InputError as error:
            return {self.status: _status(str(error), alert=True)}
        return self._desk(desk)

    def _discarded(self, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        desk.discard()
        return self._desk(desk)

    def _undone(self, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        desk.history.undo()
        return self._desk(desk)

    def _redone(self, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        desk.history.redo()
        return self._desk(desk)

    def _gone(self, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        desk = self.workspace.desk(request)
        desk.history.go(int(event.index))
        return self._desk(desk)

    def _desk(self, desk: Desk, said: str = "") -> dict[Any, Any]:
        """Show the desk as it is: the present picture, the history, nothing made."""
        now, history = desk.history.now, desk.history
        shown = now and Shown(
            picture=now.shown, name=now.title, width=now.size[0], height=now.size[1],
            # What is made of a picture has its size: its masks stay good, back and forth.
            revision=history.path()[0].id + 1,
        )  # fmt: skip
        return {
            self.canvas: shown,
            self.history: gr.update(
                value=[(str(one.shown), one.title) for one in history],
                selected_index=history.current,
            ),
            self.undo: gr.update(interactive=now is not None and now.parent is not None),
            self.redo: gr.update(interactive=history.can_redo),
            self.viewer: None,
            self.candidates: gr.update(value=[], visible=False),
            self.keep: gr.update(interactive=False),
            self.discard: gr.update(interactive=False),
            self.changes: "",
            self.status: _status(said or ENGLISH["ready"]),
            self.tabs: gr.update(selected="edit"),
        }

    def _loaded(self, file: str) -> tuple[Any, Any, Any]:
        from pathlib import Path

        try:
            workflow = read_workflow(Path(file), self.workspace.plugins)
        except InputError as error:
            return gr.skip(), ("", "", str(error)), gr.skip()
        return Stack.of(workflow), None, workflow.seeds[0]


def _with_request(start: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Gradio finds the request by its annotation, which has to stand before the values."""

    def started(request: gr.Request, *values: Any) -> Iterator[Any]:
        yield from start(*values, request=request)

    return started


def _language(request: gr.Request) -> str:
    return language(request.headers.get("accept-language", ""))


def _said(tongue: str, one: Progress) -> str:
    said = say(
        tongue, "progress", picture=one.picture + 1, pictures=one.pictures,
        index=one.pass_index + 1, passes=one.passes, step=one.step, steps=one.steps,
    )  # fmt: skip
    if one.seconds_left is not None and one.seconds_left >= 1:
        said += say(tongue, "left", seconds=round(one.seconds_left))
    return said


def _status(said: str, one: Progress | None = None, *, alert: bool = False) -> str:
    bar = ""
    if one is not None:
        bar = f'<progress max="{one.steps}" value="{one.step}" aria-hidden="true"></progress>'
    role = 'role="alert" class="fault"' if alert else 'role="status"'
    return f"<p {role}>{html.escape(said)}</p>{bar}"


def _fault(said: str) -> str:
    return f'<p class="fault" role="alert">{html.escape(said)}</p>'


def _place(stack: Stack, error: DiffeditError) -> Fault:
    """Beside which field an error belongs."""
    said = str(error)
    found = _PLACE.search(said)
    at = stack.at(found[0]) if found else None
    return (*at, said) if at else ("", "", said)


def _counted(tongue: str, found: Changes | None) -> str:
    if found is None:
        return ""
    if not found.masked:
        return _status(say(tongue, "changes_all", outside=found.outside))
    said = say(tongue, "changes", inside=found.inside, outside=found.outside)
    if found.outside:
        said += say(tongue, "changes_reach", reach=int(-(-found.reach // 1)))
    return _status(said)
