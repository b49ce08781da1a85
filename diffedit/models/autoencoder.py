"""Autoencoders: what their latents are like, and another one in the place of a model's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffedit.errors import ModelError, nearest
from diffedit.models import hub, loading, single_file
from diffedit.models.files import header, read_json

log = logging.getLogger(__name__)

#: Small ones that were distilled from those of a class, and make latents of the same kind.
SMALL = {"AutoencoderKL": "AutoencoderTiny"}


def grain(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels to a side of a latent cell, and channels of one, by an autoencoder's settings."""
    names = ("encoder_block_out_channels", "block_out_channels", "dim_mult")
    stages = next(settings[name] for name in names if settings.get(name))
    return 2 ** (len(stages) - 1), settings.get("latent_channels") or settings["z_dim"]


def drawn(made: Any, generator: torch.Generator | None = None) -> Tensor:
    """The mean of what an autoencoder makes of a picture, or a sample with a generator.

    Some (AutoencoderDC, AutoencoderTiny) make one thing of a picture, which is then both.
    """
    if not hasattr(made, "latent_dist"):
        return cast(Tensor, made.latent if hasattr(made, "latent") else made.latents)
    posterior = made.latent_dist
    return cast(Tensor, posterior.mode() if generator is None else posterior.sample(generator))


def _is_model(folder: Path, repository: hub.Repository | None) -> bool:
    """Whether an autoencoder is only a part of what a folder or a repository holds."""
    own, part = (
        (folder / name).is_file() if repository is None else repository.has(name)
        for name in ("config.json", "vae/config.json")
    )
    return part and not own


def _may_hold(folder: Path) -> bool:
    """Whether an autoencoder's settings are there, or a model's."""
    return any((folder / part / "config.json").is_file() for part in ("", "vae"))


def load_autoencoder(source: str, model: str, config: str | None, dtype: torch.dtype) -> Any:
    """Load an autoencoder for a model that comes with another.

    Args:
        source: its folder, a model's folder of which it is the ``vae``, the hub id of either, or
            a ``.safetensors`` file in any layout, to which the model's settings apply.
        model: the folder or single file of the model.
        config: what a single file lacks; see `loading.load`.
        dtype: to compute in.

    Raises:
        UnsafeWeights: the weights are pickled.
        ModelError: there is none, or its latents are not those of the model's own.
    """
    folder = Path(model)
    if folder.is_file():
        folder = loading._place(
            config or single_file.published(folder, header(folder)), frozenset()
        )
    own = read_json(folder / "vae" / "config.json")
    path = Path(loading._resolved(source))
    loading.check_file(path, whole=False)
    if path.is_file():
        return _from_file(path, own, folder / "vae", dtype)
    if not path.is_dir() and not hub.could_be(str(path)):
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        there = [one.name for one in beside if one.suffix == ".safetensors" or _may_hold(one)]
        raise ModelError(f"{source}: no such folder or file{nearest(path.name, there)}")
    repository = None if path.is_dir() else hub.find(str(path), part=True)
    part = "vae/" if _is_model(path, repository) else ""
    its = (
        read_json(path / part / "config.json")
        if repository is None
        else repository.read(f"{part}config.json")
    )
    name, takes = its.get("_class_name"), str(own.get("_class_name"))
    if name not in (takes, SMALL.get(takes)):
        raise ModelError(f"{source}: holds a {name}, and the model's autoencoder is a {takes}")
    (cell, channels), (wanted_cell, wanted) = grain(its), grain(own)
    if (cell, channels) != (wanted_cell, wanted):
        raise ModelError(
            f"{source}: does not fit the model: its latents have {channels} channels and cells of"
            f" {cell} pixels, those that the denoiser takes have {wanted} and cells of"
            f" {wanted_cell}"
        )
    scales = [(one["scaling_factor"], one.get("shift_factor") or 0) for one in (its, own)
              if one.get("scaling_factor")]  # fmt: skip
    if name == takes and len(set(scales)) > 1:
        log.warning(
            "%s: scales and shifts its latents by %g and %g, the model's own autoencoder by %g and"
            " %g: it may be one for other models",
            source,
            *scales[0],
            *scales[1],
        )
    folder = path / part if repository is None else repository.network(part)
    return loading.pretrained(_class(str(name)), str(folder), dtype=dtype)


def _from_file(path: Path, own: Mapping[str, Any], settings: Path, dtype: torch.dtype) -> Any:
    """An autoencoder in one file, whose settings are those of the model's own."""
    found = header(path)
    prefixes = ("", "first_stage_model.", "vae.")
    first = [found[name] for one in prefixes if (name := f"{one}decoder.conv_in.weight") in found]
    wanted = grain(own)[1]
    if first and len(first[0].shape) > 1 and first[0].shape[1] != wanted:
        raise ModelError(
            f"{path}: does not fit the model: its latents have {first[0].shape[1]} channels, those"
            f" that the denoiser takes have {wanted}"
        )
    cls = _class(str(own.get("_class_name")))
    return loading.pretrained(cls, str(path), dtype=dtype, config=settings)


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


__all__ = ["drawn", "grain", "load_autoencoder"]
