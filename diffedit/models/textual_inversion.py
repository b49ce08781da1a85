"""Textual inversion: words that text encoders learned, read and taught to a loaded model.

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618). A word is one or more rows of an
encoder's embedding table. Tokenizers cannot forget, so that a copy of them learns the word, and the
encoder looks it up in a longer copy of its table; both are set aside again as they came.

CLIP's tokenizers read capitals as small letters, those of words that they were taught, too. What
spells out a word of several rows (diffusers) looks for it letter by letter in what is written, and
so loses all rows but the first of one with capitals: words are taught, and prompts written, as a
tokenizer reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffedit.errors import ModelError, ParameterError
from diffedit.models import holding
from diffedit.models.files import header
from diffedit.models.weights import weights_file

#: What diffusers calls the file in a folder or repository; `SECOND` is for the second encoder.
USUAL = "learned_embeds.safetensors"
SECOND = "learned_embeds_2.safetensors"

#: By text encoder, what files for several of them call a word's rows.
_CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
#: What AUTOMATIC1111's interface calls them, whose words are called as their files.
_NAMELESS = "emb_params"
#: Marks a tokenizer that was taught a word here.
_TAUGHT = "diffedit_taught"


@dataclass(frozen=True, eq=False)
class Word:
    """A word as text encoders know it.

    Attributes:
        token: how prompts say it.
        rows: by text encoder, ``(vectors, d)`` of its embedding table.
    """

    token: str
    rows: Mapping[str, Tensor]

    def names(self) -> list[str]:
        """Its tokens: of several vectors the second is ``token_1``, as in diffusers."""
        count = len(next(iter(self.rows.values())))
        return [self.token, *(f"{self.token}_{number}" for number in range(1, count))]


@torch.inference_mode(False)  # what is read is kept, and may be used outside of it
def load_word(pipe: Any, readers: Mapping[str, str], source: str, token: str | None = None) -> Word:
    """Read a word and hold it against the encoders that are to learn it.

    Args:
        pipe: the components.
        readers: tokenizers by the text encoders that they are for, by their names in `pipe`.
        source: a ``.safetensors`` file, a folder, or a place on the hub: diffusers' layout (the
            word and its rows; one file for each encoder) or AUTOMATIC1111's.
        token: how prompts say it; None: as the file has it, or else as it is called.

    Raises:
        UnsafeWeights: it is a pickle.
        ModelError: there is none, it holds no word, or one for another model.
        ParameterError: the model knows the word already, or it is no word.
    """
    file = weights_file(source, USUAL)
    header(file)  # says what is wrong with a file that is none
    named, found = _read(file)
    tables = {name: getattr(pipe, name).get_input_embeddings().weight for name in readers}
    if None in found and len(tables) == 1:
        found = dict.fromkeys(tables, found[None])
    if missing := [_CLIPS[name] for name in tables if name not in found]:
        its = ", ".join(_CLIPS.get(name or "", "one encoder") for name in found)
        raise ModelError(
            f"{file}: was made for another model: it has rows for {its}, and the loaded model has"
            f" a text encoder that wants rows of its own ({', '.join(missing)})"
        )
    rows = {}
    for name, table in tables.items():
        own = found[name] if found[name].ndim > 1 else found[name][None]
        if own.ndim != 2 or not len(own) or own.shape[1] != table.shape[1]:
            raise ModelError(
                f"{file}: was made for another model: its rows have"
                f" {'x'.join(map(str, found[name].shape))} numbers, the loaded model's"
                f" {table.shape[1]}"
            )
        rows[name] = own.to(table.device, table.dtype)
    if len({len(own) for own in rows.values()}) > 1:
        raise ModelError(f"{file}: has more rows for one text encoder than for the other")
    word = Word(token or named or file.stem, rows)
    if word.token.split() != [word.token]:
        raise ParameterError(f"token {word.token!r} is no word: it must have no spaces")
    for tokenizer in readers.values():
        _check_new(word, getattr(pipe, tokenizer))
    return word


def _read(file: Path) -> tuple[str | None, dict[str | None, Tensor]]:
    """A file's name for its word, if it has one, and the rows by encoder; None: nobody says whose.

    Raises:
        ModelError: it holds something else.
    """
    state = _numbers(file)
    if state and state.keys() <= set(_CLIPS.values()):
        return None, {name: state[key] for name, key in _CLIPS.items() if key in state}
    if len(state) != 1:
        said = f"{len(state)} tensors, such as {next(iter(state), 'none')!r}"
        raise ModelError(f"{file}: no textual inversion, which is one word: it holds {said}")
    ((name, first),) = state.items()
    second = file.with_name(SECOND)
    if file.name == USUAL and second.is_file():
        header(second)
        others = _numbers(second)
        if others.keys() != state.keys():
            raise ModelError(f"{second}: holds {', '.join(others)}, and {file.name} {name}")
        return name, {"text_encoder": first, "text_encoder_2": others[name]}
    return None if name == _NAMELESS else name, {None: first}


def _numbers(file: Path) -> dict[str, Tensor]:
    state = load_file(file)
    if not all(bool(rows.float().isfinite().all()) for rows in state.values()):
        raise ModelError(f"{file}: holds numbers that are not finite")
    return state


def read_as(tokenizer: Any, text: str) -> str:
    """A text as a tokenizer reads it that was taught a word: in small letters, if it does so."""
    return small(tokenizer, text) if hasattr(tokenizer, _TAUGHT) else text


def small(tokenizer: Any, text: str) -> str:
    """A text with its capitals as a tokenizer reads them."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


def _check_new(word: Word, tokenizer: Any) -> None:
    known = tokenizer.get_vocab()
    if taken := [name for name in word.names() if {name, small(tokenizer, name)} & known.keys()]:
        raise ParameterError(
            f"token {taken[0]!r} is a word of the model already: give another (token: <my-word>)"
        )


def teach(pipe: Any, readers: Mapping[str, str], word: Word) -> Callable[[], None]:
    """Have a model know a word; returns what has it forget. Last in, first out.

    Raises:
        ParameterError: another edit has taught it that word.
    """
    with ExitStack() as undo:
        for name, rows in word.rows.items():
            old = getattr(pipe, readers[name])
            _check_new(word, old)
            tokenizer = copy.deepcopy(old)
            names = [small(tokenizer, name) for name in word.names()]
            tokenizer.add_tokens(names)
            setattr(tokenizer, _TAUGHT, True)
            places: Sequence[int] = tokenizer.convert_tokens_to_ids(names)
            encoder = getattr(pipe, name)
            table = encoder.get_input_embeddings()
            longer = table.weight.new_zeros(max(*places, len(table.weight) - 1) + 1, rows.shape[1])
            longer[: len(table.weight)] = table.weight
            longer[list(places)] = rows.to(longer)  # the table may have moved since
            undo.callback(encoder.set_input_embeddings, table)
            made = nn.Embedding.from_pretrained(longer).train(table.training)
            holding.alike(made, table)
            encoder.set_input_embeddings(made)
            undo.callback(setattr, pipe, readers[name], old)
            setattr(pipe, readers[name], tokenizer)
        return undo.pop_all().close


__all__ = ["Word", "load_word", "read_as", "small", "teach"]
