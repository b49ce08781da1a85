"""Does an edit do what was asked, and only that?

    python -m bench.quality --out runs/quality                   # all of it
    python -m bench.quality --out runs/quality --limit 24        # a balanced part of it
    python -m bench.quality --out runs/quality --readme --card   # and put the tables where they go

The same command goes on where a killed run stopped. See README.md in this folder.
"""

from __future__ import annotations

import os

# Before anything imports torch: nothing here is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import hashlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.quality import autoencoder, figures, measures, page
from bench.quality import cases as sets
from bench.quality.cases import Case
from bench.quality.engines import ENGINES, Bench, Engine
from bench.quality.figures import Key
from bench.quality.judging import judge, style_judge
from diffedit import Editor
from diffedit.models.lora import USUAL, own_loras
from diffedit.training import card

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
README = Path(__file__).with_name("README.md")
LARGEST = 300_000
"""Bytes that a file of results may have."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pictures").mkdir(exist_ok=True)
    if options.worker is not None:
        number, workers = (int(v) for v in options.worker.split("/"))
        _work(_bench(options), options, number, workers)
        return 0
    with _stopped_whole():
        return _run(options)


@contextlib.contextmanager
def _stopped_whole() -> Iterator[None]:
    """A run that is told to end takes its processes with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(options: argparse.Namespace) -> int:
    bench = _bench(options)
    found = sets.balanced(sets.cases(), options.limit)
    about = _about(bench, options)
    _same_run(options.out / "run.json", about, options.fresh)
    began = time.perf_counter()
    if options.workers == 1:
        _work(bench, options, 0, 1)
    elif not _crew(options):
        print("a process failed; the same command goes on where it stopped", file=sys.stderr)
        return 1
    spent = _spent(options.out / "run.json", time.perf_counter() - began)
    records = _records(options.out)
    results = _results(bench, found, records, about | {"minutes": round(spent / 60, 1)}, options)
    _write(bench, found, records, results, options)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for records and pictures")
    parser.add_argument("--model", default="tiny", help="a name, folder or file; default: tiny")
    parser.add_argument("--lora", type=Path, help="LoRA weights to put onto the model")
    parser.add_argument("--few", type=Path, help="a distillation's result, to be held against it")
    parser.add_argument("--limit", type=int, help="this many cases, balanced over categories")
    parser.add_argument("--engines", help=f"some of: {'; '.join(ENGINES)} (by semicolons)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--scheduler", help="a scheduler's name; default: the model's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="in all of them")
    parser.add_argument("--fresh", action="store_true", help="forget what the folder holds")
    parser.add_argument(
        "--results", type=Path, help="where to keep the figures; default: the folder"
    )
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md, and "
                        "the figures into bench/results")  # fmt: skip
    parser.add_argument("--card", action="store_true", help="put the figures into the model's card")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _bench(options: argparse.Namespace) -> Bench:
    warnings.filterwarnings("ignore", message="The configuration file of this scheduler")
    editor = Editor.load(options.model, device="cpu", dtype="float32")
    few = options.few or own_loras(str(editor.model.info["source"])).get("few")
    if options.lora is not None and few is not None:
        raise SystemExit(f"bench.quality: --lora beside {few}: one LoRA at a time is measured")
    if options.lora is not None:
        editor.model.pipe.load_lora_weights(str(options.lora))  # type: ignore[attr-defined, unused-ignore]
    return Bench(
        editor,
        steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        few=few,
    )


