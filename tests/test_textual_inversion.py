"""Textual inversion: prompts say new words as in diffusers, and they are forgotten afterwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffedit import Call, Editor, Pass
from diffedit.errors import CapabilityError, ModelError, ParameterError, PluginError, UnsafeWeights
from diffedit_lora import LoRA
from diffedit_region import Region
from diffedit_textual_inversion import TextualInversion
from tests.families import FAMILIES, FLUX, SD, SDXL, Tiny
from tests.families.additions import additions, written
from tests.families.tiny import TEXT
from tests.laws.state import state, unchanged
from tests.laws.tools import Custom
from tests.parity import comparisons
from tests.parity.comparisons import Case

LEARNING = (SD, SDXL)
WORD = "<thing>"
each = pytest.mark.parametrize("family", LEARNING, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def _a_prompt_that_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "STEPS", 2)
    monkeypatch.setattr(comparisons, "PROMPT", f"a {WORD} in a box")
    monkeypatch.setattr(comparisons, "NEGATIVE", f"no {WORD}s")


def rows(vectors: int = 1, seed: int = 0, width: int = TEXT) -> Tensor:
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))


def file_of(family: Tiny, folder: Path, vectors: int = 1, seed: int = 0) -> str:
    """A word for a family, in the layout that is usual there."""
    if family is SD:
        return written(folder / f"word{seed}.safetensors", {WORD: rows(vectors, seed)})
    both = {"clip_l": rows(vectors, seed), "clip_g": rows(vectors, seed + 10)}
    return written(folder / f"word{seed}.safetensors", both)


def latents(editor: Editor, *edits: Any, prompt: str = f"a {WORD}", steps: int = 2) -> Tensor:
    made = editor.run(None, Pass(prompt=prompt, steps=steps, edits=edits)).latents
    assert made is not None
    return made


def vocabulary(editor: Editor) -> list[Any]:
    """Tokenizers by identity, with what they know, and where encoders look tokens up."""
    pipe: Any = editor.model.pipe  # type: ignore[attr-defined]
    found: list[Any] = []
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        one, other = getattr(pipe, tokenizer, None), getattr(pipe, encoder, None)
        if one is None or other is None:
            continue
        found += [id(one), one.get_vocab(), dict(one.added_tokens_encoder), one.tokenize("a <b> c")]
        found += [id(other.get_input_embeddings()), other.config.to_dict()]
    return found


# --- parity ---------------------------------------------------------------------------------------


def test_who_learns_words() -> None:
    learning = {family.name for family in FAMILIES if "textual_inversion" in family.model.carries}
    assert learning == {family.name for family in LEARNING}


def taught(case: Case, given: Mapping[str, Tensor], token: str = WORD) -> None:
    """The same by diffusers' own loader."""
    for encoder, own in given.items():
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        said = {name: getattr(case.pipe, name) for name in (tokenizer, encoder)}
        case.pipe.load_textual_inversion(
            own, token=token, tokenizer=said[tokenizer], text_encoder=said[encoder]
        )


@each
@pytest.mark.parametrize("vectors", [1, 3])
def test_latents_are_those_of_diffusers(family: Tiny, vectors: int, tmp_path: Path) -> None:
    ours, theirs = Case(family, None), Case(family, None)
    given = {"text_encoder": rows(vectors)}
    if family is SDXL:
        given["text_encoder_2"] = rows(vectors, 10)
    taught(theirs, given)
    edit = TextualInversion(model=file_of(family, tmp_path, vectors), token=WORD)
    made = ours.ours(edit, negative=comparisons.NEGATIVE)
    plain = ours.ours(negative=comparisons.NEGATIVE)
    assert not torch.allclose(made, plain, atol=1e-3)
    assert (made - theirs.theirs("text2img", negative=comparisons.NEGATIVE)).abs().max() == 0.0


def test_two_words_and_a_lora(tmp_path: Path) -> None:
    ours, theirs = Case(SD, None), Case(SD, None)
    lora = written(tmp_path / "lora.safetensors", additions(ours.pipe))
    theirs.pipe.load_lora_weights(lora, adapter_name="a")
    taught(theirs, {"text_encoder": rows(2)})
    taught(theirs, {"text_encoder": rows(1, 1)}, "box")
    edits = [
        LoRA(model=lora),
        TextualInversion(model=file_of(SD, tmp_path, 2)),
        TextualInversion(model=file_of(SD, tmp_path, 1, 1), token="box"),
    ]
    made = ours.ours(*edits, negative=comparisons.NEGATIVE)
    assert (made - theirs.theirs("text2img", negative=comparisons.NEGATIVE)).abs().max() == 0.0


