"""Finding and loading models: diffusers folders, hub ids, single files. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit.errors import ModelError, UnsafeWeights, nearest

if TYPE_CHECKING:
    import torch

    from diffedit.models.protocol import LatentModel, ModelFamily

#: The model that comes with diffedit, in the ordinary diffusers folder layout.
EMBEDDED = Path(__file__).parent / "embedded"
#: What a workflow calls it.
TINY = "tiny"

_PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
_DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
           "bfloat16": "bfloat16", "bf16": "bfloat16"}  # fmt: skip


def load(
    source: str | os.PathLike[str],
    families: Mapping[str, ModelFamily],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> LatentModel:
    """Load a model.

    Args:
        source: "tiny" (embedded), a diffusers folder, a ``.safetensors`` file, or a hub id.
        families: what can be loaded, by name.
        device: "cpu", "cuda", "mps"; None: the first accelerator there is, else the CPU.
        dtype: "float32", "float16", "bfloat16"; None: float32 on the CPU, float16 on an
            accelerator. The lower ones change the picture a little, and are faster where the
            device computes in them.
        revision: a hub revision.
        variant: a weight variant such as "fp16".

    Raises:
        UnsafeWeights: the weights are pickled.
        ModelError: nothing is there, or no family recognises it.
    """
    import torch

    where = _resolved(source)
    config = configuration(where, revision)
    family = next((f for f in families.values() if f.recognises(config)), None)
    if family is None:
        raise ModelError(
            f"{source}: {config.get('_class_name', 'this checkpoint')} is of no family that"
            f" diffedit knows (it knows: {', '.join(sorted(families))})"
        )
    on = _device(device)
    kind = _dtype(dtype) or (torch.float32 if on.type == "cpu" else torch.float16)
    return family.load(where, device=on, dtype=kind, revision=revision, variant=variant)


def configuration(source: str, revision: str | None = None) -> Mapping[str, Any]:
    """What decides the family: a model_index.json, or the keys of a single file.

    Raises:
        ModelError: nothing is there, or it is not a model.
    """
    path = Path(source)
    _check_file(path)
    if path.is_file():
        return _single_file(path)
    if path.is_dir():
        _refuse_pickles(path)
        index = path / "model_index.json"
        if not index.exists():
            raise ModelError(f"{path}: no model_index.json, so it is not a diffusers model folder")
        return _json(index)
    if not _could_be_on_the_hub(source):
        hint = nearest(source, [TINY]) if "/" not in source else ""
        raise ModelError(f"{source}: no such model folder or file{hint}")
    return _from_hub(source, revision)


def _from_hub(source: str, revision: str | None) -> Mapping[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        found: Mapping[str, Any] = DiffusionPipeline.load_config(source, revision=revision)
    except Exception as error:
        raise ModelError(
            f"{source}: no such folder here, and the hub could not be asked for it"
            f" ({_first_line(error)})"
        ) from error
    return found


def _single_file(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable .safetensors file ({_first_line(error)})"
        ) from error
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys:
        raise ModelError(f"{path}: not a Stable-Diffusion checkpoint in the original layout")
    large = any(key.startswith("conditioner.embedders.") for key in keys)
    return {"_class_name": "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline"}


def components(cls: Any, source: str, **options: Any) -> Any:
    """A diffusers pipeline as a bundle of components, on its device.

    Args:
        cls: the pipeline class whose components are wanted.
        source: a folder, hub id or single file.
        options: ``device``, ``dtype``, ``revision``, ``variant``.
    """
    device, dtype = options["device"], options["dtype"]
    if Path(source).is_file():
        load = cls.from_single_file
        said: dict[str, Any] = {}
    else:
        load = cls.from_pretrained
        said = {"variant": options["variant"], "use_safetensors": True}
    try:
        pipe = load(
            source,
            dtype=dtype,
            revision=options["revision"],
            safety_checker=None,
            requires_safety_checker=False,
            **said,
        )
        return pipe.to(device)
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({_first_line(error)})") from error


def pretrained(cls: Any, source: str, **options: Any) -> Any:
    """One component, such as a control network, from a folder, a hub id or a single file."""
    source = _resolved(source)
    path = Path(source)
    _check_file(path)
    try:
        if path.is_file():
            return cls.from_single_file(source, **options)
        if path.is_dir():
            _refuse_pickles(path)
        elif not _could_be_on_the_hub(source):
            raise ModelError(f"{source}: no such folder or file")
        return cls.from_pretrained(source, use_safetensors=True, **options)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot be loaded ({_first_line(error)})") from error


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
    said = _json(path)
    try:
        (smallest, largest), whole = said["sides"], said["whole"]
        found = int(smallest), int(largest), int(whole)
    except (KeyError, TypeError, ValueError):
        found = (0, 0, 0)
    if not 8 <= found[0] <= found[1] <= found[2]:
        raise ModelError(f'{path}: should be like {{"sides": [512, 768], "whole": 1024}}')
    return found


def own_control(source: str, kind: str | None = None) -> Path | None:
    """The folder of a model's own control network for hints of a kind, if it has one.

    Looked for in the model's folder: ``controlnet/<kind>``, then ``controlnet/<its first word>``
    (``depth`` for ``depth_midas``), then ``controlnet`` itself, unless the ``diffedit.json`` in it
    says that it is for another kind: ``{"kind": "canny"}``.
    """
    own = Path(source) / "controlnet"
    if kind is not None:
        for name in dict.fromkeys([kind, kind.partition("_")[0]]):
            if name and (own / name / "config.json").is_file():
                return own / name
    if not (own / "config.json").is_file():
        return None
    about = own / "diffedit.json"
    its = _json(about).get("kind") if about.is_file() else None
    # An image that is a hint already ("none") may be one of any kind.
    fits = its is None or kind in (None, "none", its) or str(kind).partition("_")[0] == its
    return own if fits else None


def inspect(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model says of itself, from its configuration files alone."""
    where = Path(_resolved(source))
    found: dict[str, Any] = {
        "source": str(source),
        "class": configuration(str(where)).get("_class_name"),
    }
    if not where.is_dir():
        return found
    for part in sorted(where.glob("*/*config.json")):
        settings = _json(part)
        keep = {k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)}
        found[part.parent.name] = {k: v for k, v in keep.items() if not k.startswith("_")}
    weights = list(where.rglob("*.safetensors"))
    found["bytes"] = sum(file.stat().st_size for file in weights)
    found["files"] = sorted(str(file.relative_to(where)) for file in weights)
    return found


