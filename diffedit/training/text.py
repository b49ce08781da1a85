"""The text side: a CLIP tokenizer that knows the captions' words, and a small CLIP encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 32
"""Tokens per prompt, the two markers included."""

HIDDEN = 128

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary of ``captions`` and write the tokenizer to ``folder``.

    Byte-pair encoding (Sennrich et al. 2016) over bytes with CLIP's end-of-word mark ``</w>``,
    merged until every word of the captions is one token. A word never seen falls into byte pieces
    of which the model has learnt nothing.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        show_progress=False,
        # Ties between merges are broken by the pieces' numbers, and those of the pieces that end a
        # word follow a random hash order unless they are named beforehand.
        special_tokens=[f"{byte}</w>" for byte in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    # Each word once: the merges then do not depend on how often a caption was drawn.
    words = sorted({word for caption in captions for word in caption.lower().split()})
    tokenizer.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two markers.
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(m) for m in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    for marker in (_START, _END):
        vocabulary[marker] = len(vocabulary)
    made = CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=_END, unk_token=_END
    )
    save_tokenizer(made, folder)
    return made


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and CLIP's two classic files, for readers older than that one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A three-layer ``CLIPTextModel`` of random weights, hidden size :data:`HIDDEN`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            projection_dim=HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> (n, LENGTH) int64 ids, padded and cut as diffusers' pipelines do."""
    ids: Tensor = tokenizer(
        captions,
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(torch.int64)
