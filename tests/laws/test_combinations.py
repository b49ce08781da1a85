"""One pass for all: every subset of the four edits, on every kind of model, with several seeds."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from diffedit import Pass
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.laws.photographs import changed, mask, photograph
from tests.laws.tools import Watched

SIZE = (64, 64)
WHITE = mask(SIZE, (9, 9, 40, 50))
IMAGE = photograph("rgb8", SIZE)

MODELS: dict[str, dict[str, Any]] = {
    "4 channels": {},
    "9 channels": {"in_channels": 9},
    "v": {"prediction_type": "v_prediction"},
    "9 channels, v": {"in_channels": 9, "prediction_type": "v_prediction"},
}
EDITS: dict[str, Any] = {
    "inpaint": Inpaint(mask=WHITE, feather=0),
    "img2img": Img2Img(strength=0.7),
    "controlnet": ControlNet(model="net1", weight=0.5),
    "style": Style(image=photograph("rgb8", SIZE, "coffee")),
}
SUBSETS = [s for n in range(5) for s in itertools.combinations(EDITS, n)]


@functools.cache
def watched(model: str) -> Watched:
    return Watched(**MODELS[model])


def run(model: str, *edits: Any, seed: Any = 1) -> Any:
    what = Pass(prompt="a red circle", steps=3, edits=edits)
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
    made = {subset: run(model, *(EDITS[name] for name in subset)).latents for subset in SUBSETS}
    assert len(made) == 16
    assert all(torch.isfinite(latents).all() for latents in made.values())
    for one, other in itertools.combinations(SUBSETS, 2):
        assert not torch.equal(made[one], made[other]), (one, other)


def test_no_input_is_ever_written_to(tmp_path: Any) -> None:
    """Law 9, as far as the engine goes: the source and the edits' pictures are refused."""
    from diffedit.errors import OutputError
    from diffedit.images import Picture, save_picture

    files = {name: tmp_path / f"{name}.png" for name in ("source", "mask", "style")}
    for name, pixels in (("source", IMAGE), ("mask", WHITE), ("style", IMAGE)):
        save_picture(Picture(pixels), files[name])
    before = {name: file.read_bytes() for name, file in files.items()}
    what = Pass(
        prompt="x",
        steps=1,
        edits=[Inpaint(mask=files["mask"]), Style(image=files["style"], strength=0.5)],
    )
    result = watched("4 channels").editor.run(files["source"], what)
    (tmp_path / "sub").mkdir()
    for file in (*files.values(), tmp_path / "sub" / ".." / "mask.png"):
        with pytest.raises(OutputError):
            result.save(file)
    assert before == {name: file.read_bytes() for name, file in files.items()}
    (made,) = result.save(tmp_path / "out.png")
    assert made.exists()
