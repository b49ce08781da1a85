"""Does the embedded model, through diffedit's Editor, do what is asked, and only that?

    python bench/quality.py [--model tiny] [--scale 1.0] [--json out.json]

The scenes' truth is known (`diffedit.training.cases`), so colour and shape are judged, each beside
its chance level and a control that nobody asked for. `--scale 0.1` takes a tenth of the cases.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.data
import torch
from PIL import Image
from skimage.color import rgb2lab

from diffedit import Editor, Pass
from diffedit.models.loading import EMBEDDED
from diffedit.training.cases import inpaintings, single_objects
from diffedit.training.evaluate import Figures, Painter, generation, inpainting, share
from diffedit.training.judges import judge_shape, segment
from diffedit.training.report import write
from diffedit.training.world.paint import render
from diffedit.training.world.scenes import Background, Scene
from diffedit.training.world.things import COLOURS
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style

Pixels = npt.NDArray[np.uint8]
log = logging.getLogger("quality")


def painter(editor: Editor) -> Painter:
    """How the judges ask for a picture: the Editor's defaults, at the model's own size."""

    def paint(
        image: Image.Image | None, mask: Image.Image | None, prompt: str, seed: int
    ) -> Image.Image:
        edits = () if mask is None else (Inpaint(mask=mask, feather=0),)
        return editor.run(image, Pass(prompt=prompt, edits=edits), seed=seed).image

    return paint


# --- img2img: the distance to the source grows with strength --------------------------------------

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def image_to_image(editor: Editor, count: int) -> Figures:
    """Mean distance (CIE76 in Lab) to the source at each strength, over photographs and scenes."""
    side = editor.model.sides[0]
    cases = inpaintings(count // 2, "photos", side) + inpaintings(count - count // 2, "drawn", side)
    far: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    for item in cases:
        for strength in STRENGTHS:
            pass_ = Pass(prompt=item.case.prompt, edits=(Img2Img(strength=strength),))
            made = editor.run(item.image, pass_, seed=item.case.seed).pixels
            delta = rgb2lab(made) - rgb2lab(item.image)
            far[strength].append(float(np.linalg.norm(delta, axis=-1).mean()))
    rising = [all(far[a][i] < far[b][i] for a, b in pairwise(STRENGTHS)) for i in range(len(cases))]
    means = {f"distance_at_{s:g}": round(float(np.mean(far[s])), 2) for s in STRENGTHS}
    return {"n": len(cases), **means, "rising_in_every_step": share(rising)}


# --- style: towards the reference, beyond what matching pixel statistics gives --------------------


def references(side: int) -> list[Image.Image]:
    """Pictures with a look of their own: patterned scenes, and two photographs kept for judging."""
    looks = [
        ("striped", "orange", "brown", "outlined"),
        ("dotted", "pink", "purple", "flat"),
        ("checkered", "cyan", "blue", "flat"),
        ("striped", "green", "yellow", "watercolor"),
    ]
    made = []
    for number, (kind, one, two, style) in enumerate(looks):
        behind = Background(kind, one, two, number)
        made.append(Image.fromarray(render(Scene(behind, (), style, None, ""), side).image))
    for name in ("chelsea", "coffee"):
        photo = Image.fromarray(getattr(skimage.data, name)())
        crop = min(photo.size)
        made.append(photo.crop((0, 0, crop, crop)).resize((side, side), Image.Resampling.LANCZOS))
    return made


def gram(image: Pixels) -> torch.Tensor:
    """Gram matrices of a shallow bank of random filters at three scales, as one vector.

    Ustyuzhaninov et al. 2017, "What does it take to generate natural textures?": one layer of many
    random filters describes texture about as well as a trained network does.
    """
    x = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
    bank = torch.randn(96, 3, 7, 7, generator=torch.Generator().manual_seed(0)) / 12
    bank -= bank.mean(dim=(2, 3), keepdim=True)  # texture, not colour
    parts = []
    for _ in range(3):
        seen = torch.nn.functional.conv2d(x, bank).relu()[0].flatten(1)
        parts.append((seen @ seen.T / seen.shape[1]).flatten())
        x = torch.nn.functional.avg_pool2d(x, 2)
    return torch.cat(parts)


def gram_distance(a: Pixels, b: Pixels) -> float:
    """How far two textures are apart, relative to the second's size."""
    one, two = gram(a), gram(b)
    return float((one - two).norm() / two.norm())


