"""Z-Image in small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from diffedit.models.z_image import ZImage
from tests.families.stable_diffusion_3 import sd3_pipeline
from tests.families.tiny import TEXT, Tiny

#: So long that the prompts of tests fill up once or twice 32 tokens, as real ones do.
TEMPLATE = (
    "{% for one in messages %}<|im_start|>{{ one['role'] }}\nDraw {{ one['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A real one that knows bytes and no merges, and how a conversation is written."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def z_image_pipeline(*, in_channels: int = 16, seed: int = 0) -> ZImagePipeline:
    """Random components of Z-Image, about half a million weights."""
    small: Any = sd3_pipeline(seed=seed)
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 5)
        transformer = ZImageTransformer2DModel(
            in_channels=in_channels,
            dim=32,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 64, 64],
        )
        for name, weight in transformer.named_parameters():
            if name.endswith("pad_token"):
                torch.nn.init.normal_(weight, std=0.5)
        torch.nn.init.normal_(transformer.all_final_layer["2-1"].linear.weight, std=0.2)
        text = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            )
        )
    pipe = ZImagePipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small.vae,
        text_encoder=text.eval().requires_grad_(False),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control_net(transformer: Any, *, masked: bool = True) -> ZImageControlNetModel:
    """A ControlNet like version 2.1, which can be told of a mask, or like the first."""
    return ZImageControlNetModel(
        control_layers_places=[0, 2] if masked else [0],
        control_refiner_layers_places=[0, 1] if masked else None,
        control_in_dim=33 if masked else 16,
        add_control_noise_refiner="control_noise_refiner" if masked else None,
        dim=transformer.config.dim,
        n_refiner_layers=2,
        n_heads=transformer.config.n_heads,
        n_kv_heads=transformer.config.n_kv_heads,
    )


Z_IMAGE = Tiny(
    "z-image",
    z_image_pipeline,
    ZImage,
    {
        "text2img": "ZImagePipeline",
        "img2img": "ZImageImg2ImgPipeline",
        "inpaint": "ZImageInpaintPipeline",
        "control": "ZImageControlNetPipeline",
        "control inpaint model": "ZImageControlNetInpaintPipeline",
    },
    frozenset({"euler_karras"}),
    hint="control_image",
    predicts="flow_prediction",
    channels=16,
    nets=control_net,
    unguided=0.0,
    several=False,
)
