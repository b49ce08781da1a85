r"""How a prompt is written: ``(words:1.3)`` gives words a weight.

Of text in parentheses that ends in a colon and a number, the number is the weight, from 0 to 5;
where such parentheses stand in one another, their weights multiply. Parentheses without a number
are text, as is everything else, and ``\(`` and ``\)`` are parentheses that are always text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

from diffedit.errors import CapabilityError, ParameterError

#: The capability of models that read weights.
WEIGHTS = "prompt_weights"

#: Beyond it pictures fall apart; ``(at 10:30)`` was not meant as a weight.
LARGEST = 5.0

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


def _checked(weight: float, said: str) -> float:
    if not 0 <= weight <= LARGEST:
        plain = said.replace("(", r"\(").replace(")", r"\)")
        raise ParameterError(
            f"{said!r} gives words a weight of {weight:g}, should be from 0 to {LARGEST:g}; as"
            f" plain text it is written {plain}"
        )
    return weight
