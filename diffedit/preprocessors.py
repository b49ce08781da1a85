"""What turns a picture into a control hint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels8 = npt.NDArray[np.uint8]

#: ``(h, w, 3) uint8 -> (h, w, 3) uint8``, of the same size.
Preprocess = Callable[["Pixels8"], "Pixels8"]


@dataclass(frozen=True)
class Preprocessor:
    """A named preprocessor; what `register_preprocessors` returns.

    Attributes:
        name: what a user calls it, such as "canny".
        load: makes it ready, given a folder or hub id of its weights (None: its usual ones).
            Called when it is first used, so that listing preprocessors costs nothing.
        help: one line.
        weights: the folder or hub id of the weights it usually takes; None when it needs none.
    """

    name: str
    load: Callable[[str | None], Preprocess]
    help: str
    weights: str | None = None
