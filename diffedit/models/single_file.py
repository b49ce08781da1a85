"""Models in one ``.safetensors`` or ``.gguf`` file, in the layout of those who made them.

Such a file holds a denoiser, and some of the networks beside it; what it lacks, and the
configurations of all, come from a model's folder.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from diffedit.errors import ModelError
from diffedit.models import gguf, parts
from diffedit.models.files import (
    Tensor,
    check_kinds,
    check_weights,
    first_line,
    read_json,
    some,
)
from diffedit.models.files import header as header_of_safetensors

log = logging.getLogger(__name__)

#: What a file of a control network seems to be.
CONTROL = "a control network"
#: Names of pipelines, and what the names of some tensors begin with; the first that fits is right.
_KINDS = (
    ("ChromaPipeline", "distilled_guidance_layer.in_proj."),
    ("FluxPipeline", "double_blocks.0.img_attn.norm.key_norm."),
    ("StableDiffusion3Pipeline", "joint_blocks.0.context_block.adaLN_modulation."),
    ("StableDiffusionXLPipeline", "conditioner.embedders."),
    ("StableDiffusionPipeline", "input_blocks.0.0."),
)
_PREFIX = "model.diffusion_model."
#: What a UNet of XL is told besides the text: of the base, and of the refiner.
_XL = (2816, 2560)
#: What the names of tensors tell of a file: the first that a name holds, or begins with (^).
_LOOKS = {
    "a Control-LoRA": ("^lora_controlnet",),
    "a LoRA": (".lora_", "^lora_", ".lokr_", ".hada_", ".dora_scale"),
    "an IP-Adapter": ("^ip_adapter.", "^image_proj."),
    "a T2I-Adapter": ("^adapter.body.", "^adapter.conv_in.", "^body.0."),
    CONTROL: ("^control", "input_hint_block.", "zero_convs.", "controlnet_"),
    "a whole model": ("^first_stage_model.", "^cond_stage_model.", "^conditioner."),
    "a denoiser": ("^model.diffusion_model.", "^down_blocks.", "^double_blocks."),
    "an autoencoder": ("encoder.conv_in.", "decoder.conv_in."),
    "a text encoder": ("text_model.", "^shared.weight"),
}
#: Where autoencoders lie, and text encoders of the two makes.
_AUTOENCODERS = ("first_stage_model.", "vae.")
_CLIPS = (
    "cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.",
    "text_encoders.clip_l.", "text_encoders.clip_g.",
)  # fmt: skip
_T5 = "text_encoders.t5xxl.transformer."

#: Gives a model's folder with the weights of some parts: where it is named, or the hub has it.
Place = Callable[[str, frozenset[str]], Path]


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        ModelError: the file is not what it says.
    """
    return gguf.header(path) if _quantised(path) else header_of_safetensors(path)


def _quantised(path: Path) -> bool:
    return path.suffix.lower() == gguf.SUFFIX


def kind(path: Path) -> str:
    """The pipeline of diffusers that a file is for, by the names of its tensors.

    Raises:
        ModelError: it is of no kind that is read.
    """
    names = header(path)
    bare = {name.removeprefix(_PREFIX): tensor for name, tensor in names.items()}
    if (sizes := bare.get("label_emb.0.0.weight")) and sizes.shape[-1] in _XL:
        return "StableDiffusionXLPipeline"  # a UNet alone has no text encoders to tell it by
    for pipeline, mark in _KINDS:
        if any(name.startswith(mark) for name in bare):
            return pipeline
    raise ModelError(
        f"{path}: not a checkpoint in an original layout that is known: those of Stable Diffusion"
        " (1, 2, XL, 3), Flux and Chroma are, and networks of diffusers' layout belong in a folder"
    )


def seems(names: Iterable[str]) -> str | None:
    """What a file holds, by the names of its tensors; None: nothing that is known."""
    every = ["^" + name for name in names]
    for said, marks in _LOOKS.items():
        if any(mark in name for name in every for mark in marks):
            return said
    return None


def pipeline_class(path: Path, config: Mapping[str, Any] | None) -> str:
    """The pipeline that a file is for: as a folder named beside it says, if there is one.

    Raises:
        ModelError: the folder is of another family.
    """
    own = kind(path)
    if config is None:
        return own
    its = str(config.get("_class_name"))
    family = own.removesuffix("Pipeline")
    sisters = ("StableDiffusionXL", "StableDiffusion3")
    other = family == "StableDiffusion" and its.startswith(sisters)
    if not its.startswith(family) or other:
        raise ModelError(f"{path}: is for a {own}, and the configuration named is of a {its}")
    return its


