"""What the files of a model say of themselves, asked before any weights are read.

Files come from strangers and over bad lines. A header that lies, a part that is missing or a tensor
of another shape is told here, in a line that names the file: loaders would fill what is missing
with random numbers, or fail late and say little.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffedit.errors import ModelError, UnsafeWeights

_PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
#: Bits of a number of each type that the format knows.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
#: Types of numbers that mean something by themselves.
_NUMBERS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
#: What ComfyUI, bitsandbytes and others call tensors that others are to be multiplied with.
_SCALES = frozenset({
    "scaled_fp8", "scale_weight", "weight_scale", "scale_input", "input_scale", "weight_scale_2",
    "weight_scale_inv", "comfy_quant", "absmax", "quant_map", "SCB", "qweight",
})  # fmt: skip
#: Longer headers are refused by the format's own library.
_LONGEST = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor as a header describes it.

    Attributes:
        dtype: in the format's words, such as "F16".
        shape: of it.
    """

    dtype: str
    shape: tuple[int, ...]


#: Names of files of weights: ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors``,
#: ``model-00001-of-00002.fp16.safetensors``.
_VARIANT = re.compile(
    r"[\w-]+?(\.(?P<whole>[\w-]+?))?(-\d+-of-\d+(\.(?P<last>[\w-]+))?)?\.safetensors"
)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: it holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file, so its folder holds no model") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a model's configuration, which is an object in braces")
    return found


# --- pickles --------------------------------------------------------------------------------------


def is_pickle(name: str) -> bool:
    """Whether a file's name says that it is a pickle."""
    return Path(name).suffix.lower() in _PICKLES and Path(name).name != "training_args.bin"


