r"""How a prompt is written: ``(words:1.3)`` gives words a weight.

Of text in parentheses that ends in a colon and a number, the number is the weight, from 0 to 5;
where such parentheses stand in one another, their weights multiply. Parentheses without a number
are text, as is everything else, and ``\(`` and ``\)`` are parentheses that are always text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from diffedit.errors import CapabilityError, ParameterError

log = logging.getLogger(__name__)

#: The capability of models that read weights.
WEIGHTS = "prompt_weights"

#: Beyond it pictures fall apart; ``(at 10:30)`` was not meant as a weight.
LARGEST = 5.0

#: Two letters of one word; scripts without spaces have no such place to go back from.
_WITHIN = re.compile(r"\w\w", re.ASCII)
#: Letters of a prompt that a warning quotes.
_QUOTED = 60

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*", re.ASCII)


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is read.

    Attributes:
        text: what is written, without the signs of weights.
        weights: of each of its characters.
    """

    text: str
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """Whether any word has a weight other than 1."""
        return any(weight != 1 for weight in self.weights)

    @property
    def runs(self) -> list[tuple[str, float]]:
        """The text in pieces of one weight each, in order."""
        pairs = zip(self.text, self.weights, strict=True)
        return [
            ("".join(letter for letter, _ in run), weight)
            for weight, run in groupby(pairs, key=lambda pair: pair[1])
        ]


def parse(prompt: str) -> Prompt:
    """Read what is written.

    Raises:
        ParameterError: a weight is out of its range; the line quotes it.
    """
    letters: list[str] = []
    weights: list[float] = []
    opened: list[int] = []
    position = 0
    while position < len(prompt):
        letter = prompt[position]
        if letter == "\\" and prompt[position + 1 : position + 2] in ("(", ")"):
            position += 1
            letters.append(prompt[position])
            weights.append(1.0)
        elif letter == ")" and opened:
            start = opened.pop()
            words, _, number = "".join(letters[start + 1 :]).rpartition(":")
            if words.strip() and _NUMBER.fullmatch(number):
                weight = _checked(float(number), f"({words}:{number})")
                inside = slice(start + 1, start + 1 + len(words))
                weights[start:] = [weight * inner for inner in weights[inside]]
                letters[start:] = letters[inside]
            else:
                letters.append(letter)
                weights.append(1.0)
        else:
            if letter == "(":
                opened.append(len(letters))
            letters.append(letter)
            weights.append(1.0)
        position += 1
    return Prompt("".join(letters), tuple(weights))


def check(where: str, prompt: str, has: Collection[str], what: str = "the loaded model") -> None:
    """Refuse a prompt that a model (or a family of them: `what`) cannot read.

    Raises:
        ParameterError: a weight is out of its range.
        CapabilityError: it has weights, and the model takes none.
    """
    try:
        weighted = parse(prompt).weighted
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    if weighted and WEIGHTS not in has:
        raise CapabilityError(
            f"{where}: {what} takes no weights of words, such as (words:1.3); leave them out, or"
            r" write \( and \) for parentheses that are text"
        )


def tell_unread(prompt: str, tokenizer: Any, tokens: int, within: str | None = None) -> None:
    """Warn of the end of a prompt that no text encoder reads; say nothing if there is none.

    Args:
        prompt: what is written, without the signs of weights.
        tokenizer: of the encoder that reads most of it.
        tokens: that the encoder takes, of which some only say where a text begins or ends.
        within: the text that it reads, where that has more words than the prompt's.
    """
    prompt, text = prompt.strip(), within or prompt
    known = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in known["offset_mapping"]]
    room = tokens - tokenizer.num_special_tokens_to_add()
    if len(begins) <= room:
        return
    start = text.find(prompt)
    own = [begin - start for begin in begins if start <= begin < start + len(prompt)]
    takes = room - sum(begin < start for begin in begins)
    if len(own) <= takes:  # what follows the prompt is left out, and all of the prompt is read
        return
    first = own[takes]
    while _WITHIN.fullmatch(prompt[max(first - 1, 0) : first + 1]):
        first -= 1
    log.warning(
        "prompt %r: has %d tokens, of which the text encoder takes %d: it is not read from %r on",
        _quoted(prompt), len(own), takes, _quoted(prompt[first:].strip()),
    )  # fmt: skip


def _quoted(text: str) -> str:
    return text if len(text) <= _QUOTED else text[:_QUOTED].rstrip() + "…"


def _checked(weight: float, said: str) -> float:
    if not 0 <= weight <= LARGEST:
        plain = said.replace("(", r"\(").replace(")", r"\)")
        raise ParameterError(
            f"{said!r} gives words a weight of {weight:g}, should be from 0 to {LARGEST:g}; as"
            f" plain text it is written {plain}"
        )
    return weight