def colour_distance(a: Pixels, b: Pixels) -> float:
    """Distance of the means and standard deviations of two pictures' colours, in Lab."""

    def said(image: Pixels) -> npt.NDArray[np.float64]:
        lab = rgb2lab(image).reshape(-1, 3)
        return np.concatenate([lab.mean(axis=0), lab.std(axis=0)])

    return float(np.linalg.norm(said(a) - said(b)))


def pixel_adain(image: Pixels, reference: Pixels) -> Pixels:
    """The baseline: give each RGB channel the reference's mean and standard deviation."""
    x, like = image.reshape(-1, 3).astype(float), reference.reshape(-1, 3).astype(float)
    made = (x - x.mean(0)) / (x.std(0) + 1e-6) * like.std(0) + like.mean(0)
    return made.round().clip(0, 255).astype(np.uint8).reshape(image.shape)


def shows(image: Pixels, shape: str) -> bool:
    """Whether a piece of any one colour has the shape; the style may have changed the colour."""
    for colour in COLOURS:
        piece = segment(image, colour)
        if 0.02 < piece.mean() < 0.6:
            verdict = judge_shape(piece)
            if verdict is not None and verdict.shape == shape:
                return True
    return False


def style(editor: Editor, count: int) -> Figures:
    """Colour and texture distance to the reference: unstyled, baseline, styled; object presence.

    Texture is compared at equal colour statistics: the baseline is the unstyled picture with the
    reference's means and deviations, and the styled one is given them too. What is left between
    the two is pattern.
    """
    side = editor.model.sides[0]
    looks = references(side)
    cases = single_objects(count, seed=5)
    rows: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        rows.setdefault(key, []).append(value)

    for number, case in enumerate(cases):
        look = looks[number % len(looks)]
        like = np.asarray(look)
        ask = Pass(prompt=f"a {case.colour} {case.shape}")
        plain = editor.run(None, ask, seed=case.seed).pixels
        restyle = ask.model_copy(update={"edits": (Style(image=look),)})
        styled = editor.run(None, restyle, seed=case.seed).pixels
        for name, made in (("plain", plain), ("styled", styled)):
            note(f"colour_{name}", colour_distance(made, like))
            note(f"object_{name}", shows(made, case.shape))
        note("gram_adain", gram_distance(pixel_adain(plain, like), like))
        note("gram_styled", gram_distance(pixel_adain(styled, like), like))
        note("closer_in_colour", rows["colour_styled"][-1] < rows["colour_plain"][-1])
        note("closer_in_texture", rows["gram_styled"][-1] < rows["gram_adain"][-1])
    return {"n": len(cases), **{key: round(float(np.mean(v)), 3) for key, v in rows.items()}}


# --- all of it ------------------------------------------------------------------------------------


def measure(editor: Editor, scale: float = 1.0) -> dict[str, Figures]:
    """All figures; `scale` is the share of the full number of cases."""
    paint, side = painter(editor), editor.model.sides[0]

    def n(full: int) -> int:
        return max(4, round(scale * full))

    parts: dict[str, Callable[[], Figures]] = {
        "generation": lambda: generation(paint, single_objects(n(208))),
        "inpainting_drawn": lambda: inpainting(paint, inpaintings(n(128), "drawn", side)),
        "inpainting_photos": lambda: inpainting(paint, inpaintings(n(128), "photos", side)),
        "img2img": lambda: image_to_image(editor, n(24)),
        "style": lambda: style(editor, n(48)),
    }
    figures = {}
    for name, part in parts.items():
        figures[name] = part()
        log.info("%s: %s", name, figures[name])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--card", action="store_true", help="put the figures into the embedded model's card"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = measure(Editor.load(options.model), options.scale)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if options.card:
        put_into_card(figures)


def put_into_card(figures: dict[str, Figures]) -> None:
    """Write the model card anew, with these figures beside diffusers' own."""
    path = EMBEDDED / "figures.json"
    told = json.loads(path.read_text("utf-8")) if path.exists() else {}
    gates = ("generation", "inpainting_drawn", "inpainting_photos")
    told.setdefault("engines", {})["diffedit"] = {name: figures[name] for name in gates}
    write(EMBEDDED, told | {name: figures[name] for name in ("img2img", "style")})


if __name__ == "__main__":
    main()
