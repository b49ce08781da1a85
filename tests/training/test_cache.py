"""Cached latents are the autoencoder's own, are made once, and survive what happens to files."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffedit.errors import ImageError, InputError, ModelError, OutputError
from diffedit.training.cache import LatentCache
from diffedit.training.data import Example, Folder

SIDE, COUNT = 16, 10


def autoencoder(seed: int = 0, scale: float = 0.5, shift: float | None = 0.25) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=scale,
        shift_factor=shift,
    )
    vae.calls = 0
    inner = vae.encode

    def encode(pixels: Tensor) -> Any:
        vae.calls += 1
        return inner(pixels)

    vae.encode = encode
    return vae


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    folder = Path(__file__).parents[2] / "diffedit" / "models" / "embedded" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).train()


class Made:
    """Ten pictures of noise; some of them broken, some with weights or hints."""

    name = "made"

    def __init__(self, count: int = COUNT, bad: tuple[int, ...] = (), **extra: Any) -> None:
        self.count, self.bad, self.extra = count, bad, extra
        self.digest = f"made {count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise ImageError(f"{index}.png (broken)")
        image = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        extra = {name: make(index, image) for name, make in self.extra.items()}
        return Example(image, f"a red circle {index % 3}", f"{index}.png", **extra)


@torch.no_grad()
def direct(vae: AutoencoderKL, source: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, one picture at a time, unscaled."""
    found = []
    for index in indices:
        image = torch.tensor(source[index].image).permute(2, 0, 1)[None]
        found.append(vae.encode(image / 255 * 2 - 1).latent_dist)
    return torch.cat([d.mean for d in found]), torch.cat([d.logvar for d in found])


