"""What the file of a LoRA says, in whatever layout it was written.

Names of layers as the model has them are read here, with what trainers write before and after them.
All other layouts, Kohya's and those of original checkpoints, are diffusers' knowledge.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffedit.errors import ModelError
from diffedit.models.files import first_line, header, read_json

log = logging.getLogger(__name__)

#: Parts of keys by which a LoRA is known for a family's, the first that fits.
_MARKS = (
    ("Flux.1 or Chroma", ("single_transformer_blocks", "single_blocks")),
    ("Qwen-Image", ("img_mlp", "txt_mlp", "img_mod")),
    ("Stable Diffusion 3", ("joint_blocks", "add_q_proj", "add_k_proj", "add_v_proj")),
    ("Z-Image", (".attention.to_", "noise_refiner", "context_refiner")),
    ("Stable Diffusion XL", ("lora_te2_", "text_encoder_2.")),
)
#: The same for UNets, by the width of the text that they attend to.
_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
#: Parts of keys by which additions of other kinds are known.
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_controlnet": "Control-LoRA",
    "lora_mid": "LoCon in three matrices",
    ".on_input": "IA3",
    ".oft_": "OFT",
    ".a1.weight": "GLoRA",
}
#: Words that were learned along, as Kohya's scripts pack them in.
_WORDS = "bundle_emb."


class Loaders(Protocol):
    """What reads a LoRA: a pipeline class of diffusers with a LoRA loader."""

    def lora_state_dict(self, source: Any, **options: Any) -> Any:
        """The additions with component and layer as keys, and what their file says besides."""


@dataclass(frozen=True)
class Part:
    """What a file holds for one component.

    Attributes:
        state: the additions by peft's names: ``layer.lora_A.weight``.
        alphas: by layer, where the file says them.
        told: how peft was to make them, if the file tells.
    """

    state: dict[str, Tensor]
    alphas: Mapping[str, float]
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    """What a file holds.

    Attributes:
        parts: by component.
        count: of its matrices, of whichever component.
        denoising: whether some are for the denoiser, or for nobody knows what.
    """

    parts: Mapping[str, Part]
    count: int
    denoising: bool


#: Words of trainers for the two matrices, and what may stand before the name of a denoiser's layer.
_MATRICES = {"A": ("lora_A", "lora_down", "lora.down"), "B": ("lora_B", "lora_up", "lora.up")}
_PEFT = "base_model.model."
_BEFORE = ("diffusion_model.", _PEFT, "")
_NAMES = [name for names in _MATRICES.values() for name in names]
_KEY = re.compile(
    rf"(?P<layer>.+)\.((?P<matrix>{'|'.join(map(re.escape, _NAMES))})"
    r"(\.default)?\.(?P<what>weight|bias)|(?P<alpha>alpha)"
    r"|(?P<dora>lora_magnitude_vector)(\.default)?(\.weight)?)"
)


def read(loaders: Loaders, modules: Mapping[str, nn.Module], file: Path, **options: Any) -> Said:
    """Read a LoRA's file.

    Args:
        loaders: the pipeline class whose layouts are read.
        modules: by component, the denoiser first.
        options: further arguments of `Loaders.lora_state_dict`.

    Raises:
        ModelError: it is no LoRA, or one for another model.
    """
    shapes = {name: tensor.shape for name, tensor in header(file).items()}
    _check_layout(file, shapes)
    _check_alphas(file, shapes)
    said = _plain(modules, file, shapes, own=True)
    if said is None:
        # As diffusers reads it, wherever it does: only then are the pictures its own.
        try:
            said = _converted(loaders, modules, file, shapes, options)
        except ModelError:
            if (said := _plain(modules, file, shapes)) is None:
                raise
        if not _fits(said, modules):
            said = _plain(modules, file, shapes) or said
    _check_pairs(file, said)
    return said


def _fits(said: Said, modules: Mapping[str, nn.Module]) -> bool:
    """Whether any of it is for a layer that there is."""
    layers = _layers(modules)
    return any(
        key.split(".lora_")[0] in layers[name]
        for name, part in said.parts.items()
        for key in part.state
    )


def _layers(modules: Mapping[str, nn.Module]) -> dict[str, Collection[str]]:
    """The names of layers by component."""
    return {part: dict(module.named_modules()).keys() for part, module in modules.items()}


# --- layouts --------------------------------------------------------------------------------------


def _plain(
    modules: Mapping[str, nn.Module],
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    own: bool = False,
) -> Said | None:
    """A file whose layers are called as the model calls them; None: it is of another kind.

    Args:
        own: only one whose keys begin with the names of components; layers that these have not are
            left out then.
    """
    homes: dict[str, tuple[re.Match[str], tuple[str, str] | None]] = {}
    layers = _layers(modules)
    for key in shapes:
        ours = key.startswith(tuple(f"{part}." for part in modules))
        if (found := _KEY.fullmatch(key)) is None or (own and not ours):
            return None
        home = _home(found["layer"], modules, layers)
        if home is None and not own:
            return None
        homes[key] = found, home
    if not any(home for _, home in homes.values()):
        return None
    states: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
    alphas: dict[str, dict[str, float]] = {part: {} for part in modules}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        for key, (found, home) in homes.items():
            if home is None:
                continue
            part, layer = home
            if found["alpha"]:
                alphas[part][layer] = float(opened.get_tensor(key))
            elif found["dora"]:
                states[part][f"{layer}.lora_magnitude_vector"] = opened.get_tensor(key)
            else:
                letter = "A" if found["matrix"] in _MATRICES["A"] else "B"
                name = f"{layer}.lora_{letter}.{found['what']}"
                states[part][name] = opened.get_tensor(key)
    try:
        told = dict(json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: what it says of itself is not read ({error})") from error
    parts = {
        part: Part(state, alphas[part], _of_part(told, part)) for part, state in states.items()
    }
    denoiser = next(iter(modules))
    if any(key.startswith(_PEFT) for key in shapes) and not alphas[denoiser]:
        parts[denoiser] = Part(parts[denoiser].state, {}, _of_peft(file))
    count = sum(not found["alpha"] for found, _ in homes.values())
    return Said(parts, count, any(not key.startswith("text_encoder") for key in shapes))


def _home(
    layer: str, modules: Mapping[str, nn.Module], layers: Mapping[str, Collection[str]]
) -> tuple[str, str] | None:
    """The component and the layer that are meant; None: there is no such layer."""
    for part, module in modules.items():
        name = _flat(layer.removeprefix(f"{part}."), module)
        if layer.startswith(f"{part}.") and name in layers[part]:
            return part, name
    denoiser = next(iter(modules))
    for before in _BEFORE:
        if layer.startswith(before) and layer.removeprefix(before) in layers[denoiser]:
            return denoiser, layer.removeprefix(before)
    return None


def _of_peft(file: Path) -> dict[str, Any]:
    """What `peft.PeftModel.save_pretrained` writes beside the matrices, alpha among it."""
    beside = file.with_name("adapter_config.json")
    if not beside.is_file():
        raise ModelError(
            f"{file}: was saved by peft, which keeps alpha in adapter_config.json, and there is"
            " none beside it"
        )
    known = {field.name for field in fields(LoraConfig)}  # a later peft has more
    return {key: value for key, value in read_json(beside).items() if key in known}


def _converted(
    loaders: Loaders,
    modules: Mapping[str, nn.Module],
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any],
) -> Said:
    """A file in a layout that diffusers converts."""
    given: Any = str(file)
    if any(key.startswith(_WORDS) for key in shapes):
        log.warning("%s: the words in it are not read: textual_inversion takes them alone", file)
        given = {k: v for k, v in load_file(file).items() if not k.startswith(_WORDS)}
    try:
        made = loaders.lora_state_dict(given, return_lora_metadata=True, **options)
    except Exception as error:  # of a layout that the family's loader takes for one of its own
        raise unfit(file, modules, first_line(error)) from error
    state, *more, metadata = made
    said = (more[0] if more else None) or {}
    if any("dora_scale" in key for key in shapes) and not any("magnitude" in key for key in state):
        raise ModelError(
            f"{file}: is a DoRA whose layout (dora_scale) is not read: save it by peft"
        )
    parts = {}
    for name, module in modules.items():
        own = _of_part(state, name)
        try:
            peft = _as_peft(own, module, name == next(iter(modules)))
        except ValueError as error:
            raise unfit(file, modules, first_line(error)) from error
        alphas = _alphas(_of_part(said, name), own, peft, module)
        parts[name] = Part(peft, alphas, _of_part(metadata or {}, name))
    denoising = any(not key.startswith("text_encoder") for key in state)
    return Said(parts, len(state), denoising)


def _as_peft(state: dict[str, Tensor], module: nn.Module, denoiser: bool) -> dict[str, Tensor]:
    """One component's additions with peft's names for their matrices."""
    if not state:
        return state
    if denoiser:
        peft = "lora_A" in next(iter(state))
        return state if peft else convert_unet_state_dict_to_peft(state)
    state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return {_flat(key, module): value for key, value in state.items()}


def _flat(key: str, module: nn.Module) -> str:
    """A text encoder's key as its layers are called: transformers 5 took a level out."""
    return key if hasattr(module, "text_model") else key.removeprefix("text_model.")


