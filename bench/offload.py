"""What `max_memory` costs and saves: bytes on the device, and the time of a call; see README.md.

python -m bench.offload --model sd15,sdxl,flux

Without a GPU the bytes are those of `bench.fake_gpu`, and there is no time to tell. The models are
those of `bench.sizes`: settings of full size, random weights. `--cpu` times calls on the CPU, with
weights that are copied within main memory as they would be to a device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from bench import measure, sizes
from bench.fake_gpu import GPU, Memory, bytes_on, gpu, networks
from diffedit.models import holding
from diffedit.models.protocol import ModelInput
from diffedit.rows import RowKey, RowMap

RESULTS = Path(__file__).parent / "results"
#: Shares of the weights that there is room for on the device.
SHARES = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class Cost:
    """What a picture takes of the device.

    Attributes:
        share: of the weights that there was room for.
        weights: bytes of them that lie there.
        call, decode: most bytes while the denoiser is called, and while a picture is decoded.
        copied: bytes that travel to the device while the denoiser is called; None: not counted.
        ms: of a call; None: nobody knows without a device.
    """

    share: float
    weights: int
    call: int
    decode: int
    copied: int | None = None
    ms: float | None = None


def costs(name: str, share: float, rounds: int = 0) -> Cost:
    """The costs of a model.

    Args:
        rounds: calls that are timed, on a real GPU; 0: a fake one.
    """
    size = sizes.MODELS[name]
    if rounds:
        pipe = sizes.made(size, torch.device("cpu"))
        with torch.no_grad():
            return _real(size, pipe, share, rounds)
    with gpu():
        before = torch.get_default_dtype()
        torch.set_default_dtype(size.dtype)
        try:
            pipe = size.make()
        finally:
            torch.set_default_dtype(before)
        model, x = _placed(size, pipe, share)
        weights = bytes_on("cuda", pipe)
        with Memory() as memory:
            model.predict(x)
        call, copied, memory = memory.most, memory.copied, Memory()
        with memory:
            model.decode(x.latents[:1])
    return Cost(share, weights, weights + call, weights + memory.most, copied)


def on_cpu(name: str, rounds: int) -> dict[float, list[float]]:
    """Milliseconds of calls in bfloat16 on the CPU, by share; the shares take turns.

    What a layer computes with is copied each time, as if the weights were elsewhere.
    """
    size = replace(sizes.MODELS[name], dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    models = {share: _placed(size, sizes.made(size, cpu), share, cpu) for share in SHARES}
    took: dict[float, list[float]] = {share: [] for share in SHARES}
    with torch.no_grad(), _copied():
        for turn in range(rounds + 1):
            for share, (model, x) in models.items():
                began = time.perf_counter()
                model.predict(x)
                if turn:  # the first one sets up
                    took[share].append(1000 * (time.perf_counter() - began))
    return took


@contextmanager
def _copied() -> Iterator[None]:
    """While inside, weights that stay away are copied also where nothing is elsewhere."""
    usual = holding._copies

    def copies(layer: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = usual(layer)
        return weight.clone(), None if bias is None else bias.clone()

    holding._copies = copies
    try:
        yield
    finally:
        holding._copies = usual


def _placed(
    size: sizes.Size, pipe: Any, share: float, on: torch.device = GPU
) -> tuple[Any, ModelInput]:
    """A model on a device, and a call of its denoiser for a picture of its own size."""
    room = int(share * sum(bytes_on(one, pipe) for one in ("cpu", "cuda")))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    parts = sorted(networks(pipe), key=lambda one: one is not denoiser)
    holding.place(parts, on, room)
    model = size.model(pipe, "random weights")
    branches = ("positive", "negative")[: 1 + size.negative]
    cells = size.side // model.cell
    latents = torch.zeros(len(branches), model.channels, cells, cells, device=on)
    given = model.embed(["a red circle"] * len(branches), (size.side, size.side))
    rows = RowMap(tuple(RowKey(branch, 0) for branch in branches))
    timestep = torch.tensor(500.0, device=on)
    guidance = size.guidance if "embedded_guidance" in model.capabilities else None
    return model, ModelInput(latents, timestep, given, rows, guidance=guidance)


def _real(size: sizes.Size, pipe: Any, share: float, rounds: int) -> Cost:
    model, x = _placed(size, pipe, share)
    weights = bytes_on("cuda", pipe)
    most, took = [], []
    calls: list[Callable[[], Any]] = [lambda: model.predict(x)] * (rounds + 1)
    for work in [*calls, lambda: model.decode(x.latents[:1])]:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        took.append(1000 * (time.perf_counter() - began))
        most.append(torch.cuda.max_memory_allocated())
    return Cost(share, weights, most[0], most[-1], ms=median(took[1:-1]))


def table(found: dict[str, list[Cost]]) -> str:
    """The figures, as Markdown."""
    lines = ["| model | room for the weights | there, GiB | a call, GiB | decoding, GiB |"]
    lines[0] += " copied a call, GiB | ms |"
    lines.append("|---|---|---|---|---|---|---|")
    for name, some in found.items():
        for one in some:
            counted = (one.weights, one.call, one.decode, one.copied)
            sums = " | ".join("—" if n is None else f"{n / 2**30:.2f}" for n in counted)
            took = "—" if one.ms is None else f"{one.ms:.0f} ({one.ms / (some[0].ms or 1):.2f}×)"
            lines.append(f"| {name} | {one.share:.0%} | {sums} | {took} |")
    return "\n".join(lines)


def timed(name: str, took: dict[float, list[float]]) -> str:
    """What `on_cpu` found, as Markdown: ratios are those of calls that followed each other."""
    lines = ["| model, bfloat16 on the CPU | room for the weights | ms | beside room for all |"]
    lines.append("|---|---|---|---|")
    for share, some in took.items():
        ratios = [one / whole for one, whole in zip(some, took[1.0], strict=True)]
        spread = f"{median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(f"| {name} | {share:.0%} | {median(some):.0f} | {spread} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write to `bench/results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sd15,sdxl,flux")
    parser.add_argument("--rounds", type=int, default=5, help="calls that are timed")
    parser.add_argument("--cpu", action="store_true", help="time calls on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.cpu:
        calls = {name: on_cpu(name, options.rounds) for name in options.model.split(",")}
        print("\n\n".join(timed(name, took) for name, took in calls.items()))
        kept = {"machine": measure.machine("bfloat16"), "ms": calls}
        path = options.out / f"{measure.today()}-{measure.commit()}-offload-cpu.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        return
    rounds = options.rounds if torch.cuda.is_available() else 0
    found: dict[str, list[Cost]] = {}
    for name in options.model.split(","):
        for share in SHARES:
            found.setdefault(name, []).append(costs(name, share, rounds))
            gc.collect()
    print(table(found))
    where = {"device": torch.cuda.get_device_name() if rounds else "torch's fake tensors"}
    measured = {name: [vars(one) for one in some] for name, some in found.items()}
    path = options.out / f"{measure.today()}-{measure.commit()}-offload.json"
    path.write_text(json.dumps(where | {"models": measured}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
