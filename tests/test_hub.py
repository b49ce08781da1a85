"""Models by hub id, from a hub on this machine: what is fetched, resumed, refused, used offline."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from diffedit import Editor, Pass, errors
from diffedit.cli import main
from diffedit.models import download, hub
from diffedit.models.loading import inspect
from diffedit.models.turns import turns
from diffedit.testing import tiny_control_net, tiny_editor, tiny_pipeline
from diffedit_controlnet import ControlNet
from diffedit_ip_adapter import IPAdapter
from diffedit_lora import LoRA
from diffedit_textual_inversion import TextualInversion
from tests.families import SDXL, ip_adapter
from tests.families.additions import additions, written
from tests.hub_server import Hub, digest, serving

NAME = "someone/model"
UNET = "unet/diffusion_pytorch_model.safetensors"
PASS = Pass(prompt="a red circle", steps=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one model, with what else such a folder may hold."""
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("models") / str(seed)
        pipe: Any = tiny_pipeline(seed=seed)
        pipe.save_pretrained(folder)
        pipe.unet.save_pretrained(folder / "unet", variant="fp16")
        pipe.unet.save_pretrained(folder / "unet", safe_serialization=False)
        for extra in (
            "model.ckpt",
            "all.safetensors",
            "text_encoder/model.onnx",
            "vae/flax.msgpack",
        ):
            (folder / extra).write_bytes(b"not for us")
        (folder / "safety_checker").mkdir()
        shutil.copy(folder / UNET, folder / "safety_checker" / "model.safetensors")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        made.append(folder)
    return made


