"""The denoiser and its text encoder, trained together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffedit.errors import InputError
from diffedit.training import parts as models
from diffedit.training.config import DenoiserTraining
from diffedit.training.data import Source
from diffedit.training.denoising import Latents, scheduler_for
from diffedit.training.export import export
from diffedit.training.grounding import Watched, grounding
from diffedit.training.kernels import quick
from diffedit.training.loop import Rows
from diffedit.training.parts import Parts
from diffedit.training.text import HIDDEN, build_text_encoder, build_tokenizer
from diffedit.training.unet_task import UNetTask
from diffedit.training.world.source import Drawn

_PHRASES = 4
"""Phrases of a caption that attention is grounded in."""

_CAPTIONS = 30_000
"""Captions of which a new vocabulary is made."""


class DenoiserTask(UNetTask[DenoiserTraining]):
    """A UNet, and unless it is frozen its text encoder, on any objective.

    ``widths`` in the training makes a new UNet, ``text: new`` a new text encoder whose vocabulary
    is the captions'; what the model's own encoder knows of it is kept.
    """

    def __init__(self, training: DenoiserTraining, device: torch.device) -> None:
        super().__init__(training, device)
        parts, cells = self.parts, training.data.side // 8
        if training.text == "new":
            renew_text(parts, self.examples, training.out / "tokenizer")
        if training.widths is not None:
            hidden = int(parts.text_encoder.config.hidden_size)
            parts.unet = models.new_unet(
                training.widths,
                plain_levels=training.plain_levels,
                sample_size=cells,
                hidden=hidden,
            ).to(device)
            parts.scheduler = models.new_scheduler()
        parts.text_encoder.to(device)
        quick(parts.unet, parts.text_encoder)
        frozen = training.text == "frozen"
        self.latents = Latents(
            training,
            training.objective,
            parts,
            self.examples,
            embeddings=frozen,
            phrases=_PHRASES if training.grounding else 0,
        )
        if training.grounding and training.checkpointing:
            raise InputError("grounding and checkpointing do not go together: leave one out")
        self.watched = Watched(parts.unet) if training.grounding else None
        modules: dict[str, nn.Module] = {"unet": parts.unet}
        if not frozen:
            modules["text_encoder"] = parts.text_encoder
        for module in modules.values():
            module.requires_grad_(True).train()
        self.trains(modules)

    def loss(self, rows: Rows) -> Tensor:
        """The objective's, and that of attention off the words' places."""
        if self.watched is None:
            return super().loss(rows)
        with self.watched.recording() as attentions:
            loss = super().loss(rows)
        phrases, spans = (rows[name].to(loss.device) for name in ("phrases", "spans"))
        return loss + self.training.grounding * grounding(attentions, phrases, spans).mean()

    def export(self, folder: Path) -> None:
        """The whole model as a Stable Diffusion folder."""
        self.parts.scheduler = scheduler_for(self.training.objective, self.parts.scheduler)
        export(folder, self.parts, side=self.training.data.side)


def renew_text(parts: Parts, examples: Source, folder: Path) -> None:
    """Give ``parts`` a tokenizer of the captions' words, and an encoder of that vocabulary.

    Words, and all other weights, that the present encoder has are taken over where its sizes are
    those of a new one. A tokenizer that stands in ``folder`` is used as it is.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    else:
        count = min(len(examples), _CAPTIONS)
        if isinstance(examples, Drawn):
            captions = [examples.scene(index).caption for index in range(count)]
        else:
            captions = [examples[index].caption for index in range(count)]
        tokenizer = build_tokenizer(captions, folder)
    encoder = build_text_encoder(tokenizer)
    before = parts.text_encoder.state_dict()
    if int(parts.text_encoder.config.hidden_size) == HIDDEN:
        known, state = parts.tokenizer.get_vocab(), encoder.state_dict()
        for key, value in before.items():
            if key.endswith("token_embedding.weight"):
                for piece, number in tokenizer.get_vocab().items():
                    if piece in known:
                        state[key][number] = value[known[piece]]
            elif key in state and state[key].shape == value.shape:
                state[key] = value
        encoder.load_state_dict(state)
    parts.tokenizer, parts.text_encoder = tokenizer, encoder