def _resolved(source: str | os.PathLike[str]) -> str:
    """The embedded model's folder for its name; a home folder's ``~`` spelt out."""
    return str(EMBEDDED) if str(source) == TINY else os.path.expanduser(os.fspath(source))  # noqa: PTH111 - a hub id is no path


def _could_be_on_the_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/"))


def _check_file(path: Path) -> None:
    """Refuse files that are no .safetensors, pickles with the reason."""
    if path.suffix.lower() in _PICKLES:
        raise _unsafe(path)
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path}: not a model; give a diffusers folder or a .safetensors file")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not valid JSON ({_first_line(error)})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a model's configuration, which is an object in braces")
    return found


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder (or a part of one) whose only weights are pickles."""
    for part in (folder, *(child for child in folder.iterdir() if child.is_dir())):
        files = list(part.iterdir())
        pickles = [
            f for f in files if f.suffix.lower() in _PICKLES and f.name != "training_args.bin"
        ]
        if pickles and not any(f.suffix == ".safetensors" for f in files):
            raise _unsafe(pickles[0])


def _unsafe(path: Path) -> UnsafeWeights:
    return UnsafeWeights(
        f"{path}: a pickle ({path.suffix}) can run any code when it is loaded, so diffedit does not"
        " open it; convert it to .safetensors"
    )


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except Exception as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used here ({_first_line(error)})"
        ) from error
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}{nearest(dtype, _DTYPES)}")
    return getattr(torch, _DTYPES[dtype])  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