@pytest.fixture
def server(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the first version, for this process; an empty cache."""
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    with serving() as served:
        served.push(NAME, folders[0])
        use(monkeypatch, served.url, tmp_path / "cache")
        yield served


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def pixels(editor: Editor) -> Any:
    return editor.run(None, PASS).pixels


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("cache/models--*/blobs/*"))


# --- what is fetched ------------------------------------------------------------------------------


def test_a_hub_id_is_the_same_model_as_its_folder(server: Hub, folders: list[Path]) -> None:
    editor = Editor.load(NAME)
    assert (pixels(editor) == pixels(Editor.load(folders[0]))).all()
    assert editor.source == NAME
    commit = server.commit(NAME, "main")
    assert editor.model.info["source"] == NAME
    assert editor.run(None, PASS).provenance["model"]["commit"] == commit


def test_only_what_is_needed_is_fetched_and_once(server: Hub) -> None:
    Editor.load(NAME)
    assert [path for path in server.fetched() if not path.endswith((".json", ".txt"))] == [
        "text_encoder/model.safetensors",
        UNET,
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert not any(path.startswith("safety_checker") for path in server.fetched())
    assert len([path for _, path, _ in server.asked if "/large/" in path]) == 3
    server.asked.clear()
    Editor.load(NAME)
    assert server.fetched() == []


def test_a_variant_is_fetched_where_there_is_one(server: Hub) -> None:
    Editor.load(NAME, variant="fp16")
    fetched = server.fetched()
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched
    assert UNET not in fetched
    assert "vae/diffusion_pytorch_model.safetensors" in fetched


def test_where_no_part_is_of_a_variant_it_is_told(
    server: Hub, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    del server.repositories[NAME]["main"]["unet/diffusion_pytorch_model.fp16.safetensors"]
    mine = Editor.load(NAME, variant="fp16")
    assert (pixels(mine) == pixels(Editor.load(folders[0]))).all()
    assert f"{NAME}: has no weights of variant fp16: takes its plain ones" in caplog.text


def test_a_tokenizer_that_knows_no_words_is_refused(server: Hub) -> None:
    del server.repositories[NAME]["main"]["tokenizer/tokenizer.json"]
    with pytest.raises(errors.ModelError, match="/tokenizer: the tokenizer knows no words"):
        Editor.load(NAME)


def test_a_variant_is_named_on_the_command_line_and_holds_for_the_models_of_passes(
    server: Hub, folders: list[Path], tmp_path: Path
) -> None:
    server.push("someone/refiner", folders[1])
    file, out = tmp_path / "two.yaml", str(tmp_path / "out.png")
    first, second = (
        "{prompt: x, steps: 2, stop: 0.5}",
        "{prompt: x, steps: 2, model: someone/refiner}",
    )
    file.write_text(
        f"diffedit: 1\nmodel: {NAME}\nsize: 64x64\npasses:\n  - {first}\n  - {second}\n"
    )
    assert main(["run", str(file), "-o", out, "--variant", "fp16", "--device", "cpu"]) == 0
    for name in (NAME, "someone/refiner"):
        asked = [path for _, path, _ in server.asked if path.startswith(f"/{name}/resolve/")]
        assert any(path.endswith("unet/diffusion_pytorch_model.fp16.safetensors") for path in asked)
        assert not any(path.endswith(UNET) for path in asked)


def test_shards_are_fetched_with_their_index(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    pipe: Any = tiny_pipeline()
    pipe.save_pretrained(folder)
    (folder / UNET).unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    server.push("someone/sharded", folder)
    assert (pixels(Editor.load("someone/sharded")) == pixels(Editor.load(folder))).all()


def test_of_models_that_have_variants_only_one_is_taken_and_of_several_none(server: Hub) -> None:
    files = server.repositories[NAME]["main"]
    stem = "vae/diffusion_pytorch_model"
    files[f"{stem}.fp16.safetensors"] = files.pop(f"{stem}.safetensors")
    Editor.load(NAME)
    files[f"{stem}.ema.safetensors"] = files[f"{stem}.fp16.safetensors"]
    with pytest.raises(errors.ModelError, match=r"no weights but .*fp16.*: say which with variant"):
        Editor.load(NAME)


def test_what_the_real_client_downloads_is_used_and_it_uses_what_is_here(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server speaks as the real one does, and the cache is shared."""
    huggingface_hub.snapshot_download(NAME, endpoint=server.url, cache_dir=tmp_path / "cache")
    server.asked.clear()
    Editor.load(NAME)
    assert server.fetched() == []
    use(monkeypatch, server.url, tmp_path / "other")
    Editor.load(NAME)
    server.asked.clear()
    again = huggingface_hub.hf_hub_download(
        NAME, UNET, endpoint=server.url, cache_dir=tmp_path / "other"
    )
    assert not any("/large/" in path for method, path, _ in server.asked if method == "GET")
    assert load_file(again).keys() == load_file(tmp_path / "cache" / _place(server)).keys()


def _place(server: Hub) -> str:
    return f"models--someone--model/snapshots/{server.commit(NAME, 'main')}/{UNET}"


def test_control_networks_by_hub_id(server: Hub, tmp_path: Path) -> None:
    tiny_control_net(tiny_pipeline()).save_pretrained(tmp_path / "net")
    server.push("someone/net", tmp_path / "net", {"extra.bin": b"x", "big/extra.safetensors": b"x"})
    editor = Editor.load(NAME)
    server.asked.clear()
    picture = np.full((64, 64, 3), 128, np.uint8)
    made = [
        editor.run(picture, Pass(prompt="x", steps=1, edits=[ControlNet(model=net)])).pixels
        for net in ("someone/net", str(tmp_path / "net"))
    ]
    assert (made[0] == made[1]).all()
    assert server.fetched() == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_models_own_loras_come_with_it(server: Hub, folders: list[Path], tmp_path: Path) -> None:
    """They are few and small, and called by their names alone."""
    own = tmp_path / "model" / "lora" / "soft"
    shutil.copytree(folders[0], tmp_path / "model")
    own.mkdir(parents=True)
    file = written(own / "pytorch_lora_weights.safetensors", additions(tiny_pipeline()))
    (own / "diffedit.json").write_text('{"steps": 4}')
    server.push("someone/distilled", tmp_path / "model", {"lora/soft/notes.safetensors": b"x"})
    editor = Editor.load("someone/distilled")
    go = [Pass(prompt="x", steps=1, edits=[LoRA(model=name)]) for name in ("soft", file)]
    first, second = (editor.run(None, one, size=(64, 64)).pixels for one in go)
    assert (first == second).all()
    assert "lora/soft/diffedit.json" in server.fetched()
    assert "lora/soft/notes.safetensors" not in server.fetched()


def test_no_other_thread_waits_for_a_download(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever fetches within a step, or while it loads, has no turn meanwhile."""
    here, kept = threading.get_ident(), list[bool]()
    get = hub.Repository._get

    def seen(self: hub.Repository, *given: Any) -> None:
        kept.append(here in turns._running or turns._loader == here)
        get(self, *given)

    monkeypatch.setattr(hub.Repository, "_get", seen)
    with turns.running():
        hub.find(NAME).model()
        assert here in turns._running
    assert kept
    assert not any(kept)


def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path) -> None:
    editor = Editor.load(NAME)
    for named, said in (
        ("someone/model/other.safetensors", r"someone/model: has no other.safetensors on the hub$"),
        ("https://huggingface.co/someone/model/blob/main/a.safetensors", "an address: give a file"),
    ):
        with pytest.raises(errors.ModelError, match=said):
            editor.run(None, Pass(prompt="x", steps=1, edits=[LoRA(model=named)]))
    server.push("someone/empty", tmp_path / "nothing", {"notes.txt": b"x"})
    with pytest.raises(errors.ModelError, match=r"has no model_index\.json on the hub, so it"):
        Editor.load("someone/empty")


def test_the_autoencoder_of_a_whole_model_by_its_hub_id(
    server: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of its folder, and nothing else of it is fetched."""
    wanted = pixels(Editor.load(folders[0], vae=folders[1]))
    commit = server.push("someone/other", folders[1])
    server.push("someone/vae", folders[1] / "vae")
    assert (pixels(Editor.load(folders[0], vae="someone/other")) == wanted).all()
    weights = "diffusion_pytorch_model.safetensors"
    assert server.fetched() == ["vae/config.json", f"vae/{weights}"]
    assert (pixels(Editor.load(folders[0], vae=f"someone/other@{commit}")) == wanted).all()
    assert (pixels(Editor.load(folders[0], vae="someone/vae")) == wanted).all()
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("someone/other", "someone/vae"):
        assert (pixels(Editor.load(folders[0], vae=name)) == wanted).all()
    with pytest.raises(errors.ModelError, match="someone/other: no such folder here, and the hub"):
        Editor.load("someone/other")  # a part of it is no model


def test_a_control_network_of_another_class_is_refused_before_its_weights_are_fetched(
    server: Hub, tmp_path: Path
) -> None:
    pipe: Any = tiny_pipeline()
    pipe.unet.save_pretrained(tmp_path / "net")
    server.push("someone/net", tmp_path / "net")
    editor = Editor.load(NAME)
    with pytest.raises(errors.ModelError, match="holds a UNet2DConditionModel, and the loaded"):
        editor.model.load_control("someone/net")
    assert not any("someone/net" in path for _, path, _ in server.asked if "/large/" in path)


# --- revisions ------------------------------------------------------------------------------------


def test_a_revision_is_pinned(server: Hub, folders: list[Path], tmp_path: Path) -> None:
    old = server.commit(NAME, "main")
    new = server.push(NAME, folders[1])
    server.repositories[NAME]["v1"] = server.repositories[NAME][old]
    first, second = (pixels(Editor.load(folder)) for folder in folders)
    assert (first != second).any()
    for made in (Editor.load(NAME, revision=old), Editor.load(f"{NAME}@{old}"),
                 Editor.load(f"{NAME}@v1")):  # fmt: skip
        assert (pixels(made) == first).all()
        assert made.model.info["commit"] == old
    newest = Editor.load(NAME)
    assert (pixels(newest) == second).all()
    assert newest.model.info["commit"] == new
    assert inspect(f"{NAME}@v1")["commit"] == old
    assert inspect(NAME)["commit"] == new
    with pytest.raises(errors.ModelError, match="names one revision where 'main' is asked for"):
        Editor.load(f"{NAME}@v1", revision="main")
    with pytest.raises(errors.ModelError, match="no such revision"):
        Editor.load(NAME, revision="v2")


# --- downloads that fail --------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_stopped(
    server: Hub, folders: list[Path], tmp_path: Path
) -> None:
    whole = (folders[0] / UNET).read_bytes()
    at = len(whole) // 3
    server.cut[UNET] = at
    with pytest.raises(errors.ModelError, match=rf"broke off at {at} of {len(whole)} bytes.*again"):
        Editor.load(NAME)
    kept = hashlib.sha256(whole).hexdigest()
    assert f"{kept}.incomplete" in blobs(tmp_path)
    assert kept not in blobs(tmp_path)
    server.cut.clear()
    server.asked.clear()
    editor = Editor.load(NAME)
    ranges = [begin for _, path, begin in server.asked if path.endswith(UNET) and "large" in path]
    assert ranges == [f"bytes={at}-"]
    assert (tmp_path / "cache/models--someone--model/blobs" / kept).read_bytes() == whole
    assert (pixels(editor) == pixels(Editor.load(folders[0]))).all()


def test_a_connection_that_drops_now_and_then_is_taken_up_again(server: Hub) -> None:
    """As long as each brings something; the real hub's files take minutes."""

    class Later(dict[str, int]):
        def get(self, path: str, default: Any = None) -> Any:  # a little more each time
            if path == UNET:
                self[path] = self.get("at", 0) + 300_000
                self["at"] = self[path]
                return self[path]
            return super().get(path, default)

    server.cut = Later()
    Editor.load(NAME)
    assert len([1 for _, path, _ in server.asked if path.endswith(UNET) and "large" in path]) > 2


def test_what_a_partial_file_holds_wrongly_is_fetched_anew(
    server: Hub, folders: list[Path], tmp_path: Path
) -> None:
    name = digest(UNET, (folders[0] / UNET).read_bytes())
    place = tmp_path / "cache/models--someone--model/blobs" / f"{name}.incomplete"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"of something else")
    assert (pixels(Editor.load(NAME)) == pixels(Editor.load(folders[0]))).all()


