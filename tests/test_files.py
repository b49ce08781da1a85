"""Files that lie: refused before any weights are read, in one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffedit import Editor
from diffedit.cli import main
from diffedit.errors import ModelError
from diffedit.models.files import header
from diffedit.testing import tiny_control_net, tiny_pipeline
from tests.families import FAMILIES, Tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = f"unet/{WEIGHTS}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    tiny_pipeline().save_pretrained(folder)
    tiny_control_net(tiny_pipeline()).save_pretrained(folder / "controlnet")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read as weights by the time that a folder was refused."""
    import diffusers.models.modeling_utils as modeling

    read: list[str] = []
    whole = modeling.load_state_dict

    def watched(file: Any, *rest: Any, **options: Any) -> Any:
        read.append(str(file))
        return whole(file, *rest, **options)

    monkeypatch.setattr(modeling, "load_state_dict", watched)
    return read


# --- what is done to a file -----------------------------------------------------------------------


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and what comes after it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, head: Any, rest: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the first tensor that the header describes."""

    def spoil(path: Path) -> None:
        head, rest = split(path)
        change(head[min(name for name in head if name != "__metadata__")])
        join(path, head, rest)

    return spoil


def without(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)], tensors[max(tensors)]
    save_file(tensors, path, {"format": "pt"})


def shaped(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, {"format": "pt"})


def longer(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "cut off: it has"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "its header is said to"),
    "empty": (lambda p: p.write_bytes(b""), "its header is said to have 0 bytes, the file has 0"),
    "header longer than the file": (longer, "its header is said to have 46116860184273879"),
    "header is not JSON": (lambda p: join(p, b"{nothing}", b""), "its header is not JSON"),
    "header is a list": (lambda p: join(p, b"[]", b""), "its header is not an object"),
    "a name twice": (
        lambda p: join(p, b'{"a": {}, "a": {}}', b""), "its header is not JSON: 'a' stands twice"
    ),
    "bytes at its end": (lambda p: p.write_bytes(p.read_bytes() + b"abc"), "3 bytes at its end"),
    "offsets overlap": (
        changed(lambda one: one.update(data_offsets=[o + 4 for o in one["data_offsets"]])),
        "should begin at byte",
    ),
    "offsets beyond the end": (
        changed(lambda one: one.update(data_offsets=[2**50, 2**50 + _bytes(one)])),
        "should begin at byte",
    ),
    "offsets the wrong way": (
        changed(lambda one: one.update(data_offsets=one["data_offsets"][::-1])), "are no lengths"
    ),
    "a type of another size": (changed(lambda one: one.update(dtype="F16")), "of type F16, in"),
    "an unknown type": (changed(lambda one: one.update(dtype="Q4")), "of the unknown type 'Q4'"),
    "no shape": (changed(lambda one: one.pop("shape")), "lacks a dtype, a shape or"),
    "a shape below zero": (changed(lambda one: one.update(shape=[-1, -1])), "are no lengths"),
    "tensors that are missing": (without, "conv_in.bias and 1 more tensors; it would be random"),
    "a tensor of another shape": (shaped, "its conv_in.weight is [3, 3] where its configuration"),
}  # fmt: skip


def _bytes(one: dict[str, Any]) -> int:
    begin, end = one["data_offsets"]
    return int(end - begin)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_models_folder_with_a_file_that_lies(
    fault: str, folder: Path, unread: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FAULTS[fault]
    spoil(folder / UNET)
    told = refused_line(folder, capsys)
    assert told.startswith(f"diffedit: {folder / UNET}: ")
    assert said in told
    assert unread == []


def refused_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of a model's folder, in one line, with exit code 2."""
    out, there = folder / "out.png", sorted(folder.rglob("*"))
    line = ["edit", "-o", str(out), "-p", "x", "--size", "64x64", "--model", str(folder)]
    assert main([*line, "--device", "cpu"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(folder.rglob("*")) == there
    return told


@pytest.mark.parametrize("fault", FAULTS)
def test_a_control_network_with_a_file_that_lies(
    fault: str, sound: Path, folder: Path, unread: list[str]
) -> None:
    spoil, said = FAULTS[fault]
    spoil(folder / "controlnet" / WEIGHTS)
    editor = Editor.load(sound, device="cpu")
    unread.clear()
    with pytest.raises(ModelError) as refused:
        editor.model.load_control(str(folder / "controlnet"))
    said = said.replace("conv_in.bias", "controlnet_cond_embedding.blocks.0.bias")
    assert str(refused.value).startswith(f"{folder / 'controlnet' / WEIGHTS}: ")
    assert said in str(refused.value)
    assert unread == []


@pytest.mark.parametrize("fault", [name for name in FAULTS if "tensor" not in name])
def test_a_single_file_that_lies(
    fault: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FAULTS[fault]
    file, out = folder / UNET, tmp_path / "out.png"
    spoil(file)
    line = ["edit", "-o", str(out), "-p", "x", "--size", "64x64", "--model", str(file)]
    assert main(line) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith(f"diffedit: {file}: ")
    assert said in told
    assert not out.exists()


# --- shards, and the parts of a folder ------------------------------------------------------------


def test_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe: Any = tiny_pipeline()
    (folder / UNET).unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    Editor.load(folder, device="cpu")
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    lost = shards[1].read_bytes()
    shards[1].unlink()
    told = refused_line(folder, capsys)
    assert told == f"diffedit: {shards[1]}: missing; {index.name} names it"
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ModelError, match=f"holds no .*, which {index.name} says is in it"):
        Editor.load(folder, device="cpu")
    shards[1].write_bytes(lost[:-1])
    with pytest.raises(ModelError, match="cut off"):
        Editor.load(folder, device="cpu")
    for wrong, said in (("{", "not valid JSON"), ("{}", "weight_map"),
                        ('{"weight_map": {"a": "../b"}}', "name files beside it")):  # fmt: skip
        index.write_text(wrong)
        with pytest.raises(ModelError, match=said):
            Editor.load(folder, device="cpu")


def _set(file: str, **said: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | said))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / UNET).unlink(), "unet: cannot be loaded: diff.*safetensors is missing$"),
        (
            lambda f: [
                *(shutil.copy(f / UNET, f / UNET.replace(".", f".{n}.")) for n in ("ema", "fp16")),
                (f / UNET).unlink(),
            ],
            r"there is diffusion_pytorch_model\.ema\.safetensors, of a variant",
        ),
        (lambda f: shutil.rmtree(f / "unet"), "unet: missing; .*index.json names a UNet2DCond"),
        (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json: missing"),
        (_set("unet/config.json", block_out_channels=[1]), r"unet/config\.json: makes no UNet2DC"),
        (_set("unet/config.json", block_out_channels=[8, 16]), "where its configuration asks for"),
        (_set("unet/config.json", _class_name="VQModel"), "holds a VQModel, and this is the place"),
        (_set("model_index.json", unet=["diffusers", "VQModel"]), "no denoiser of a StableDiff"),
        (_set("model_index.json", unet=["diffusers", "UNet"]), "is of neither diffusers nor"),
        (
            _set("unet/config.json", quantization_config={"quant_method": "exl2"}),
            "its weights are quantised by exl2, which diffedit does not read",
        ),
        (
            lambda f: [file.unlink() for file in (f / "tokenizer").iterdir()],
            r"tokenizer: the .* its vocabulary \(tokenizer\.json or vocab\.json\) is missing$",
        ),
        (
            lambda f: without(f / "text_encoder" / "model.safetensors"),
            "text_encoder: lacks .* and 1 more tensors; it would be random",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_what_it_says(
    folder: Path, unread: list[str], spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=said) as refused:
        Editor.load(folder, device="cpu")
    assert str(refused.value).startswith(str(folder))
    assert unread == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_tokenizer_that_knows_no_words(family: Tiny, tmp_path: Path, unread: list[str]) -> None:
    """Transformers makes an empty one, to which every prompt is the same."""
    kinds = {"qwen-image": {"kind": QwenImageEditPipeline}}  # its processor has one inside, too
    family.save(family.pipeline(**kinds.get(family.name, {})), tmp_path)
    vocabularies = sorted(tmp_path.glob("*/tokenizer.json"))
    assert len(vocabularies) == len([*tmp_path.glob("*/tokenizer_config.json")]) > 0
    for file in vocabularies:
        words = file.read_bytes()
        file.unlink()
        with pytest.raises(ModelError) as refused:
            Editor.load(tmp_path, device="cpu")
        said = f"{file.parent}: the tokenizer knows no words: its vocabulary ("
        assert str(refused.value).startswith(said)
        file.write_bytes(words)
    assert unread == []
    Editor.load(tmp_path, device="cpu")


def eighth(path: Path, scale: str | None = None) -> None:
    """Have matrices in 8 bits, with scales of that name beside them."""
    made = {}
    for name, tensor in load_file(path).items():
        matrix = tensor.ndim == 2 and name.endswith(".weight") and "embed" not in name
        made[name] = tensor.to(torch.float8_e4m3fn) if matrix else tensor
        if matrix and scale:
            made[name.replace(".weight", f".{scale}")] = torch.tensor(1.0)
    save_file(made, path, {"format": "pt"})


def whole_numbers(path: Path) -> None:
    tensors = load_file(path)
    name = next(one for one in sorted(tensors) if one.endswith("fc1.weight") or "to_q.w" in one)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path, {"format": "pt"})


@pytest.mark.parametrize("part", [UNET, "text_encoder/model.safetensors", f"controlnet/{WEIGHTS}"])
def test_weights_that_mean_something_with_their_scales_only(
    part: str, folder: Path, unread: list[str]
) -> None:
    def load() -> None:
        made: Any = Editor.load(folder, device="cpu").model
        if part.startswith("controlnet"):
            made.load_control(str(folder / "controlnet"))

    sound = (folder / part).read_bytes()
    for spoil, said in (
        (lambda f: eighth(f, "scale_weight"), r"it holds .*\.scale_weight\)"),
        (lambda f: eighth(f, "weight_scale"), r"it holds .*\.weight_scale\)"),
        (whole_numbers, r"its .*\.weight is of type I8\)"),
    ):
        spoil(folder / part)
        unread.clear()
        match = f"{folder / part}: its weights are quantised in a way that .* not read .{said}"
        with pytest.raises(ModelError, match=match):
            load()
        assert unread == []
        (folder / part).write_bytes(sound)
    eighth(folder / part)  # without scales they are what they say
    load()


def test_a_pipeline_that_is_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (folder / "custom.py").write_text(f"open({str(proof)!r}, 'w')")
    _set("model_index.json", _class_name=["custom", "StableDiffusionPipeline"])(folder)
    with pytest.raises(ModelError, match=r"its pipeline is custom\.py, a program of its own, whi"):
        Editor.load(folder, device="cpu")
    assert not proof.exists()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_part_of_every_family_is_checked(
    family: Tiny, tmp_path: Path, unread: list[str]
) -> None:
    pipe: Any = family.pipeline()
    family.save(pipe, tmp_path)
    denoiser = family.model.networks[0]
    for part in (
        denoiser,
        "vae",
        *sorted(p.parent.name for p in tmp_path.glob("text_enc*/*.json")),
    ):
        for file in (tmp_path / part).glob("*.safetensors"):
            whole = file.read_bytes()
            tensors = load_file(file)
            tensors.pop(max(tensors, key=lambda name: (tensors[name].dim() == 2, name)))
            save_file(tensors, file, {"format": "pt"})
            with pytest.raises(ModelError, match=f"{part}.*: lacks .*; it would be random"):
                Editor.load(tmp_path, device="cpu")
            assert unread == []
            file.write_bytes(whole)
    Editor.load(tmp_path, device="cpu")


# --- any header -----------------------------------------------------------------------------------

NUMBER = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64, 2**80]), st.floats())
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F8_E4M3", "F4", "BOOL", "X", "", None]),
        "shape": st.lists(NUMBER, max_size=3),
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
    },
)
SOUND = st.builds(
    lambda dtype, size, at: {
        "dtype": dtype[0], "shape": [size], "data_offsets": [at, at + size * dtype[1]]
    },
    st.sampled_from([("F32", 4), ("F16", 2), ("U8", 1)]), st.integers(0, 4), st.integers(0, 12),
)  # fmt: skip
HEAD = st.one_of(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | SOUND, max_size=3),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), SOUND, max_size=3),
    st.recursive(st.none() | NUMBER | st.text(max_size=3), st.lists, max_leaves=4),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=HEAD.map(lambda said: json.dumps(said).encode()) | st.binary(max_size=30),
    rest=st.integers(0, 32).map(bytes),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_no_header_raises_anything_else_and_none_passes_that_the_format_refuses(
    head: bytes, rest: bytes, length: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "some.safetensors"
    said = len(head) if length is None else length
    file.write_bytes(said.to_bytes(8, "little") + head + rest)
    try:
        found = header(file)
    except ModelError:
        return
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(found)
        for name, tensor in found.items():
            assert tuple(opened.get_slice(name).get_shape()) == tensor.shape


@given(data=st.binary(max_size=100))
def test_what_is_no_such_file_is_refused_by_both(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(data)
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError:
        with pytest.raises(ModelError):
            header(file)


# -- what fits is read as diffusers reads it -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_weights_are_those_that_diffusers_reads(
    family: Tiny, dtype: torch.dtype, tmp_path: Path
) -> None:
    family.save(family.pipeline(), tmp_path)
    mine: Any = Editor.load(tmp_path, device="cpu", dtype=dtype).model
    theirs = type(mine.pipe).from_pretrained(tmp_path, dtype=dtype)
    for name, part in theirs.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if name == "vae" and getattr(part.config, "force_upcast", False):
            part.to(mine.vae.dtype)  # as the family's pipelines do when they run
        own = getattr(mine.pipe, name)
        assert not own.training
        for kind in ("named_parameters", "named_buffers"):
            found, meant = (dict(getattr(one, kind)()) for one in (own, part))
            assert found.keys() == meant.keys()
            for key, tensor in meant.items():
                assert found[key].dtype == tensor.dtype, (name, key)
                assert torch.equal(found[key], tensor), (name, key)


# -- what is right is not refused ------------------------------------------------------------------


def loads(folder: Path) -> Any:
    return Editor.load(folder, device="cpu").model


def test_the_only_variant_is_taken(tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loads(tmp_path).unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_a_variant_is_taken_where_there_is_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loaded() -> Any:
        return Editor.load(folder, device="cpu", variant="fp16").model

    pipe: Any = tiny_pipeline()
    assert torch.equal(loaded().unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert f"{folder}: has no weights of variant fp16: takes its plain ones" in caplog.text
    caplog.clear()
    pipe.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16")
    without(folder / "text_encoder" / "model.safetensors")
    loaded()
    assert "variant" not in caplog.text


def test_pickles_that_are_nobodys_part_are_left_alone(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    for place in ("model.ckpt", "checkpoint-500/optimizer.bin", "safety_checker/model.bin"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"not for us")
    loads(tmp_path)


def test_classes_that_have_other_names_today_are_known(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "pixart")
    family.save(family.pipeline(), tmp_path / "pixart")
    for file in ("model_index.json", "transformer/config.json"):
        said = (tmp_path / "pixart" / file).read_text("utf-8")
        old = said.replace("PixArtTransformer2DModel", "Transformer2DModel")
        (tmp_path / "pixart" / file).write_text(old, "utf-8")
    assert type(loads(tmp_path / "pixart").denoiser).__name__ == "PixArtTransformer2DModel"
    tiny_pipeline().save_pretrained(tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    said = json.loads(index.read_text("utf-8"))
    said["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    index.write_text(json.dumps(said), "utf-8")
    (tmp_path / "sd" / "feature_extractor").mkdir()
    (tmp_path / "sd" / "feature_extractor" / "preprocessor_config.json").write_text("{}", "utf-8")
    loads(tmp_path / "sd")
