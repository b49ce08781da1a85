"""Sana in small."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, models, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from diffedit import testing
from diffedit.models.sana import Sana
from tests.families.tiny import TEXT, Tiny


def sana_pipeline(*, in_channels: int = 32, seed: int = 0, stages: int = 4) -> SanaPipeline:
    """Random components of Sana, about 0.3 million weights.

    Args:
        stages: of the autoencoder: with 6, as all of Sana's have, a cell is 32 by 32 pixels; with 4
            it is 8 by 8, as other families' are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Attention comes in at the deepest stage.
        blocks = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
        widths = (8,) * (stages - 2) + (16, 32)
        scales = ((),) * (stages - 1) + ((5,),)
        vae = AutoencoderDC(
            latent_channels=32,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * stages,
            decoder_layers_per_block=(1,) * stages,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.41407,
        )
        transformer = SanaTransformer2DModel(
            in_channels=in_channels,
            out_channels=32,
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=TEXT,
            sample_size=testing.NATIVE // 8,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        gemma = Gemma2Model(
            Gemma2Config(
                vocab_size=512,
                hidden_size=TEXT,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                query_pre_attn_scalar=16,
            )
        )
    pipe = SanaPipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae.eval().requires_grad_(False),
        text_encoder=gemma.eval().requires_grad_(False),
        tokenizer=gemma_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gemma_tokenizer() -> GemmaTokenizer:
    """A real Gemma tokenizer of 512 tokens, learnt from what stands before Sana's prompts."""
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learning = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\u2581", *map(chr, range(33, 127))],
    )
    learnt = Tokenizer(models.BPE())
    learnt.train_from_iterator((line.replace(" ", "\u2581") for line in told), learning)
    made = json.loads(learnt.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    return GemmaTokenizer(vocab=made["vocab"], merges=merges, add_bos_token=True)


def _net(transformer: Any) -> Any:
    takes = inspect.signature(SanaControlNetModel).parameters
    shared = {key: value for key, value in transformer.config.items() if key in takes}
    return SanaControlNetModel(**{**shared, "num_layers": 2})


SANA = Tiny(
    "sana",
    sana_pipeline,
    Sana,
    {"text2img": "SanaPipeline", "control": "SanaControlNetPipeline"},
    frozenset({"euler", "euler_karras", "dpmpp_2m", "dpmpp_2m_sde", "heun", "lcm", "unipc"}),
    hint="control_image",
    predicts="flow_prediction",
    channels=32,
    nets=_net,
    styled=False,
    several=False,
)
