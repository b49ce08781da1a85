"""How fast ``diffedit train`` trains beside a straightforward loop: see README.md in this folder.

python bench/training.py --what speed --rounds 7 --json out.json

Every contestant is a process of its own (allocators, threads and peaks of memory belong to a
process) that waits for its turn; nobody else's turn runs meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

# Before anything imports torch: nothing here is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measure
from bench.measure import Contestant, ratios

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
RATE, DECAY, EMA = 1e-4, 1e-2, 0.9999


# --- contestants: each does steps and gives their losses --------------------------------------


def training(folder: Path, options: argparse.Namespace, **changes: Any) -> Any:
    """What both sides train, as a training of diffedit."""
    from diffedit.training.config import DenoiserTraining

    said: dict[str, Any] = {
        "train": "denoiser",
        "model": options.model,
        "text": "frozen",
        "data": {"world": "simple", "count": options.count, "side": options.side, "held_out": 0},
        "out": folder / "run",
        "steps": 1_000_000,
        "batch": options.batch,
        "seed": options.seed,
        "device": "cpu",
        "precision": "fp32",
        "ema": EMA,
        "objective": {"gamma": None, "dropout": 0.0, "timesteps": "uniform"},
        "optimiser": {"rate": RATE, "weight_decay": DECAY, "warmup": 1},
    }
    return DenoiserTraining.model_validate(said | changes)


class Turns:
    """A clock that stands still while others have their turn: pages are drawn once a minute."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.began: float | None = None

    def __call__(self) -> float:
        return self.spent + (0.0 if self.began is None else time.monotonic() - self.began)


@contextmanager
def diffedit_loop(
    folder: Path, options: argparse.Namespace, *, mkl: bool = False, **changes: Any
) -> Iterator[Callable[[], float]]:
    """A step of ``diffedit train``, with all that it does at every step.

    Args:
        mkl: whether products of matrices are left to MKL on every processor.
    """
    from diffedit.training import kernels, loop
    from diffedit.training.denoiser import DenoiserTask
    from diffedit.training.ema import Ema
    from diffedit.training.logbook import Logbook
    from diffedit.training.threads import keep_memory, one_core

    if mkl:  # for the whole of this process, which is one contestant's
        kernels.mkl_is_slow = lambda: False  # type: ignore[assignment]
    how = training(folder, options, out=folder / f"run-{os.getpid()}", **changes)
    machine = loop.accelerator(how)
    task = DenoiserTask(how, machine.device)
    report = loop.Report()
    steps = loop._Loop(task, how, machine, Ema(task.modules, loop._decay(how)), report, None)
    keep_memory()
    turns = Turns()
    with Logbook(how.out, steps=how.steps, clock=turns) as book, one_core():

        def step() -> float:
            turns.began = time.monotonic()
            loss, rate = steps.step(report.step)
            report.losses.append(loss)
            book.step(report.step, loss, rate, how.batch)
            turns.spent, turns.began = turns(), None
            return loss

        yield step


