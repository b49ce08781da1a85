"""A new word starts as a known one, is all that is trained, and means the same to diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffedit.errors import InputError
from diffedit.training.config import InversionTraining
from diffedit.training.inversion import InversionTask, add_word, spelled
from diffedit.training.loop import Report, accelerator, train
from diffedit.training.parts import load

CPU = torch.device("cpu")
SIDE = 32


def training(model: Path, out: Path, **changes: Any) -> InversionTraining:
    said: dict[str, Any] = {
        "train": "textual_inversion",
        "model": str(model),
        "data": {"world": "plain", "count": 6, "side": SIDE, "held_out": 1},
        "out": out / "out",
        "token": "<sketch>",
        "like": "red",
        "steps": 3,
        "batch": 3,
        "optimiser": {"name": "muon", "rate": 1e-2, "warmup": 1},
        "objective": {"dropout": 0.0},
    }
    return InversionTraining.model_validate(said | changes)


def trained(how: InversionTraining, **options: Any) -> tuple[InversionTask, Report]:
    task = InversionTask(how, CPU)
    return task, train(task, how, accelerator(how), **options)


@torch.no_grad()
def encoded(tokenizer: Any, encoder: Any, prompt: str) -> Tensor:
    ids = tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    made: Tensor = encoder(ids).last_hidden_state
    return made


@pytest.mark.parametrize(
    ("like", "vectors", "means"),
    [("red", 1, "red"), ("red", 3, "red red red"), ("a red", 2, "a red")],
)
def test_a_new_word_starts_as_the_known_one(
    small_model: Path, like: str, vectors: int, means: str
) -> None:
    parts = load(str(small_model), CPU)
    tokenizer, encoder = parts.tokenizer, parts.text_encoder
    before = encoded(tokenizer, encoder, f"a {means} circle")
    other = encoded(tokenizer, encoder, "a green star")
    words = add_word(tokenizer, encoder, "<new>", like, vectors)
    assert words.table.weight.shape == (vectors, 128)
    prompt = spelled("a <new> circle", tokenizer)
    assert torch.equal(encoded(tokenizer, encoder, prompt), before)
    torch.nn.init.normal_(words.table.weight)
    assert not torch.allclose(encoded(tokenizer, encoder, prompt), before, atol=1e-2)
    assert torch.equal(encoded(tokenizer, encoder, "a green star"), other)


@pytest.mark.parametrize("vectors", [1, 2])
def test_only_the_new_rows_change(small_model: Path, tmp_path: Path, vectors: int) -> None:
    task, report = trained(training(small_model, tmp_path, vectors=vectors))
    assert report.finished
    before = load(str(small_model), CPU)
    known = before.text_encoder.get_input_embeddings().weight
    count = len(known)
    (start,) = before.tokenizer.convert_tokens_to_ids(["red</w>"])
    moved = task.words.table.weight.detach() - known[start]
    assert bool((moved.abs().amax(dim=1) > 1e-3).all())
    for name in ("unet", "vae", "text_encoder"):
        after = getattr(task.parts, name).state_dict()
        for key, value in getattr(before, name).state_dict().items():
            kept = after[key][:count] if key.endswith("token_embedding.weight") else after[key]
            assert torch.equal(kept, value), key
    assert [p.requires_grad for p in task.parts.text_encoder.parameters()].count(True) == 0


def test_a_resumed_training_goes_on(small_model: Path, tmp_path: Path) -> None:
    at_once = trained(training(small_model, tmp_path / "a"))
    how = training(small_model, tmp_path / "b")
    assert trained(how, max_minutes=0)[1].step == 1
    task, report = trained(how, resume=True)
    assert report.losses == pytest.approx(at_once[1].losses, abs=1e-6)
    assert torch.allclose(task.words.table.weight, at_once[0].words.table.weight, atol=1e-6)


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_the_word(small_model: Path, tmp_path: Path, vectors: int) -> None:
    how = training(small_model, tmp_path, vectors=vectors)
    task = InversionTask(how, CPU)
    torch.manual_seed(0)
    torch.nn.init.normal_(task.words.table.weight)
    task.export(tmp_path / "result")
    (rows,) = load_file(tmp_path / "result" / "learned_embeds.safetensors").values()
    assert rows.shape == (vectors, 128)

    pipe = StableDiffusionPipeline.from_pretrained(small_model, torch_dtype=torch.float32)
    pipe.load_textual_inversion(tmp_path / "result")
    prompt = "a <sketch> of a red circle"
    theirs = pipe.encode_prompt(prompt, CPU, 1, False)[0]
    parts = task.parts
    mine = encoded(parts.tokenizer, parts.text_encoder, spelled(prompt, parts.tokenizer))
    assert torch.allclose(theirs, mine, atol=1e-5)
    without = pipe.encode_prompt("a red circle", CPU, 1, False)[0]
    plain = encoded(parts.tokenizer, parts.text_encoder, "a red circle")
    assert torch.allclose(without, plain, atol=1e-5)


def test_captions_say_the_word(small_model: Path, tmp_path: Path) -> None:
    task = InversionTask(training(small_model, tmp_path, vectors=2), CPU)
    first = task.parts.tokenizer.convert_tokens_to_ids("<sketch>")
    rows = task.batch(0, torch.Generator().manual_seed(0))
    assert (rows["tokens"] == first).sum(dim=1).tolist() == [1, 1, 1]
    assert (rows["tokens"] == first + 1).sum(dim=1).tolist() == [1, 1, 1]
    task.loss(rows).backward()
    grad = task.words.table.weight.grad
    assert grad is not None
    assert bool(grad.any(dim=1).all())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "red</w>"}, "'red</w>' is a word of the model already"),
        (
            {"token": "<New>", "vectors": 2},
            "'<New>' is '<new>' to the model's tokenizer, write it so",
        ),
        ({"like": "xylophone"}, r"like 'xylophone' is \d+ tokens .* should be one word it knows"),
        ({"like": "red green"}, r"like 'red green' is 2 tokens .* should be one word it knows"),
        ({"like": "red green", "vectors": 3}, r"should be one word, or 3, it knows"),
        ({"objective": {"target": "epsilon"}}, "leave target out"),
    ],
)
def test_what_cannot_be_is_said(
    small_model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        InversionTask(training(small_model, tmp_path, **changes), CPU)
    assert "\n" not in str(caught.value)
