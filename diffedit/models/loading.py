"""Finding and loading models: diffusers folders, hub ids, single files. Never a pickle."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit.errors import ModelError, nearest
from diffedit.models import devices, gguf, hub, parts, single_file
from diffedit.models.files import first_line, is_pickle, read_json, refuse_pickles, unsafe
from diffedit.models.turns import turns

if TYPE_CHECKING:
    import torch

    from diffedit.models.protocol import LatentModel, ModelFamily

log = logging.getLogger(__name__)

#: The model that comes with diffedit, in the ordinary diffusers folder layout.
EMBEDDED = Path(__file__).parent / "embedded"
#: What a workflow calls it.
TINY = "tiny"

_FILES = (".safetensors", gguf.SUFFIX)


def load(
    source: str | os.PathLike[str],
    families: Mapping[str, ModelFamily],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
    compiled: bool | str = False,
    config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    low_memory: bool = False,
) -> LatentModel:
    """Load a model.

    Args:
        source: "tiny" (embedded), a diffusers folder, a ``.safetensors`` or ``.gguf`` file, or a
            hub id, which may say a revision: ``owner/name@revision``.
        families: what can be loaded, by name.
        device: "cpu", "cuda", "mps"; None: the first accelerator there is, else the CPU.
        dtype: "float32", "float16", "bfloat16"; None: float32 on the CPU, on an accelerator the
            16-bit type that the family was trained in. The lower ones change the picture a little,
            and are faster where the device computes in them. "float8": the denoiser's weights are
            held in 8 bits, and computed with in the type that None gives.
        revision: a hub revision: a branch, a tag or a commit.
        variant: a weight variant such as "fp16", of each part that has one.
        compiled: have torch compile the denoiser at its first step, which takes a minute or more
            and makes each later one faster; a mode of `torch.compile`, such as "reduce-overhead",
            or True for its default one. Values change in their last bits. Passes whose edits act
            on attention run as written.
        config: for a single file: the folder or hub id of a model that has what the file lacks:
            configurations, and maybe an autoencoder and text encoders. None: configurations are
            asked of the hub.
        vae: another autoencoder than the model's own: its folder or hub id, those of a model that
            has it, or a ``.safetensors`` file. Its latents must be those of the model's.
        max_memory: what weights may take on an accelerator, in bytes or as "6GB": the layers that
            find no room stay in main memory, and are copied when they compute, which makes the
            same picture more slowly. Latents and what is computed from them come on top. None: all
            there is.
        low_memory: do from the start what is otherwise done first when memory has run out:
            predictions one after the other, several pictures in turn and large ones in tiles
            through the autoencoder. They come out a little different where tiles meet. (A process
            that has taken all main memory is ended by the system, without an error to catch.)

    Raises:
        UnsafeWeights: the weights are pickled.
        ModelError: nothing is there, or no family recognises it, or it cannot be compiled so.
    """
    where = _resolved(source)
    repository = _repository(where, revision)
    more: dict[str, Any] = {} if config is None else {"config": _resolved(config)}
    if more and not Path(where).is_file():
        raise ModelError(f"{source}: is no single file, so it brings its own configuration")
    family = _family(source, _configuration(where, repository, **more), families)
    on = devices.chosen(device)
    if dtype in devices.NARROW:
        more["storage"], dtype = devices.NARROW[dtype], None
    kind = devices.named(dtype) or devices.usual(family, on)
    room = None if max_memory is None else devices.room(max_memory)
    if room is not None and on.type != "cpu":
        more["room"] = room
    if repository is not None:
        where = str(repository.model(variant))
    mention_code(source, where, repository)
    here = Path(where)
    if variant is not None and here.is_dir() and not parts.has_variant(here, variant):
        log.warning("%s: has no weights of variant %s: takes its plain ones", source, variant)
    offline = repository is not None and repository.files is None
    if offline and variant is None and (held := parts.only_variant(here)) is not None:
        log.warning("%s: of its weights only those of variant %s are here", source, held)
    if vae is not None:
        from diffedit.models.autoencoder import load_autoencoder

        more["vae"] = load_autoencoder(str(vae), where, more.get("config"), kind)
    said = {"device": on, "dtype": kind, "revision": revision, "variant": variant, **more}
    with turns.running():  # what a family sets up makes tensors, too
        model = devices.fitting(source, on, lambda **less: family.load(where, **{**said, **less}))
    if dtype is not None and model.dtype != kind:
        own = str(model.dtype).removeprefix("torch.")
        log.warning("%s: computes in %s, which its weights were quantised for", source, own)
    if vae is not None:
        if not hasattr(model, "replaced"):
            raise ModelError(f"{source}: models of its family take no other autoencoder")
        model.replaced = {"vae": str(vae)}
    if low_memory and model.save_memory() is None:
        log.warning("%s: models of its family know no way to take less memory", source)
    if compiled:
        if not hasattr(model, "compile"):
            raise ModelError(f"{source}: models of its family cannot be compiled")
        model.compile("default" if compiled is True else compiled)
    return model


def recognised(
    source: str | os.PathLike[str], families: Mapping[str, ModelFamily], revision: str | None = None
) -> ModelFamily:
    """The family of a model, from its configuration alone.

    Raises:
        ModelError: nothing is there, or no family recognises it.
    """
    return _family(source, configuration(_resolved(source), revision), families)


def _family(
    source: str | os.PathLike[str], config: Mapping[str, Any], families: Mapping[str, ModelFamily]
) -> ModelFamily:
    family = next((f for f in families.values() if f.recognises(config)), None)
    if family is None:
        raise ModelError(
            f"{source}: {config.get('_class_name', 'this checkpoint')} is of no family that"
            f" diffedit knows (it knows: {', '.join(sorted(families))})"
        )
    return family


def configuration(
    source: str, revision: str | None = None, config: str | None = None
) -> Mapping[str, Any]:
    """What decides the family: a model_index.json, or the ``_class_name`` of a single file.

    Args:
        config: of a single file; see `load`.

    Raises:
        ModelError: nothing is there, or it is not a model.
    """
    return _configuration(source, _repository(source, revision), config)


def _repository(source: str, revision: str | None, part: bool = False) -> hub.Repository | None:
    """What the hub has of that name; None: it is a folder or a file here."""
    path = Path(source)
    check_file(path)
    if path.exists():
        return None
    if not hub.could_be(source) or path.suffix in _FILES:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        there = [TINY] if "/" not in source else []
        there += [str(one) for one in beside if one.suffix in _FILES]
        raise ModelError(f"{source}: no such model folder or file{nearest(source, there)}")
    return hub.find(source, revision, part=part)


def _configuration(
    source: str, repository: hub.Repository | None, config: str | None = None
) -> Mapping[str, Any]:
    path = Path(source)
    if path.is_file():
        rest = None
        if config is not None:
            if Path(_resolved(config)).is_file():
                raise ModelError(f"{config}: a file, and config names a model's folder or hub id")
            rest = _configuration(_resolved(config), _repository(_resolved(config), None, True))
        return {"_class_name": single_file.pipeline_class(path, rest)}
    if repository is not None:
        index = repository.read("model_index.json")
    else:
        if not (path / "model_index.json").exists():
            refuse_pickles(path)
            raise ModelError(f"{path}: no model_index.json, so it is not a diffusers model folder")
        index = read_json(path / "model_index.json")
        if not parts.named(index):
            refuse_pickles(path)
        for name in parts.named(index):  # what else lies there is not looked at
            if (path / name).is_dir():
                refuse_pickles(path / name)
    named = index.get("_class_name")
    # With the name of a module beside it, which is not run.
    return {**index, "_class_name": named[-1]} if isinstance(named, list) and named else index


def mention_code(
    source: str | os.PathLike[str], folder: str, repository: hub.Repository | None
) -> None:
    """Say once that programs, which a model brings, are left alone."""
    found = sorted({*parts.own_code(Path(folder)), *(repository.code() if repository else ())})
    if found:
        log.warning(
            "%s: brings code of its own (%s), which diffedit does not run", source, ", ".join(found)
        )


def class_name(source: str, options: Mapping[str, Any]) -> str:
    """The pipeline of diffusers that a model was saved with, which may say what it can do.

    Args:
        options: as a family is loaded with them; ``revision`` and ``config`` are looked at.
    """
    said = configuration(source, options.get("revision"), options.get("config"))
    return str(said.get("_class_name"))


def components(cls: Any, source: str, **options: Any) -> Any:
    """A diffusers pipeline as a bundle of components, on its device.

    Args:
        cls: the pipeline class whose components are wanted.
        source: a folder, hub id or single file.
        options: ``device``, ``dtype``, ``revision``, ``variant``, and components that are given
            instead of loaded.
    """
    device, dtype, variant = (options.pop(name) for name in ("device", "dtype", "variant"))
    revision = options.pop("revision", None)
    config, storage, room = (options.pop(name, None) for name in ("config", "storage", "room"))
    repository = _repository(source, revision)
    path = Path(source) if repository is None else repository.model(variant)
    import torch

    from diffedit.models import holding

    try:
        with turns.loading():
            if path.is_file():
                if storage is not None and path.suffix.lower() == gguf.SUFFIX:
                    raise ModelError(f"{source}: held in few bits already: leave out dtype float8")
                pipe = single_file.load(cls, path, config, _place, dtype, **options)
            else:
                unused = parts.UNUSED & read_json(path / "model_index.json").keys()
                options = dict.fromkeys(unused) | options
                if own := parts.quantised(path, variant):
                    if storage is not None:
                        raise ModelError(
                            f"{source}: held in few bits already: leave out dtype float8"
                        )
                    dtype = {**dtype, "default": own[1]} if isinstance(dtype, dict) else own[1]
                made = parts.check_folder(path, cls, variant, set(options), dtype)
                options |= parts.encoders(path, cls, variant, options, dtype)
                if own:
                    options[own[0]] = parts.read_quantised(path, own[0], variant, own[1])
                options |= {name: parts.filled(one) for name, one in made.items()}
                # No variant: its networks are here by now, each of the variant that it has.
                pipe = cls.from_pretrained(path, dtype=dtype, **options, use_safetensors=True)
            denoiser = getattr(pipe, "unet", None) or pipe.transformer
            if storage is not None:
                holding.narrow(denoiser, storage)
            networks = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
            holding.place(sorted(networks, key=lambda one: one is not denoiser), device, room)
            return pipe
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error


def _place(source: str, weights: frozenset[str]) -> Path:
    """The folder of a model, with the weights of some of its parts."""
    repository = _repository(source, None, part=True)
    return Path(source) if repository is None else repository.model(weights=weights)


def resting(pipe: Any) -> Any:
    """Its networks, as sampling wants them: in evaluation mode, and without gradients."""
    import torch

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def network_class(source: str) -> str | None:
    """The class of one component in a folder or on the hub, if its configuration names one.

    Of a single file, what the configuration beside it names, if there is one.

    Raises:
        ModelError: there is no such folder, or none with a configuration.
    """
    source = _resolved(source)
    path = Path(source)
    if path.is_file():
        path = path.parent
        if not (path / "config.json").is_file():
            return None
    if path.is_dir():
        named = read_json(path / "config.json").get("_class_name")
    elif not hub.could_be(source):
        raise ModelError(f"{source}: no such folder or file")
    else:
        named = hub.find(source).read("config.json").get("_class_name")
    return None if named is None else str(named)


def pretrained(cls: Any, source: str, *, dtype: Any = None, config: Path | None = None) -> Any:
    """One component, such as a control network, from a folder, a hub id or a single file.

    Args:
        cls: of diffusers or transformers.
        source: where it is.
        dtype: that it is to be used in.
        config: of a single file, the folder with the configuration; None: that which it lies in.
    """
    source = _resolved(source)
    path = Path(source)
    check_file(path, whole=False)
    wanted = "the loaded model's family takes"
    try:
        if path.is_file():
            folder = config or path.parent
            parts.check_class(folder, cls, wanted)
            with turns.loading():
                return single_file.network(cls, path, folder, dtype)
        repository = None
        if path.is_dir():
            refuse_pickles(path)
        elif not hub.could_be(source):
            raise ModelError(f"{source}: no such folder or file")
        else:
            repository = hub.find(source)
            parts.check_class(repository.fetch(["config.json"]), cls, wanted)
            path = repository.network()
        mention_code(source, str(path), repository)
        parts.check_class(path, cls, wanted)
        with turns.loading():
            made = parts.check_part(path, cls, dtype=dtype)
            return parts.read(path, cls, dtype) if made is None else parts.filled(made)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error


def sizes(source: str) -> tuple[int, int, int] | None:
    """The sizes that a model's folder asks for in ``diffedit.json``, if it has one.

    ``{"sides": [128, 128], "whole": 512}``: the smallest and the largest side of a working region,
    and the largest of a whole picture, in pixels. A model trained at one size draws best at it.

    Raises:
        ModelError: the file says something else.
    """
    path = Path(source) / "diffedit.json"
    if not path.is_file():
        return None
    said = read_json(path)
    try:
        (smallest, largest), whole = said["sides"], said["whole"]
        found = int(smallest), int(largest), int(whole)
    except (KeyError, TypeError, ValueError):
        found = (0, 0, 0)
    if not 8 <= found[0] <= found[1] <= found[2]:
        raise ModelError(f'{path}: should be like {{"sides": [512, 768], "whole": 1024}}')
    return found


def inspect(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """What a model says of itself, from its configuration files alone."""
    named = _resolved(source)
    repository = _repository(named, revision)
    config = _configuration(named, repository)
    found: dict[str, Any] = {"source": str(source), "class": config.get("_class_name")}
    where = Path(named)
    if repository is not None:
        found["commit"] = repository.commit
        where = repository.settings()
        found["folder"] = str(where)
    if not where.is_dir():
        return found
    for part in sorted(where.glob("*/*config.json")):
        settings = read_json(part)
        keep = {k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)}
        found[part.parent.name] = {k: v for k, v in keep.items() if not k.startswith("_")}
    if repository is not None and repository.files is not None:
        files = {path: file.size for path, file in repository.files.items()}
        weights = {path: size for path, size in files.items() if path.endswith(".safetensors")}
    else:
        weights = {
            str(file.relative_to(where)): file.stat().st_size
            for file in where.rglob("*.safetensors")
        }
    found["bytes"] = sum(weights.values())
    found["files"] = sorted(weights)
    return found


def _resolved(source: str | os.PathLike[str]) -> str:
    """The embedded model's folder for its name; a home folder's ``~`` spelt out."""
    return str(EMBEDDED) if str(source) == TINY else os.path.expanduser(os.fspath(source))  # noqa: PTH111 - a hub id is no path


def check_file(path: Path, *, whole: bool = True) -> None:
    """Refuse files that are no .safetensors, pickles with the reason.

    Args:
        whole: a whole model is wanted, whose denoiser may be in a .gguf file.
    """
    if is_pickle(path.name):
        raise unsafe(path)
    known = _FILES if whole else _FILES[:1]
    if path.is_file() and path.suffix.lower() not in known:
        raise ModelError(
            f"{path}: not a model; give a diffusers folder or a {' or '.join(known)} file"
        )
