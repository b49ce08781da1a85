"""Endpoints for programs and agents: ``/edit``, ``/run_workflow`` and ``/plugins``.

They are called with ``gradio_client``, over plain HTTP, or as tools (MCP) where the server offers
them. A run waits for its turn like every other one, tells its progress, and ends within a step when
its caller cancels it or goes away.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffedit import Workflow
from diffedit.errors import DiffeditError, InputError
from diffedit_demo.components import WithoutStub
from diffedit_demo.desk import Desk, visitors_workflow
from diffedit_demo.jobs import Cancelled, run
from diffedit_demo.stack import parameters_of
from diffedit_demo.texts import progress
from diffedit_demo.workspace import Workspace

Said = tuple[list[str] | None, str]
"""Files of pictures once there are some, and how far it is or the workflow that made them."""


class _Record(gr.JSON, metaclass=WithoutStub):
    """Values by name. Gradio's own schema of JSON, ``{"type": {}}``, is one that agents refuse."""

    is_template = True  # in the browser it is a gr.JSON

    def api_info(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": True}


class Endpoints:
    """What programs may call."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def lay_out(self) -> None:
        """Tie the endpoints, in the present `gr.Blocks`; nothing of them is seen."""
        with gr.Column(visible=False):
            image, mask = (
                gr.File(label=name, type="filepath", file_types=["image"])
                for name in ("image", "mask")
            )
            edit, prompt, negative, model, workflow = (
                gr.Textbox("", label=name)
                for name in ("edit", "prompt", "negative", "model", "workflow")
            )
            parameters = _Record(label="parameters", value={})
            seed = gr.Number(0, precision=0, label="seed")
            steps = gr.Number(20, precision=0, label="steps")
            guidance = gr.Number(5.0, label="guidance")
            pictures = gr.File(label="pictures", file_count="multiple")
            said = gr.Textbox(label="said")
            found = _Record(label="plugins")
            call: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
            gr.Button().click(
                _caught(self.edit),
                [image, edit, prompt, parameters, mask, seed, steps, guidance, negative, model],
                [pictures, said], api_name="edit", api_description=_about(self.edit), **call,
            )  # fmt: skip
            gr.Button().click(
                _caught(self.run_workflow), [image, workflow], [pictures, said],
                api_name="run_workflow", api_description=_about(self.run_workflow), **call,
            )  # fmt: skip
            gr.Button().click(
                self.plugins, None, found,
                api_name="plugins", api_description=_about(self.plugins), concurrency_limit=None,
            )  # fmt: skip

    def edit(
        self,
        request: gr.Request,
        image: str | None = None,
        edit: str = "",
        prompt: str = "",
        parameters: dict[str, Any] | None = None,
        mask: str | None = None,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 5.0,
        negative: str = "",
        model: str = "",
    ) -> Iterator[Said]:
        """Edit a picture by one edit, and get the picture and the workflow that made it.

        Args:
            image: the picture to edit; none: make one from nothing.
            edit: an edit's name, such as inpaint; /plugins lists them. Empty: none.
            prompt: what the picture is to show.
            parameters: those of the edit, by name; pictures among them as data URIs.
            mask: a picture, white where the edit is to change something, for an edit that takes a
                mask.
            seed: the same seed gives the same picture.
            steps: of sampling, 1 to 1000.
            guidance: how closely the prompt is followed.
            negative: what the picture is not to show.
            model: one of those that /plugins lists; empty: the first.
        """
        edits: list[dict[str, Any]] = []
        if edit:
            values = dict(parameters or {})
            schema = self.workspace.plugins.edit(edit).model_json_schema()
            masks = sorted(parameters_of(schema, ("mask",)))
            if mask is not None:
                if not masks:
                    raise InputError(f"{edit} takes no mask")
                values.setdefault(masks[0], Desk.checked(Path(mask)))
            edits = [{edit: values}]
        one = {
            "prompt": prompt, "negative": negative, "steps": steps, "guidance": guidance,
            "edits": edits,
        }  # fmt: skip
        data = {"model": model or self.workspace.models.sources[0], "seed": seed, "passes": [one]}
        workflow = Workflow.from_data(
            data, where="the call", plugins=self.workspace.plugins, files=False
        )
        yield from self._run(request, image, workflow)

    def run_workflow(self, request: gr.Request, image: str | None, workflow: str) -> Iterator[Said]:
        """Run a workflow on a picture, and get the pictures and the workflow with its seeds.

        Args:
            image: the picture to edit; none: make one from nothing.
            workflow: as YAML or JSON; pictures in it stand as data URIs, it may name no file.
        """
        read = visitors_workflow(workflow, "the workflow", self.workspace.plugins)
        yield from self._run(request, image, read)

    def plugins(self) -> dict[str, Any]:
        """List the models, the edits with their parameters (JSON Schema) and the preprocessors."""
        found = self.workspace.plugins
        return {
            "models": list(self.workspace.models.sources),
            "edits": {name: dict(self.workspace.schemas[name]) for name in sorted(found.edits)},
            "preprocessors": {name: one.help for name, one in sorted(found.preprocessors.items())},
            "broken": dict(found.broken),
        }

    def _run(self, request: gr.Request, image: str | None, workflow: Workflow) -> Iterator[Said]:
        self.workspace.check(workflow)
        # A desk of its own: calls of one session have nothing to do with each other.
        desk = Desk(self.workspace.sessions[request.session_hash])
        file = None
        if image is not None:
            desk.checked(Path(image))
            file = Path(image)
        made: list[str] = []

        def done(result: Any) -> None:
            for one in desk.made(result, None):
                desk.session.remove(one.shown)
                desk.session.unpin(one.file)  # the oldest go when a program has made many
                made.append(str(one.file))

        with self.workspace.models.editor(workflow.model, workflow.passes) as editor:
            for step in run(editor, file, workflow, threading.Event(), done):
                yield None, progress("en", step)
        yield made, workflow.to_yaml()


def _caught(act: Callable[..., Iterator[Said]]) -> Callable[..., Iterator[Said]]:
    """What is wrong with a call is told to the caller, in its one line."""

    @functools.wraps(act)  # the parameters' names are those of the endpoint
    def called(request: gr.Request, *values: Any) -> Iterator[Said]:
        try:
            yield from act(request, *values)
        except (DiffeditError, Cancelled) as error:
            raise gr.Error(str(error) or "cancelled", print_exception=False) from None

    return called


def _about(act: Callable[..., Any]) -> str:
    return inspect.getdoc(act) or ""
