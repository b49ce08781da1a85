"""Control networks: a model's own, the right class, whether one fits, unions, and inpainting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffedit.errors import ModelError, ParameterError, nearest
from diffedit.models import holding, hub, loading, single_file
from diffedit.models.files import header, read_json


@dataclass(frozen=True)
class InMode:
    """A union of control networks, and which of them is meant.

    Attributes:
        net: the union.
        number: of the kind of hint.
    """

    net: Any
    number: int


@dataclass(frozen=True)
class OfHoles:
    """A control network for inpainting, whose hint is the picture, marked where it is to change.

    Attributes:
        net: the network.
    """

    net: Any


def load(
    source: str, classes: Sequence[type], denoiser: Any, kinship: Sequence[str], **options: Any
) -> Any:
    """Load a control network for a denoiser.

    Args:
        source: a folder, a hub id, or a single file, with its configuration beside it or in the
            layout of its makers.
        classes: what the family has.
        denoiser: that it is to lead.
        kinship: settings that both share.
        options: as of `loading.pretrained`.

    Raises:
        ModelError: it cannot be loaded, or was made for another model.
    """
    cls = _class(source, classes)
    path = Path(loading._resolved(source))
    if path.is_file():
        options = {"config": _settings(path)} | options
    net: Any = loading.pretrained(cls, source, **options)
    if (said := net.config.get("conditioning_channels", 3)) != 3:
        raise ModelError(f"{source}: this control network wants hints of {said} channels, not 3")
    if more := net.config.get("extra_conditioning_channels"):
        raise ModelError(
            f"{source}: this control network wants {more} further channels, such as a mask,"
            " which is not supported"
        )
    for key in kinship:
        if key not in net.config:
            continue
        # A config from a file has lists where one from a constructor has tuples.
        mine, its = (json.dumps(part.config[key]) for part in (denoiser, net))
        if mine != its:
            raise ModelError(
                f"{source}: this control network was made for another model: its {key} is"
                f" {its}, the loaded model's is {mine}"
            )
    return net.to(holding.where(denoiser)).eval().requires_grad_(False)


def _class(source: str, classes: Sequence[type]) -> type:
    """Which of some classes a folder or a repository holds; the first, where that is not known."""
    first: Any = classes[0]
    if len(classes) == 1:
        return first  # type: ignore[no-any-return]
    try:
        said = loading.network_class(source)
    except ModelError:  # whatever is wrong with it is said when it is loaded
        return first  # type: ignore[no-any-return]
    return next((one for one in classes if one.__name__ == said), first)


def _settings(path: Path) -> Path:
    """The folder with the configuration of a control network in a file: its own, or its makers'.

    Raises:
        ModelError: it seems to be something else, or nobody has the configuration.
    """
    loading.check_file(path, whole=False)
    names = header(path)
    found = single_file.seems(names)
    if found not in (None, single_file.CONTROL, "a T2I-Adapter"):
        raise ModelError(f"{path}: seems to be {found}, which is no control network")
    said = loading.network_class(str(path)) or ""
    if "Control" in said or "Adapter" in said:  # not of something else in a folder of many files
        return path.parent
    why = ""
    if found == single_file.CONTROL:
        try:
            makers = single_file.published(path, names)
            if "control" in makers.lower():  # what diffusers does not know it takes for SD 1
                return hub.find(makers, part=True).fetch(["config.json"])
        except ModelError as error:
            why = f"; that of its makers cannot be had ({error})"
    raise ModelError(
        f"{path}: no config.json of it lies beside it, to say what it is like{why}: put it there,"
        " or name the folder or hub id of a control network"
    )


def own_control(source: str, kind: str | None = None, *, named: bool = False) -> Path | None:
    """The folder of a model's own control network for hints of a kind, if it has one.

    Looked for in the model's folder: ``controlnet/<kind>``, then ``controlnet/<its first word>``
    (``depth`` for ``depth_midas``), then one in ``controlnet`` whose ``diffedit.json`` says that it
    is for this kind, too: ``{"kind": ["canny", "depth"]}``, then ``controlnet`` itself, unless that
    file says that it is for others. A hint as it is ("none") may be of any kind, so that it is for
    the only one there is that is not for inpainting.

    Args:
        named: only one of which the folder's name or that file says that it is for this kind.
    """
    own = Path(source) / "controlnet"
    asked = {str(kind), str(kind).partition("_")[0]}
    if kind is not None:
        for name in dict.fromkeys([kind, kind.partition("_")[0]]):
            if name and (own / name / "config.json").is_file():
                return own / name
        there = [one.parent for one in sorted(own.glob("*/config.json"))]
        for one in there:
            if asked & _kinds(one):
                return one
        others = [one for one in there if "inpaint" not in {one.name, *_kinds(one)}]
        alone = len(others) == 1 and not (own / "config.json").is_file()
        if kind == "none" and alone and not named:
            return others[0]
    if not (own / "config.json").is_file():
        return None
    its = _kinds(own)
    fits = (not its and not named) or kind in (None, "none") or bool(asked & its)
    return own if fits else None


def _kinds(folder: Path) -> frozenset[str]:
    """The kinds of hints that a control network says it is for."""
    about = folder / "diffedit.json"
    said = read_json(about).get("kind") if about.is_file() else None
    return frozenset(map(str, said if isinstance(said, list) else [] if said is None else [said]))


def in_mode(net: Any, kind: str, mode: int | None, modes: Mapping[str, int]) -> Any:
    """A control network for a kind of hint: of a union the one that was trained on it.

    Args:
        mode: its number; None: by the kind.
        modes: the numbers of kinds.

    Raises:
        ParameterError: there is no such mode.
    """
    said = getattr(net, "config", {})
    count = said.get("num_control_type") or said.get("num_mode")
    if not count:
        if mode is not None:
            raise ParameterError("controlnet: mode is for unions of control networks only")
        return net
    number = modes.get(kind) if mode is None else mode
    if number is None:
        raise ParameterError(
            "controlnet: this is a union of control networks, and which is meant does not follow"
            f" from the kind {kind!r}{nearest(kind, modes)}: give mode, from 0 to {count - 1}"
        )
    if not 0 <= number < count:
        raise ParameterError(f"controlnet: mode {number}: this union's are 0 to {count - 1}")
    return InMode(net, number)