def load(cls: Any, path: Path, config: str | None, place: Place, dtype: Any, **given: Any) -> Any:
    """A pipeline with what the file holds, and the rest of it.

    Args:
        cls: of diffusers.
        config: a folder or hub id of a model that has the rest; None: the one that the file's
            makers publish, of which configurations are taken and no weights.
        place: finds it.
        dtype: of the networks.
        given: parts that are taken from neither.

    Raises:
        ModelError: a part is nowhere, or a tensor is missing or of another shape.
    """
    names = header(path)
    if not _quantised(path):
        check_kinds(path, names)
    if any(name.startswith("input_blocks.") for name in names):
        raise ModelError(
            f"{path}: a UNet whose tensors lack {_PREFIX!r} before their names, which diffusers"
            " does not read"
        )
    asked = config or published(path, names)
    try:
        folder = place(asked, frozenset())
    except ModelError as error:
        if config is not None:
            raise
        raise ModelError(
            f"{path}: says nothing of its configuration, and that of {asked} cannot be had: name a"
            f" folder that has it with config (on the command line --config) ({error})"
        ) from error
    index = read_json(folder / "model_index.json")
    lacking = _lacking(names, index) - set(given)
    if lacking and config is None:
        raise ModelError(
            f"{path}: holds no {', '.join(sorted(lacking))}: name the folder or hub id of a model"
            " that has them with config (on the command line --config)"
        )
    if lacking and config is not None:
        folder = place(config, frozenset(lacking))
    parts.check_words(folder, cls, set(given))
    if (scheduler := _scheduler(path, names, folder, index)) is not None:
        given = {"scheduler": scheduler} | given
    if not _quantised(path):
        _check_networks(path, names, folder, index, lacking | set(given))
    rest = {name: _from_folder(folder, name, index, dtype) for name in sorted(lacking)}
    try:
        if _quantised(path):
            name = "unet" if "unet" in index else "transformer"
            denoiser = parts.find_class(*parts.named(index)[name])
            rest[name] = gguf.load(denoiser, path, folder, name, parts.kind_of(dtype, name))
            pipe = cls.from_pretrained(folder, **rest, **given)
        else:
            pipe = cls.from_single_file(str(path), config=str(folder), dtype=dtype, **rest, **given)
    except Exception as error:
        if "meta tensor" in str(error):  # what has no weights cannot be given another type
            raise ModelError(
                f"{path}: lacks tensors that the configuration in {folder} asks for"
            ) from error
        if isinstance(error, KeyError):  # of diffusers' renaming, which takes each out by its name
            raise ModelError(f"{path}: lacks {error.args[0]}") from error
        raise ModelError(f"{path}: cannot be loaded ({first_line(error)})") from error
    for name, part in pipe.components.items():
        if lost := [key for key, one in _parameters(part) if one.is_meta]:
            raise ModelError(f"{path}: its {name} lacks {some(lost)}")
    return pipe


def network(cls: Any, path: Path, folder: Path, dtype: Any = None) -> Any:
    """One network from a file, in the layout of diffusers or of its makers.

    Args:
        cls: of diffusers.
        folder: with its configuration.
        dtype: that it is to be used in.

    Raises:
        ModelError: it is quantised, or a tensor is missing or of another shape.
    """
    settings, names = folder / "config.json", header_of_safetensors(path)
    config = read_json(settings)
    if method := config.pop("quantization_config", None):
        raise parts.unread(settings, method)
    made = parts.blueprint(cls, config, settings, dtype)
    wanted, own = parts.shapes(made), dict(names)
    held = {name: one for name, one in names.items() if name.startswith(_AUTOENCODERS)}
    whole = held and cls.__name__.startswith("Autoencoder")  # of a model, whose rest is not read
    check_kinds(path, held if whole else names, wanted)
    made._fix_state_dict_keys_on_load(own)
    if cls.__name__ not in _layouts() or 2 * len(own.keys() & wanted) > len(wanted):
        check_weights(path, own, wanted)
        return parts.filled(parts.Blueprint(made, [path], dtype))
    check_weights(path, _renamed(cls, path, names, config), wanted)
    return cls.from_single_file(str(path), config=str(folder), dtype=dtype)


def _check_networks(
    path: Path,
    names: Mapping[str, Tensor],
    folder: Path,
    index: Mapping[str, Any],
    elsewhere: Collection[str],
) -> None:
    """Refuse a file whose denoiser or autoencoder is not what the configurations say.

    Args:
        folder, index: of the model that has them.
        elsewhere: parts that are not taken from the file.

    Raises:
        ModelError: a tensor is missing, or of another shape.
    """
    for name in sorted({*parts.DENOISERS, "vae"} & parts.named(index).keys() - set(elsewhere)):
        settings = folder / name / "config.json"
        cls = parts.find_class(*parts.named(index)[name])
        if cls is None or cls.__name__ not in _layouts() or not settings.is_file():
            continue
        config = read_json(settings)
        config.pop("quantization_config", None)  # of the folder's own weights, which are not read
        wanted = parts.shapes(parts.blueprint(cls, config, settings))
        found = _renamed(cls, path, names, config)
        held = {f"{name}.{key}": tensor for key, tensor in found.items()}
        try:
            check_weights(path, held, {f"{name}.{key}": shape for key, shape in wanted.items()})
        except ModelError as error:
            raise ModelError(f"{error} (the configuration is {settings})") from None


