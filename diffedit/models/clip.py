"""CLIP as a reader of prompts: weights of words, and texts longer than it reads at once.

CLIP (Radford et al. 2021, arXiv:2103.00020) reads 77 tokens, of which the first and the last say
where a text begins and ends. A longer text is read in chunks, cut between words, each with a
beginning and an end of its own; what the denoiser attends to is one after the other.

The embedding z of a token of weight w becomes ``e + w (z - e)``, where e is what CLIP makes of an
empty text at the same place: 0 leaves nothing of the token there, 1 is the token as it is, and more
goes on in the same direction. So InvokeAI (its library compel, above 1) and ComfyUI read weights;
AUTOMATIC1111's interface scales z itself, and then gives all of it the mean that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffedit.models import holding
from diffedit.prompts import Prompt

#: What a longer prompt has more of.
RAGGED = frozenset({"text"})


class Chunk(NamedTuple):
    """What is read at once.

    Attributes:
        tokens: with beginning and end, filled up to what fits.
        weights: of each token; 1 of what is no part of the text.
        said: how many tokens there are before those that only fill up.
    """

    tokens: list[int]
    weights: list[float]
    said: int


@dataclass(frozen=True)
class Clip:
    """A text encoder and its tokenizer.

    Attributes:
        pipe: whose they are; it knows words that became several tokens (textual inversion).
        tokenizer: the names of both in it.
        encoder: the same.
        layer: the hidden state that is taken, counted from the end; None: the last one, normed.
    """

    pipe: Any
    tokenizer: str
    encoder: str
    layer: int | None = None

    def chunks(self, prompt: Prompt) -> list[Chunk]:
        """The prompt in parts that can be read at once; one at least."""
        tokenizer = getattr(self.pipe, self.tokenizer)
        text, weights = "", list[float]()
        for run, weight in prompt.runs:
            whole = self.pipe.maybe_convert_prompt(run, tokenizer)
            text += whole
            weights += [weight] * len(whole)
        known = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        places, words = known["offset_mapping"], known.word_ids()
        room = tokenizer.model_max_length - 2
        made = []
        for part in _parts(words, room):
            tokens = [tokenizer.bos_token_id, *known["input_ids"][part], tokenizer.eos_token_id]
            own = [1.0, *(_mean(weights, place) for place in places[part]), 1.0]
            rest = room + 2 - len(tokens)
            tokens += [tokenizer.pad_token_id] * rest
            made.append(Chunk(tokens, own + [1.0] * rest, room + 2 - rest))
        return made

    def read(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Read chunks, each alone.

        Returns:
            ``(1, tokens, d)`` of all chunks; and what the encoder gives first, of the first chunk.
        """
        made = [self._read(chunk) for chunk in chunks]
        states = [state for state, _ in made]
        if any(weight != 1 for chunk in chunks for weight in chunk.weights):
            nothing, _ = self._read(self.chunks(Prompt("", ()))[0])
            states = [
                weighted(state, nothing, chunk.weights)
                for state, chunk in zip(states, chunks, strict=True)
            ]
        return torch.cat(states, dim=1), made[0][1]

    def _read(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        encoder = getattr(self.pipe, self.encoder)
        on = holding.where(encoder)
        tokens = torch.tensor([chunk.tokens], device=on)
        shown = None
        if self.layer is None and getattr(encoder.config, "use_attention_mask", False):
            shown = (torch.arange(len(chunk.tokens)) < chunk.said)[None].long().to(on)
        hidden = self.layer is not None
        output = encoder(tokens, attention_mask=shown, output_hidden_states=hidden)
        state = output[0] if self.layer is None else output.hidden_states[self.layer]
        return state.to(encoder.dtype), output[0]


def read(clips: Sequence[Clip], prompt: Prompt) -> tuple[Tensor, Tensor] | None:
    """Read a prompt with several encoders, whose states stand side by side.

    Returns:
        ``(1, tokens, d)``; and what the last encoder gives first, of the first chunk: of an encoder
        with a projection the embedding of the whole. None: the prompt is plain and short, so that
        diffusers reads all of it.
    """
    every = [clip.chunks(prompt) for clip in clips]
    most = max(len(chunks) for chunks in every)
    if most == 1 and not prompt.weighted:
        return None
    made = []
    for clip, chunks in zip(clips, every, strict=True):
        empty = clip.chunks(Prompt("", ())) * (most - len(chunks))
        made.append(clip.read([*chunks, *empty]))
    return torch.cat([states for states, _ in made], dim=-1), made[-1][1]


def weighted(states: Tensor, nothing: Tensor, weights: Sequence[float]) -> Tensor:
    """A text's embeddings with their weights: ``e + w (z - e)``; those of weight 1 keep their bits.

    Args:
        states: z, ``(1, tokens, d)``.
        nothing: e, of an empty text, of the same shape.
        weights: w, of each token.
    """
    weight = torch.tensor(weights).to(states)[None, :, None]
    return torch.where(weight == 1, states, nothing + weight * (states - nothing))


def token_weights(tokenizer: Any, prompt: Prompt, tokens: int) -> list[float]:
    """The weight of each of so many tokens, to which a tokenizer fills a text up or cuts it off."""
    known = tokenizer(
        prompt.text,
        padding="max_length",
        max_length=tokens,
        truncation=True,
        return_offsets_mapping=True,
    )
    return [_mean(prompt.weights, place) for place in known["offset_mapping"]]


def _mean(weights: Sequence[float], place: tuple[int, int]) -> float:
    """Of the letters of a token: weights change no token; 1 where it has none."""
    return fmean(weights[slice(*place)] or [1.0])


def _parts(words: Sequence[int | None], room: int) -> Iterator[slice]:
    """Cut tokens, by the words that they are of, into parts of at most `room`; one at least."""
    start = 0
    while len(words) - start > room:
        end = start + room
        while end > start and words[end] == words[end - 1]:
            end -= 1
        end = end if end > start else start + room  # a word longer than all that is read at once
        yield slice(start, end)
        start = end
    yield slice(start, len(words))


__all__ = ["RAGGED", "Chunk", "Clip", "read", "token_weights", "weighted"]
