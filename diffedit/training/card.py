"""The model card, made from the figures: whoever changes the model measures it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffedit.training.world.forms import SHAPES
from diffedit.training.world.things import COLOURS

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
`python -m diffedit.training.report`; its figures are in `figures.json`.

It knows {n_colours} colours ({colours}) and {n_shapes} shapes ({shapes}). Prompts that work are
like "a red circle" or "a blue star on a yellow background". It knows few other words: an unknown
one falls into byte pieces of which the model has learnt nothing.

## What is inside

| part | what | parameters |
|---|---|---|
| `vae` | `AutoencoderKL`, f = 8, 4 channels, widths (32, 64, 96, 96); mean 0 and standard \
deviation 1 are folded in, so `scaling_factor` is 1 | 2.3 M |
| `text_encoder`, `tokenizer` | `CLIPTextModel`, hidden size 128, 3 layers; a CLIP tokenizer whose \
vocabulary is the captions' words, 32 tokens | 0.7 M |
| `unet` | `UNet2DConditionModel` (64, 128, 192), cross-attention at every level | 11.2 M |
| `scheduler` | DDIM, v-prediction, zero terminal SNR, trailing spacing | |

Native size: 128 px (16 × 16 latent cells). Weights are fp16 safetensors, each file under 16 MB.

## Measured quality

{quality}

{reading}{by_shape}

## Data

Scenes drawn by `diffedit/training/scenes.py`, seed 0: one object (now and then two, with a
relation) on a plain, gradient, striped, checkered or dotted background, on a photograph's crop, or
on noise with a photograph's statistics. The photographs are those in scikit-image's wheel,
**except** `astronaut`, `chelsea`, `coffee` and `rocket`: these four are kept for judging, and no
part of the model was trained on them. Captions are made with the scene, in several wordings; no
other text or picture was used.

## Recipe

`python -m diffedit.training.embedded --out DIR` makes the model again (seed 0; `--resume`,
`--max-minutes`, `--device`). Batches of 32, bf16 autocast; Muon (2e-3) for matrices and kernels,
AdamW for the rest; warm-up, plateau, straight line to zero; averaged weights (EMA 0.999).

- Autoencoder: 64-px crops, half scenes, half photographs and photograph-like noise;
  4·MSE + L1 + 1e-5·KL; the posterior's log-variance starts at -6.
- Denoiser and text encoder together: v-prediction, 10 % of the captions dropped, min-SNR-5 weights
  with a floor (they vanish at zero signal, where composition is decided). First a mix of scenes;
  when colours were learnt and shapes were not, mostly single flat objects at a lower rate, half of
  the timesteps from the range in which words decide the outline, and less weight on cells away
  from the object. The phases stand in `diffedit/training/embedded.py`.
{training}
## Limits

- It draws coloured shapes with slightly uneven outlines; what a word does worst stands above. It
  is no model of photographs: asked for a cat, it paints none.
- Fine detail is lost in the autoencoder (8 × 8 pixels become 4 numbers): faces and print blur
  wherever a photograph is repainted. diffedit pastes back only what the mask asks for.
- Two objects and their relations, textures ("striped", "dotted") and styles ("outlined", "shaded",
  "watercolor") were a minority of the training. What is not in the table is not claimed.
- Made for 128 px. At larger sizes it has not been trained, and may draw more than one object.
"""

_READING = """\
Prompts name one object, every colour and shape equally often; of those from nothing every second
names a background too. All is seeded. {sampling} A colour counts as there from 2 % of the picture
(from nothing) or 10 % of the mask on. The shape is judged on the largest piece of the asked colour,
by overlap with templates; the judge's own accuracy, in the table, is a ceiling. Masks are squares
and discs of 45-75 % of the side, anywhere in the frame. "Source picture" asks the same of the
untouched picture (photographs hold brown, gray, black and white already), "unasked colour" asks the
result for a colour that nobody named (a background may have it)."""

