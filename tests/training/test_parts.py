"""What a training starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffedit.errors import ModelError
from diffedit.training.parts import load
from tests.families.stable_diffusion_xl import xl_pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("other", ["xl", "inpainting"])
def test_models_that_cannot_be_trained_are_told(
    small_model: Path, tmp_path: Path, other: str
) -> None:
    if other == "xl":
        xl_pipeline().save_pretrained(tmp_path / "other")
    else:
        shutil.copytree(small_model, tmp_path / "other")
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(small_model / "unet") | {"in_channels": 9}
        )
        unet.save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(ModelError, match="training takes text-to-image models of Stable Diffusion"):
        load(str(tmp_path / "other"), CPU)