@contextmanager
def straightforward_loop(
    folder: Path, options: argparse.Namespace, mixed: str = "no", *, plain_attention: bool = False
) -> Iterator[Callable[[], float]]:
    """A step as scripts like diffusers' ``train_text_to_image.py`` make it.

    Args:
        mixed: their ``--mixed_precision``.
        plain_attention: in place of torch's fused one, which diffusers takes by itself.
    """
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset
    from tqdm import tqdm

    from diffedit.models.loading import EMBEDDED, TINY
    from diffedit.training import parts
    from diffedit.training.denoising import Latents, source

    how = training(folder, options)
    torch.manual_seed(options.seed)
    model = parts.load(options.model, torch.device("cpu"))
    examples = source(how.data, how.seed)
    cached = Latents(how, how.objective, model, examples, embeddings=True).cache
    rows = cached.rows(list(range(len(cached))))
    assert rows.embeddings is not None
    noise_scheduler = model.scheduler
    del model, cached, examples  # scripts that cache latents have one UNet in memory, no VAE
    where = EMBEDDED if options.model == TINY else Path(options.model).expanduser()
    unet = UNet2DConditionModel.from_pretrained(where, subfolder="unet", torch_dtype=torch.float32)
    if plain_attention:
        unet.set_attn_processor(AttnProcessor())
    unet.requires_grad_(True).train()

    accelerator = Accelerator(cpu=True, mixed_precision=mixed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=DECAY)
    loader = DataLoader(
        TensorDataset(rows.latents, rows.embeddings), batch_size=options.batch, shuffle=True
    )
    rates = get_scheduler("constant", optimizer)
    ema = EMAModel(unet.parameters(), decay=EMA, model_cls=type(unet), model_config=unet.config)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    progress = tqdm(file=sys.stderr)

    def batches() -> Iterator[Sequence[Tensor]]:
        while True:
            yield from loader

    every = batches()

    def step() -> float:
        latents, words = next(every)
        with accelerator.accumulate(unet):
            noise = torch.randn_like(latents)
            count = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, count, (len(latents),)).long()
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, words, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
            said = float(accelerator.gather(loss.repeat(len(latents))).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
            progress.update(1)
        progress.set_postfix(step_loss=loss.detach().item(), lr=rates.get_last_lr()[0])
        return said

    yield step
    progress.close()


CONTESTANTS: dict[str, tuple[str, Any, dict[str, Any], dict[str, str]]] = {
    # name: what the table calls it, how it is made, changes of the training, environment
    "diffedit": ("diffedit train", diffedit_loop, {}, {}),
    "plain": ("straightforward loop", straightforward_loop, {}, {}),
    "plain-asleep": (
        "the straightforward loop, waiting threads sleep",
        straightforward_loop,
        {},
        {"OMP_WAIT_POLICY": "PASSIVE"},
    ),
    "auto": ("diffedit train, precision auto", diffedit_loop, {"precision": "auto"}, {}),
    "plain-bf16": ("the straightforward loop, bf16", straightforward_loop, {"mixed": "bf16"}, {}),
    "mkl": ("diffedit train, products by MKL", diffedit_loop, {"mkl": True}, {}),
    "plain-attention": (
        "the straightforward loop, plain attention",
        straightforward_loop,
        {"plain_attention": True},
        {},
    ),
    "plain-1": (
        "the straightforward loop, one thread",
        straightforward_loop,
        {},
        {"OMP_NUM_THREADS": "1"},
    ),
    "fp32": ("fp32", diffedit_loop, {}, {}),
    "fp32-check": ("fp32, checkpointing", diffedit_loop, {"checkpointing": True}, {}),
    "bf16": ("bf16", diffedit_loop, {"precision": "bf16"}, {}),
    "bf16-check": (
        "bf16, checkpointing",
        diffedit_loop,
        {"precision": "bf16", "checkpointing": True},
        {},
    ),
}


def serve(name: str, folder: Path, options: argparse.Namespace) -> None:
    """A contestant's process: takes a number of steps a line, tells what they took."""
    _, made, changes, _ = CONTESTANTS[name]
    with made(folder, options, **changes) as step:
        print(json.dumps({"mib": _peak_mib()}), flush=True)
        for line in sys.stdin:
            began, busy = time.perf_counter(), time.process_time()
            losses = [step() for _ in range(int(line))]
            told = {
                "seconds": time.perf_counter() - began,
                "cpu": time.process_time() - busy,
                "losses": losses,
                "mib": _peak_mib(),
            }
            print(json.dumps(told), flush=True)


def _peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


class Runner:
    """A contestant in a process of its own."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.title, _, _, environment = CONTESTANTS[name]
        command = [sys.executable, "-m", "bench.training", "--serve", name, "--folder", str(folder)]
        for key in ("model", "side", "batch", "count", "seed"):
            command += [f"--{key}", str(getattr(options, key))]
        self.losses: list[float] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=measure.ROOT,
            env=os.environ | environment,
        )
        self.contestant = Contestant(self.title, lambda: None)
        self.peak: float = self._told()["mib"]

    def turn(self, steps: int, *, timed: bool = True) -> None:
        """Make steps while all others wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        told = self._told()
        self.losses += told["losses"]
        self.peak = told["mib"]
        if timed:
            self.contestant.seconds.append(told["seconds"])
            self.contestant.cpu.append(told["cpu"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.title} ended with exit code {self.process.wait()}")


@contextmanager
def running(names: Sequence[str], folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """The named contestants, warmed up by some steps each."""
    with ExitStack() as stack:
        runners = {}
        for name in names:
            runners[name] = runner = Runner(name, folder, options)
            stack.callback(runner.close)
            runner.turn(options.warmup, timed=False)
        yield runners


# --- what is measured ---------------------------------------------------------------------------


def speed(folder: Path, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Samples per second, in turns."""
    names = ["diffedit", "mkl", "plain", "plain-attention", "plain-asleep", "plain-1"]
    names += ["auto", "plain-bf16"]
    with running(names, folder, options) as runners:
        for number in range(options.rounds):
            # Whoever comes after a long turn of another finds cold caches: the order rotates.
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                runners[name].turn(options.steps)
        seen = options.steps * options.batch
        rows = []
        for runner in runners.values():
            one = runner.contestant
            rates = f"**{seen / median(one.seconds):.2f}** | {seen / median(one.cpu):.2f}"
            rows.append(
                f"| {one.name} | {rates} | {runner.peak:.0f} | {_mean(runner.losses):.3f} |"
            )
        took = {name: runner.contestant for name, runner in runners.items()}
        gain = ratios(took["plain"], took["diffedit"])
        others = {
            "with plain attention, as diffedit trains": ("plain-attention", "diffedit"),
            "with threads that sleep while they wait for each other": ("plain-asleep", "diffedit"),
            "kept to one thread, which never waits for another": ("plain-1", "diffedit"),
            "beside diffedit with products left to MKL, as on an Intel": ("plain", "mkl"),
            "beside `diffedit train` as it decides on this machine": ("plain", "auto"),
            "in bf16, beside the same": ("plain-bf16", "auto"),
        }
        found = {said: ratios(took[slow], took[fast]) for said, (slow, fast) in others.items()}
        reached = "reached" if min(one.value for one in gain) >= 1.2 else "NOT REACHED"
        title = f"speed: {_about(options)}, {options.rounds} rounds of {options.steps} steps"
        lines = [
            f"### {title}\n",
            "| | samples/s | samples per CPU second | peak MiB | mean loss |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"- the straightforward loop takes ≥ 1.2× as long: **{gain}**, {reached}",
            *(f"- {said}: {ratio}" for said, ratio in found.items()),
        ]
        data = {
            "contestants": [r.contestant.record() | {"losses": r.losses} for r in runners.values()],
            "ratios": [one._asdict() for pair in (gain, *found.values()) for one in pair],
        }
    return "\n".join(lines) + "\n", {"title": title, **data}


def memory(folder: Path, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Peak memory and time of checkpointing and of bf16, against plain fp32."""
    names = ["fp32", "fp32-check", "bf16", "bf16-check"]
    rows, data = [], []
    plain: tuple[float, float] | None = None
    for name in names:  # one after another: two processes would share what memory there is
        with running([name], folder, options) as runners:
            runner = runners[name]
            for _ in range(options.rounds):
                runner.turn(1)
        one, busy = runner.contestant, median(runner.contestant.cpu)
        plain = plain or (runner.peak, busy)
        rows.append(
            f"| {one.name} | {runner.peak:.0f} ({runner.peak - plain[0]:+.0f})"
            f" | {busy:.2f} ({busy / plain[1]:.2f}×) | {_mean(runner.losses):.4f} |"
        )
        data.append(one.record() | {"peak_mib": runner.peak})
    title = f"memory: {_about(options)}"
    lines = [
        f"### {title}\n",
        "| | peak MiB of the process | CPU s per step | mean loss |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n", {"title": title, "contestants": data}


def _about(options: argparse.Namespace) -> str:
    return f"{options.model}, {options.side} px, batch {options.batch}, AdamW, EMA"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- the command line -----------------------------------------------------------------------------

MEASURES = {"speed": speed, "memory": memory}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training against a straightforward loop.")
    parser.add_argument("--what", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each (default 7)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--warmup", type=int, default=8, help="untimed steps before (default 8)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--side", type=int, default=128, help="of the pictures (default 128)")
    parser.add_argument("--batch", type=int, default=16, help="default 16, as the scripts have it")
    parser.add_argument("--count", type=int, default=256, help="pictures (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write; a .md is written beside it")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md too")
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> str:
    options = parsed(arguments)
    if options.serve:
        serve(options.serve, options.folder, options)
        return ""
    about = {
        "date": measure.today(),
        "commit": measure.commit(),
        "seed": options.seed,
        "machine": measure.machine("float32"),
    }
    on = about["machine"]
    said = (
        f"{about['date']}, commit {about['commit']}: {on['cores']} cores ({on['cpu']}, load"
        f" {on['load']} at the start), torch {on['torch']}, diffusers {on['diffusers']}, seed"
        f" {options.seed}; medians, ratios are medians of the rounds' own ratios (least–most).\n"
    )
    print(said, flush=True)
    texts, reports = [said], []
    with tempfile.TemporaryDirectory() as scratch:
        for what in options.what:
            text, data = MEASURES[what](Path(scratch), options)
            print(text, flush=True)
            texts.append(text)
            reports.append(data)
    text = "\n".join(texts)
    name = f"{about['date']}-{str(about['commit']).strip('+')}-training.json"
    target = options.json or RESULTS / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about | {"reports": reports}, indent=1) + "\n", "utf-8")
    target.with_suffix(".md").write_text(text, "utf-8")
    if options.readme:
        begin, end = "<!-- training -->\n", "<!-- /training -->\n"
        head, rest = README.read_text("utf-8").split(begin)
        tail = rest.split(end)[1]
        README.write_text(head + begin + "\n" + text + "\n" + end + tail, "utf-8")
    return text


if __name__ == "__main__":
    main()