@pytest.mark.parametrize("path", [UNET, "unet/config.json"])
def test_a_wrong_checksum_is_refused_and_nothing_of_it_stays(
    server: Hub, tmp_path: Path, path: str
) -> None:
    server.wrong.add(path)
    said = f"{path} came with other bytes than the hub says"
    for _ in range(2):  # the second attempt takes nothing of the first for good
        with pytest.raises(errors.ModelError, match=said):
            Editor.load(NAME)
        name = digest(path, server.repositories[NAME]["main"][path])
        assert not [blob for blob in blobs(tmp_path) if blob.startswith(name)]
    server.wrong.clear()
    Editor.load(NAME)


def test_another_size_than_the_hub_says_is_refused(server: Hub, tmp_path: Path) -> None:
    """A server that sends without end is stopped at the size."""
    file = download.File(UNET, 1000, "0" * 64)
    commit = server.commit(NAME, "main")
    url = f"{server.url}/{NAME}/resolve/{commit}/{UNET}"
    told: list[int] = []
    with pytest.raises(errors.ModelError, match="checksum or size"):
        download.fetch(file, url, tmp_path / "file", what=NAME, told=told.append)
    assert max(np.cumsum(told)) < 2**18
    assert list(tmp_path.glob("file*")) == []


def test_a_file_of_another_size_in_the_cache_is_fetched_anew(server: Hub, tmp_path: Path) -> None:
    Editor.load(NAME)
    blob = (tmp_path / "cache" / _place(server)).resolve()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-10])
    Editor.load(NAME)
    assert blob.read_bytes() == whole


