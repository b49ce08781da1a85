"""Textual inversion: a new word for something that pictures show, with all weights frozen.

What is trained are the word's rows of the text encoder's embedding table alone, on the model's own
objective (Gal et al. 2022, arXiv:2208.01618, eq. 2).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit.errors import InputError
from diffedit.models.textual_inversion import small
from diffedit.training.config import InversionTraining
from diffedit.training.data import Example, Source
from diffedit.training.denoising import Latents, save_settings
from diffedit.training.files import whole_folder
from diffedit.training.unet_task import UNetTask, must_fit

log = logging.getLogger(__name__)

FILE = "learned_embeds.safetensors"
"""What ``load_textual_inversion`` looks for in a folder."""


class Words(nn.Module):
    """The new rows of a text encoder's embedding table, in place of the encoder's own.

    Args:
        rows: (vectors, d), where they start.
        first: the id of the first of the new tokens; those of the others follow it.
    """

    def __init__(self, rows: Tensor, first: int) -> None:
        super().__init__()
        # An Embedding, so that the optimisers take it for one.
        self.table = nn.Embedding.from_pretrained(rows.clone(), freeze=False)
        self.first = first

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """``embedded`` (…, d) of the token ids (…), with the new rows where their tokens stand."""
        new = ids >= self.first
        rows = self.table((ids - self.first).clamp_min(0))
        return torch.where(new.unsqueeze(-1), rows.to(embedded.dtype), embedded)


def add_word(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, token: str, like: str, vectors: int = 1
) -> Words:
    """Teach a tokenizer and an encoder the word ``token``, which means what ``like`` means.

    As diffusers has it, a word of several vectors is followed by ``token_1``, ``token_2``, …, which
    a pipeline adds to a prompt by itself.

    Args:
        tokenizer: gets the new tokens.
        encoder: looks them up in what is returned.
        token: a word that the tokenizer does not know.
        like: a word that it knows as one token, or as many words as there are vectors.
        vectors: how many tokens the word stands for.

    Raises:
        InputError: the word is known already, or what it is to be like is not.
    """
    if vectors > 1 and (read := small(tokenizer, token)) != token:
        # diffusers would find the first of its tokens only.
        raise InputError(f"token {token!r} is {read!r} to the model's tokenizer, write it so")
    names = [token, *(f"{token}_{number}" for number in range(1, vectors))]
    known = tokenizer.get_vocab()
    if taken := [name for name in names if name in known]:
        raise InputError(f"token {taken[0]!r} is a word of the model already, take another")
    pieces = tokenizer.tokenize(like)
    unknown = [word for word in like.split() if len(tokenizer.tokenize(word)) != 1]
    if unknown or len(pieces) not in (1, vectors):
        said = f"{len(pieces)} tokens ({' '.join(pieces)})" if pieces else "nothing"
        should = "one word" if vectors == 1 else f"one word, or {vectors},"
        raise InputError(f"like {like!r} is {said} to the model, should be {should} it knows")
    table = encoder.get_input_embeddings()
    ids = tokenizer.convert_tokens_to_ids(pieces)
    start = table.weight.detach()[ids].expand(vectors, -1)
    tokenizer.add_tokens(names)
    first = tokenizer.convert_tokens_to_ids(token)
    if len(tokenizer) > len(table.weight):
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).requires_grad_(False)
    words = Words(start, first)
    encoder.get_input_embeddings().register_forward_hook(
        lambda module, given, embedded: words(given[0], embedded)
    )
    return words


class Named:
    """Examples whose captions say the new word: as they are, or else the word comes before them."""

    def __init__(self, source: Source, token: str, tokenizer: CLIPTokenizer) -> None:
        self.source, self.token, self.tokenizer = source, token, tokenizer
        self.name = source.name
        self.views = getattr(source, "views", 1)
        said = f"named 1 {source.digest} {token} {len(tokenizer)}"
        self.digest = hashlib.sha256(said.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        caption = example.caption
        if self.token not in caption.split():
            caption = f"{self.token}, {caption}" if caption else self.token
        return replace(example, caption=spelled(caption, self.tokenizer))


def spelled(prompt: str, tokenizer: CLIPTokenizer) -> str:
    """``prompt`` with all tokens of a word of several vectors, as diffusers' pipelines spell it."""
    made: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    return made


class InversionTask(UNetTask[InversionTraining]):
    """A new word, trained on the model's objective. Nothing else changes."""

    def __init__(self, training: InversionTraining, device: torch.device) -> None:
        super().__init__(training, device)
        parts = self.parts
        must_fit(training.objective, parts, training.model)
        self.words = add_word(
            parts.tokenizer, parts.text_encoder, training.token, training.like, training.vectors
        ).to(device)
        named = Named(self.examples, training.token, parts.tokenizer)
        self.latents = Latents(training, training.objective, parts, named, embeddings=False)
        self.trains({"words": self.words})

    def export(self, folder: Path) -> None:
        """The word's vectors, for ``load_textual_inversion``, and what they belong to."""
        training = self.training
        rows = self.words.table.weight.detach().cpu().contiguous()
        about: dict[str, Any] = {"train": "textual_inversion", "model": training.model}
        about |= {"token": training.token, "like": training.like, "vectors": training.vectors}
        with whole_folder(folder) as made:
            save_file({training.token: rows}, made / FILE)
            save_settings(made, about | {"steps": training.steps, "seed": training.seed})
