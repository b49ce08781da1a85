"""Weights in main memory: the same pictures, little on the device, and nothing left behind.

No accelerator is needed: torch's fake tensors say where each would lie and refuse to compute across
devices, and the memory of the device is what they would take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skimage import data
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bench import sizes
from bench.fake_gpu import GPU, Memory, bytes_on, gpu, networks
from diffedit import Call, Editor, Pass, errors
from diffedit.cli import main
from diffedit.models import devices, holding, loading, textual_inversion
from diffedit.models.protocol import Conditioning, ModelInput
from diffedit.models.stable_diffusion_xl import StableDiffusionXL
from diffedit.rows import RowKey, RowMap
from diffedit_img2img import Img2Img
from diffedit_ip_adapter import IPAdapter
from diffedit_lora import LoRA
from diffedit_style import Style
from diffedit_textual_inversion import TextualInversion
from tests.families import FAMILIES, FLUX, SD, SDXL, Tiny
from tests.families import ip_adapter as adapters
from tests.families.additions import additions, written
from tests.laws.state import state, unchanged
from tests.laws.tools import Custom
from tests.test_textual_inversion import file_of

PICTURE = data.coffee()[:64, :64]
PASS = Pass(prompt="a red circle", steps=2, guidance=3.0)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


#: Families whose prompts are cut to their lengths, which a fake does not know.
LENGTHS = ("qwen-image", "z-image")


def conditioning(family: Tiny, model: Any) -> Conditioning:
    """Of a prompt."""
    if family.name not in LENGTHS:
        made: Conditioning = model.embed(["a red circle"], (64, 64))
        return made
    with unset_fake_temporarily():
        known = family.model(family.pipeline()).embed(["a red circle"], (64, 64))
    return Conditioning({name: one.to(GPU) for name, one in known.tensors.items()}, known.ragged)


def really(file: Path) -> dict[str, Tensor]:
    """The numbers in a word's file, as they are."""
    with unset_fake_temporarily():
        return load_file(file)


def call(model: Any, family: Tiny) -> ModelInput:
    side = 64 // model.cell
    latents = torch.empty(1, model.channels, side, side, device=GPU)
    guided = 3.0 if "embedded_guidance" in model.capabilities else None
    rows = RowMap((RowKey("positive", 0),))
    timestep = torch.tensor(500.0, device=GPU)
    return ModelInput(latents, timestep, conditioning(family, model), rows, guidance=guided)


@pytest.mark.parametrize("room", [None, 1_000_000, 0], ids=["all", "some", "none"])
def test_a_model_computes_on_the_device_wherever_its_weights_are(
    family: Tiny, room: int | None
) -> None:
    pipe: Any = family.pipeline()
    whole = bytes_on("cpu", pipe)
    with gpu():
        holding.place(networks(pipe), GPU, room)
        model: Any = family.model(pipe)
        assert model.device == GPU
        there, here = bytes_on("cuda", pipe), bytes_on("cpu", pipe)
        assert there + here == whole
        assert sum(holding.away(one) for one in networks(pipe)) == here
        if room is None:
            assert here == 0
        else:  # what never stays away comes on top
            least = whole - sum(t.nbytes for one in networks(pipe) for t in _layers(one))
            assert there <= room + least
        given = call(model, family)
        if family.name not in LENGTHS:
            assert model.predict(given).device == GPU
        assert model.decode(given.latents).device == GPU
        assert model.encode(torch.empty(1, 3, 64, 64, device=GPU)).device == GPU