def _renamed(
    cls: Any, path: Path, names: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a file as diffusers will call them, by its header alone.

    Raises:
        ModelError: one is missing that others are told by.
    """
    rename = _layouts()[cls.__name__]["checkpoint_mapping_fn"]
    try:
        made = rename(config=dict(config), checkpoint=_bodiless(names))
    except KeyError as error:  # it takes each out by its name
        raise ModelError(f"{path}: lacks {error.args[0]}") from error
    except Exception as error:
        raise ModelError(
            f"{path}: in no layout of a {cls.__name__} ({first_line(error)})"
        ) from error
    return {name: Tensor("F32", tuple(one.shape)) for name, one in made.items() if one is not None}


def _bodiless(names: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors without numbers, for what asks for shapes only."""
    import torch

    return {name: torch.empty(one.shape, device="meta") for name, one in names.items()}


def _layouts() -> Mapping[str, Any]:
    """How diffusers reads the layouts of makers, by the names of its classes."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return cast(Mapping[str, Any], SINGLE_FILE_LOADABLE_CLASSES)


def _parameters(part: Any) -> Any:
    return part.named_parameters() if hasattr(part, "named_parameters") else ()


def _scheduler(
    path: Path, names: Mapping[str, Tensor], folder: Path, index: Mapping[str, Any]
) -> Any:
    """The scheduler of a model's folder, with what a file says of how its UNet was trained.

    ``v_pred`` and, beside it, ``ztsnr`` are tensors without numbers that those write who train
    Stable Diffusion (XL) so; ComfyUI goes by them, too.

    Returns:
        None: they say nothing.
    """
    settings = folder / "scheduler" / "scheduler_config.json"
    library, named = parts.named(index).get("scheduler", ("", ""))
    own = parts.find_class(library, named)
    if own is None or "unet" not in index or not settings.is_file():
        return None
    if any(name.startswith("edm_") for name in names) and not named.startswith("EDM"):
        log.warning(
            "%s: was trained at the noise levels of EDM, and %s is a %s of others: name a model of"
            " its own kind with config", path, settings, named,
        )  # fmt: skip
    said: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    if said and "ztsnr" in names:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(own.__init__).parameters:
            own = parts.find_class("diffusers", "EulerDiscreteScheduler")  # others ignore it
    return own.from_config(read_json(settings) | said) if said else None


def published(path: Path, names: Mapping[str, Tensor]) -> str:
    """The hub id of the model that a file's makers publish, as diffusers knows it.

    Raises:
        ModelError: none is known.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    try:
        return str(fetch_diffusers_config(_bodiless(names))["pretrained_model_name_or_path"])
    except Exception as error:
        raise ModelError(
            f"{path}: which model it is of is not known ({first_line(error)}): name a folder or hub"
            " id of one with config (on the command line --config)"
        ) from error


def _lacking(names: Mapping[str, Tensor], index: Mapping[str, Any]) -> set[str]:
    """The networks that a model has and a file has not."""
    clips = sum(any(name.startswith(prefix) for name in names) for prefix in _CLIPS)
    lacking = set()
    for part, (_, cls_name) in sorted(parts.named(index).items()):
        if part.startswith("tokenizer"):
            continue
        if cls_name.startswith("CLIPText"):
            clips -= 1
            held = clips >= 0
        elif cls_name.startswith("T5"):
            held = any(name.startswith(_T5) for name in names)
        elif part == "vae":
            held = any(name.startswith(_AUTOENCODERS) for name in names)
        else:
            continue
        if not held:
            lacking.add(part)
    return lacking


def _from_folder(folder: Path, name: str, index: Mapping[str, Any], dtype: Any) -> Any:
    """A network that the file lacks, checked as one of a folder is."""
    cls = parts.find_class(*parts.named(index)[name])
    part = folder / name
    if not part.is_dir():
        raise ModelError(f"{part}: missing; the single file has no {name} either")
    made = parts.check_part(part, cls, dtype=dtype)
    return parts.read(part, cls, dtype) if made is None else parts.filled(made)


__all__ = [
    "CONTROL",
    "header",
    "kind",
    "load",
    "network",
    "pipeline_class",
    "published",
    "seems",
]
