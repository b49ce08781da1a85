"""A whole model in miniature, for trainings that start from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffedit.training.autoencoder import new_autoencoder
from diffedit.training.export import export
from diffedit.training.parts import Parts, new_scheduler, new_unet
from diffedit.training.text import build_text_encoder, build_tokenizer


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of random weights: 32 px, v-prediction, zero terminal SNR."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    captions = ["a red circle on a blue background", "a photo of a green star"]
    tokenizer = build_tokenizer(captions, folder / "tokenizer")
    parts = Parts(
        new_autoencoder((8, 8, 8, 8), 32),
        tokenizer,
        build_text_encoder(tokenizer),
        new_unet((16, 32), plain_levels=0, sample_size=4),
        new_scheduler(),
    )
    export(folder / "model", parts, side=32)
    return folder / "model"