def _about(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, with what, on what: all that decides the figures, and the machine."""
    machine = measure.machine("float32")
    return {
        "commit": measure.commit(),
        "sources": _sources(),
        "date": measure.today(),
        "model": options.model,
        "digest": _digest(bench),
        "lora": None if options.lora is None else options.lora.name,
        "few": None if bench.few is None else bench.few.name,
        "native": bench.native,
        "feather": bench.feather,
        "steps": bench.steps,
        "guidance": bench.guidance,
        "scheduler": bench.scheduler or type(bench.parts.scheduler).__name__,
        "seed": sets.SEED,
        "styles judged": style_judge() is not None,
        "set": sets.digest(sets.cases()),
        "limit": options.limit,
        "workers": options.workers,
        "features": measures.FEATURES,
        **{k: machine[k] for k in ("cpu", "cores", "torch", "diffusers", "python")},
    }


_MAKES = (
    *("diffedit/*.py", "diffedit/images/*.py", "diffedit/models/*.py", "plugins/**/*.py"),
    *("diffedit/training/world/*.py", "diffedit/training/hints.py", "diffedit/training/judges.py"),
    *("diffedit/training/styles.*", "bench/quality/cases.py", "bench/quality/pictures.py"),
    *("bench/quality/engines.py", "bench/quality/judging.py", "bench/quality/measures.py"),
)
"""What can change a picture or what is said of it."""


def _sources() -> str:
    """A name for the code that makes and judges pictures: any change of it changes it."""
    said = hashlib.sha256()
    for path in sorted({path for pattern in _MAKES for path in ROOT.glob(pattern)}):
        said.update(path.relative_to(ROOT).as_posix().encode())
        said.update(path.read_bytes())
    return said.hexdigest()[:12]


def _digest(bench: Bench) -> str:
    """A name for the weights: any change of any of them changes it."""
    said = hashlib.sha256()
    for part in bench.editor.model.parts():  # type: ignore[attr-defined, unused-ignore]
        for name, tensor in sorted(part.state_dict().items()):
            said.update(name.encode())
            said.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    beside = sorted(Path(bench.source).glob("controlnet/**/*.safetensors"))
    beside += [] if bench.few is None else [bench.few / USUAL, bench.few / "diffedit.json"]
    for path in beside:
        said.update("/".join(path.parts[-3:]).encode())
        said.update(path.read_bytes())
    return said.hexdigest()[:12]


#: What has to be the same for records of two runs to stand side by side.
_DECIDES = (
    *("sources", "digest", "lora", "few", "steps", "guidance", "scheduler", "set", "native"),
)


def _same_run(path: Path, about: Mapping[str, Any], fresh: bool) -> None:
    """Make sure that the folder holds this run and no other."""
    if path.exists() and not fresh:
        was = json.loads(path.read_text("utf-8"))
        if other := [key for key in _DECIDES if was["about"].get(key) != about[key]]:
            key = other[0]
            raise SystemExit(
                f"{path.parent}: holds a run with {key} {was['about'].get(key)!r}, this one's is"
                f" {about[key]!r}: choose another --out, or start anew with --fresh"
            )
        return
    for old in path.parent.glob("records-*.jsonl"):
        old.unlink()
    path.write_text(json.dumps({"about": about, "seconds": 0.0}, indent=1) + "\n", "utf-8")


def _spent(path: Path, more: float) -> float:
    """Add to the seconds that the run took, and return all of them."""
    run = json.loads(path.read_text("utf-8"))
    run["seconds"] += more
    path.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    return float(run["seconds"])


def _crew(options: argparse.Namespace) -> bool:
    """Let processes share the work; whether all of them came to its end."""
    command = [sys.executable, "-m", "bench.quality", *_said(options)]
    crew = [
        subprocess.Popen([*command, "--worker", f"{i}/{options.workers}"], cwd=ROOT)
        for i in range(options.workers)
    ]
    try:
        codes = [one.wait() for one in crew]  # of all of them, not up to the first failure
        return not any(codes)
    finally:
        for one in crew:
            one.terminate()


def _said(options: argparse.Namespace) -> list[str]:
    """The options that the processes have to know, as arguments."""
    names = (
        "out",
        "model",
        "lora",
        "few",
        "limit",
        "engines",
        "steps",
        "guidance",
        "scheduler",
        "threads",
    )
    return [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]


def _chosen(bench: Bench, options: argparse.Namespace) -> list[Engine]:
    names = options.engines.split(";") if options.engines else list(ENGINES)
    if wrong := [name for name in names if name.strip() not in ENGINES]:
        raise SystemExit(f"--engines: no {wrong[0]!r}; there are {'; '.join(ENGINES)}")
    return [ENGINES[name.strip()](bench) for name in names]


def shared(found: Sequence[Case], number: int, workers: int) -> list[Case]:
    """The cases of one process: of each group as many as the others get, give or take two.

    Groups take times of their own, and of each two neighbours in a group one has more engines.
    """
    turns, mine = Counter[tuple[str, str]](), []
    for case in found:
        group = case.category, case.group
        if turns[group] // 2 % workers == number:
            mine.append(case)
        turns[group] += 1
    return mine


def _work(bench: Bench, options: argparse.Namespace, number: int, workers: int) -> None:
    """Make and judge this process's share of the pictures that are not there yet."""
    torch.set_num_threads(max(1, options.threads // workers))
    found = shared(sets.balanced(sets.cases(), options.limit), number, workers)
    done = set(_records(options.out))
    engines = _chosen(bench, options)
    todo = [
        (case, engine)
        for case in found
        for engine in engines
        if (case.id, engine.name) not in done and not engine.declines(case)
    ]
    with (options.out / f"records-{number}.jsonl").open("a", encoding="utf-8") as file:
        for turn, (case, engine) in enumerate(todo):
            record = one(bench, case, engine, options.out / "pictures")
            file.write(json.dumps(record) + "\n")
            file.flush()
            if turn % 20 == 0:
                print(f"process {number}: {turn} of {len(todo)}, {case.id}", flush=True)


def one(bench: Bench, case: Case, engine: Engine, thumbs: Path) -> dict[str, Any]:
    """Make one picture, judge it, keep a thumbnail of it."""
    began, busy = time.perf_counter(), time.process_time()
    made = engine.make(case)
    spent, cpu = time.perf_counter() - began, time.process_time() - busy
    values = judge(case, made, bench.native, bench.feather)
    record: dict[str, Any] = {
        "case": case.id,
        "engine": engine.name,
        "values": values,
        "digest": measures.digest(made),
        "seconds": round(spent, 3),
        "cpu": round(cpu, 3),
    }
    if case.category == "nothing":
        record["features"] = [float(f"{v:.6g}") for v in measures.features(made)]
    (thumbs / f"{case.id}-{engine.name}.webp").write_bytes(page.thumbnail(made))
    if (given := page.given(case, bench.native)) is not None:
        (thumbs / f"{case.id}-given.webp").write_bytes(page.thumbnail(given))
    return record


def _records(out: Path) -> dict[Key, dict[str, Any]]:
    """All that was made so far; a line that a killed process left unfinished is not."""
    made: dict[Key, dict[str, Any]] = {}
    for path in sorted(out.glob("records-*.jsonl")):
        text = path.read_text("utf-8")
        whole, _, broken = text.rpartition("\n")
        if broken:
            path.write_text(whole + "\n" if whole else "", "utf-8")
        for line in whole.splitlines():
            record = json.loads(line)
            made[record["case"], record["engine"]] = record
    return made


def _results(
    bench: Bench,
    found: Sequence[Case],
    records: Mapping[Key, Any],
    about: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    ids = {case.id for case in found}
    kept = {key: record for key, record in records.items() if key[0] in ids}
    rows = [
        *autoencoder.rows(bench.parts.vae, bench.native, options.limit),
        *figures.rows(found, kept),
        *figures.distribution(found, kept, bench.native),
        figures.repeated(kept),
    ]
    declined = Counter(
        (case.category, engine.name, why)
        for engine in _chosen(bench, options)
        for case in found
        if (why := engine.declines(case)) not in ("", "not asked")
        and engine.name in ("diffedit", "diffusers")
    )
    made = len({case for case, engine in kept if engine == "diffedit"})
    return {
        "about": {**about, "made": made, "cases": len(found)},
        "gates": figures.gates(rows),
        "rows": rows,
        "seconds": figures.seconds(kept),
        "declined": [
            {"category": category, "engine": engine, "why": why, "cases": count}
            for (category, engine, why), count in declined.items()
        ],
        "values": figures.columns(found, kept),
    }


def _write(
    bench: Bench,
    found: Sequence[Case],
    records: Mapping[Key, Any],
    results: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    text = _json(results)
    if len(text) > LARGEST:
        text = _json({key: value for key, value in results.items() if key != "values"})
    about = results["about"]
    folder = options.results or (RESULTS if options.readme else options.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about['date']}-{about['commit']}-quality.json"
    path.write_text(text, "utf-8")
    tables = page.markdown(results)
    path.with_suffix(".md").write_text(tables, "utf-8")
    thumbs = options.out / "pictures"
    html = page.page(results, found, records, thumbs)
    (options.out / "index.html").write_text(html, "utf-8")
    page.grid(found, records, thumbs).save(options.out / "grid.png")
    if options.readme:
        page.put_into(README, tables)
    if options.card:
        put_into_card(Path(bench.source), results)
    print(tables)
    print(f"figures: {path}\npictures: {options.out / 'index.html'}, {options.out / 'grid.png'}")


def put_into_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the card of the model in `folder` anew, with these figures in it."""
    keep = ("about", "gates", "rows", "declined")
    told = {"training": card.read(folder).get("training", [])}
    card.write(folder, told | {"benchmark": {key: results[key] for key in keep}})


def _json(value: Any) -> str:
    """JSON with one line for each row, NaN as null."""

    def clean(one: Any) -> Any:
        if isinstance(one, float) and math.isnan(one):
            return None
        if isinstance(one, Mapping):
            return {key: clean(v) for key, v in one.items()}
        return [clean(v) for v in one] if isinstance(one, list) else one

    dense = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    parts = []
    for key, part in clean(value).items():
        if isinstance(part, list):
            body = "[\n" + ",\n".join(f"  {dense(one)}" for one in part) + "\n ]"
        elif key == "values":
            body = "{\n" + ",\n".join(f"  {dense(k)}: {dense(v)}" for k, v in part.items()) + "\n }"
        else:
            body = dense(part)
        parts.append(f" {dense(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    raise SystemExit(main())
