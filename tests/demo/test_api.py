"""The endpoints for programs and agents, called as they call them."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file

import diffedit
from diffedit import Editor, Pass, Workflow
from diffedit.images import encode_png, open_picture
from diffedit.plugins import default
from diffedit.testing import tiny_editor
from diffedit_demo.api import Endpoints
from diffedit_demo.jobs import Models
from diffedit_demo.sessions import Sessions
from diffedit_demo.workspace import Workspace
from tests.demo.conftest import served

WAIT = 120


@pytest.fixture
def client(address: str, tmp_path: Path) -> Iterator[Client]:
    made = Client(address, verbose=False, download_files=str(tmp_path / "down"))
    yield made
    made.close()


def edit(client: Client, photo: Path | None, **given: Any) -> Any:
    """A call of /edit."""
    call = {
        "image": None if photo is None else handle_file(str(photo)),
        "edit": "img2img", "prompt": "a red circle", "parameters": {"strength": 0.5},
        "seed": 3, "steps": 4,
    }  # fmt: skip
    return client.submit(**{**call, **given}, api_name="/edit")


def test_an_edit_is_what_the_editor_makes(client: Client, photo: Path) -> None:
    pictures, said = edit(client, photo).result(WAIT)
    workflow = Workflow.from_yaml(said)
    assert workflow.seed == 3
    expected = Editor.load("tiny", device="cpu").run(photo, workflow)
    assert (open_picture(Path(pictures[0])).pixels == expected.pixels).all()


def test_a_mask_and_a_picture_among_the_parameters(
    client: Client, photo: Path, tmp_path: Path
) -> None:
    import base64

    import numpy as np
    from PIL import Image

    mask = np.zeros((128, 160), np.uint8)
    mask[30:90, 40:100] = 255
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    painted = edit(
        client, photo, edit="inpaint", parameters={"feather": 0}, mask=handle_file(str(file))
    )
    pictures, _ = painted.result(WAIT)
    before, after = open_picture(photo).pixels, open_picture(Path(pictures[0])).pixels
    assert (before[mask == 0] == after[mask == 0]).all()
    assert (before[mask == 255] != after[mask == 255]).any()
    reference = (
        "data:image/png;base64," + base64.b64encode(encode_png(open_picture(photo), {})).decode()
    )
    pictures, said = edit(client, photo, edit="style", parameters={"image": reference}).result(WAIT)
    assert [one.name for one in Workflow.from_yaml(said).passes[0].edits] == ["style"]


def test_a_workflow_runs_from_nothing_and_gives_every_seed(client: Client) -> None:
    passes = [Pass(prompt="a red circle", steps=2)]
    workflow = Workflow(model="tiny", seed=(1, 2), size=(64, 48), passes=tuple(passes))
    pictures, said = client.submit(None, workflow.to_yaml(), api_name="/run_workflow").result(WAIT)
    assert len(pictures) == 2
    assert open_picture(Path(pictures[0])).size == (64, 48)
    assert Workflow.from_yaml(said) == workflow


def test_progress_is_told(client: Client, photo: Path) -> None:
    job = edit(client, photo, steps=8, parameters={"strength": 1.0})
    job.result(WAIT)
    said = [one[1] for one in job.outputs()]
    assert sum("step" in one for one in said[:-1]) >= 3


def test_plugins_are_listed(client: Client) -> None:
    found = client.predict(api_name="/plugins")
    assert set(found["edits"]) == set(diffedit.edits())
    assert found["edits"]["img2img"]["properties"]["strength"]["maximum"] == 1
    assert found["models"] == ["tiny"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"edit": "impaint"}, "no edit 'impaint'"),
        ({"parameters": {"strength": 3}}, "strength is 3"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"model": "/etc"}, "not offered here"),
        ({"edit": "style", "parameters": {"image": "/etc/passwd"}}, "is a file's name"),
        ({"edit": "img2img", "mask": "photo"}, "takes no mask"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    client: Client, photo: Path, given: dict[str, Any], why: str
) -> None:
    given = {k: handle_file(str(photo)) if v == "photo" else v for k, v in given.items()}
    with pytest.raises(Exception, match=why):
        edit(client, photo, **given).result(WAIT)


def test_a_workflow_may_not_ask_for_more_than_pages_do(client: Client) -> None:
    for wrong, why in (
        ({"passes": [{"prompt": "x"}] * 40}, "40 passes"),
        ({"seed": list(range(9)), "passes": [{"prompt": "x"}]}, "9 seeds"),
        ({"size": [9000, 8], "passes": [{"prompt": "x"}]}, "9000 pixels"),
    ):
        with pytest.raises(Exception, match=why):
            client.predict(None, json.dumps(wrong), api_name="/run_workflow")


def test_a_call_that_is_cancelled_frees_the_queue(client: Client, photo: Path) -> None:
    job = edit(client, photo, steps=1000, parameters={"strength": 1.0})
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    began = time.monotonic()
    edit(client, photo).result(WAIT)
    assert time.monotonic() - began < 60  # a thousand steps take minutes


def test_agents_find_the_same_as_tools(photo: Path) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    picture = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    asked = {
        "image": picture, "edit": "img2img", "prompt": "a red circle",
        "parameters": {"strength": 0.5}, "seed": 3, "steps": 2,
    }  # fmt: skip

    async def calls(url: str) -> tuple[set[str], Any, Any]:
        async with (
            streamablehttp_client(url) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {one.name for one in (await session.list_tools()).tools}
            named = {name.rpartition("diffedit_")[2]: name for name in tools}
            said = await session.call_tool(named["plugins"], {})
            made: Any = await session.call_tool(named["edit"], asked)
            for url in re.findall(r"http://[^']+", made.content[0].text):
                fetched[url] = httpx.get(url).content
            return set(named), said, made

    fetched: dict[str, bytes] = {}
    with served("--mcp") as address:
        tools, said, made = asyncio.run(calls(f"{address}/gradio_api/mcp/"))
    assert {"edit", "run_workflow", "plugins"} <= tools
    assert "inpaint" in said.content[0].text
    assert not made.isError, made.content
    (file,), text = ast.literal_eval(made.content[0].text)
    expected = Editor.load("tiny", device="cpu").run(photo, Workflow.from_yaml(text))
    assert (open_picture(fetched[file["url"]]).pixels == expected.pixels).all()


def test_what_programs_make_gives_way_when_a_session_is_full(tmp_path: Path) -> None:
    models = Models(["tiny"], lambda source: tiny_editor())
    sessions = Sessions(tmp_path / "sessions", quota_bytes=60_000)
    endpoints = Endpoints(Workspace(models, sessions, default()))
    request: Any = SimpleNamespace(session_hash="program")
    text = "size: [64, 64]\nseed: SEED\npasses: [{prompt: x, steps: 1, guidance: 1}]"
    made: list[str] = []
    for seed in range(12):
        *_, (files, _) = endpoints.run_workflow(request, None, text.replace("SEED", str(seed)))
        assert files
        assert Path(files[0]).exists()
        made.append(files[0])
    assert not Path(made[0]).exists()
    assert sessions["program"].used <= 60_000