def _layers(network: nn.Module) -> list[Tensor]:
    """The weights that may stay away."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    found = {
        id(t): t
        for layer in network.modules()
        if type(layer) in kinds
        for t in layer.parameters(recurse=False)
    }
    return list(found.values())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_of_large_models_hundredths_are_on_the_device(name: str) -> None:
    with gpu():
        pipe = sizes.MODELS[name].make()
        whole = bytes_on("cpu", pipe)
        holding.place(networks(pipe), GPU, 0)
        assert bytes_on("cuda", pipe) < 0.01 * whole


def test_the_denoiser_finds_room_first_and_then_takes_no_more() -> None:
    pipe: Any = SD.pipeline()
    unet = sum(one.nbytes for one in pipe.unet.parameters())
    with gpu():
        holding.place([pipe.unet, pipe.vae, pipe.text_encoder], GPU, unet)
        assert holding.away(pipe.unet) == 0
        assert holding.away(pipe.vae) > 0.9 * sum(one.nbytes for one in _layers(pipe.vae))
        with Memory() as memory:
            model: Any = SD.model(pipe)
            given = call(model, SD)
            model.predict(given)
    # Nothing that was fetched is kept.
    assert memory.used < 0.1 * unet


def test_a_table_that_serves_two_layers_is_in_one_place() -> None:
    pipe: Any = FLUX.pipeline()
    encoder = pipe.text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    with gpu():
        for room in (None, 0):
            holding.place([encoder], GPU, room)
            assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
            assert holding.where(encoder) == GPU


def test_a_table_that_somebody_else_reads_too_is_on_the_device() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    head, table = nn.Linear(4, 9, bias=False), Scaled(9, 4)
    table.weight = head.weight
    holding.place([nn.Sequential(head, table)], torch.device("cpu"), 0)
    assert not holding.holds(head)
    assert table.weight is head.weight


ADDITIONS = ["plain", "float8", "lora", "ip_adapter", "textual_inversion", "style", "controlnet"]


@pytest.fixture(params=[SD, SDXL], ids=lambda one: one.name)
def learning(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("with_", ADDITIONS)
def test_pictures_are_the_same_and_the_model_as_it_was(
    learning: Tiny, with_: str, tmp_path: Path
) -> None:
    pipe = learning.pipeline()
    learning.save(pipe, tmp_path / "model")
    pass_ = PASS
    if with_ == "lora":
        file = written(tmp_path / "lora.safetensors", additions(pipe))
        pass_ = PASS.model_copy(update={"edits": (LoRA(model=file),)})
    if with_ == "ip_adapter":
        adapter = adapters.write(tmp_path / "adapter", pipe.unet, "plus")
        shown = IPAdapter(model=str(adapter), image=data.astronaut(), weight=0.7)
        pass_ = PASS.model_copy(update={"edits": (shown,)})
    if with_ == "textual_inversion":
        word = TextualInversion(model=file_of(learning, tmp_path), token="<thing>")
        pass_ = PASS.model_copy(update={"edits": (word,), "prompt": "a <thing>"})
    if with_ == "style":
        edits = (Img2Img(strength=0.6), Style(image=data.astronaut()))
        pass_ = PASS.model_copy(update={"edits": edits})
    if with_ == "controlnet":
        from diffedit_controlnet import ControlNet

        learning.control_net(pipe).save_pretrained(tmp_path / "net")
        edit = ControlNet(model=str(tmp_path / "net"), kind="canny", image=PICTURE)
        pass_ = PASS.model_copy(update={"edits": (edit,)})
    image = PICTURE if with_ == "style" else None
    dtype = "float8" if with_ == "float8" else None

    wanted = Editor.load(tmp_path / "model", device="cpu", dtype=dtype).run(image, pass_, seed=3)
    editor = Editor.load(tmp_path / "model", device="cpu", dtype=dtype)
    holding.place(list(editor.model.parts()), torch.device("cpu"), 0)
    assert editor.model.info["in_main_memory"] > 0
    before = state(editor)
    made = editor.run(image, pass_, seed=3).latents
    assert torch.equal(made, wanted.latents)  # type: ignore[arg-type]
    unchanged(before, state(editor))
    with editor.stream(image, pass_, seed=3) as events:
        next(iter(events))  # and is left in the midst
    unchanged(before, state(editor))

    def fails(prediction: Tensor, call: Call) -> Tensor:
        raise RuntimeError("in the midst of a step")

    broken = Custom(parts={"refine": fails})
    with pytest.raises(errors.PluginError, match="in the midst"):
        editor.run(image, pass_.model_copy(update={"edits": (*pass_.edits, broken)}), seed=3)
    unchanged(before, state(editor))
    again = editor.run(image, pass_, seed=3).latents
    assert torch.equal(again, wanted.latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_", ["textual_inversion", "controlnet"])
def test_what_comes_on_top_is_where_it_is_computed_with(
    learning: Tiny, with_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textual_inversion, "_numbers", really)
    pipe: Any = learning.pipeline()
    net = learning.control_net(pipe)
    word = file_of(learning, tmp_path)
    with gpu():
        holding.place(networks(pipe), GPU, 0)
        model: Any = learning.model(pipe)
        if with_ == "textual_inversion":
            model.add_textual_inversion(model.load_textual_inversion(word, "<thing>"))
        given = call(model, learning)
        if with_ == "controlnet":
            holding.place([net], GPU)
            model.control(net, given, torch.empty(1, 3, 64, 64, device=GPU), 1.0)
        assert model.predict(given).device == GPU


def test_a_lora_is_where_it_is_computed_with(learning: Tiny, tmp_path: Path) -> None:
    pipe: Any = learning.pipeline()
    file = written(tmp_path / "lora.safetensors", additions(pipe))
    elsewhere = torch.device("meta")  # peft moves layers in a way that fakes do not bear
    holding.place([pipe.unet], elsewhere, 0)
    model: Any = learning.model(pipe)
    model.add_lora(model.load_lora(file), 1.0)
    layers = [one for one in pipe.unet.modules() if type(one).__name__ == "Linear"]
    found = [t for name, t in pipe.unet.named_parameters() if "lora_" in name]
    assert len(found) > 10
    assert {one.device for one in found} == {elsewhere}
    assert {one.weight.device.type for one in layers if holding.away(one)} == {"cpu"}


def test_a_model_that_does_not_fit_is_loaded_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    SD.save(SD.pipeline(), tmp_path)
    placed: list[int | None] = []

    def place(networks: Any, device: torch.device, room: int | None = None) -> None:
        placed.append(room)
        if room != 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(holding, "place", place)
    monkeypatch.setattr(devices, "chosen", lambda device: torch.device(device or GPU))
    for said, rooms in [(None, [None, 0]), ("2 MB", [2_000_000, 0])]:
        caplog.clear()
        placed.clear()
        Editor.load(tmp_path, max_memory=said)
        assert placed == rooms
        assert f"{tmp_path}: more than fits into the memory of cuda:0" in caplog.text
    placed.clear()
    with pytest.raises(errors.ModelError, match="out of memory"):
        Editor.load(tmp_path, device="cpu", max_memory="2 MB")  # there is no other place
    assert placed == [None]


@pytest.fixture
def upcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A model in `xl` whose autoencoder is set up in float32; whether each attempt finds memory."""
    pipe: Any = SDXL.pipeline()
    pipe.vae.register_to_config(force_upcast=True)
    SDXL.save(pipe, tmp_path / "xl")
    finds: list[bool] = []

    def to(self: Any, *_: Any, **__: Any) -> None:
        if not finds.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(StableDiffusionXL, "_vae_dtype", torch.float16)
    monkeypatch.setattr(type(pipe.vae), "to", to)
    monkeypatch.setattr(holding, "place", lambda *_: None)
    monkeypatch.setattr(devices, "chosen", lambda device: torch.device(device))
    return finds