def unsafe(path: Path | str) -> UnsafeWeights:
    """The refusal of a pickle."""
    return UnsafeWeights(
        f"{path}: a pickle ({Path(path).suffix}) can run any code when it is loaded, so diffedit"
        " does not open it; convert it to .safetensors"
    )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder (or a part of one) whose only weights are pickles."""
    for part in (folder, *(child for child in folder.iterdir() if child.is_dir())):
        names = [file.name for file in part.iterdir()]
        pickles = sorted(name for name in names if is_pickle(name))
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise unsafe(part / pickles[0])


# --- headers --------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file by name; reads its header only.

    Raises:
        ModelError: the header is none, or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        found = _header(path)
        # The format's own library has the last word; it reads no weights here either.
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError, OverflowError) as error:
        raise _unreadable(path, first_line(error)) from error
    return found


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}: not a readable .safetensors file ({why})")


def _header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST):
            raise _unreadable(
                path, f"its header is said to have {length} bytes, the file has {size}"
            )
        head = file.read(length)
    try:
        said = json.loads(head, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"its header is not JSON: {first_line(error)}") from error
    if not isinstance(said, dict):
        raise _unreadable(path, "its header is not an object in braces")
    said.pop("__metadata__", None)
    places = {name: _place(path, name, one) for name, one in said.items()}
    end = 0
    for name, (begins, ends, tensor) in sorted(places.items(), key=lambda item: item[1][:2]):
        numbers = math.prod(tensor.shape)
        bits = numbers * _BITS[tensor.dtype]
        if bits != 8 * (ends - begins):
            raise _unreadable(
                path,
                f"{name} is said to be {numbers} numbers of type {tensor.dtype}, in"
                f" {ends - begins} bytes",
            )
        if begins != end:
            raise _unreadable(path, f"{name} should begin at byte {end}, not at {begins}")
        end = ends
    if end > size - 8 - length:
        raise ModelError(
            f"{path}: cut off: it has {size} bytes where its header tells of {8 + length + end};"
            " get it again"
        )
    if end < size - 8 - length:
        raise _unreadable(path, f"{size - 8 - length - end} bytes at its end belong to no tensor")
    return {name: tensor for name, (_, _, tensor) in places.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _place(path: Path, name: str, said: Any) -> tuple[int, int, Tensor]:
    """Where a tensor begins and ends, and what it is."""
    try:
        dtype, shape, (begins, ends) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _unreadable(path, f"{name} lacks a dtype, a shape or two data_offsets") from None
    whole = all(type(one) is int and one >= 0 for one in (*shape, begins, ends))
    if not whole or begins > ends:
        raise _unreadable(path, f"the shape or the data_offsets of {name} are no lengths")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _unreadable(path, f"{name} is of the unknown type {dtype!r}")
    return begins, ends, Tensor(dtype, shape)


# --- the weights of one network -------------------------------------------------------------------


def weights(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files that hold a network's weights: one, or the shards that an index names.

    Args:
        folder: of the network.
        stem: what libraries call the file: "diffusion_pytorch_model", "model".
        variant: a variant that is preferred, where there is one; where there is nothing else, the
            only one.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    names = [file.name for file in folder.glob(f"{stem}*.safetensors*")]
    only = {variant_of(name) for name in names if name.endswith(".safetensors")}
    for kind in dict.fromkeys((variant, None, *(only if len(only) == 1 else ()))):
        dotted = f".{kind}" if kind else ""
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        whole = folder / f"{stem}{dotted}.safetensors"
        if index.is_file() and not whole.is_file():
            return _shards(index)
        if whole.is_file():
            return [whole]
    others = sorted(file.name for file in folder.glob(f"{stem}*.safetensors"))
    there = f"; there is {others[0]}, of a variant" if others else ""
    raise ModelError(f"{folder}: cannot be loaded: {stem}.safetensors is missing{there}")


def variant_of(name: str) -> str | None:
    """The variant that a file of weights is of, such as "fp16"; None: it is of none."""
    found = _VARIANT.fullmatch(name)
    return found and (found["whole"] or found["last"])


def _shards(index: Path) -> list[Path]:
    said = read_json(index).get("weight_map")
    if not isinstance(said, dict) or not said:
        raise ModelError(f'{index}: should have a "weight_map" from tensors to files')
    names = list(said.values())
    if not all(isinstance(one, str) and Path(one).name == one for one in names):
        raise ModelError(f'{index}: its "weight_map" should name files beside it')
    shards = [index.with_name(name) for name in sorted(set(names))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{shard}: missing; {index.name} names it")
    for shard in shards:
        held = header(shard)
        if lost := [name for name, file in said.items() if file == shard.name and name not in held]:
            raise ModelError(f"{shard}: holds no {lost[0]}, which {index.name} says is in it")
    return shards


def check_weights(
    where: Path, found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse weights that lack a tensor, or have one of another shape.

    Args:
        where: they are, for the message.
        found: what the files hold.
        wanted: shapes, as the configuration makes them.

    Raises:
        ModelError: names the first tensor of those that are wrong, and says how many there are.
    """
    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            raise ModelError(
                f"{where}: its {name} is {list(found[name].shape)} where its configuration asks for"
                f" {list(shape)}"
            )
    if lost := [name for name in wanted if name not in found]:
        raise ModelError(f"{where}: lacks {some(lost)}; it would be random numbers")


def check_kinds(where: Path, found: Mapping[str, Tensor], known: Collection[str] = ()) -> None:
    """Refuse weights that are quantised: numbers that mean something only together with others.

    Tables of positions, counts and the like, which are integers by right, are left alone.

    Args:
        where: they are, for the message.
        found: what the files hold.
        known: names of a network's parameters, whatever else they may look like.

    Raises:
        ModelError: names a tensor that shows it.
    """
    for name, tensor in found.items():
        last = name.rpartition(".")[2]
        if last in _SCALES and name not in known:
            why = f"it holds {name}"
        elif (last in ("weight", "bias") or name in known) and tensor.dtype not in _NUMBERS:
            why = f"its {name} is of type {tensor.dtype}"
        else:
            continue
        raise ModelError(
            f"{where}: its weights are quantised in a way that diffedit does not read ({why}): take"
            " the model's ordinary weights, which dtype float8 makes smaller"
        )


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more tensors" if rest else first


__all__ = [
    "Tensor",
    "check_kinds",
    "check_weights",
    "first_line",
    "header",
    "is_pickle",
    "read_json",
    "refuse_pickles",
    "some",
    "unsafe",
    "weights",
]
