"""Textual inversion: a word that a model has learned for something that pictures show.

Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion" (arXiv:2208.01618).
"""

from __future__ import annotations

import logging
from typing import ClassVar

from pydantic import ConfigDict, Field

from diffedit import Contribution, Edit, ModelField, Pass, Patch, Run, hookimpl

log = logging.getLogger(__name__)


class TextualInversion(Edit):
    """Know one word more, which prompts may then say. Any number of them may be known."""

    model_config = ConfigDict(json_schema_extra={"advanced": True})

    name: ClassVar[str] = "textual_inversion"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"textual_inversion"})

    model: ModelField = Field(description="Folder, .safetensors file or hub id of the word")
    token: str | None = Field(
        None,
        description="How prompts say it; none: as the file has it, or else as the file is called",
        min_length=1,
        max_length=256,
    )

    def contribute(self, run: Run) -> Contribution:
        """What the text encoders know while prompts are embedded."""
        word = run.textual_inversion(self.model, self.token)
        return Contribution(patches=(Patch(lambda model: model.add_textual_inversion(word)),))


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [TextualInversion]


@hookimpl
def pass_started(pass_: Pass, run: Run) -> None:
    """Warn of words that no prompt says: neither the pass's, nor one of an edit, such as region."""
    learned = [edit for edit in pass_.edits if isinstance(edit, TextualInversion)]
    others = [edit for edit in pass_.edits if not isinstance(edit, TextualInversion)]
    texts = [run.prompt, run.negative]
    fields = [(name, text) for edit in others for name, text in vars(edit).items()]
    texts += [str(text) for name, text in fields if "prompt" in name or "negative" in name]
    said = "\n".join(texts).lower()  # capitals or none: the text encoders hear no difference
    for edit in learned:
        token = run.textual_inversion(edit.model, edit.token).token
        if token.lower() not in said:
            log.warning("no prompt of this pass says %s, the word of %s", token, edit.model)