@pytest.mark.parametrize(
    ("device", "finds"), [("cpu", [False]), ("cuda:0", [False, True]), ("cuda:0", [False, False])]
)
def test_what_a_family_sets_up_may_find_no_memory_either(
    device: str,
    finds: list[bool],
    upcast: list[bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    upcast += finds
    if finds[-1]:
        Editor.load(tmp_path / "xl", device=device, dtype="float32")
    else:
        with pytest.raises(errors.ModelError, match=r"xl: cannot be loaded \(CUDA out of memory"):
            Editor.load(tmp_path / "xl", device=device, dtype="float32")
    assert upcast == []
    assert caplog.text.count("its weights stay in main memory") == len(finds) - 1


def test_a_model_that_a_pass_names_and_that_does_not_fit_is_named(
    upcast: list[bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upcast.append(False)
    file = tmp_path / "two.yaml"
    passes = f"passes: [{{prompt: x, steps: 1}}, {{prompt: y, steps: 2, model: {tmp_path / 'xl'}}}]"
    file.write_text(f"size: 64x64\n{passes}\n", "utf-8")
    assert main(["run", str(file), "-o", str(tmp_path / "a.png"), "--device", "cpu"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith(f"diffedit: {tmp_path / 'xl'}: cannot be loaded (CUDA out of memory")


def test_every_model_of_a_workflow_has_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        SD.save(SD.pipeline(), tmp_path / name)
    editor = Editor.load(tmp_path / "one", device="cpu", max_memory="1 GB")
    given: list[Any] = []
    load = loading.load

    def noted(*some: Any, **said: Any) -> Any:
        given.append(said["max_memory"])
        return load(*some, **said)

    monkeypatch.setattr(loading, "load", noted)
    two = PASS.model_copy(update={"model": str(tmp_path / "two"), "edits": (Img2Img(),)})
    editor.run(None, [PASS, two], size=(64, 64))
    assert given == ["1 GB"]


def test_where_a_model_computes_is_where_it_was_moved() -> None:
    pipe: Any = SD.pipeline()
    model: Any = SD.model(pipe)
    holding.place(networks(pipe), torch.device("cpu"))
    pipe.to("meta")
    assert model.device.type == "meta"
    with gpu():
        pipe = SD.pipeline()
        holding.place(networks(pipe), torch.device("cuda"), 0)
        assert holding.where(pipe.unet) == GPU  # of which there may be others


def test_a_word_that_was_read_before_the_weights_moved(
    learning: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textual_inversion, "_numbers", really)
    pipe: Any = learning.pipeline()
    file = file_of(learning, tmp_path)
    with gpu():
        holding.place(networks(pipe), GPU)
        model: Any = learning.model(pipe)
        word = model.load_textual_inversion(file, "<thing>")
        assert all(rows.device == GPU for rows in word.rows.values())
        holding.place(networks(pipe), GPU, 0)  # as when memory runs out
        model.add_textual_inversion(word)
        assert model.embed(["a <thing>"], (64, 64)).tensors["text"].device == GPU


def test_a_dora_is_refused_where_weights_are_not_there(learning: Tiny, tmp_path: Path) -> None:
    pipe: Any = learning.pipeline()
    state = dict(additions(pipe, parts=("unet",)))
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        name = key.replace("lora_A.weight", "lora_magnitude_vector")
        state[name] = torch.ones(len(state[key.replace("lora_A", "lora_B")]))
    model: Any = learning.model(pipe)
    lora = model.load_lora(written(tmp_path / "dora.safetensors", state))
    model.add_lora(lora, 1.0)()
    holding.place([pipe.unet], torch.device("cpu"), 0)
    with pytest.raises(errors.ModelError, match="is a DoRA, which reads the weights of layers"):
        model.add_lora(lora, 1.0)


def test_weights_that_others_read_stay_where_they_are_read() -> None:
    attention = nn.MultiheadAttention(8, 2)
    holding.place([attention], torch.device("cpu"), 0)
    assert not holding.holds(attention)


def test_out_of_memory_the_weights_are_the_last_thing_given_up() -> None:
    pipe: Any = SD.pipeline()
    with gpu():
        holding.place(networks(pipe), GPU)
        model: Any = SD.model(pipe)
        assert model.save_memory() == "predictions one after the other and the autoencoder in tiles"
        assert model.save_memory() == "the weights in main memory until they are needed"
        assert model.info["in_main_memory"] > 0.9 * bytes_on("cpu", pipe)
        assert model.predict(call(model, SD)).device == GPU
        assert model.save_memory() is None


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (0, 0),
        (5_000_000, 5_000_000),
        ("0", 0),
        ("6GB", 6_000_000_000),
        ("5.5 GiB", 5_905_580_032),
        ("500mb", 500_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(said: int | str, meant: int) -> None:
    assert devices.room(said) == meant


@pytest.mark.parametrize("said", ["much", "-1", -1, "6 apples", "", True, "1e9", 6, "6", 0.5])
def test_what_is_no_size_is_refused(said: Any) -> None:
    wanted = r"max_memory .*: (needs bytes, or a size such as|so few bytes)"
    with pytest.raises(errors.ModelError, match=wanted):
        Editor.load(max_memory=said)


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["edit", "-o", str(tmp_path / "a.png"), "-p", "x", "--steps", "1", "--device", "cpu"]
    line += ["--size", "64x64"]
    assert main([*line, "--max-memory", "3MB"]) == 0
    run = [str(tmp_path / "one.yaml"), "-o", str(tmp_path / "b.png"), "--device", "cpu"]
    Path(run[0]).write_text("size: 64x64\npasses: [{prompt: x, steps: 1}]\n", "utf-8")
    assert main(["run", *run, "--max-memory", "3MB"]) == 0
    assert main([*line, "--overwrite", "--max-memory", "lots"]) == 2
    assert "max_memory 'lots'" in capsys.readouterr().err
