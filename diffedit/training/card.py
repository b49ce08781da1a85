"""The model card: what a model's folder holds, what it was made by, and what was measured of it.

``python -m diffedit.training.card FOLDER`` writes ``README.md`` anew from the folder's own settings
and its ``figures.json``, into which ``python -m bench.quality --card`` puts what it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open

from diffedit.errors import InputError
from diffedit.models.loading import sizes
from diffedit.training.config import KINDS
from diffedit.training.world.backdrops import KEPT_FOR_JUDGING
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.scenes import RELATIONS, STYLES
from diffedit.training.world.things import COLOURS, NOUNS

Figures: TypeAlias = Mapping[str, Any]
"""``benchmark``: about, gates, rows, declined; ``training``: a list of what `history` returns."""

_TEMPLATE = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# diffedit's embedded model

A small latent-diffusion model of a drawn world, which lets diffedit edit pictures offline on two
CPU cores. It is an ordinary Stable Diffusion folder: `StableDiffusionPipeline.from_pretrained`
loads it. The weights' licence is Apache-2.0. **This card is generated** by
`python -m diffedit.training.card` from the folder's settings and `figures.json`.

{words}

## What is inside

| part | what | parameters |
|---|---|---|
{parts}

{sizes}
{quality}
## Data

{data}
{training}
## Limits

- It is a model of a small drawn world and of no other. An unknown word falls into byte pieces of
  which it has learnt nothing: asked for a cat, it paints none.
{detail}{native}- What is not measured above is not claimed.
"""


def card(folder: Path, figures: Figures) -> str:
    """The card of the model in ``folder``; sections whose figures are missing are left out."""
    vae, unet = (_settings(folder / part) for part in ("vae", "unet"))
    factor = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    side = _native(folder, unet, factor)
    weights = sorted(folder.rglob("*.safetensors"))
    largest = max((file.stat().st_size for file in weights), default=0)
    total = sum(file.stat().st_size for file in weights)
    return _TEMPLATE.format(
        words=_words(folder),
        parts="\n".join(_parts(folder)),
        sizes=_wrapped(
            f"Native size: {side} px ({side // factor} × {side // factor} latent cells). The"
            f" weights are {_precision(weights)} safetensors, {total / 1e6:.1f} MB in all, no file"
            f" larger than {math.ceil(largest / 1e6)} MB."
        ),
        quality=_quality(figures.get("benchmark")),
        data=_wrapped(
            "Scenes drawn by `diffedit/training/world`, with the words for them, and crops of"
            " photographs behind some of them. The photographs are those in scikit-image's wheel,"
            f" **except** {', '.join(f'`{name}`' for name in KEPT_FOR_JUDGING)}: these are kept for"
            " judging, and no part of the model was trained on them. No other picture or text was"
            " used."
        ),
        training=_training(figures.get("training", ())),
        detail=_item(
            f"Fine detail is lost in the autoencoder ({factor} × {factor} pixels become"
            f" {vae.get('latent_channels', 4)} numbers): faces and print blur wherever a photograph"
            " is repainted. diffedit pastes back only what the mask asks for."
        ),
        native=_item(
            f"Made for {side} px. At larger sizes it has not been trained, and may draw more than"
            " one object; diffedit works on a region of that size."
        ),
    )


