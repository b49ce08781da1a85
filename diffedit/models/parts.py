"""The parts of a model's folder, checked against what their configurations promise."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diffedit.errors import ModelError
from diffedit.models import torchao
from diffedit.models.files import (
    check_kinds,
    check_weights,
    first_line,
    header,
    read_json,
    some,
    variant_of,
    weights,
)

#: Parts that a folder may have and that diffedit does not use.
UNUSED = frozenset({"safety_checker"})
#: What pipelines call their denoisers.
DENOISERS = ("unet", "transformer")
#: What libraries call a file of weights.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
#: Files that hold the words of any tokenizer, whatever its class calls its own.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")


def named(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that a model_index.json names, each with its library and class."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(one, str) for one in entry)
        and not name.startswith("_")
        and name not in UNUSED
    }


def check_folder(
    folder: Path, pipeline: Any, variant: str | None, given: set[str], dtype: Any = None
) -> dict[str, Blueprint]:
    """Refuse a model's folder whose files are not what they say; reads no weights.

    Args:
        folder: with a model_index.json.
        pipeline: the class of diffusers that bundles the parts.
        variant: of weights that is preferred.
        given: parts that are not taken from the folder.
        dtype: that they are to be used in, or those of some by name; see `kind_of`.

    Returns:
        What diffusers makes of the configurations, for `filled`; text encoders are transformers'.

    Raises:
        ModelError: names the file and what is wrong in it.
    """
    blueprints: dict[str, Blueprint] = {}
    index = folder / "model_index.json"
    its = read_json(index).get("_class_name")
    if isinstance(its, list) and its and (folder / f"{its[0]}.py").exists():
        raise ModelError(
            f"{index}: its pipeline is {its[0]}.py, a program of its own, which diffedit does not"
            f" run: take the file away to have it loaded as {its[-1]}"
        )
    hints = typing.get_type_hints(pipeline.__init__)
    check_words(folder, pipeline, given)
    for name, (library, cls_name) in named(read_json(index)).items():
        if name in given or name not in hints:
            continue
        part = folder / name
        if not part.is_dir():
            raise ModelError(f"{part}: missing; {index} names a {cls_name} there")
        if (cls := _today(find_class(library, cls_name), part)) is None:
            if library in STEMS or not _of_diffusers(library):
                raise ModelError(
                    f"{index}: {name} is a {library}.{cls_name}, which is of neither diffusers nor"
                    " transformers as they are installed here"
                )
            continue
        if name in DENOISERS and not _fits(cls, hints[name]):
            raise ModelError(
                f"{index}: {name} is a {cls_name}, which is no denoiser of a {pipeline.__name__}"
            )
        if holds_weights(cls):
            kind = kind_of(dtype, name)
            made = check_part(part, cls, variant, kind, quantised=name in DENOISERS)
            blueprints |= {} if made is None else {name: made}
    return blueprints


def check_words(folder: Path, pipeline: Any, given: Collection[str]) -> None:
    """Refuse tokenizers that know no words, which transformers makes where files are missing.

    Args:
        folder, pipeline, given: as of `check_folder`.

    Raises:
        ModelError: none of the files is there that may hold the words.
    """
    hints = typing.get_type_hints(pipeline.__init__)
    for name, (library, cls_name) in named(read_json(folder / "model_index.json")).items():
        part = folder / name
        if name in given or name not in hints or not part.is_dir():
            continue
        wanted = _vocabularies(find_class(library, cls_name), part)
        if wanted and not any((part / one).is_file() for one in (*wanted, *_VOCABULARIES)):
            raise ModelError(
                f"{part}: the tokenizer knows no words: its vocabulary"
                f" ({' or '.join(sorted(wanted))}) is missing"
            )


def _vocabularies(cls: Any, part: Path) -> set[str]:
    """The files of which a tokenizer takes its words, or the one in a processor."""
    from transformers import ProcessorMixin

    if isinstance(cls, type) and issubclass(cls, ProcessorMixin):
        settings = part / "tokenizer_config.json"
        said = read_json(settings).get("tokenizer_class") if settings.is_file() else None
        cls = find_class("transformers", str(said))
    files = getattr(cls, "vocab_files_names", {})  # a tokenizer that reads bytes has none
    return {file for kind, file in files.items() if kind != "merges_file"}


def kind_of(dtype: Any, name: str) -> Any:
    """The type of one part, where several may have been named."""
    return dtype.get(name, dtype["default"]) if isinstance(dtype, dict) else dtype


def own_code(folder: Path) -> list[str]:
    """The files of a model that are programs, or that ask for some to be run."""
    if not folder.is_dir():
        return []
    found = [file for place in ("*.py", "*/*.py") for file in folder.glob(place)]
    settings = [file for place in ("*config.json", "*/*config.json") for file in folder.glob(place)]
    found += [file for file in settings if "auto_map" in read_json(file)]
    return sorted(file.relative_to(folder).as_posix() for file in found)


@dataclass(frozen=True)
class Blueprint:
    """A network without its weights, and the files that hold them.

    Attributes:
        network: as its configuration makes it.
        files: of weights.
        dtype: that it is made in.
    """

    network: Any
    files: Sequence[Path]
    dtype: Any


def check_part(
    folder: Path,
    cls: Any,
    variant: str | None = None,
    dtype: Any = None,
    *,
    quantised: bool = False,
) -> Blueprint | None:
    """Refuse one network's folder whose files are not what they say; reads no weights.

    Args:
        quantised: it may be, by what diffusers reads without a GPU.

    Returns:
        What diffusers makes of it; None: it is transformers', or quantised.

    Raises:
        ModelError: names the file and what is wrong in it.
    """
    settings = folder / "config.json"
    config = read_json(settings) if settings.is_file() else None
    if config is None:
        raise ModelError(f"{settings}: missing; it says what the weights beside it are")
    files = weights(folder, STEMS["diffusers" if is_diffusers(cls) else "transformers"], variant)
    found = {name: tensor for file in files for name, tensor in header(file).items()}
    where = files[0] if len(files) == 1 else folder
    if method := config.pop("quantization_config", None):
        if not quantised or method_of(method) != torchao.METHOD:
            raise unread(settings, method)
        check_class(folder, cls)
        torchao.check(settings, files, found, shapes(blueprint(cls, config, settings)))
    elif is_diffusers(cls):
        check_class(folder, cls)
        network = blueprint(cls, config, settings, dtype)
        if len(files) == 1:  # names of old files, as diffusers itself mends them
            network._fix_state_dict_keys_on_load(found)
        wanted = shapes(network)
        check_kinds(where, found, wanted)
        check_weights(where, found, wanted)
        network.register_to_config(_name_or_path=str(folder))
        return Blueprint(network, files, dtype)
    else:
        check_kinds(where, found)
    return None


def quantised(folder: Path, variant: str | None) -> tuple[str, torch.dtype] | None:
    """The denoiser of a model's folder if it is quantised, and the type that it computes in.

    The weights are of that type for good: what they are multiplied with has to be, too.

    Raises:
        ModelError: its files do not say how.
    """
    for name in DENOISERS:
        settings = folder / name / "config.json"
        said = read_json(settings).get("quantization_config") if settings.is_file() else None
        if method_of(said) == torchao.METHOD:
            files = weights(settings.parent, STEMS["diffusers"], variant)
            return name, torchao.computing(files)
    return None


def read_quantised(folder: Path, name: str, variant: str | None, dtype: torch.dtype) -> Any:
    """A quantised denoiser of a model's folder that was checked."""
    part = folder / name
    cls = _today(find_class(*named(read_json(folder / "model_index.json"))[name]), part)
    said = _its_variant(part, "diffusers", variant)
    return cls.from_pretrained(part, dtype=dtype, use_safetensors=True, **said)