def test_a_redirect_to_another_host_is_refused(
    server: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as other:
        other.push(NAME, folders[0])
        server.elsewhere[UNET] = other.url
        host = other.url.removeprefix("http://")
        with pytest.raises(errors.ModelError) as refused:
            Editor.load(NAME)
        own = server.url.removeprefix("http://")
        assert f"over to {other.url}, which may not serve it; {own} may" in str(refused.value)
        assert download.HOSTS in str(refused.value)
        assert other.asked == []
        monkeypatch.setenv(download.HOSTS, f"cdn.example.org, {host}")
        Editor.load(NAME)
        assert [path for _, path, _ in other.asked] == [
            f"/large/{NAME}/{server.commit(NAME, 'main')}/{UNET}"
        ]


@pytest.mark.parametrize(
    ("endpoint", "url", "allowed"),
    [
        ("https://huggingface.co", "https://cas-bridge.xethub.hf.co/x", True),
        ("https://huggingface.co", "https://cdn-lfs-us-1.huggingface.co/x", True),
        ("https://huggingface.co", "https://huggingface.co/x", True),
        ("https://huggingface.co", "http://cdn-lfs.huggingface.co/x", False),
        ("https://huggingface.co", "http://huggingface.co/x", False),
        ("https://huggingface.co", "https://huggingface.co.example.org/x", False),
        ("https://huggingface.co", "https://nothf.co/x", False),
        ("https://huggingface.co", "https://huggingface.co@example.org/x", False),
        ("http://127.0.0.1:8000", "https://huggingface.co/x", False),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001/x", False),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/x", True),
        ("https://hub.example.org", "http://hub.example.org/x", False),
    ],
)
def test_which_hosts_may_serve(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, url: str, allowed: bool
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    to = download.utils().get_session().build_request("GET", url).url
    if allowed:
        download._check_host(to, "a file")
    else:
        with pytest.raises(errors.ModelError, match="may not serve it"):
            download._check_host(to, "a file")


def test_a_token_goes_to_the_hub_alone(
    server: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str | None] = {}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving() as other:
        other.push(NAME, folders[0])
        server.elsewhere[UNET] = other.url
        monkeypatch.setenv(download.HOSTS, other.url.removeprefix("http://"))
        send = download.utils().get_session().send

        def watched(request: Any, **options: Any) -> Any:
            seen[request.url.netloc.decode()] = request.headers.get("authorization")
            return send(request, **options)

        monkeypatch.setattr(download.utils().get_session(), "send", watched)
        Editor.load(NAME)
    own, its = (url.removeprefix("http://") for url in (server.url, other.url))
    assert seen == {own: "Bearer hf_secret", its: None}


# --- without network ------------------------------------------------------------------------------


def test_what_is_here_is_used_offline(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    online = pixels(Editor.load(NAME))
    commit = server.commit(NAME, "main")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    caplog.set_level(logging.WARNING, "diffedit")
    editor = Editor.load(NAME)
    assert (pixels(editor) == online).all()
    assert editor.model.info["commit"] == commit
    assert "the hub could not be asked (" in caplog.text
    assert inspect(NAME)["class"] == "StableDiffusionPipeline"
    caplog.clear()
    server.asked.clear()
    use(monkeypatch, server.url, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (pixels(Editor.load(NAME)) == online).all()
    assert (pixels(Editor.load(NAME, revision=commit)) == online).all()
    assert server.asked == []
    assert caplog.text == ""  # nobody has to be told of what they asked for
    with pytest.raises(errors.ModelError, match=r"may not be asked \(HF_HUB_OFFLINE is set\)"):
        Editor.load("someone/else")


def test_a_download_that_did_not_end_is_no_model_offline(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut[UNET] = 100
    with pytest.raises(errors.ModelError, match="broke off"):
        Editor.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.ModelError, match="no such folder here, and the hub may not"):
        Editor.load(NAME)


def test_the_last_whole_version_is_used_offline(
    server: Hub, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pixels(Editor.load(NAME))
    server.push(NAME, folders[1])
    server.cut[UNET] = 100
    with pytest.raises(errors.ModelError, match="broke off"):
        Editor.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (pixels(Editor.load(NAME)) == first).all()


# --- what is refused, and what is left alone ------------------------------------------------------


def test_a_repository_of_pickles_is_refused(server: Hub, folders: list[Path]) -> None:
    files = server.repositories[NAME]["main"]
    for path in list(files):
        if path.startswith("unet/") and path.endswith(".safetensors"):
            del files[path]
    with pytest.raises(errors.UnsafeWeights, match=r"unet/diff.*\.bin: a pickle \(\.bin\) can run"):
        Editor.load(NAME)
    assert not any("/large/" in path for _, path, _ in server.asked)


@pytest.mark.parametrize("listed", [False, True])
def test_code_that_a_repository_brings_is_not_run(
    server: Hub,
    folders: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    listed: bool,
) -> None:
    proof = tmp_path / "it ran"
    evil = f"open({str(proof)!r}, 'w')\nclass Custom: pass\n".encode()
    index = json.loads((folders[0] / "model_index.json").read_text())
    if listed:
        index["_class_name"] = ["pipeline", "StableDiffusionPipeline"]
    text = json.loads((folders[0] / "text_encoder/config.json").read_text())
    text["auto_map"] = {"AutoModel": "evil.Custom"}
    more = dict.fromkeys(("pipeline.py", "unet/evil.py", "text_encoder/evil.py"), evil)
    more |= {
        "model_index.json": json.dumps({**index, "custom_pipeline": "pipeline"}).encode(),
        "text_encoder/config.json": json.dumps(text).encode(),
    }
    server.push(NAME, folders[0], more)
    caplog.set_level(logging.WARNING, "diffedit")
    made = pixels(Editor.load(NAME))
    assert (made == pixels(Editor.load(folders[0]))).all()
    assert not proof.exists()
    assert not any(path.endswith(".py") for path in server.fetched())
    (said,) = [one.getMessage() for one in caplog.records if one.name.startswith("diffedit")]
    assert said == (
        f"{NAME}: brings code of its own (pipeline.py, text_encoder/config.json,"
        " text_encoder/evil.py, unet/evil.py), which diffedit does not run"
    )


def test_a_part_that_is_code_is_refused_unrun(
    server: Hub, folders: list[Path], tmp_path: Path
) -> None:
    proof = tmp_path / "it ran"
    evil = f"open({str(proof)!r}, 'w')\nclass MyUNet: pass\n".encode()
    index = json.loads((folders[0] / "model_index.json").read_text())
    index["unet"] = ["my_unet", "MyUNet"]
    more = {"model_index.json": json.dumps(index).encode(), "unet/my_unet.py": evil}
    server.push(NAME, folders[0], more)
    with pytest.raises(errors.ModelError, match=r"unet is a my_unet\.MyUNet, which is of neither"):
        Editor.load(NAME)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("path", "blob"),
    [("../../evil.json", None), ("/etc/evil.json", None), ("a\\..\\b", None), ("x", "../../x")],
)
def test_a_hub_that_lists_files_elsewhere_is_refused(
    server: Hub, monkeypatch: pytest.MonkeyPatch, path: str, blob: str | None
) -> None:
    said = {"rfilename": path, "size": 1, "blobId": blob or "0" * 40}
    monkeypatch.setattr(hub, "ask", lambda *_: {"sha": "0" * 40, "siblings": [said]})
    with pytest.raises(errors.ModelError, match=r"lists no model's files"):
        hub.find(NAME)


@pytest.mark.parametrize(
    ("source", "right"),
    [("a/b", True), ("a/b@main", True), ("a/b@refs/pr/1", True), ("a/b@../c", False),
     ("../b", False), ("a/..", False), ("a/b/c", False), ("a", False), ("/a/b", False),
     ("a--b/c", False), ("a/b@/c", False)],
)  # fmt: skip
def test_what_a_hub_id_looks_like(source: str, right: bool) -> None:
    assert hub.could_be(source) == right


# --- the command line -----------------------------------------------------------------------------


def environment(server: str, home: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return own | {"HF_ENDPOINT": server, "HF_HOME": str(home)}


def test_the_command_line_shows_a_bar_and_works_offline_after(
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--size", "64x64"]
    line += ["--model", NAME, "--overwrite", "--device", "cpu"]
    with serving() as server:
        server.push(NAME, folders[0])
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 100))
        process = subprocess.Popen(
            [sys.executable, "-m", "diffedit", *line],
            env=environment(server.url, home),
            stderr=slave,
        )
        seen = b""
        while process.poll() is None or select.select([master], [], [], 0.1)[0]:
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 65536)
        os.close(master)
        os.close(slave)
        assert process.returncode == 0
        assert re.search(rb"someone/model: 100%.*B/s", seen)
    made = (tmp_path / "a.png").read_bytes()
    use(monkeypatch, "http://127.0.0.1:9", home / "hub")
    capsys.readouterr()
    assert main(line) == 0
    assert "the hub could not be asked" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == made


def test_info_fetches_no_weights(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "info", NAME, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["commit"] == server.commit(NAME, "main")
    assert said["family"] == "stable-diffusion"
    assert said["licence"] == "mit"
    assert said["unet"]["in_channels"] == 4
    assert UNET in said["files"]
    assert not any("/large/" in path for _, path, _ in server.asked)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("someone/nothing", "no such folder here, and none of this name on the hub, or it is priv"),
        (f"{NAME}@v9", "no such revision"),
        ("someone/closed", "no such folder here, and the hub could not be asked for it (http://1"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    said: str,
) -> None:
    if "closed" in model:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "out.png"
    for line in (
        ["edit", "-o", str(out), "-p", "x", "--size", "64x64", "--model", model],
        ["models", "info", model],
    ):
        assert main(line) == 2
        (told,) = capsys.readouterr().err.strip().splitlines()
        assert told.startswith(f"diffedit: {model}: ")
        assert said in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong", f"{UNET} came with other bytes than the hub says"),
        ("cut", f"{UNET} broke off at 1000 of "),
        ("elsewhere", "which may not serve it"),
        ("pickles", "pickle"),
        ("a shard", "00002-of-00002.safetensors"),
        ("offline", "the hub may not be asked"),
    ],
)
def test_the_command_line_says_in_one_line_what_went_wrong_on_the_way(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    said: str,
) -> None:
    files = server.repositories[NAME]["main"]
    sent = files[UNET]
    with serving() as other:
        match fault:
            case "wrong":
                server.wrong.add(UNET)
            case "cut":
                server.cut[UNET] = 1000
            case "elsewhere":
                server.elsewhere[UNET] = other.url
            case "pickles":
                weights = [name for name in files if name.endswith(".safetensors")]
                server.push(NAME, tmp_path, {n: d for n, d in files.items() if n not in weights})
            case "a shard":
                first, second = (UNET.replace(".", f"-0000{n}-of-00002.") for n in (1, 2))
                index = {
                    "metadata": {},
                    "weight_map": {"a": Path(first).name, "b": Path(second).name},
                }
                more = {f"{UNET}.index.json": json.dumps(index).encode(), first: sent}
                kept = {n: d for n, d in files.items() if not n.startswith("unet/d")}
                server.push(NAME, tmp_path, kept | more)
            case "offline":
                monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        out = tmp_path / "out.png"
        assert main(["edit", "-o", str(out), "-p", "x", "--size", "64x64", "--model", NAME]) == 2
        assert other.asked == []
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("diffedit: ")
    assert NAME in told.replace("--", "/")  # as the cache writes it
    assert said in told
    assert not out.exists()
    # Nothing half written is taken for whole: what broke off is kept to go on from.
    whole = {digest(name, data) for name, data in server.repositories[NAME]["main"].items()}
    assert {name for name in blobs(tmp_path) if not name.endswith(".incomplete")} <= whole
    if fault in {"wrong", "cut", "elsewhere"}:
        assert digest(UNET, sent) not in blobs(tmp_path)


def test_other_families_come_from_the_hub_too(server: Hub, tmp_path: Path) -> None:
    SDXL.save(SDXL.pipeline(), tmp_path / "xl")
    server.push("someone/xl", tmp_path / "xl")
    editor = Editor.load("someone/xl", device="cpu")
    assert editor.model.info["family"] == SDXL.name
    assert editor.model.sides == Editor.load(tmp_path / "xl", device="cpu").model.sides
    assert torch.equal(
        next(editor.model.parts()[0].parameters()),  # type: ignore[index]
        next(Editor.load(tmp_path / "xl", device="cpu").model.parts()[0].parameters()),  # type: ignore[index]
    )


def test_what_is_trained_comes_from_the_hub_too(server: Hub, folders: list[Path]) -> None:
    from diffedit.training.parts import load

    index = json.loads((folders[0] / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    server.push(NAME, folders[0], {"model_index.json": json.dumps(index).encode()})
    made = load(NAME, torch.device("cpu")).unet.state_dict()
    wanted = load_file(folders[0] / UNET)
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


# -- what is named by its file ---------------------------------------------------------------------


def test_a_lora_is_fetched_by_its_file_and_by_its_repository(server: Hub, tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline()
    for name in ("styles/blue", "pytorch_lora_weights"):
        (tmp_path / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / "loras" / f"{name}.safetensors", additions(pipe, seed=len(name)))
    server.push("someone/loras", tmp_path / "loras")
    editor = tiny_editor()
    for named, file in {
        "someone/loras": "pytorch_lora_weights.safetensors",
        "someone/loras@main/styles/blue.safetensors": "styles/blue.safetensors",
    }.items():
        made, local = (
            editor.run(None, PASS.model_copy(update={"edits": (LoRA(model=model),)}), seed=1).pixels
            for model in (named, str(tmp_path / "loras" / file))
        )
        np.testing.assert_array_equal(made, local)
    with pytest.raises(errors.ModelError, match=r"has no styles/red\.safetensors"):
        editor.run(None, Pass(edits=(LoRA(model="someone/loras/styles/red.safetensors"),), steps=1))


def test_an_adapter_is_fetched_with_the_image_encoder_beside_it(
    server: Hub, tmp_path: Path
) -> None:
    editor = tiny_editor()
    file = ip_adapter.write(tmp_path / "models", editor.model.denoiser)  # type: ignore[attr-defined]
    (tmp_path / "models" / "other.safetensors").write_bytes(b"not for us")
    server.push("someone/adapter", tmp_path)
    picture = np.zeros((32, 32, 3), np.uint8)
    made, local = (
        editor.run(
            None,
            PASS.model_copy(update={"edits": (IPAdapter(model=model, image=picture),)}),
            seed=1,
        ).pixels
        for model in (f"someone/adapter/models/{file.name}", str(file))
    )
    np.testing.assert_array_equal(made, local)
    here = Path(constants.HF_HUB_CACHE) / "models--someone--adapter" / "snapshots"
    held = {path.name for path in here.rglob("*") if path.is_file()}
    assert held == {file.name, "config.json", "model.safetensors"}


def test_what_was_fetched_of_a_repository_is_used_offline(
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "loras").mkdir()
    written(tmp_path / "loras" / "of.any-name.safetensors", additions(tiny_pipeline()))
    server.push("someone/FLUX.1-lora", tmp_path / "loras")
    editor = tiny_editor()
    styled = PASS.model_copy(update={"edits": (LoRA(model="someone/FLUX.1-lora"),)})
    made = editor.run(None, styled, seed=1).pixels
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = tiny_editor()
    np.testing.assert_array_equal(again.run(None, styled, seed=1).pixels, made)
    assert "takes of.any-name.safetensors, the only such file of it that is here" in caplog.text
    named = LoRA(model="someone/FLUX.1-lora/of.any-name.safetensors")
    other = PASS.model_copy(update={"edits": (named,)})
    np.testing.assert_array_equal(again.run(None, other, seed=1).pixels, made)


def test_of_a_repository_with_pickles_alone_the_reason_is_told(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "word").mkdir()
    (tmp_path / "word" / "learned_embeds.bin").write_bytes(b"a pickle")
    server.push("someone/word", tmp_path / "word")
    editor = tiny_editor()
    word = PASS.model_copy(update={"edits": (TextualInversion(model="someone/word"),)})
    with pytest.raises(errors.UnsafeWeights, match=r"someone/word: learned_embeds\.bin: a pickle"):
        editor.run(None, word)
    assert not any(path.endswith(".bin") for path in server.fetched())


def test_offline_another_variant_than_was_asked_for_is_told(
    server: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Editor.load(NAME, variant="fp16")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Editor.load(NAME, variant="fp16")
    assert "of variant fp16 are here" not in caplog.text
    Editor.load(NAME)
    assert f"{NAME}: of its weights only those of variant fp16 are here" in caplog.text


def test_code_of_a_single_network_is_told_and_not_run(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_control_net(tiny_pipeline()).save_pretrained(tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "net.Custom"}
    proof = tmp_path / "it ran"
    more = {"net.py": f"open({str(proof)!r}, 'w')".encode()}
    server.push(
        "someone/net", tmp_path / "net", more | {"config.json": json.dumps(config).encode()}
    )
    editor, picture = tiny_editor(), np.full((64, 64, 3), 90, np.uint8)
    net = ControlNet(model="someone/net", kind="none", image=picture)
    editor.run(picture, Pass(prompt="x", steps=1, edits=[net]))
    told = "someone/net: brings code of its own (config.json, net.py), which diffedit does not run"
    assert told in caplog.text
    assert not proof.exists()
    assert "net.py" not in server.fetched()


def test_a_file_that_is_not_there_is_no_hub_id(
    server: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "dream.safetensors").touch()
    said = r"checkpoints/draem\.safetensors: no such model .*did you mean 'checkpoints/dream"
    with pytest.raises(errors.ModelError, match=said):
        Editor.load("checkpoints/draem.safetensors")
    assert server.asked == []


def test_a_cache_that_may_only_be_read_serves(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Editor.load(NAME)
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--someone--model" / "refs")

    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "write_text", refused)
    Editor.load(NAME)


def test_a_commit_that_was_pinned_is_held(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"sha": "2" * 40, "siblings": []}
    monkeypatch.setattr(hub, "ask", lambda *_: other)
    with pytest.raises(errors.ModelError, match=r"lists no model's files"):
        hub.find(f"{NAME}@{'1' * 40}")
    with pytest.raises(errors.ModelError, match="no name of a branch"):
        hub.find(NAME, "..\\..\\x")


def test_files_of_odd_names_are_as_good_as_not_there(server: Hub) -> None:
    files = server.repositories[NAME]["main"]
    files["samples/2023-01-01 12:00.png"] = next(iter(files.values()))
    Editor.load(NAME)
