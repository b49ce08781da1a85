"""One pass for all: every subset of the four edits, on every kind of model, with several seeds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from diffedit import Pass
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_instruct import Instruct
from diffedit_style import Style
from tests.laws.photographs import changed, mask, photograph
from tests.laws.tools import CHOSEN, Watched, per_family

SIZE = (64, 64)
WHITE = mask(SIZE, (9, 9, 40, 50))
IMAGE = photograph("rgb8", SIZE)

MODELS = ("plain", "inpainting", "v", "inpainting, v", "instructed")
EDITS: dict[str, Any] = {
    "inpaint": Inpaint(mask=WHITE, feather=0),
    "img2img": Img2Img(strength=0.6),
    "controlnet": ControlNet(model="net1", weight=0.5),
    "style": Style(image=photograph("rgb8", SIZE, "coffee")),
}


@per_family
def watched(model: str) -> Watched:
    return Watched(**CHOSEN.family.options(model))


def run(model: str, *edits: Any, seed: Any = 1) -> Any:
    if model == "instructed":
        edits = (*edits, Instruct())
    what = Pass(prompt="a red circle", steps=3, edits=CHOSEN.family.carried(edits))
    return watched(model).editor.run(IMAGE, what, seed=seed)


@pytest.mark.parametrize("model", MODELS)
def test_all_at_once_with_two_control_networks_and_two_seeds(model: str) -> None:
    second = ControlNet(model="net2", kind="none", weight=0.3, image=photograph("rgb8", SIZE))
    result = run(model, *EDITS.values(), second, seed=[1, 2])
    assert len(result.pictures) == 2
    for picture in result.pictures:
        assert not changed(IMAGE, picture.pixels)[WHITE == 0].any()
        assert changed(IMAGE, picture.pixels)[WHITE > 0].mean() > 0.5
    assert not np.array_equal(result.pictures[0].pixels, result.pictures[1].pixels)


@pytest.mark.parametrize("model", MODELS)
def test_every_subset_runs_and_every_edit_counts(model: str) -> None:
    carried = CHOSEN.family.carried(list(EDITS.values()))
    subsets = [
        some for count in range(len(carried) + 1) for some in itertools.combinations(carried, count)
    ]
    made = [(some, run(model, *some).latents) for some in subsets]
    assert len(made) == 2 ** len(carried)
    assert all(torch.isfinite(latents).all() for _, latents in made)
    for (one, latents), (other, others) in itertools.combinations(made, 2):
        assert not torch.equal(latents, others), (one, other)


def test_no_input_is_ever_written_to(tmp_path: Any) -> None:
    """Law 9, as far as the engine goes: the source and the edits' pictures are refused."""
    from diffedit.errors import OutputError
    from diffedit.images import Picture, save_picture

    files = {name: tmp_path / f"{name}.png" for name in ("source", "mask", "style")}
    for name, pixels in (("source", IMAGE), ("mask", WHITE), ("style", IMAGE)):
        save_picture(Picture(pixels), files[name])
    before = {name: file.read_bytes() for name, file in files.items()}
    edits = [Inpaint(mask=files["mask"]), Style(image=files["style"], strength=0.5)]
    what = Pass(prompt="x", steps=1, edits=CHOSEN.family.carried(edits))
    result = watched("plain").editor.run(files["source"], what)
    (tmp_path / "sub").mkdir()
    read = [files[name] for name in ("source", "mask", "style")[: 1 + len(what.edits)]]
    for file in (*read, tmp_path / "sub" / ".." / "mask.png"):
        with pytest.raises(OutputError):
            result.save(file)
    assert before == {name: file.read_bytes() for name, file in files.items()}
    (made,) = result.save(tmp_path / "out.png")
    assert made.exists()
