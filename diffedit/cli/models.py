"""``diffedit models``."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import click

from diffedit.cli import verbose_option


@click.group(short_help="List models and say what is known of one.")
def models() -> None:
    """List models and say what is known of one."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def list_(as_json: bool) -> None:
    """List the embedded model and the families of models that can be loaded."""
    from diffedit import plugins
    from diffedit.cli.tables import echo_json, echo_table
    from diffedit.models.loading import EMBEDDED, TINY

    loaded = plugins.default()
    there = any(EMBEDDED.glob("unet/*.safetensors"))
    families: list[dict[str, Any]] = [
        {
            "name": name,
            "plugin": loaded.owner("family", name),
            "carries": sorted(getattr(family, "carries", ())),
            "sometimes": sorted(getattr(family, "sometimes", ())),
        }
        for name, family in sorted(loaded.families.items())
    ]
    if as_json:
        found = {"name": TINY, "path": str(EMBEDDED), "weights": there}
        echo_json({"models": [found], "families": families})
        return
    echo_table(("model", "weights", "path"), [(TINY, "yes" if there else "missing", str(EMBEDDED))])
    click.echo()
    echo_table(
        ("family", "plugin", "carries besides img2img and inpaint", "some of its models"),
        [
            (
                one["name"],
                one["plugin"],
                *(", ".join(one[k]) or "-" for k in ("carries", "sometimes")),
            )
            for one in families
        ],
    )
    click.echo(
        "\nOf these families, --model takes a diffusers folder or hub id; of Stable Diffusion"
        " (1, 2, XL, 3), Flux and Chroma a single file, too."
    )


@models.command()
@click.argument("model", default="tiny")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbose_option
def info(model: str, as_json: bool) -> None:
    """Say what is known of MODEL (default: the embedded one) from its files, without loading it."""
    from diffedit import plugins
    from diffedit.cli.tables import echo_json, echo_tree
    from diffedit.errors import ModelError
    from diffedit.models.loading import EMBEDDED, TINY, inspect, recognised

    told = inspect(model)
    try:
        family = recognised(model, plugins.default().families)
    except ModelError:  # of no family that is known; what it is can be told all the same
        found: dict[str, Any] = {"family": None, **told}
    else:
        said = {name: sorted(getattr(family, name, ())) for name in ("carries", "sometimes")}
        found = {"family": family.name, **told, "carries": said["carries"]}
        found["some of its models"] = said["sometimes"]
    folder = EMBEDDED if model == TINY else Path(told.get("folder", model)).expanduser()
    if folder.is_dir():
        found["parameters"] = {
            part.name: count for part in sorted(folder.iterdir()) if (count := _weights(part))
        }
        nets = sorted((folder / "controlnet").glob("*/config.json"))
        found |= {"control networks": [_net(one.parent) for one in nets]} if nets else {}
        found |= {"LoRAs": loras} if (loras := _loras(folder)) else {}
    if licence := _licence(folder / "README.md"):
        found["licence"] = licence
    if as_json:
        echo_json(found)
    else:
        echo_tree(found)


def _net(folder: Path) -> str:
    """A control network's name, and for which kinds of hints it is if that is for several."""
    from diffedit.models.files import read_json

    about = folder / "diffedit.json"
    kinds = read_json(about).get("kind") if about.is_file() else None
    return f"{folder.name} ({', '.join(kinds)})" if isinstance(kinds, list) else folder.name


def _loras(folder: Path) -> dict[str, str]:
    """A model's own LoRAs by name, each with what it says is to be set with it."""
    if not (folder / "lora").is_dir():  # what follows imports torch
        return {}
    from diffedit.models.files import read_json
    from diffedit.models.lora import own_loras

    found = {}
    for name, own in own_loras(str(folder)).items():
        told = read_json(about) if (about := own / "diffedit.json").is_file() else {}
        kept = ("steps", "guidance", "scheduler")
        found[name] = ", ".join(f"{key} {told[key]}" for key in kept if key in told)
    return found


def _weights(folder: Path) -> int:
    """How many numbers the weights of one part hold, from the heads of its files.

    A part may lie there twice, at another precision: files of one variant are counted.
    """
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        variant = re.sub(r"-\d+-of-\d+", "", file.stem).partition(".")[2]
        counts[variant] = counts.get(variant, 0) + _numbers(file)
    return counts.get("", max(counts.values(), default=0))


def _numbers(file: Path) -> int:
    try:
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            head = json.loads(data.read(min(length, 2**27)))
        return sum(math.prod(one["shape"]) for name, one in head.items() if name[:2] != "__")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return 0


def _licence(card: Path) -> str | None:
    """The licence that a model card names in its front matter."""
    try:
        text = card.read_text("utf-8")
    except (OSError, ValueError):
        return None
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", match[1], re.MULTILINE) if match else None
    return line[1] if line else None