def _of_part(said: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What is said of a component, by names within it."""
    start = f"{part}."
    return {key.removeprefix(start): v for key, v in said.items() if key.startswith(start)}


def _alphas(
    said: Mapping[str, Any],
    own: Mapping[str, Tensor],
    peft: Mapping[str, Tensor],
    module: nn.Module,
) -> dict[str, float]:
    """Alphas by layer, which files say by their own names of matrices.

    diffusers itself goes by those names, and so gives all attention of a UNet and of a text encoder
    the most frequent alpha.
    """
    names = {id(value): key for key, value in peft.items()}
    made = {}
    for key, alpha in said.items():
        matrix = key.removesuffix(".alpha")
        known = names.get(id(own[matrix])) if matrix in own else None
        made[known.split(".lora_")[0] if known else _flat(matrix, module)] = float(alpha)
    return made


# --- refusing -------------------------------------------------------------------------------------


def _check_pairs(file: Path, said: Said) -> None:
    """Refuse a layer with one matrix alone: the other would be what lies in memory."""
    for part in said.parts.values():
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in part.state.items():
            layer, matrix, what = key.partition(".lora_")
            if matrix and what in ("A.weight", "B.weight"):
                found.setdefault(layer, {})[what[0]] = value
            if not bool(value.float().isfinite().all()):
                raise ModelError(f"{file}: {key} holds numbers that are not finite")
        for layer, pair in found.items():
            if len(pair) < 2:
                raise ModelError(f"{file}: lacks lora_{'AB'.strip(next(iter(pair)))} of {layer}")
            ranks = pair["A"].shape[0], pair["B"].shape[1]
            if ranks[0] != ranks[1] or not ranks[0]:
                raise ModelError(
                    f"{file}: the two matrices of {layer} have the ranks {ranks[0]} and {ranks[1]}:"
                    " should be one, and at least 1"
                )


def _check_alphas(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with safe_open(file, framework="pt") as opened:
        for name in (name for name in shapes if name.endswith(".alpha")):
            if math.prod(shapes[name]) != 1 or not math.isfinite(float(opened.get_tensor(name))):
                raise ModelError(f"{file}: {name} should be one finite number")


def _check_layout(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for mark, name in _OTHERS.items():
        if any(mark in key for key in shapes):
            raise ModelError(f"{file}: holds additions of the kind {name}; only LoRA is supported")
    if any(key.endswith(".diff") for key in shapes) and not any(
        name in key for key in shapes for name in _NAMES
    ):
        raise ModelError(f"{file}: holds whole differences of weights; only LoRA is supported")
    if not any("lora" in key for key in shapes):
        raise ModelError(
            f"{file}: no LoRA: none of its {len(shapes)} tensors is called lora, such as"
            f" {next(iter(shapes), 'none')!r}"
        )


def unfit(file: Path, modules: Mapping[str, nn.Module], why: str) -> ModelError:
    """The refusal of a LoRA that does not fit the loaded model."""
    seems = _seems({name: tensor.shape for name, tensor in header(file).items()})
    own = _seems(
        {
            f"{part}.{layer}.lora_A.weight": tuple(one.weight.shape)
            for part, module in modules.items()
            for layer, one in module.named_modules()
            if isinstance(one, nn.Linear)
        }
    )
    if seems is None:
        said = "it is for another model, or in a layout that is not read"
    elif seems == own:
        said = "it is for another model of its kind, or in a layout that is not read"
    else:
        said = f"it seems to be for {seems}"
    return ModelError(f"{file}: does not fit the loaded model ({why}); {said}")


def _seems(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family that a LoRA was made for, by its file's keys; None: nobody knows."""
    for family, marks in _MARKS:
        if any(mark in key for key in shapes for mark in marks):
            return family
    for key, shape in shapes.items():
        crosses = "attn2" in key and ("to_k" in key or "to_v" in key)
        if crosses and ("lora_down" in key or "lora_A" in key or "lora.down" in key):
            return _WIDTHS.get(shape[1])
    return None


__all__ = ["Loaders", "Part", "Said", "read", "unfit"]
