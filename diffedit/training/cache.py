"""Latents and text embeddings on disk: each picture goes through the autoencoder once.

Chunks of examples are encoded when they are first asked for, and kept as safetensors in a folder
whose name is a digest of everything that decides what is in them: the source, the weights of the
autoencoder and of the text encoder, the tokenizer and the options. Another autoencoder, or another
side, therefore never meets chunks that are not its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit.errors import ImageError, InputError, ModelError, OutputError
from diffedit.training.data import Example, Source, log_skipped, none_left
from diffedit.training.files import whole_file
from diffedit.training.threads import in_parallel

log = logging.getLogger(__name__)

_PIECE = 8  # pictures that one core, or times four a GPU, encodes at a time
_LONGEST = 4096  # tokens; a tokenizer that knows no length says 1e30


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples ready for the denoiser, float32 and int64 on the CPU; None = the cache has none.

    Attributes:
        latents: (n, c, h, w), the posterior's mean as the denoiser sees it: (mean − shift)·scale
            with the autoencoder's ``shift_factor`` and ``scaling_factor``.
        log_variance: (n, c, h, w), the posterior's, at the same scale.
        tokens: (n, length) ids.
        embeddings: (n, length, d), the frozen text encoder's last hidden states.
        weights: (n, h, w) in [0, 1]: the greatest weight of the pixels of a cell.
        hints: (n, 3 or 4, H, W) in [0, 1], in pixels; the fourth of those for inpainting is the
            hole.
        phrases: (n, p, h, w) in [0, 1]: the share of a cell in which stands what a phrase says.
        spans: (n, p, length), 1 where a token belongs to the phrase; all 0 for no phrase.
    """

    latents: Tensor
    log_variance: Tensor | None = None
    tokens: Tensor | None = None
    embeddings: Tensor | None = None
    weights: Tensor | None = None
    hints: Tensor | None = None
    phrases: Tensor | None = None
    spans: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in values.items()}
        return Batch(**moved)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Latents drawn from the posterior N(mean, exp(log_variance)): (n, c, h, w).

        Raises:
            InputError: the cache was made without log-variances.
        """
        if self.log_variance is None:
            raise InputError("these latents were cached without variance: cache with variance=True")
        noise = torch.randn(self.latents.shape, generator=generator).to(self.latents.device)
        return self.latents + (0.5 * self.log_variance).exp() * noise


class LatentCache:
    """A source as latents, token ids, embeddings, weights and hints.

    A picture that cannot be read is skipped: the next one that can stands in for it, so that
    numbers and batch sizes stay what they are.

    Args:
        folder: the cache makes a folder of its own below it.
        source: the examples; all of one size, a multiple of the autoencoder's factor.
        vae: asked for the posterior of every picture, once, where it is and as precise as it is.
        tokenizer: None = no text.
        text_encoder: a frozen one, whose embeddings are kept; None = token ids only.
        chunk: examples to a file.
        variance: whether to keep the posterior's log-variance.
        length: tokens per caption; default: the tokenizer's own.
        phrases: how many phrases of a caption are kept, with where they stand.

    Raises:
        InputError: options that do not go together.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        vae: AutoencoderKL,
        *,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: CLIPTextModel | None = None,
        chunk: int = 256,
        variance: bool = False,
        length: int | None = None,
        phrases: int = 0,
    ) -> None:
        if text_encoder is not None and tokenizer is None:
            raise InputError("a text encoder without its tokenizer: the cache needs both")
        if phrases and tokenizer is None:
            raise InputError("phrases without a tokenizer: the cache needs both")
        if chunk < 1 or not len(source):
            raise InputError(f"chunks of {chunk} of {len(source)} examples, should be 1 or more")
        if tokenizer is not None:
            length = length or int(tokenizer.model_max_length)
            if not 2 <= length <= _LONGEST:
                raise InputError(f"captions of {length} tokens, should be 2 to {_LONGEST}")
        self.source, self.vae, self.tokenizer = source, vae, tokenizer
        self.text_encoder, self.size = text_encoder, chunk
        self.variance, self.length, self.phrases = variance, length, phrases
        parts = [
            *("chunks 1", source.digest, chunk, variance, length, _weights_digest(vae)),
            None if tokenizer is None else _words(tokenizer),
            None if text_encoder is None else _weights_digest(text_encoder),
            *([f"phrases {phrases}"] if phrases else []),
        ]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.folder = folder / self.key[:16]
        self._faults: dict[int, list[str]] = {}
        self._shape: tuple[int, ...] | None = None
        self._making = threading.Lock()
        self._tokenizing = threading.Lock()  # its options are a state of the tokenizer's
        self._chunk: Callable[[int], dict[str, Tensor]] = lru_cache(256)(self._open)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def skipped(self) -> list[str]:
        """The pictures skipped in the chunks seen so far, each as ``name (why)``."""
        return list(dict.fromkeys(why for n in sorted(self._faults) for why in self._faults[n]))

    def ensure(self, count: int | None = None) -> None:
        """Have the chunks of the first ``count`` examples (default: all) on disk.

        Of several processes let one do this first; what the others find is then whole.

        Raises:
            InputError: none of the source's pictures can be read.
            OutputError: the disk is full, or must not be written to.
        """
        count = len(self) if count is None else min(count, len(self))
        for number in range(-(-count // self.size)):
            self._chunk(number)
        if count == len(self):
            log_skipped(self.source, self.skipped)
            self._place(0)

    def rows(self, indices: Sequence[int]) -> Batch:
        """The examples at these numbers, in this order. Makes the chunks that are not there yet."""
        places: dict[int, tuple[list[int], list[int]]] = {}
        for position, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"{self.source.name} holds {len(self)} examples, not {index}")
            number, row = self._place(index)
            positions, rows = places.setdefault(number, ([], []))
            positions.append(position)
            rows.append(row)
        found = [(torch.tensor(p), torch.tensor(r), self._chunk(n)) for n, (p, r) in places.items()]
        if not found:
            raise InputError("no examples asked for, should be at least one")

        def gather(name: str, dtype: torch.dtype, through: str | None = None) -> Tensor | None:
            parts = [(positions, chunk, rows) for positions, rows, chunk in found if name in chunk]
            if not parts:
                return None
            if len(parts) < len(found) and name != "weights":  # a weight that is not kept is 1
                raise InputError(f"{self.source.name}: some examples have {name}, others none")
            # A chunk of grey hints has one channel for three.
            shape = torch.broadcast_shapes(*(chunk[name].shape[1:] for _, chunk, _ in parts))
            made = torch.ones(len(indices), *shape, dtype=dtype)
            for positions, chunk, rows in parts:
                place = chunk[through][rows].long() if through else rows
                made[positions] = chunk[name][place].to(dtype)
            return made

        config, real = self.vae.config, torch.float32
        scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        latents, variance = gather("latents", real), gather("log_variance", real)
        hints = gather("hints", real)
        assert latents is not None  # every chunk with rows has them
        return Batch(
            (latents - shift) * scale,
            None if variance is None else variance + 2 * math.log(scale),
            gather("tokens", torch.int64, "text"),
            gather("embeddings", real, "text"),
            gather("weights", real),
            None if hints is None else hints.expand(-1, max(3, hints.shape[1]), -1, -1) / 255,
            None if (where := gather("phrases", real)) is None else where / 255,
            gather("spans", real),
        )

    def empty(self) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (length,) int64 and embeddings (length, d) of the empty caption, or None."""
        chunk = self._chunk(self._place(0)[0])
        tokens, embeddings = chunk.get("tokens"), chunk.get("embeddings")
        return (
            None if tokens is None else tokens[0].long(),
            None if embeddings is None else embeddings[0].float(),
        )

    def _place(self, index: int) -> tuple[int, int]:
        """Chunk and row of an example, or of the next that could be read."""
        count = -(-len(self) // self.size)
        number, within = divmod(index, self.size)
        for _ in range(count):
            rows = self._chunk(number)["row"]
            if int(rows[within]) >= 0:
                return number, int(rows[within])
            number, within = (number + 1) % count, 0
        raise none_left(self.source, self.skipped)

    def _open(self, number: int) -> dict[str, Tensor]:
        path = self.folder / f"{number:06d}.safetensors"
        with self._making:
            stored = self._read(path, number)
            if stored is None:
                self._write(path, *self._encode(number), number)
                stored = self._read(path, number)
        if stored is None:
            raise OutputError(f"{path} does not hold what was written to it: check the disk")
        return stored

    def _read(self, path: Path, number: int) -> dict[str, Tensor] | None:
        """A chunk, mapped into memory; None if it is missing, damaged or of something else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key or about.get("number") != str(number):
                    raise SafetensorError("made from something else")
                self._faults[number] = json.loads(about["skipped"])
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s is made anew: %s", path.name, error)
            return None

    def _write(
        self, path: Path, tensors: dict[str, Tensor], skipped: list[str], number: int
    ) -> None:
        about = {"key": self.key, "number": str(number), "skipped": json.dumps(skipped)}
        try:
            with whole_file(path) as file:
                file.write(save(tensors, about))
        except OSError as error:
            raise OutputError(
                f"{self.folder}: latents cannot be kept there ({error.strerror or error}), free "
                "some space or name another folder"
            ) from error

    # -- encoding --------------------------------------------------------------------------------

    def _encode(self, number: int) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of a chunk, and which pictures were skipped in it."""
        indices = range(number * self.size, min((number + 1) * self.size, len(self)))
        count = -(-len(self) // self.size)
        log.info("%s: encoding chunk %d of %d", self.source.name, number + 1, count)
        on_cpu = next(self.vae.parameters()).device.type == "cpu"
        step = _PIECE if on_cpu else 4 * _PIECE
        pieces = [indices[start : start + step] for start in range(0, len(indices), step)]
        with _evaluating(self.vae, self.text_encoder):
            if on_cpu:
                done = in_parallel(lambda piece: self._piece(map(self._example, piece)), pieces)
            else:
                done = [self._piece(in_parallel(self._example, piece)) for piece in pieces]
            captions = [caption for _, found, _ in done for caption in found]
            sound = np.array([caption is not None for caption in captions])
            # The row of an example; of the next that could be read, for one that could not.
            rows = np.cumsum(sound) - sound
            tensors = {"row": torch.from_numpy(np.where(rows < sound.sum(), rows, -1)).int()}
            made = [piece for piece, _, _ in done if piece]
            if len({"hints" in piece for piece in made}) > 1:
                raise InputError(f"{self.source.name}: some examples have hints, others none")
            for name in made[0] if made else ():
                tensors[name] = torch.cat([piece[name] for piece in made])
            if made and bool((tensors["weights"] == 1).all()):
                del tensors["weights"]
            hints = tensors.get("hints")
            if hints is not None and hints.shape[1] == 3 and bool((hints[:, :1] == hints).all()):
                tensors["hints"] = hints[:, :1].clone()
            if made and self.tokenizer is not None:
                tensors |= self._text(self.tokenizer, [c for c in captions if c is not None])
        return tensors, [fault for _, _, faults in done for fault in faults]

    def _example(self, index: int) -> Example | str:
        """An example, or why it is skipped."""
        try:
            example = self.source[index]
        except ImageError as error:
            return str(error)
        shape = example.image.shape[:2]
        self._shape = self._shape or shape
        parts = [part for part in (example.hint, example.weight) if part is not None]
        if shape != self._shape or any(part.shape[:2] != shape for part in parts):
            raise InputError(
                f"{example.name}: picture, hint, weight differ in size, or from others"
            )
        if any(side % _factor(self.vae) for side in shape):
            raise InputError(
                f"{example.name} is {shape[1]}x{shape[0]}: the sides should be multiples of "
                f"{_factor(self.vae)}"
            )
        return example

    @torch.no_grad()
    def _piece(
        self, read: Iterable[Example | str]
    ) -> tuple[dict[str, Tensor], list[str | None], list[str]]:
        """Tensors of the examples that were read, the captions (None: skipped), and why skipped."""
        found = list(read)
        captions = [None if isinstance(item, str) else item.caption for item in found]
        faults = [item for item in found if isinstance(item, str)]
        examples = [item for item in found if not isinstance(item, str)]
        if not examples:
            return {}, captions, faults
        like = next(self.vae.parameters())
        pixels = torch.from_numpy(np.stack([e.image for e in examples])).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 127.5 - 1).to(like, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        made = {"latents": posterior.mean}
        if self.variance:
            made["log_variance"] = posterior.logvar
        made = {name: value.half().cpu().contiguous() for name, value in made.items()}
        for example, latents in zip(examples, made["latents"], strict=True):
            if not latents.isfinite().all():
                raise ModelError(f"{example.name}: the autoencoder's latents are not finite")
        factor = _factor(self.vae)
        ones = np.ones(pixels.shape[2:], np.float16)
        weights = np.stack([ones if e.weight is None else e.weight for e in examples])
        made["weights"] = functional.max_pool2d(torch.from_numpy(weights).float(), factor).half()
        hints = [e.hint for e in examples if e.hint is not None]
        if 0 < len(hints) < len(examples):
            raise InputError(f"{self.source.name}: some examples have hints, others none")
        if hints:
            made["hints"] = torch.from_numpy(np.stack(hints)).permute(0, 3, 1, 2).contiguous()
        if self.phrases:
            assert self.tokenizer is not None
            assert self.length is not None
            with self._tokenizing:
                places = [_places(e, self.tokenizer, self.length, self.phrases) for e in examples]
            where = torch.stack([place for place, _ in places])
            made["phrases"] = (functional.avg_pool2d(where, factor) * 255).round().byte()
            made["spans"] = torch.stack([span for _, span in places])
        return made, captions, faults

    @torch.no_grad()
    def _text(self, tokenizer: CLIPTokenizer, captions: list[str]) -> dict[str, Tensor]:
        """What the captions are for the denoiser, each different one once; row 0 is the empty."""
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
        ids = tokenizer(
            list(rows),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        kind = torch.int16 if int(ids.max()) < 2**15 else torch.int32
        made = {
            "text": torch.tensor([rows[caption] for caption in captions], dtype=torch.int32),
            "tokens": ids.to(kind),
        }
        if self.text_encoder is not None:
            device = next(self.text_encoder.parameters()).device
            parts = [
                self.text_encoder(part.to(device)).last_hidden_state.half().cpu()
                for part in ids.split(32)
            ]
            made["embeddings"] = torch.cat(parts).contiguous()
        return made


def _places(
    example: Example, tokenizer: CLIPTokenizer, length: int, count: int
) -> tuple[Tensor, Tensor]:
    """Where the first phrases stand, (count, h, w), and which tokens they are, (count, length)."""
    where = torch.zeros(count, *example.image.shape[:2])
    spans = torch.zeros(count, length, dtype=torch.uint8)
    said = tokenizer(example.caption).input_ids[: length - 1]
    for number, phrase in enumerate(example.phrases[:count]):
        words = tokenizer(phrase.words, add_special_tokens=False).input_ids
        starts = [at for at in range(len(said)) if said[at : at + len(words)] == words]
        if len(starts) == 1:  # otherwise cut off, or said twice
            where[number] = torch.from_numpy(np.asarray(phrase.where, np.float32))
            spans[number, starts[0] : starts[0] + len(words)] = 1
    return where, spans


def _factor(vae: AutoencoderKL) -> int:
    """Pixels to a latent cell's side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _words(tokenizer: CLIPTokenizer) -> str:
    """A tokenizer's rules, without the padding that the last call left set in it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    marks = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    kept = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    return json.dumps([kept, marks], sort_keys=True)


def _weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) of a model's weights and of the settings that its output depends on."""
    config: Any = module.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    ignored = ("architectures", "dtype", "torch_dtype", "transformers_version")
    known = {k: v for k, v in settings.items() if k[0] != "_" and k not in ignored}
    made = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """No dropout for the time of the block."""
    parts = [part for model in models if model is not None for part in model.modules()]
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training