def test_layouts(tmp_path: Path) -> None:
    """What diffusers writes, and what AUTOMATIC1111's interface does, say the same."""
    one = rows(2)
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "learned_embeds.safetensors", {WORD: one})
    editor = SD.editor()
    expected = latents(editor, TextualInversion(model=file_of(SD, tmp_path, 2)))
    assert torch.equal(latents(editor, TextualInversion(model=str(tmp_path / "folder"))), expected)
    file = written(tmp_path / "clay.safetensors", {"emb_params": one})
    by_name = latents(editor, TextualInversion(model=file), prompt="a clay")
    assert torch.equal(by_name, expected)
    other = latents(editor, TextualInversion(model=file, token=WORD))
    assert torch.equal(other, expected)
    vector = written(tmp_path / "vector.safetensors", {WORD: one[0]})
    single = written(tmp_path / "single.safetensors", {WORD: one[:1]})
    made = [latents(editor, TextualInversion(model=name)) for name in (vector, single)]
    assert torch.equal(*made)
    assert not torch.equal(made[0], expected)


def test_a_folder_with_a_file_for_each_encoder(tmp_path: Path) -> None:
    written(tmp_path / "learned_embeds.safetensors", {WORD: rows(2)})
    written(tmp_path / "learned_embeds_2.safetensors", {WORD: rows(2, 10)})
    (tmp_path / "a").mkdir()
    editor = SDXL.editor()
    expected = latents(editor, TextualInversion(model=file_of(SDXL, tmp_path / "a", 2), token=WORD))
    assert torch.equal(latents(editor, TextualInversion(model=str(tmp_path))), expected)


def test_what_diffedit_train_writes(tmp_path: Path) -> None:
    from diffedit.training.inversion import FILE, add_word

    editor = SD.editor()
    pipe: Any = SD.pipeline()
    words = add_word(pipe.tokenizer, pipe.text_encoder, WORD, "a", 2)
    torch.nn.init.normal_(words.table.weight)
    written(tmp_path / FILE, {WORD: words.table.weight.detach()})
    word = editor.model.load_textual_inversion(str(tmp_path))
    undo = editor.model.add_textual_inversion(word)
    ours = editor.model.embed([f"a {WORD}"], (64, 64)).tensors["text"]
    undo()
    spelled = pipe.tokenizer(
        f"a {WORD} {WORD}_1", padding="max_length", max_length=77, return_tensors="pt"
    )
    assert torch.allclose(ours, pipe.text_encoder(spelled.input_ids)[0], atol=1e-6)


def test_a_weight_within_the_word(tmp_path: Path) -> None:
    """Prompts with weights are read by diffedit itself, which spells words out too."""
    edit = TextualInversion(model=file_of(SD, tmp_path, 3))
    editor = SD.editor()
    plain, weighted = (
        latents(editor, edit, prompt=f"a {said}") for said in (WORD, f"({WORD}:1.4)")
    )
    assert not torch.allclose(plain, weighted, atol=1e-3)


# --- nothing is left ------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("how", ["well", "error", "cancel"])
def test_nothing_is_left(family: Tiny, how: str, tmp_path: Path) -> None:
    editor = family.editor()
    before, known = state(editor), vocabulary(editor)

    def refine(x0: Tensor, call: Call) -> Tensor:
        raise RuntimeError("boom")

    edits: list[Any] = [
        TextualInversion(model=file_of(family, tmp_path, 2, seed), token=f"<{seed}>")
        for seed in range(2)
    ]
    if how == "error":
        edits.append(Custom(parts={"refine": refine}))
        with pytest.raises(PluginError, match="boom"):
            latents(editor, *edits, prompt="a <0> <1>")
    elif how == "cancel":
        with editor.stream(None, Pass(prompt="a <0> <1>", steps=3, edits=edits)) as events:
            next(events)
            assert "<1>_1" in editor.model.pipe.tokenizer.get_vocab()  # type: ignore[attr-defined]
    else:
        latents(editor, *edits, prompt="a <0> <1>")
    unchanged(before, state(editor))
    assert vocabulary(editor) == known
    assert torch.equal(
        latents(editor, prompt="a <0> <1>"), latents(family.editor(), prompt="a <0> <1>")
    )


def test_a_word_learned_twice_is_learned_by_nobody(tmp_path: Path) -> None:
    editor = SDXL.editor()
    before, known = state(editor), vocabulary(editor)
    edits = [
        TextualInversion(model=file_of(SDXL, tmp_path, 1, seed), token=WORD) for seed in range(2)
    ]
    with pytest.raises(ParameterError, match=f"token '{WORD}' is a word of the model already"):
        latents(editor, *edits)
    unchanged(before, state(editor))
    assert vocabulary(editor) == known


# --- what is refused ------------------------------------------------------------------------------


def refused(family: Tiny, file: Any, match: str, kind: type = ModelError, **more: Any) -> None:
    editor = family.editor()
    known = vocabulary(editor)
    with pytest.raises(kind, match=match) as caught:
        latents(editor, TextualInversion(model=str(file), **more))
    assert "\n" not in str(caught.value)
    assert vocabulary(editor) == known


