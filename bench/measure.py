"""Side-by-side timing: contestants take turns, and a ratio is taken within each round.

Machines are noisy and get noisier while a benchmark runs. What one contestant took is therefore
only ever compared with what another took in the same round, moments apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")


class Ratio(NamedTuple):
    """How many times as long `over` took as `under`: median, least and most over the rounds.

    `by` is the clock, or the CPU time of all threads, which is less disturbed by others' work.
    """

    over: str
    under: str
    by: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× ({self.low:.2f}–{self.high:.2f})"


class Ratios(NamedTuple):
    """The same ratio by both measures; a claim has to hold by both."""

    clock: Ratio
    cpu: Ratio

    def __str__(self) -> str:
        return f"{self.clock} by the clock, {self.cpu} of CPU time"


class Meter:
    """Counts and times the work of a pipeline's components, whoever calls them.

    Attributes:
        cpu: CPU seconds by phase, ``text``, ``encode``, ``unet``, ``decode``.
        calls: how many, by phase.
        shapes: how often the UNet was called with which shape of its input.
    """

    def __init__(self, pipe: Any | None) -> None:
        self._methods: dict[str, tuple[Any, str]] = (
            {}
            if pipe is None
            else {
                "text": (pipe.text_encoder, "forward"),
                "encode": (pipe.vae, "encode"),
                "unet": (pipe.unet, "forward"),
                "decode": (pipe.vae, "decode"),
            }
        )
        self.cpu: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, every call of the components is counted."""
        with contextlib.ExitStack() as undo:
            for phase, (part, name) in self._methods.items():
                setattr(part, name, self._timed(phase, getattr(part, name)))
                undo.callback(delattr, part, name)  # the class's own method shows again
            yield

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.process_time()
            value = method(*args, **options)
            self.cpu[phase] += time.process_time() - began
            self.calls[phase] += 1
            if phase == "unet":
                self.shapes[tuple(args[0].shape)] += 1
            return value

        return timed

    @property
    def work(self) -> str:
        """What the UNet and the VAE were asked to do."""
        unet = " + ".join(f"{n} × {'×'.join(map(str, s))}" for s, n in self.shapes.items())
        return f"{unet}; VAE {self.calls['encode']} in, {self.calls['decode']} out"


@dataclass
class Contestant:
    """One side of a comparison.

    Attributes:
        name: what the table calls it.
        run: does the work once.
        pipe: the components that it uses, to be watched; None: there are none.
        work: what it did, filled in by the untimed first run.
        peak_mib: most memory above what stood before, in the untimed first run.
        seconds: what each round took by the clock.
        cpu: and in CPU time of all threads.
        phases: CPU seconds by phase, for each round.
    """

    name: str
    run: Callable[[], Any]
    pipe: Any = None
    work: str = ""
    peak_mib: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    def warm_up(self) -> None:
        """An untimed run: fills caches, says what is done, and takes the memory's peak."""
        with Peak() as peak:
            self.work = self._watched().work
        self.peak_mib = peak.mib

    def measure(self) -> None:
        """One timed run."""
        gc.collect()
        began, busy = time.perf_counter(), time.process_time()
        phases = dict(self._watched().cpu)
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - busy)
        phases["rest"] = self.cpu[-1] - sum(phases.values())
        self.phases.append(phases)

    def phase(self, name: str) -> float:
        """Median CPU seconds of a phase."""
        return median(one.get(name, 0.0) for one in self.phases)

    def _watched(self) -> Meter:
        meter = Meter(self.pipe)
        with meter.watching():
            self.run()
        return meter

    def record(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "name": self.name,
            "work": self.work,
            "peak_mib": self.peak_mib,
            "median_s": median(self.seconds),
            "seconds": self.seconds,
            "cpu": self.cpu,
            "phases": self.phases,
        }


def race(contestants: Sequence[Contestant], rounds: int) -> None:
    """Let contestants take turns: A, B, C, A, B, C, … after an untimed run of each."""
    gc.collect()
    gc.freeze()  # what is loaded stays, and need not be searched between runs
    try:
        for one in contestants:
            one.warm_up()
        for _ in range(rounds):
            for one in contestants:
                one.measure()
    finally:
        gc.unfreeze()


def ratios(over: Contestant, under: Contestant) -> Ratios:
    """How many times as long one took as another, round by round."""
    names = over.name, under.name
    return Ratios(
        _ratio(*names, "clock", over.seconds, under.seconds),
        _ratio(*names, "CPU", over.cpu, under.cpu),
    )


def _ratio(over: str, under: str, by: str, above: Sequence[float], below: Sequence[float]) -> Ratio:
    each = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(over, under, by, median(each), min(each), max(each))


class Peak:
    """The most memory (resident, MiB) above what stood at the start; None where Linux is not."""

    mib: float | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier run freed must not hide this one's
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts again here
        self._before = _status_mib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        after = _status_mib("VmHWM")
        if after is not None and self._before is not None:
            self.mib = round(after - self._before, 1)


def _status_mib(key: str) -> float | None:
    if not _STATUS.exists():
        return None
    lines = (line.split() for line in _STATUS.read_text("ascii").splitlines())
    return next((int(words[1]) / 1024 for words in lines if words[0] == f"{key}:"), None)


def cpu_seconds(command: Sequence[str], env: Mapping[str, str] | None = None) -> float:
    """User and system time of a command and its children, by wait4; it must succeed."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # reaped: Popen must not wait again
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def machine(dtype: str) -> dict[str, Any]:
    """What kind of machine this is, without anything that names it."""
    import diffusers
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "dtype": dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def commit() -> str:
    """The commit that was measured, with a ``+`` where the sources differ from it."""
    said = [_git("rev-parse", "--short", "HEAD"), _git("status", "--short", "diffedit", "plugins")]
    return (said[0] or "unknown") + ("+" if said[1] else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()
