"""IP-Adapter: a picture as a prompt, by cross-attention of its own beside the text's.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion
Models" (arXiv:2308.06721), eq. 5, for the UNets of Stable Diffusion and its XL, and for Flux.1
(XLabs AI 2024, "flux-ip-adapter"). What it adds goes through attention terms, so that nothing of
the denoiser is replaced and any number act together.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffedit.attention import QKV, Addition, Beside, Site
from diffedit.errors import ModelError
from diffedit.models import holding, hub, loading
from diffedit.models.files import first_line, header, is_pickle, read_json, unsafe
from diffedit.models.weights import weights_file
from diffedit.rows import RowMap

#: The folder beside an adapter's file that holds what it sees pictures with, and the one where
#: repositories keep what several see with.
ENCODER, SHARED = "image_encoder", "models"
#: What transformers calls a network's.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_KINDS = ("image_proj", "ip_adapter")
#: How XLabs calls what others do.
_OTHERWISE = (
    (re.compile(r"^ip_adapter_proj_model\."), "image_proj."),
    (re.compile(r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\."),
     r"ip_adapter.\1.to_\2_ip."),
)  # fmt: skip
#: Weights of a linear layer: its matrix, and what is added.
Linear = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Places:
    """Where the adapters of a family act.

    Attributes:
        modules: the attention modules by the numbers that files call them by, and of each the shape
            of the matrices that make keys and values of tokens.
        biased: whether something is added to these.
        black: guidance leads away from a black picture, and not from what says nothing.
        late: as in `attention.Beside`.
    """

    modules: Mapping[int, tuple[str, tuple[int, ...]]]
    biased: bool = False
    black: bool = False
    late: bool = False


def of_unet(unet: Any) -> Places:
    """Files count all attention modules, of which every other is cross."""
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    sites = [name.removesuffix(".processor") for name in cross]
    shapes = [holding.unpacked(unet.get_submodule(site).to_k.weight) for site in sites]
    return Places({2 * n + 1: one for n, one in enumerate(zip(sites, shapes, strict=True))})


class IPAdapter:
    """An adapter, ready for the denoiser that it was loaded for.

    Args:
        projection: makes the tokens that are attended to of what the encoder sees.
        encoder: sees pictures.
        keys_values: weights that make keys and values of tokens, by attention module.
        black, late: as in `Places`.
    """

    def __init__(
        self,
        projection: torch.nn.Module,
        encoder: torch.nn.Module,
        keys_values: Mapping[str, tuple[Linear, Linear]],
        black: bool = False,
        late: bool = False,
    ) -> None:
        self.projection, self.encoder, self.keys_values = projection, encoder, keys_values
        self.black, self.late = black, late
        config: Any = encoder.config
        self.processor = CLIPImageProcessor(size=config.image_size, crop_size=config.image_size)

    def seen(self, rgb: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """What the encoder sees of a picture ``(h, w, 3)``, uint8, and of none at all."""
        pixels = self._pixels(rgb)
        if isinstance(self.projection, ImageProjection):  # the other kinds see patches
            whole: Tensor = self.encoder(pixels).image_embeds
            if self.black:
                return whole, self.encoder(self._pixels(np.zeros_like(rgb))).image_embeds
            return whole, torch.zeros_like(whole)
        patches, none = (
            self.encoder(one, output_hidden_states=True).hidden_states[-2]
            for one in (pixels, torch.zeros_like(pixels))
        )
        return patches, none

    def _pixels(self, rgb: np.ndarray[Any, Any]) -> Tensor:
        weight = next(self.encoder.parameters())
        pixels = self.processor(Image.fromarray(rgb), return_tensors="pt").pixel_values
        return cast(Tensor, pixels.to(weight.device, weight.dtype))

    def term(
        self,
        rgb: np.ndarray[Any, Any],
        weight: float,
        mask: Tensor | None = None,
    ) -> Addition:
        """The attention, beside that to the text, which adds what a picture says.

        Args:
            rgb: the picture ``(h, w, 3)``, uint8.
            weight: how much is added.
            mask: where, ``(1, 1, h, w)`` of the working size, 1 = there; None: everywhere.
        """
        seen = functools.cache(lambda: self.seen(rgb))
        tokens: dict[RowMap, Tensor] = {}
        made: dict[tuple[str, RowMap, int], Beside] = {}

        def beside(qkv: QKV, site: Site) -> Beside | None:
            if site.name not in self.keys_values:
                return None
            key = site.name, site.rows, qkv.q.shape[2]
            if key not in made:
                if site.rows not in tokens:
                    tokens[site.rows] = self._tokens(seen(), site.rows)
                made[key] = self._beside(qkv, site, tokens[site.rows], weight, mask)
            return made[key]

        return beside

    def _tokens(self, seen: tuple[Tensor, Tensor], rows: RowMap) -> Tensor:
        """What each row is shown, ``(rows, tokens, d)``: guidance leads away from no picture."""
        shown, none = seen
        return cast(
            Tensor, self.projection(torch.cat([none if k.negative else shown for k in rows.keys]))
        )

    def _beside(
        self, qkv: QKV, site: Site, tokens: Tensor, weight: float, mask: Tensor | None
    ) -> Beside:
        heads = qkv.q.shape[1]
        k, v = (
            F.linear(tokens, *one).unflatten(2, (heads, -1)).transpose(1, 2)
            for one in self.keys_values[site.name]
        )
        where = None
        if mask is not None:
            where = at_tokens(mask, qkv.q.shape[2]).to(qkv.q)[..., None]
        if any(row.reference is not None for row in site.rows.keys):  # they are what they are
            canvas = site.rows.is_canvas(k.device)[:, None, None, None].to(qkv.q)
            where = canvas if where is None else where * canvas
        return Beside(k, v, weight, where, self.late)


def at_tokens(mask: Tensor, tokens: int) -> Tensor:
    """A mask ``(1, 1, h, w)`` at the tokens of one level of a denoiser: ``(1, 1, tokens)``.

    Each level halves the sides, rounded up.
    """
    height, width = mask.shape[-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ModelError(
            f"a mask of {mask.shape[-1]}x{mask.shape[-2]} does not fit {tokens} tokens"
        )
    return F.interpolate(mask, (height, width), mode="bicubic").flatten(2)


def load_ip_adapter(
    source: str,
    denoiser: Any,
    places: Places,
    encoder: str | None,
    own: torch.nn.Module | None,
    load: Callable[[str, Callable[[], Any]], Any],
) -> IPAdapter:
    """Load an adapter for a denoiser.

    Args:
        source: its ``.safetensors`` file.
        denoiser: that it is to act on.
        places: where in that.
        encoder: folder of the image encoder it was trained with, here or on the hub
            (``owner/name/folder``); None: ``image_encoder`` beside the file, beside its folder, or
            in ``models`` there, whichever fits.
        own: the image encoder that the loaded model brings itself, for want of another.
        load: as `Run.resource`: adapters share encoders.

    Raises:
        ModelError: it is no adapter, was made for another model, or sees with another encoder.
        UnsafeWeights: the image encoder is a pickle.
    """
    file = weights_file(source)
    parts = _read(file)
    keys_values = _keys_values(file, parts["ip_adapter"], places, denoiser)
    projection = _projection(file, parts["image_proj"], places, denoiser)
    its: Any = own
    if encoder is not None:
        where: Path | None = _named(encoder)
    else:
        where = _usual(file, lambda one: _fits(read_json(one / "config.json"), projection)[0])
        beside = where is not None and _fits(read_json(where / "config.json"), projection)[0]
        if own is not None and not beside and _fits(its.config.to_dict(), projection)[0]:
            where = None
    if where is None and own is None:
        raise ModelError(
            f"{file}: no folder {ENCODER} beside it: name the image encoder that it was trained"
            " with (ip_adapter: encoder)"
        )
    config = read_json(where / "config.json") if where else its.config.to_dict()
    fits, said = _fits(config, projection)
    if not fits:
        raise ModelError(
            f"{file}: this IP-Adapter was trained with another image encoder than"
            f" {where or 'the model has'}: it takes {said}; name the right one (ip_adapter:"
            " encoder)"
        )
    if where is not None:
        folder = str(where)
        its = load(f"image encoder:{folder}", lambda: _load_encoder(folder, denoiser))
    return IPAdapter(projection, its, keys_values, places.black, places.late)


def _read(file: Path) -> dict[str, dict[str, Tensor]]:
    header(file)
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    with safe_open(file, framework="pt", device="cpu") as opened:
        for key in opened.keys():  # noqa: SIM118 - not a mapping
            named = key
            for theirs, ours in _OTHERWISE:
                named = theirs.sub(ours, named)
            kind, _, rest = named.partition(".")
            if kind in parts:
                weight = opened.get_tensor(key)
                if not weight.float().isfinite().all():  # torch's attention hides a key's
                    raise ModelError(f"{file}: {key} holds numbers that are not finite")
                parts[kind][rest] = weight
    if not all(parts.values()):
        raise ModelError(
            f"{file}: not an IP-Adapter, whose weights are named image_proj.… and ip_adapter.…"
        )
    return parts


def _keys_values(
    file: Path, weights: Mapping[str, Tensor], places: Places, denoiser: Any
) -> dict[str, tuple[Linear, Linear]]:
    """The weights by attention module."""
    like, found = _like(denoiser), {}
    for number, (site, shape) in places.modules.items():
        wanted = {"weight": tuple(shape)} | ({"bias": (shape[0],)} if places.biased else {})
        pair: list[Linear] = []
        for part in "kv":
            one = {kind: weights.get(f"{number}.to_{part}_ip.{kind}") for kind in wanted}
            for kind, its in one.items():
                if its is None or its.shape != wanted[kind]:
                    has = "nothing" if its is None else "x".join(map(str, its.shape))
                    raise ModelError(
                        f"{file}: this IP-Adapter was made for another model: for {site} it has"
                        f" {has}, the loaded model's is {'x'.join(map(str, wanted[kind]))}"
                    )
            matrix, bias = (one.get(kind) for kind in ("weight", "bias"))
            assert matrix is not None
            pair.append((matrix.to(**like), None if bias is None else bias.to(**like)))
        found[site] = pair[0], pair[1]
    last = max(places.modules)
    numbers = [key.partition(".")[0] for key in weights if ".to_k_ip" in key]
    if any(one.isdecimal() and int(one) > last for one in numbers):
        raise ModelError(
            f"{file}: this IP-Adapter was made for another model: it has weights for more"
            f" attention modules than the loaded model's {len(found)}"
        )
    return found


def _projection(
    file: Path, weights: dict[str, Tensor], places: Places, denoiser: Any
) -> torch.nn.Module:
    if "norm.weight" in weights and "proj.3.weight" not in weights and "proj.weight" not in weights:
        raise ModelError(
            f"{file}: an IP-Adapter of faces, which wants a face's embedding and not a picture:"
            " not supported"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # it is made of random numbers first
            make = denoiser._convert_ip_adapter_image_proj_to_diffusers
            made: torch.nn.Module = make(weights, low_cpu_mem_usage=False)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        said = first_line(error)
        raise ModelError(f"{file}: not an IP-Adapter that is known ({said})") from error
    ends: Any = made.norm if hasattr(made, "norm") else made.norm_out  # every kind ends so
    its, takes = ends.normalized_shape[0], next(iter(places.modules.values()))[1][1]
    if its != takes:
        raise ModelError(
            f"{file}: this IP-Adapter was made for another model: what it makes of a picture has"
            f" {its} numbers to a token, the loaded model's attention takes {takes}"
        )
    return made.to(**_like(denoiser)).eval().requires_grad_(False)


def _like(denoiser: Any) -> dict[str, Any]:
    """Where a denoiser is, and what it computes in."""
    return {"device": holding.where(denoiser), "dtype": holding.computing(denoiser)}


def _fits(config: Mapping[str, Any], projection: torch.nn.Module) -> tuple[bool, str]:
    """Whether an image encoder gives what an adapter takes, and both in words."""
    config = config.get("vision_config") or config  # of a whole CLIP
    name = "projection_dim" if isinstance(projection, ImageProjection) else "hidden_size"
    gives = config.get(name, getattr(CLIPVisionConfig(), name))
    matrices = (w for n, w in projection.named_parameters() if w.ndim == 2 and "latents" not in n)
    takes = next(matrices).shape[1]
    return gives == takes, f"{takes} numbers, and this one gives {gives}"


def _named(encoder: str) -> Path:
    """The folder of the image encoder that somebody names.

    Raises:
        ModelError: there is none.
    """
    where = Path(os.path.expanduser(encoder))  # noqa: PTH111 - a place on the hub is no path
    if (where / "config.json").is_file():
        return where
    parts = encoder.rstrip("/").split("/")
    name, inside = "/".join(parts[:2]), "/".join(parts[2:])
    here = where.exists() or (where.parent.is_dir() and where.parent != Path())
    if here or not hub.could_be(name) or ".." in parts:
        raise ModelError(f"{where}: no folder of an image encoder, which has a config.json")
    repository = hub.find(name, part=True)
    folder = _fetch(repository, inside or ".")
    if not (folder / "config.json").is_file():
        paths = [PurePosixPath(path) for path in repository.files or ()]
        others = [
            str(PurePosixPath(name) / path.parent) for path in paths if path.name == "config.json"
        ]
        raise ModelError(
            f"{encoder}: no folder of an image encoder, which has a config.json, on the hub"
            + (f"; there is {', '.join(others)}" if others else "")
        )
    return folder


def _usual(file: Path, fits: Callable[[Path], bool]) -> Path | None:
    """The first folder that fits of those where an adapter's image encoder usually is.

    Returns:
        The first one there is, if none fits. None: there is none.
    """
    held = [(one, said) for one in file.parents if (said := hub.origin(one))]
    find = functools.cache(functools.partial(hub.find, part=True))

    def has(place: Path, what: str) -> bool:
        for root, said in held:
            if place.is_relative_to(root) and not any(place.glob(what)):
                _fetch(find(*said), place.relative_to(root).as_posix(), what == "model*")
        return any(place.glob(what))

    near, first = (file.parent, file.parent.parent), None
    for place in (*(one / ENCODER for one in near), *(one / SHARED / ENCODER for one in near)):
        if has(place, "config.json"):
            if fits(place):
                has(place, "model*")
                return place
            first = first or place
    return first


def _fetch(repository: hub.Repository, folder: str, weights: bool = True) -> Path:
    """Have what there is of an image encoder: its configuration, and its weights if wanted.

    Raises:
        UnsafeWeights: its weights are pickles.
    """
    paths = [PurePosixPath(path) for path in repository.files or ()]
    there = [path for path in paths if str(path.parent) == folder]
    held = [path for path in there if weights and _WEIGHTS.fullmatch(path.name)]
    if weights and not held and (pickles := [path for path in there if is_pickle(path.name)]):
        raise unsafe(f"{repository.name}/{pickles[0]}")
    wanted = [path for path in there if path.name == "config.json"] + held
    return repository.fetch([str(path) for path in wanted]) / folder


def _load_encoder(folder: str, denoiser: Any) -> torch.nn.Module:
    like = _like(denoiser)
    made = loading.pretrained(CLIPVisionModelWithProjection, folder, dtype=like["dtype"])
    return cast(torch.nn.Module, made.to(like["device"]).eval().requires_grad_(False))