def _its_variant(part: Path, library: str, variant: str | None) -> dict[str, str]:
    """How a library is told which weights of a part are read: its only ones, if need be."""
    kind = variant_of(weights(part, STEMS[library], variant)[0].name)
    return {} if kind is None else {"variant": kind}


def only_variant(folder: Path) -> str | None:
    """The variant of a part of a model's folder that has no plain weights; None: all have."""
    for part in sorted(one for one in folder.iterdir() if one.is_dir()):
        kinds = {variant_of(file.name) for file in part.glob("*.safetensors")}
        if kinds and None not in kinds:
            return sorted(str(kind) for kind in kinds)[0]
    return None


def has_variant(folder: Path, variant: str) -> bool:
    """Whether any part of a model's folder has weights of a variant."""
    return any(variant_of(file.name) == variant for file in folder.glob("*/*.safetensors"))


def method_of(said: Any) -> str | None:
    """By what a network is quantised whose configuration says this of it."""
    return said.get("quant_method") if isinstance(said, dict) else None


def filled(made: Blueprint) -> Any:
    """A network with its weights, as `from_pretrained` makes it, which would build it once more."""
    from safetensors.torch import load_file

    network, dtype = made.network, made.dtype
    finer = set(network._keep_in_fp32_modules or ())
    for file in made.files:
        state = load_file(file)
        if len(made.files) == 1:
            network._fix_state_dict_keys_on_load(state)
        for name, value in state.items():
            if value.is_floating_point() and dtype is not None:
                kind = torch.float32 if finer.intersection(name.split(".")) else dtype
                state[name] = value.to(kind).contiguous()
        network.load_state_dict(state, strict=False, assign=True)
    return network.eval()