def write(folder: Path, figures: Figures) -> None:
    """Write ``figures.json`` and the card made from it into ``folder``."""
    text = json.dumps(figures, ensure_ascii=False, indent=1, sort_keys=True)
    # One line for a list without lists in it: an interval is read at a glance.
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    (folder / "figures.json").write_text(text + "\n", "utf-8")
    (folder / "README.md").write_text(card(folder, figures), "utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The figures that a model's folder has; empty if it has none."""
    path = folder / "figures.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def history(out: Path) -> dict[str, Any]:
    """What a training's folder tells of it: settings, steps, minutes, the validations.

    Folders of the machine that it ran on are left out, of a model's only the last part is told.

    Raises:
        InputError: there is no checkpoint, or it is none of a training.
    """
    checkpoint = out / "checkpoint.pt"
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        said = dict(state["training"])
        settings = KINDS[said["train"]].model_validate(said)
        losses, validations, seconds = state["losses"], state["figures"], state["seconds"]
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{checkpoint} cannot be read as a checkpoint ({why})") from None
    told = settings.model_dump(mode="json", exclude_defaults=True)
    for key in ("out", "device", "save_minutes", "sample_every", "validate_every", "prompts"):
        told.pop(key, None)
    data = told.get("data", {})
    for place, key in (
        *((told, "model"), (told, "start")),
        *((data, "folder"), (data, "captions")),
    ):
        if place.get(key):
            place[key] = Path(place[key]).name
    return {
        "train": told.pop("train"),
        "settings": told,
        "steps": len(losses),
        "minutes": round(seconds / 60),
        "figures": [[step, dict(made)] for step, made in validations],
    }


# --- what is inside -------------------------------------------------------------------------------


def _words(folder: Path) -> str:
    """What the tokenizer has words for."""
    path = folder / "tokenizer" / "vocab.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def there(words: Iterable[str]) -> list[str]:
        return [w for w in words if all(f"{part}</w>" in known for part in w.split())]

    kinds = {
        "colours": there(COLOURS),
        "shapes": there(SHAPES),
        "things": there(noun for noun in NOUNS if noun not in SHAPES),
        "styles": there(STYLES[1:]),
        "relations": there(RELATIONS),
    }
    lines = [
        _item(f"{len(found)} {kind}: {', '.join(found)}").rstrip()
        for kind, found in kinds.items()
        if found
    ]
    return "It has words for\n\n" + "\n".join(lines)


def _parts(folder: Path) -> Iterator[str]:
    """A row for everything that has weights, and for the scheduler."""
    parts = sorted({file.parent for file in folder.rglob("*.safetensors")})
    order = ("vae", "text_encoder", "unet")
    first = [folder / name for name in order if folder / name in parts]
    for part in (*first, *(part for part in parts if part not in first)):
        name = part.relative_to(folder).as_posix()
        title = f"`{name}`" + (", `tokenizer`" if name == "text_encoder" else "")
        count = sum(_numbers(file) for file in part.glob("*.safetensors"))
        yield f"| {title} | {_what(part)} | {count / 1e6:.1f} M |"
    said = _settings(folder / "scheduler", "scheduler_config.json")
    if said:
        spoken = [
            f"`{said.get('_class_name')}`",
            str(said.get("prediction_type", "epsilon")).replace("v_prediction", "v-prediction"),
            "zero terminal SNR" if said.get("rescale_betas_zero_snr") else "",
            f"{said['timestep_spacing']} spacing" if "timestep_spacing" in said else "",
        ]
        yield f"| `scheduler` | {', '.join(part for part in spoken if part)} | |"


def _what(part: Path) -> str:
    """One line on a part, from its settings."""
    said = _settings(part)
    name = said.get("_class_name") or next(iter(said.get("architectures") or ()), "")
    widths = tuple(said.get("block_out_channels", ()))
    if name == "AutoencoderKL":
        return (
            f"`{name}`, f = {2 ** (len(widths) - 1)}, {said['latent_channels']} channels, widths"
            f" {widths}, `scaling_factor` {said['scaling_factor']:g}"
        )
    if name == "CLIPTextModel":
        return (
            f"`{name}`, hidden size {said['hidden_size']}, {said['num_hidden_layers']} layers,"
            f" {said['max_position_embeddings']} tokens; the tokenizer's vocabulary is the"
            " captions' words"
        )
    if name in ("UNet2DConditionModel", "ControlNetModel"):
        plain = [kind for kind in said["down_block_types"] if "CrossAttn" not in kind]
        where = {0: "at every level", len(widths): "at no level"}
        attention = where.get(len(plain), f"at all levels but the finest {len(plain)}")
        kinds = _settings(part, "diffedit.json").get("kind", part.name)
        named = " and ".join(", ".join(kinds).rsplit(", ", 1)) if isinstance(kinds, list) else kinds
        hints = f" for {named} hints" if name == "ControlNetModel" else ""
        return f"`{name}`{hints}, widths {widths}, cross-attention {attention}"
    if lora := next(iter(part.glob("*lora*.safetensors")), None):
        told = _settings(part, "diffedit.json")
        steps = f", {told['steps']} steps, guidance {told['guidance']:g}" if "steps" in told else ""
        return f"LoRA of rank {_rank(lora)}{steps}"
    return f"`{name}`" if name else ""


def _settings(part: Path, name: str = "config.json") -> dict[str, Any]:
    path = part / name
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _native(folder: Path, unet: Mapping[str, Any], factor: int) -> int:
    found = sizes(str(folder))
    return found[0] if found else factor * int(unet.get("sample_size") or 64)


def _numbers(file: Path) -> int:
    """How many numbers a file of weights holds."""
    with safe_open(file, "pt") as weights:
        return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118


def _rank(file: Path) -> int:
    with safe_open(file, "pt") as weights:
        down = [key for key in weights.keys() if "lora_A" in key or "lora.down" in key]  # noqa: SIM118
        return int(weights.get_slice(down[0]).get_shape()[0]) if down else 0


def _precision(files: Iterable[Path]) -> str:
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    return " and ".join(sorted(names[kind] for kind in kinds if kind in names)) or "no"


# --- what was measured ----------------------------------------------------------------------------

TOLD = (
    *("PSNR, dB", "colour", "shape", "relation", "background", "ground", "removed", "style"),
    *("outline overlap", "nothing outside", "seam, own ground", "edge F1", "depth order"),
    *("closer in colour", "closer in texture", "same bytes again"),
)
"""The benchmark's measures that the card shows."""

FEWEST = 6
"""Rows of fewer cases than this are left out: they say too little."""

_BESIDE = ("diffusers", "without the edit", "source", "drawn answer")
"""Whom the card holds the model's figures against."""

_READING = """\
By `python -m bench.quality` on {date}, commit {commit}: {made} seeded cases (set {set}) through
diffedit's Editor, {steps} steps, guidance {guidance:g}. In brackets: 95 % intervals.
*diffusers* is its own pipeline on the same weights and cases; *without* the hint or reference that
the case is about; *source* the picture left as it was; *drawn* what the judges make of the right
picture after the autoencoder, their ceiling. `bench/quality/README.md` says how it is measured.
Rows of fewer than {fewest} cases are left out."""


def _quality(told: Mapping[str, Any] | None) -> str:
    if not told:
        return ""
    gates = [gate for gate in told["gates"] if " minus " not in gate["gate"]]
    lines = ["", "## Measured quality", "", _READING.format(**told["about"], fewest=FEWEST), ""]
    lines += ["| to be reached | figure | at least | |", "|---|---|---|---|"]
    lines += [
        f"| {gate['gate']} | {shown(gate['figure'])} | {gate['target']} | {gate['verdict']} |"
        for gate in gates
        if gate["verdict"] != "not measured"
    ]
    if missing := [gate["gate"] for gate in gates if gate["verdict"] == "not measured"]:
        lines += ["", _wrapped(f"Not measured: {'; '.join(missing)}.")]
    lines += ["", "| what | n | diffedit | diffusers | without | source | drawn | chance |"]
    lines += ["|---|---|---|---|---|---|---|---|", *_rows(told["rows"])]
    if declined := _declined(told.get("declined", ())):
        lines += ["", _wrapped(declined)]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        engines = row["engines"]
        if row["measure"] not in TOLD or "diffedit" not in engines:
            continue
        if engines["diffedit"][3] < FEWEST:
            continue
        where = ", ".join(part for part in (row["category"], row["group"]) if part)
        beside = " | ".join(shown(engines[e]) if e in engines else "" for e in _BESIDE)
        value, _, rest = shown(engines["diffedit"]).partition(" ")
        chance = f"{row['chance']:.2g}" if "chance" in row else ""
        yield (
            f"| {where}: {row['measure']} | {engines['diffedit'][3]} |"
            f" {f'**{value}** {rest}'.strip()} | {beside} | {chance} |"
        )


def _declined(found: Iterable[Mapping[str, Any]]) -> str:
    mine = [one for one in found if one["engine"] == "diffedit"]
    words = sum(one["cases"] for one in mine if one["why"].startswith("words"))
    nets = sum(one["cases"] for one in mine if one["why"] == "no net")
    said = [f"{words} with words that the model has not learnt"] if words else []
    said += [f"{nets} with hints that it has no net for"] if nets else []
    return f"Not asked: {' and '.join(said)}." if said else ""


def shown(figure: Sequence[Any] | None) -> str:
    """``0.97 (0.92–0.99)`` of a value, its bounds and a count; a dash for nothing."""
    if not figure or figure[0] is None:
        return "–"
    digits = 2 if abs(figure[0]) < 10 else 1
    value = f"{figure[0]:.{digits}f}"
    if figure[1] is None or figure[2] is None:
        return value
    return f"{value} ({figure[1]:.{digits}f}–{figure[2]:.{digits}f})"


# --- how it was made ------------------------------------------------------------------------------


def _training(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    lines = ["", "## Training", ""]
    for stage in stages:
        said = f"**{stage['train']}**: {stage['steps']} steps in {stage['minutes']} minutes"
        said += f" on {stage['machine']}" if stage.get("machine") else ""
        if settings := stage.get("settings"):
            said += f"; {_spoken(settings)}"
        said += f". {stage['note'].rstrip('.')}" if stage.get("note") else ""
        if stage.get("figures"):
            step, made = stage["figures"][-1]
            figures = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in made.items())
            said += f". At step {step}: {figures}"
        lines.append(_item(f"{said}.").rstrip())
    return "\n".join(lines) + "\n"


def _spoken(settings: Mapping[str, Any]) -> str:
    """``batch 32, optimiser (name muon, rate 0.0004)``."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            said = f"({_spoken(value)})"
        elif isinstance(value, list | tuple):
            said = f"({', '.join(map(str, value))})"
        else:
            said = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.replace('_', ' ')} {said}")
    return ", ".join(parts)


# --- text -----------------------------------------------------------------------------------------


def _wrapped(text: str, indent: str = "") -> str:
    """Lines of at most 100 characters."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > 100:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def _item(text: str) -> str:
    """An item of a list, with its line's end."""
    return _wrapped(f"- {text}", "  ") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: write a model's card anew."""
    parser = argparse.ArgumentParser(
        prog="python -m diffedit.training.card",
        description="Write a model's card anew from its folder and its figures.json.",
    )
    parser.add_argument("folder", type=Path, help="the model's folder")
    parser.add_argument(
        "--training",
        type=Path,
        action="append",
        metavar="OUT",
        help="the 'out' of a training that made it, in order; replaces what the card told of that",
    )
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="OUT",
        help="the same of one that came on top",
    )
    options = parser.parse_args(arguments)
    figures = read(options.folder)
    if options.training:
        figures["training"] = [history(out) for out in options.training]
    figures.setdefault("training", []).extend(history(out) for out in options.also)
    write(options.folder, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
