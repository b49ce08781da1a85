"""What is on the page, and where: a picture with masks on the left, the stack on the right."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from diffedit_demo.about import card, heading
from diffedit_demo.canvas import Canvas
from diffedit_demo.code import LANGUAGES
from diffedit_demo.composer import Composer
from diffedit_demo.jobs import Progress
from diffedit_demo.look import translations
from diffedit_demo.settings import MOST_PICTURES
from diffedit_demo.texts import COMPOSER, PAGE, VIEWER, say
from diffedit_demo.viewer import Viewer
from diffedit_demo.workspace import Workspace


class Layout:
    """The components."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.t: Any = translations()

    def lay_out(self) -> None:
        """Put everything on the page; of the present `gr.Blocks`."""
        gr.HTML(heading(), padding=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self._left()
            with gr.Column(scale=2, min_width=320):
                self._right()

    def _left(self) -> None:
        t = self.t
        with gr.Tabs(selected="edit") as self.tabs:
            with gr.Tab(t("tab_edit"), id="edit"):
                self.canvas = Canvas(elem_id="canvas")
            with gr.Tab(t("tab_result"), id="result"):
                self.viewer = Viewer(VIEWER, elem_id="viewer")
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
        with gr.Row(elem_classes="steps"):
            self.undo = gr.Button(t("undo"), size="sm", interactive=False, elem_id="undo")
            self.redo = gr.Button(t("redo"), size="sm", interactive=False, elem_id="redo")
            self.remove = gr.Button(t("remove"), size="sm", interactive=False, elem_id="remove")

    def _right(self) -> None:
        t = self.t
        with gr.Column(elem_classes="run-bar"):
            self.status = gr.HTML(status_line(PAGE["en"]["ready"]), elem_id="status", padding=False)
            with gr.Row():
                self.run = gr.Button(t("run"), variant="primary", elem_id="run")
                self.cancel = gr.Button(
                    t("cancel"), variant="stop", interactive=False, elem_id="cancel"
                )
        for name, why in self.workspace.plugins.broken.items():
            gr.HTML(f'<p class="fault">{html.escape(say("en", "broken", name=name, why=why))}</p>')
        self.composer = Composer(forms=self.workspace.forms(), texts=COMPOSER, elem_id="composer")
        with gr.Accordion(t("workflow"), open=False):
            self.load = gr.UploadButton(
                t("load"),
                file_types=[".yaml", ".yml", ".json", ".png"],
                type="filepath",
            )
            self.save = gr.DownloadButton(t("save"), interactive=False)
            self.language = gr.Radio(list(LANGUAGES), value=None, label=t("code"))
            self.code = gr.Textbox(
                label=t("code_text"), lines=6, max_lines=16, interactive=False, visible=False,
                buttons=["copy"], elem_id="code",
            )  # fmt: skip
        with gr.Accordion(t("about"), open=False, elem_id="about"):
            for source in self.workspace.models.sources:
                gr.Markdown(card(source))

    def all(self) -> list[Any]:
        """What shows the desk."""
        return [
            self.canvas, self.composer, self.history, self.undo, self.redo, self.remove,
            self.viewer, self.candidates, self.keep, self.discard, self.changes, self.status,
            self.tabs,
        ]  # fmt: skip


def status_line(said: str, one: Progress | None = None, *, alert: bool = False) -> str:
    """The line of the status, with a bar while something runs."""
    bar = ""
    if one is not None:
        bar = f'<progress max="{one.steps}" value="{one.step}" aria-hidden="true"></progress>'
    role = 'role="alert" class="fault"' if alert else 'role="status"'
    return f"<p {role}>{html.escape(said)}</p>{bar}"