def blueprint(cls: Any, config: Mapping[str, Any], where: Path, dtype: Any = None) -> Any:
    """A network as its configuration makes it, without memory for its weights.

    Raises:
        ModelError: the configuration makes none.
    """
    from accelerate import init_empty_weights

    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or usual)  # of tables that are no weights
        with init_empty_weights():
            return cls.from_config(dict(config))
    except Exception as error:
        raise ModelError(f"{where}: makes no {cls.__name__} ({first_line(error)})") from error
    finally:
        torch.set_default_dtype(usual)


def shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a network, by name."""
    return {name: tuple(one.shape) for name, one in network.named_parameters()}


def check_class(folder: Path, cls: type, why: str = "this is the place of") -> None:
    """Refuse a network of another class: diffusers would make one of random weights of it."""
    settings = folder / "config.json"
    its = read_json(settings).get("_class_name") if settings.is_file() else None
    if its is not None and _today(find_class("diffusers", its), folder) is cls:
        return
    if its not in (None, cls.__name__):
        raise ModelError(f"{folder}: holds a {its}, and {why} a {cls.__name__}")


def encoders(
    folder: Path, pipeline: Any, variant: str | None, given: Mapping[str, Any], dtype: Any
) -> dict[str, Any]:
    """Those networks of a folder that transformers reads, with none of their weights made up.

    Which names their files may have is transformers' own affair, so it is asked what it missed.

    Raises:
        ModelError: a tensor is missing.
    """
    hints, made = typing.get_type_hints(pipeline.__init__), {}
    for name, (library, cls_name) in named(read_json(folder / "model_index.json")).items():
        cls = find_class(library, cls_name) if library == "transformers" else None
        if cls is None or name in given or name not in hints or not holds_weights(cls):
            continue
        made[name] = read(folder / name, cls, kind_of(dtype, name), variant)
    return made


def read(part: Path, cls: Any, dtype: Any, variant: str | None = None) -> Any:
    """A network from its folder, with none of its weights made up.

    Raises:
        ModelError: a tensor is missing.
    """
    said = _its_variant(part, "transformers", variant)
    network, told = cls.from_pretrained(
        part, dtype=dtype, use_safetensors=True, output_loading_info=True, **said
    )
    if lost := told["missing_keys"]:
        raise ModelError(f"{part}: lacks {some(lost)}; it would be random numbers")
    return network


@lru_cache
def find_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers; None: there is no such class, or library."""
    if library not in STEMS:
        return None
    if library == "transformers":
        from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class

        name = _maybe_remap_transformers_class(name) or name
    return getattr(importlib.import_module(library), name, None)


def _today(cls: Any, part: Path) -> Any:
    """The class that diffusers has made of one that models were saved with, by their settings."""
    from diffusers.models.model_loading_utils import (
        _CLASS_REMAPPING_DICT,
        _fetch_remapped_cls_from_config,
    )

    settings = part / "config.json"
    if cls is None or cls.__name__ not in _CLASS_REMAPPING_DICT or not settings.is_file():
        return cls
    said = read_json(settings)
    return _fetch_remapped_cls_from_config(said, cls) if "norm_type" in said else cls


def _of_diffusers(library: str) -> bool:
    """Whether what a model_index.json calls a library is a package of diffusers' pipelines."""
    from diffusers import pipelines

    return hasattr(pipelines, library)


def is_diffusers(cls: Any) -> bool:
    """Whether diffusers reads a class's weights, and not transformers."""
    from diffusers import ModelMixin

    return isinstance(cls, type) and issubclass(cls, ModelMixin)


def holds_weights(cls: Any) -> bool:
    """Whether a part is a network."""
    from transformers import PreTrainedModel

    return is_diffusers(cls) or (isinstance(cls, type) and issubclass(cls, PreTrainedModel))


def _fits(cls: type, hint: Any) -> bool:
    kinds = [one for one in (typing.get_args(hint) or (hint,)) if isinstance(one, type)]
    return not kinds or issubclass(cls, tuple(kinds))


def unread(settings: Path, said: Any) -> ModelError:
    """For weights whose numbers mean something only together with others."""
    return ModelError(
        f"{settings}: its weights are quantised by {method_of(said) or 'an unknown method'}, which"
        " diffedit does not read: take the model's ordinary weights, which dtype float8 makes"
        " smaller"
    )


__all__ = [
    "STEMS",
    "UNUSED",
    "Blueprint",
    "blueprint",
    "check_class",
    "check_folder",
    "check_part",
    "check_words",
    "encoders",
    "filled",
    "find_class",
    "has_variant",
    "kind_of",
    "named",
    "own_code",
    "quantised",
    "read",
    "read_quantised",
    "shapes",
    "unread",
]
