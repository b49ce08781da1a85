"""Makes pictures of the docs with the embedded model: ``python docs/pictures.py``.

The README's: left the photograph with the mask outlined, then what three prompts put there. That of
`prompts.md`: a prompt, then with a region, then two regions. That of `train-controlnet.md`: a drawn
scene, what is to be followed of it (edges, depth, regions), and three prompts that do. The seeds
are fixed, so a machine of the same kind makes the same pictures again.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from diffedit import Editor, Pass
from diffedit.training.hints import Hinted
from diffedit.training.world.source import Drawn
from diffedit_controlnet import ControlNet
from diffedit_inpaint import Inpaint
from diffedit_region import Region

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "examples" / "coffee.png"
MASK = ROOT / "examples" / "coffee-mask.png"
PROMPTS = (("a yellow star", 6), ("a white ring", 6), ("a cyan triangle", 6))
SCENE = 900044
FOLLOWED = (
    ("a red apple, a yellow pear and a blue cup on a white table", 3),
    ("an outlined purple apple, a green pear and a red cup on a yellow table", 0),
    ("a watercolor still life with a green apple, an orange pear and a pink cup", 0),
)


def main() -> None:
    """Write all."""
    editor = Editor.load()
    before_after(editor)
    regions(editor)
    hints(editor)


def hints(editor: Editor) -> None:
    """Write docs/hints.png: a row for each kind of hint."""
    rows = []
    for kind in ("canny", "depth", "segments"):
        scene = Hinted(Drawn({"rich": 1.0}, 1, 256, first=SCENE), kind)[0]
        assert scene.hint is not None
        hint = Image.fromarray(scene.hint)
        pictures = [scene.image, scene.hint]
        for prompt, seed in FOLLOWED:
            pass_ = Pass(prompt=prompt, edits=(ControlNet(kind="none", image=hint),))
            pictures.append(editor.run(scene.image, pass_, seed=seed).pixels)
        rows.append(np.concatenate(pictures, axis=1))
    Image.fromarray(np.concatenate(rows)).save(ROOT / "docs" / "hints.png")


def regions(editor: Editor) -> None:
    """Write docs/regions.png."""
    left = np.zeros((256, 256), bool)
    left[:, :128] = True
    prompts = "a red circle on a white background", "a green square on a black background"
    other = "a green square on a yellow background"
    sets = (
        (),
        (Region(prompt=other, mask=~left),),
        tuple(Region(prompt=p, mask=m) for p, m in zip(prompts, (left, ~left), strict=True)),
    )
    said = "a red circle on a blue background"
    passes = [Pass(prompt=said, steps=25, guidance=6, edits=edits) for edits in sets]
    made = [editor.run(None, one, seed=1, size=(256, 256)).pixels for one in passes]
    Image.fromarray(np.concatenate(made, axis=1)).save(ROOT / "docs" / "regions.png")


def before_after(editor: Editor) -> None:
    """Write docs/before-after.png."""
    before = np.asarray(Image.open(PHOTO)).copy()
    outline, _ = cv2.findContours(
        np.asarray(Image.open(MASK).convert("L")), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    cv2.drawContours(before, outline, -1, (255, 255, 255), 2)
    pictures = [before]
    for prompt, seed in PROMPTS:
        pass_ = Pass(prompt=prompt, edits=(Inpaint(mask=MASK, feather=6),))
        pictures.append(editor.run(PHOTO, pass_, seed=seed).pixels)
    gap = np.full((before.shape[0], 8, 3), 255, np.uint8)
    row = np.concatenate([part for one in pictures for part in (one, gap)][:-1], axis=1)
    wide = Image.fromarray(row)
    wide.resize((1200, round(1200 * wide.height / wide.width)), Image.Resampling.LANCZOS).save(
        ROOT / "docs" / "before-after.png"
    )


if __name__ == "__main__":
    main()
