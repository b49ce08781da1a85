"""For tests of plugins: a tiny model with random weights, and a real `Run`.

from diffedit.testing import make_run, tiny_editor
editor = tiny_editor()                       # plugins installed in this environment
result = editor.run(image, Pass(edits=[MyEdit()]))
contribution = MyEdit().contribute(make_run(image))
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffedit.canvas import Canvas, frame
from diffedit.editor import Editor
from diffedit.images import ImageSource, open_picture
from diffedit.models.stable_diffusion import StableDiffusion
from diffedit.plugins import Plugins
from diffedit.run import Run, Streams

#: Sides of a pass on the tiny model: 64 px is its own size.
NATIVE = 64
_WIDTHS = (32, 64)
_TEXT = 32


def tiny_pipeline(
    *, in_channels: int = 4, prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any
) -> StableDiffusionPipeline:
    """Random components of the real classes, small enough for tests (f = 8, about 1.5 M weights).

    Args:
        in_channels: 4, or 9 for an inpainting UNet.
        prediction_type: what the UNet is taken to predict.
        seed: of the weights.
        scheduler: further settings of the DDIM scheduler.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=NATIVE // 8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=_WIDTHS,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=_TEXT,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=NATIVE,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=514,
                hidden_size=_TEXT,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=512,
                eos_token_id=513,
                pad_token_id=513,
            )
        )
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    pipe = StableDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        text_encoder=text.eval().requires_grad_(False),
        tokenizer=tiny_tokenizer(),
        unet=unet.eval().requires_grad_(False),
        scheduler=DDIMScheduler(**{**settings, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer that knows bytes and no merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        merges = Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
        merges.write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def tiny_control_net(pipe: StableDiffusionPipeline, seed: int = 1) -> ControlNetModel:
    """A ControlNet for a tiny pipeline, whose zero convolutions are random so that it acts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            pipe = tiny_pipeline()  # control networks see the latents and no further channels
        net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
        for weight in net.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    return net.eval().requires_grad_(False)


def tiny_model(**options: Any) -> StableDiffusion:
    """The `LatentModel` of a tiny pipeline; options as in `tiny_pipeline`."""
    return StableDiffusion(tiny_pipeline(**options), "tiny random weights")


def tiny_editor(plugins: Plugins | None = None, **options: Any) -> Editor:
    """An editor on a tiny model, with the installed plugins unless others are given."""
    return Editor(tiny_model(**options), plugins)


def make_run(
    image: ImageSource,
    *,
    prompt: str = "",
    negative: str = "",
    steps: int = 4,
    guidance: float = 5.0,
    seeds: Sequence[int] = (0,),
    editor: Editor | None = None,
) -> Run:
    """A real `Run` over the whole of a picture, for testing `contribute` by itself."""
    editor = editor or tiny_editor()
    picture = open_picture(image)
    where = frame(picture.size, [], editor.model.sides, editor.model.grid)
    return Run(
        canvas=Canvas.open(picture, where),
        model=editor.model,
        prompt=prompt,
        negative=negative,
        steps=steps,
        guidance=guidance,
        streams=Streams(tuple(seeds)),
        preprocessors=editor.plugins.preprocessors,
    )
