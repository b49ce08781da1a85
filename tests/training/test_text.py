from __future__ import annotations

import re
from pathlib import Path

from transformers import CLIPTokenizer

from diffedit.training.text import LENGTH, build_text_encoder, build_tokenizer, tokenise
from diffedit.training.world.scenes import RICH, draw_scene


def test_every_word_of_the_captions_is_one_token(tmp_path: Path) -> None:
    captions = [draw_scene(0, i, RICH).caption for i in range(1500)]
    tokenizer = build_tokenizer(captions, tmp_path)
    # A comma is a token of its own.
    for word in {word for caption in captions for word in re.findall(r"[a-z]+|,", caption)}:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == LENGTH
    assert loaded("A Red  circle").input_ids == tokenizer("a red circle").input_ids
    assert (tmp_path / "vocab.json").exists()
    assert (tmp_path / "merges.txt").exists()
    for number in range(4):
        again = build_tokenizer(reversed(captions), tmp_path / str(number))
        assert again.get_vocab() == tokenizer.get_vocab()
    ids = tokenise(tokenizer, ["a red circle", ""])
    assert ids.shape == (2, LENGTH)
    assert build_text_encoder(tokenizer)(ids).last_hidden_state.shape == (2, LENGTH, 128)
