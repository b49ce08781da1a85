"""Qwen-Image in small."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageMultiControlNetModel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from diffedit import testing
from diffedit.models.qwen_image import QwenImage
from tests.families.tiny import TEXT, Tiny

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
"""What prompts are put into; the pipelines drop its first 34 tokens, which are words."""

VISION = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
"""The tokens that stand for pictures, by what a configuration calls them."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A real Qwen2 tokenizer that knows bytes, the words of the template, and what is special."""
    special = ["<|im_start|>", "<|im_end|>", *VISION.values()]
    bare: Any = Qwen2Tokenizer()
    made: Qwen2Tokenizer = bare.train_new_from_iterator(
        [TEMPLATE] * 2, 600, new_special_tokens=special, show_progress=False
    )
    return made


def qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random one that sees, from the generator as it stands."""
    settings = Qwen2_5_VLConfig(
        **{f"{name}_token_id": tokenizer.vocab[token] for name, token in VISION.items()},
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(settings).eval().requires_grad_(False)


def qwen_image_pipeline(
    *,
    in_channels: int = 16,
    seed: int = 0,
    kind: Callable[..., DiffusionPipeline] = QwenImagePipeline,
) -> DiffusionPipeline:
    """Random components of Qwen-Image, about half a million weights.

    Args:
        in_channels: to a latent cell.
        kind: its pipeline, which says whether it is Qwen-Image-Edit.
    """
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 5)
        vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * in_channels,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 4, 8),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        encoder = qwen_encoder(tokenizer)
    parts: dict[str, Any] = {}
    if "processor" in inspect.signature(kind).parameters:
        parts["processor"] = Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()
        )
    pipe = kind(
        **parts,
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vae.eval().requires_grad_(False),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _net(transformer: Any, *, inpainting: bool = False) -> Any:
    return QwenImageControlNetModel.from_transformer(
        transformer,
        num_layers=2,
        attention_head_dim=transformer.config.attention_head_dim,
        num_attention_heads=transformer.config.num_attention_heads,
        load_weights_from_transformer=False,
        extra_condition_channels=4 if inpainting else 0,
    )


def _mended(pipe: Any) -> None:
    """Have a pipeline that edits work on small pictures, and read and encode as it is meant to."""
    kind = type(pipe)
    if not hasattr(pipe, "processor"):
        return
    # It scales pictures to the size of its model's, whatever it is told.
    module = inspect.getmodule(kind)

    def small(area: int, ratio: float) -> tuple[int, ...]:
        assert ratio == 1
        return (testing.NATIVE, testing.NATIVE, 0)[: 2 if "Plus" in kind.__name__ else 3]

    class Small(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **said: Any) -> Any:
            with mock.patch.object(module, "calculate_dimensions", small):
                return super().__call__(*args, **said)

    pipe.__class__ = Small
    # Of what the processor makes it does not hand on the kinds of tokens, without which the
    # encoder (of transformers 5) counts the places of a picture's as it does a text's.
    encoder, pad = pipe.text_encoder, pipe.text_encoder.config.image_token_id

    def seeing(**given: Any) -> Any:
        return encoder(mm_token_type_ids=(given["input_ids"] == pad).int(), **given)

    seeing.dtype = encoder.dtype  # type: ignore[attr-defined]
    vars(pipe)["text_encoder"] = seeing
    # With a mask, the picture it shows is a draw of the posterior; without one, the mean.
    pipe._encode_vae_image = functools.partial(QwenImageEditPipeline._encode_vae_image, pipe)


QWEN_IMAGE = Tiny(
    "qwen-image",
    qwen_image_pipeline,
    QwenImage,
    {
        "text2img": "QwenImagePipeline",
        "img2img": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
        "instruct": "QwenImageEditPipeline",
        "instruct inpaint": "QwenImageEditInpaintPipeline",
        "instruct by two": "QwenImageEditPlusPipeline",
        "control": "QwenImageControlNetPipeline",
        "control for inpainting": "QwenImageControlNetInpaintPipeline",
    },
    schedulers=frozenset({"euler_karras"}),
    hint="control_image",
    predicts="flow_prediction",
    channels=16,
    nets=_net,
    union=lambda net: QwenImageMultiControlNetModel([net]),
    unsaid="",
    instructed={"kind": QwenImageEditPipeline},
    mended=_mended,
)