def files(cache: LatentCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_latents_are_the_posteriors_at_the_denoisers_scale(tmp_path: Path) -> None:
    vae, order = autoencoder(), [9, 0, 4, 4, 3]
    batch = LatentCache(tmp_path, Made(), vae, chunk=4, variance=True).rows(order)
    mean, log_variance = direct(vae, Made(), order)
    expected = (mean - 0.25) * 0.5
    assert batch.latents.dtype == torch.float32
    assert batch.latents.shape == (5, 4, SIDE // 4, SIDE // 4)
    assert torch.allclose(batch.latents, expected, rtol=2e-3, atol=1e-3)
    assert batch.log_variance is not None
    spread, std = (0.5 * batch.log_variance).exp(), (0.5 * log_variance).exp() * 0.5
    assert torch.allclose(spread, std, rtol=5e-3)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([batch.drawn(generator) for _ in range(400)])
    assert torch.allclose(draws.mean(0), batch.latents, atol=float(5 * spread.max() / 20))
    assert torch.allclose(draws.std(0) / spread, torch.ones(()), atol=0.2)
    assert (batch.tokens, batch.embeddings, batch.weights, batch.hints) == (None,) * 4
    assert len(batch.to("cpu")) == 5
    assert torch.equal(batch.to("cpu").latents, batch.latents)


def test_a_second_run_encodes_nothing(
    tmp_path: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    vae = autoencoder()
    texts = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    cache = LatentCache(tmp_path, Made(), vae, chunk=4, **texts)
    first = cache.rows(list(range(COUNT)))
    calls = vae.calls
    assert calls == 3
    assert [f.name for f in files(cache)] == [f"{n:06d}.safetensors" for n in range(3)]

    class Refusing(Made):
        def __getitem__(self, index: int) -> Example:
            raise AssertionError("drawn again")

    hooked: list[int] = []
    text_encoder.register_forward_hook(lambda *_: hooked.append(1))
    again = LatentCache(tmp_path, Refusing(), vae, chunk=4, **texts)
    assert again.folder == cache.folder
    again.ensure()
    second = again.rows(list(range(COUNT)))
    again.empty()
    assert (vae.calls, hooked) == (calls, [])
    assert torch.equal(first.latents, second.latents)
    assert first.tokens is not None
    assert second.tokens is not None
    assert torch.equal(first.tokens, second.tokens)


def test_chunks_are_made_when_asked_for(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, Made(), autoencoder(), chunk=4)
    cache.rows([9])
    assert [f.stem for f in files(cache)] == ["000002"]
    cache.ensure(4)
    assert [f.stem for f in files(cache)] == ["000000", "000002"]
    whole = cache.rows(list(range(COUNT))).latents
    other = LatentCache(tmp_path / "b", Made(), autoencoder(), chunk=4)
    other.ensure()
    assert torch.equal(other.rows(list(range(COUNT))).latents, whole)
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match="holds 10 examples"):
            cache.rows([wrong])
    with pytest.raises(InputError, match="no examples asked for"):
        cache.rows([])


def test_another_model_source_or_option_has_another_folder(
    tmp_path: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    def folder(source: Any = None, vae: Any = None, **options: Any) -> str:
        return LatentCache(tmp_path, source or Made(), vae or autoencoder(), **options).folder.name

    altered = autoencoder()
    with torch.no_grad():
        next(altered.decoder.parameters()).view(-1)[0] += 1
    other_text = CLIPTextModel(text_encoder.config)
    seen = [
        folder(),
        folder(Made(9)),
        folder(vae=autoencoder(1)),
        folder(vae=altered),
        folder(vae=autoencoder(scale=0.6)),
        folder(chunk=4),
        folder(variance=True),
        folder(tokenizer=tokenizer),
        folder(tokenizer=tokenizer, length=16),
        folder(tokenizer=tokenizer, text_encoder=text_encoder),
        folder(tokenizer=tokenizer, text_encoder=other_text),
    ]
    assert len(set(seen)) == len(seen)
    assert folder() == seen[0]
    # Calls set padding and truncation in a tokenizer; it stays the same tokenizer.
    tokenizer(["a"], padding="max_length", max_length=9, truncation=True)
    assert folder(tokenizer=tokenizer) == seen[7]


def test_text_is_what_the_tokenizer_and_the_encoder_give(
    tmp_path: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    cache = LatentCache(
        tmp_path, Made(), autoencoder(), chunk=4, tokenizer=tokenizer, text_encoder=text_encoder
    )
    order = [7, 2, 0]
    batch = cache.rows(order)
    captions = [Made()[i].caption for i in order]
    ids = tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert batch.tokens is not None
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.tokens, ids)
    assert text_encoder.training  # as it was; dropout was off while its states were taken
    with torch.no_grad():
        expected = text_encoder.eval()(ids).last_hidden_state
        empty = tokenizer([""], padding="max_length", max_length=32, return_tensors="pt").input_ids
        nothing = text_encoder(empty).last_hidden_state[0]
    assert batch.embeddings is not None
    assert torch.allclose(batch.embeddings, expected, atol=2e-3)
    tokens, embeddings = cache.empty()
    assert tokens is not None
    assert embeddings is not None
    assert torch.equal(tokens, empty[0])
    assert torch.allclose(embeddings, nothing, atol=2e-3)


def test_weights_become_the_greatest_of_a_cell_and_hints_stay_pixels(tmp_path: Path) -> None:
    def weight(index: int, _: Any) -> Any:
        pixels = np.zeros((SIDE, SIDE), np.float32)
        pixels[5, 14] = 0.5
        return None if index > 3 else pixels

    source = Made(weight=weight, hint=lambda _, image: image[::-1].copy())
    batch = LatentCache(tmp_path, source, autoencoder(), chunk=2).rows([0, 9])
    assert batch.weights is not None
    expected = torch.zeros(2, 4, 4)
    expected[0, 1, 3] = 0.5
    expected[1] = 1  # an example without a weight
    assert torch.equal(batch.weights, expected)
    assert batch.hints is not None
    assert batch.hints.dtype == torch.float32
    hint = torch.tensor(source[9].hint).permute(2, 0, 1) / 255
    assert torch.allclose(batch.hints[1], hint)
    alone = LatentCache(tmp_path / "b", source, autoencoder(), chunk=2).rows([8, 9])
    assert alone.weights is None


def test_corrupt_pictures_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = (1, 3, 4, 5, 6, 7, 9)  # chunk 1 is all bad, and what follows 9 is 0
    cache = LatentCache(tmp_path, Made(bad=bad), autoencoder(), chunk=4)
    with caplog.at_level(logging.WARNING):
        cache.ensure()
    assert "made: skipped 7 of 10 pictures: 1.png (broken), 3.png" in caplog.text
    assert cache.skipped == [f"{index}.png (broken)" for index in bad]
    stands_in = [0, 2, 2, 8, 8, 8, 8, 8, 8, 0]
    latents = cache.rows(list(range(COUNT))).latents
    plain = LatentCache(tmp_path / "b", Made(), autoencoder(), chunk=4).rows(stands_in).latents
    assert torch.allclose(latents, plain, atol=2e-3)
    again = LatentCache(tmp_path, Made(bad=bad), autoencoder(), chunk=4)
    again.ensure()
    assert again.skipped == cache.skipped
    with pytest.raises(InputError, match=r"none of its pictures can be read, such as 0\.png"):
        LatentCache(tmp_path / "c", Made(bad=tuple(range(10))), autoencoder(), chunk=4).ensure()


def test_a_real_folder_with_a_truncated_file(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (40, 24, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"cat {number}.png")
    (pictures / "cat 1.png").write_bytes((pictures / "cat 1.png").read_bytes()[:500])
    folder = Folder(pictures, SIDE)
    cache = LatentCache(tmp_path / "cache", folder, autoencoder())
    cache.ensure()
    assert [why[:9] for why in cache.skipped] == ["cat 1.png"]
    mean, _ = direct(autoencoder(), folder, [0, 2])
    assert torch.allclose(cache.rows([0, 1]).latents, (mean - 0.25) * 0.5, atol=2e-3)


def _truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path, other: Path) -> None:
    save_file({"latents": torch.zeros(4, 4, 4, 4)}, path)


def _misplaced(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [_truncate, _empty, _foreign, _misplaced])
def test_a_damaged_or_foreign_chunk_is_made_anew(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LatentCache(tmp_path, Made(), autoencoder(), chunk=5)
    before = cache.rows(list(range(COUNT))).latents
    first, second = files(cache)
    contents = load(first.read_bytes())  # not mapped: it is about to be cut short
    damage(first, second)
    vae = autoencoder()
    again = LatentCache(tmp_path, Made(), vae, chunk=5)
    assert torch.equal(again.rows(list(range(COUNT))).latents, before)
    assert vae.calls == 1
    assert "000000.safetensors is made anew" in caplog.text
    assert all(torch.equal(value, contents[key]) for key, value in load(first.read_bytes()).items())


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = LatentCache(tmp_path, Made(), autoencoder(), chunk=4)
    cache.ensure(4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.ensure()
    assert [f.name for f in files(cache)] == ["000000.safetensors"]
    cache.ensure()
    assert len(files(cache)) == 3


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = LatentCache(tmp_path, Made(), autoencoder(), chunk=4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*free some space") as error:
            cache.rows([0])
    assert "\n" not in str(error.value)
    assert files(cache) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a write that the kernel itself cuts short
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        with pytest.raises(OutputError, match="latents cannot be kept there"):
            cache.rows([0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == []
    assert len(cache.rows([0])) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be kept there"):
        LatentCache(tmp_path / "file", Made(), autoencoder()).ensure()


def test_what_cannot_be_cached_is_said(tmp_path: Path, text_encoder: CLIPTextModel) -> None:
    def fails(says: str, source: Any, error: Any = InputError, **options: Any) -> None:
        vae = options.pop("vae", None) or autoencoder()
        with pytest.raises(error, match=says):
            LatentCache(tmp_path, source, vae, **options).rows([0, 5])
        assert not list(tmp_path.rglob("*.part"))

    def small(index: int, image: Any) -> Any:
        return image[:8, :8]

    def some(index: int, image: Any) -> Any:
        return image if index % 2 else None

    def few(index: int, image: Any) -> Any:
        return image if index < 5 else None

    broken = autoencoder()
    with torch.no_grad():
        broken.quant_conv.bias.fill_(float("nan"))
    fails("without its tokenizer", Made(), text_encoder=text_encoder)
    fails("should be 1 or more", Made(), chunk=0)
    fails("should be 1 or more", Made(0))
    fails("differ in size", Made(hint=small))
    fails("some examples have hints, others none", Made(hint=some))
    fails("some examples have hints, others none", Made(hint=few), chunk=5)
    fails(r"0\.png: the autoencoder's latents are not finite", Made(), ModelError, vae=broken)
    with pytest.raises(InputError, match="without variance"):
        LatentCache(tmp_path, Made(), autoencoder()).rows([0]).drawn(torch.Generator())


def test_sides_are_multiples_of_the_autoencoders_factor(tmp_path: Path) -> None:
    class Odd(Made):
        def __getitem__(self, index: int) -> Example:
            return Example(np.zeros((16, 18, 3), np.uint8), "", "odd.png")

    with pytest.raises(InputError, match=r"odd\.png is 18x16: the sides should be multiples of 4"):
        LatentCache(tmp_path, Odd(), autoencoder()).ensure()


def test_the_tokens_of_a_large_vocabulary_are_kept(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large:
        """The same words, numbered from 49,000 on, as CLIP's own markers are."""

        model_max_length = 32
        backend_tokenizer = tokenizer.backend_tokenizer
        pad_token_id = bos_token_id = eos_token_id = 1

        def __call__(self, *given: Any, **options: Any) -> Any:
            found = tokenizer(*given, **options)
            found["input_ids"] = found.input_ids + 49_000
            return found

    batch = LatentCache(tmp_path, Made(), autoencoder(), tokenizer=Large()).rows([0])
    assert batch.tokens is not None
    assert int(batch.tokens.min()) >= 49_000


def test_grey_hints_are_kept_in_one_channel(tmp_path: Path) -> None:
    """Chunks of either kind may stand in one batch."""

    def hint(index: int, image: Any) -> Any:
        return np.repeat(image[..., :1], 3, axis=2) if index < 4 else image

    source = Made(8, hint=hint)
    cache = LatentCache(tmp_path, source, autoencoder(), chunk=4)
    cache.ensure()
    channels = [
        load(file.read_bytes())["hints"].shape[1] for file in sorted(cache.folder.iterdir())
    ]
    assert channels == [1, 3]
    for indices in ([0, 1], [2, 7], [5, 6]):
        hints = cache.rows(indices).hints
        assert hints is not None
        for found, index in zip(hints, indices, strict=True):
            expected = torch.from_numpy(np.asarray(source[index].hint)).permute(2, 0, 1)
            assert torch.equal(found, expected / 255)
