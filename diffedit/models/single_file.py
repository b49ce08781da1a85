"""Models in one ``.safetensors`` or ``.gguf`` file, in the layout of those who made them.

Such a file holds a denoiser, and some of the networks beside it; what it lacks, and the
configurations of all, come from a model's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffedit.errors import ModelError
from diffedit.models import gguf, parts
from diffedit.models.files import Tensor, first_line, read_json, some
from diffedit.models.files import header as header_of_safetensors

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
    if any(name.startswith("input_blocks.") for name in names):
        raise ModelError(
            f"{path}: a UNet whose tensors lack {_PREFIX!r} before their names, which diffusers"
            " does not read"
        )
    folder = place(config or _published(path, names), frozenset())
    index = read_json(folder / "model_index.json")
    lacking = _lacking(names, index) - set(given)
    if lacking and config is None:
        raise ModelError(
            f"{path}: holds no {', '.join(sorted(lacking))}: name the folder or hub id of a model"
            " that has them with config (on the command line --config)"
        )
    if lacking and config is not None:
        folder = place(config, frozenset(lacking))
    rest = {name: _from_folder(folder, name, index, dtype) for name in sorted(lacking)}
    try:
        if _quantised(path):
            name = "unet" if "unet" in index else "transformer"
            network = parts.find_class(*parts.named(index)[name])
            rest[name] = gguf.load(network, path, folder, name, parts.kind_of(dtype, name))
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


def _parameters(part: Any) -> Any:
    return part.named_parameters() if hasattr(part, "named_parameters") else ()


def _published(path: Path, names: Mapping[str, Tensor]) -> str:
    """The hub id of the model that a file's makers publish, as diffusers knows it."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    told = {key: torch.empty(one.shape, device="meta") for key, one in names.items()}
    try:
        return str(fetch_diffusers_config(told)["pretrained_model_name_or_path"])
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


__all__ = ["header", "kind", "load", "pipeline_class"]