_READING_BENCHMARK = """\
Made by `python -m bench.quality` through diffedit's Editor on {date}, commit {commit}: {made}
seeded cases (set {set}), {steps} steps, guidance {guidance:g}. In brackets: 95 % intervals.
"Diffusers" is its own pipeline on the same weights and cases; "drawn answer" is what the judges
make of the right picture after the autoencoder, a ceiling; "source" is the picture left as it was;
"unasked" is what nobody asked for. `bench/quality/README.md` says how each is measured."""


def card(figures: Mapping[str, Any]) -> str:
    """The card's Markdown. Rows whose figures are missing are left out."""
    sampling = figures.get("sampling", {})
    return _TEMPLATE.format(
        n_colours=len(COLOURS),
        colours=", ".join(COLOURS),
        n_shapes=len(SHAPES),
        shapes=", ".join(SHAPES),
        quality="\n".join(_quality(figures)),
        reading=_READING_BENCHMARK.format(**figures["benchmark"]["about"])
        if "benchmark" in figures
        else _READING.format(
            sampling=f"{sampling['steps']} steps, guidance {sampling['guidance']:g}."
            if sampling
            else ""
        ),
        by_shape=_by_shape(figures.get("generation")),
        training=_training(figures.get("training")),
    )


def _quality(figures: Mapping[str, Any]) -> list[str]:
    lines = [_row("test", "n", "result", "chance or control"), "|---|---|---|---|"]
    chance = f"chance {1 / len(SHAPES):.3f}"
    if (vae := figures.get("autoencoder")) is not None:
        scenes, photos = f"{vae['scenes_db']} dB", f"{vae['photos_db']} dB"
        lines.append(
            _row(
                f"autoencoder: held-out scenes at {vae.get('scenes_side', 128)} px", 64, scenes, ""
            )
        )
        lines.append(_row("autoencoder: the four kept photographs at 256 px", 4, photos, ""))
    if (judges := figures.get("judges")) is not None:
        n, absent = judges["n"], f"absent colour {judges['colour_false']:.2f}"
        lines.append(_row("the colour judge itself, drawn scenes", n, judges["colour"], absent))
        lines.append(_row("the shape judge itself, drawn scenes", n, judges["shape"], chance))
    # Made with diffusers' pipelines; whatever else painted stands under "engines".
    for engine, gates in ({"diffusers": figures} | dict(figures.get("engines", {}))).items():
        if (made := gates.get("generation")) is not None:
            n, unasked = made["n"], f"unasked colour {made['unasked_colour']:.2f}"
            one_in = f"chance {1 / len(COLOURS):.3f}"
            lines.append(_row(f"{engine}: from nothing, colour", n, made["colour"], unasked))
            lines.append(_row(f"{engine}: from nothing, shape", n, made["shape"], chance))
            lines.append(
                _row(f"{engine}: from nothing, background", n // 2, made["background"], one_in)
            )
        for key, name in (("drawn", "into drawn backgrounds"), ("photos", "into kept photographs")):
            if (made := gates.get(f"inpainting_{key}")) is not None:
                n, before = made["n"], f"source picture {made['colour_before']:.2f}"
                unasked = f"{before}, unasked colour {made['unasked_colour']:.2f}"
                lines.append(
                    _row(f"{engine}: inpainting {name}, colour", n, made["colour"], unasked)
                )
                unasked = f"{chance}, source picture {made['shape_before']:.2f}"
                lines.append(_row(f"{engine}: inpainting {name}, shape", n, made["shape"], unasked))
    lines += _edits(figures)
    lines += _benchmark(figures.get("benchmark", {}))
    return lines


_TOLD = (
    *("colour", "shape", "relation", "background", "ground", "removed", "style"),
    *("outline overlap", "nothing outside", "edge F1", "depth order", "closer in colour"),
    *("closer in texture", "same bytes again"),
)
"""The benchmark's measures that the card shows."""


def _benchmark(told: Mapping[str, Any]) -> list[str]:
    """Rows of the edit benchmark, with their intervals and what to hold them against."""
    lines = []
    for row in told.get("rows", ()):
        engines = row["engines"]
        if row["measure"] not in _TOLD or "diffedit" not in engines:
            continue
        where = ", ".join(part for part in (row["category"], row["group"]) if part)
        beside = [f"chance {row['chance']:.2f}"] if "chance" in row else []
        unasked = (where, f"unasked {row['measure']}")
        for other in told["rows"]:
            same = ", ".join(part for part in (other["category"], other["group"]) if part)
            if (same, other["measure"]) == unasked:
                beside.append(f"unasked {other['engines']['diffedit'][0]:.2f}")
        others = ("source", "without the edit", "diffusers", "drawn answer")
        beside += [f"{name} {interval(engines[name])}" for name in others if name in engines]
        n, figure = engines["diffedit"][3], interval(engines["diffedit"])
        value, _, rest = figure.partition(" ")
        lines.append(
            _row(f"{where}: {row['measure']}", n, f"**{value}** {rest}".strip(), ", ".join(beside))
        )
    return lines


def interval(figure: Sequence[float | None]) -> str:
    """``0.97 (0.92-0.99)`` of a value, its bounds and a count."""
    value, low, high, *_ = figure
    if value is None:
        return "-"
    bounds = "" if low is None or high is None else f" ({low:.2f}-{high:.2f})"
    return f"{value:.2f}{bounds}"


def _edits(figures: Mapping[str, Any]) -> list[str]:
    """Rows for edits that only diffedit makes, as measured before there was a benchmark."""
    lines: list[str] = []
    if (made := figures.get("img2img")) is not None:
        far = ", ".join(f"{v:.0f}" for k, v in made.items() if k.startswith("distance"))
        rising = f"rises at every step in {made['rising_in_every_step']:.2f} of the cases"
        name = "img2img: distance to the source (Lab) at strength 0.25, 0.5, 0.75, 1"
        lines.append(_row(name, made["n"], far, rising))
    if (made := figures.get("style")) is not None:
        n = made["n"]
        for key, name, other in (
            ("colour", "style: distance to the reference's colours (Lab)", "plain"),
            ("gram", "style: distance to its texture (Gram), colours made equal", "adain"),
            ("object", "style: the asked shape is there", "plain"),
        ):
            control = f"{'pixel AdaIN' if other == 'adain' else 'without the edit'}"
            lines.append(
                _row(
                    name, n, float(made[f"{key}_styled"]), f"{control} {made[f'{key}_{other}']:.2f}"
                )
            )
    return lines


def _by_shape(made: Mapping[str, float] | None) -> str:
    if made is None or f"shape_{SHAPES[0]}" not in made:
        return ""
    shown = ", ".join(f"{name} {made[f'shape_{name}']:.2f}" for name in SHAPES)
    return f"\n\nShape from nothing, by the asked word: {shown}."


def _row(test: str, count: int | str, result: float | str, control: str) -> str:
    shown = f"**{result:.2f}**" if isinstance(result, float) else result
    return f"| {test} | {count} | {shown} | {control} |"


def _training(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    vae, denoiser = told["vae"], told["denoiser"]
    losses = ", ".join(f"{made['loss']:.4f} ({step})" for step, made in denoiser["figures"])
    return f"""
These weights: {vae["steps"]} steps of the autoencoder in {vae["minutes"]} minutes,
{denoiser["steps"]} of the denoiser in {denoiser["minutes"]}, on two x86-64 cores with AVX-512 bf16,
no GPU, shared with other work. The run was stopped and resumed several times, and its length was
settled on the way. Validation loss (min-SNR-5 weights, held-out simple scenes), by step in
brackets: {losses}.
"""