def test_words_of_other_models(tmp_path: Path) -> None:
    wide = written(tmp_path / "wide.safetensors", {WORD: rows(2, width=768)})
    large = written(tmp_path / "large.safetensors", {"clip_l": rows(), "clip_g": rows(width=1280)})
    few = written(tmp_path / "few.safetensors", {"clip_l": rows(1), "clip_g": rows(2)})
    refused(SD, wide, "made for another model: its rows have 2x768 numbers, .* model's 32")
    refused(SDXL, file_of(SD, tmp_path), "rows for one encoder, .* of its own")
    refused(SDXL, large, "its rows have 1x1280 numbers", token=WORD)
    refused(SDXL, few, "more rows for one text encoder than for the other", token=WORD)
    with pytest.raises(CapabilityError, match="has no 'textual_inversion'"):
        latents(FLUX.editor(), TextualInversion(model="nothing"))


def test_words_that_are_none(tmp_path: Path) -> None:
    file = file_of(SD, tmp_path)
    refused(SD, file, "token 'a' is a word of the model already", ParameterError, token="a")
    refused(SD, file, "token 'a b' is no word", ParameterError, token="a b")
    lora = written(tmp_path / "lora.safetensors", additions(SD.pipeline(), ends=("to_q",)))
    refused(SD, lora, r"no textual inversion, which is one word: it holds \d+ tensors, such as")
    refused(SD, tmp_path / "word1.safetensors", "no such file.*did you mean 'word0.safetensors'")
    refused(SD, tmp_path / "word.pt", "a pickle", UnsafeWeights)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(file).read_bytes()[:-4])
    refused(SD, cut, "cut off")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(wrong: float, tmp_path: Path) -> None:
    one = rows(2)
    one[1, 3] = wrong
    file = written(tmp_path / "word.safetensors", {WORD: one})
    refused(SD, file, r"word\.safetensors: holds numbers that are not finite")


# --- how prompts say it ---------------------------------------------------------------------------


@each
def test_capitals_and_small_letters_are_one(family: Tiny, tmp_path: Path) -> None:
    """As its tokenizer has it, which diffusers asks for words; of several rows all act."""
    file, editor = file_of(family, tmp_path, 3), family.editor()
    expected = latents(
        editor, TextualInversion(model=file, token="easynegative"), prompt="easynegative"
    )
    for said in ("easynegative", "EasyNegative", "EASYNEGATIVE"):
        for token in ("EasyNegative", "easynegative"):
            made = latents(editor, TextualInversion(model=file, token=token), prompt=said)
            assert torch.equal(made, expected)
    weighted = [
        latents(editor, TextualInversion(model=file, token="EasyNegative"), prompt=f"({said}:1.4)")
        for said in ("easynegative", "EasyNegative")
    ]
    assert torch.equal(*weighted)
    assert not torch.equal(weighted[0], expected)
    (tmp_path / "first").mkdir()
    first = file_of(family, tmp_path / "first")
    alone = latents(
        editor, TextualInversion(model=first, token="EasyNegative"), prompt="easynegative"
    )
    assert not torch.allclose(alone, expected, atol=1e-3)


def test_of_one_row_capitals_are_those_of_diffusers(tmp_path: Path) -> None:
    """Of several rows diffusers finds the first alone, if a word has capitals."""
    ours, theirs = Case(SD, None), Case(SD, None)
    taught(theirs, {"text_encoder": rows()}, WORD.upper())
    edit = TextualInversion(model=file_of(SD, tmp_path), token=WORD.upper())
    made = ours.ours(edit, negative=comparisons.NEGATIVE)
    assert (made - theirs.theirs("text2img", negative=comparisons.NEGATIVE)).abs().max() == 0.0


def test_capitals_make_no_new_word(tmp_path: Path) -> None:
    file = file_of(SD, tmp_path)
    refused(SD, file, "token 'A' is a word of the model already", ParameterError, token="A")
    edits = [TextualInversion(model=file, token=token) for token in ("Cat", "cat")]
    with pytest.raises(ParameterError, match="is a word of the model already"):
        latents(SD.editor(), *edits, prompt="a cat")


def test_a_prompt_that_does_not_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit, editor = TextualInversion(model=file_of(SD, tmp_path)), SD.editor()
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    with caplog.at_level(logging.WARNING):
        latents(editor, edit)
        latents(editor, edit, prompt=f"a {WORD.upper()}")
        latents(editor, edit, Region(prompt=f"a {WORD}", mask=half), prompt="a box")
        latents(editor, edit, Region(prompt="a", negative=WORD, mask=half), prompt="a box")
        assert "no prompt of this pass says" not in caplog.text
        latents(editor, edit, Region(prompt="a bag", mask=half), prompt="a box")
    assert caplog.text.count(f"no prompt of this pass says {WORD}") == 1
