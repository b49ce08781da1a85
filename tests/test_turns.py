"""Threads: what loading changes for a whole process, no run of another thread sees."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from diffedit import Contribution, Edit, Editor, Pass, Run
from diffedit.models.turns import Turns
from diffedit_lora import LoRA
from tests.families import SD
from tests.families.additions import additions, written


def _latents(editor: Editor, go: Pass) -> Tensor:
    made = editor.run(None, go).latents
    assert made is not None
    return made


def test_two_threads_with_a_lora_each(tmp_path: Path) -> None:
    made = [additions(SD.pipeline(), seed=seed) for seed in range(2)]
    files = [written(tmp_path / f"{n}.safetensors", state) for n, state in enumerate(made)]
    passes = [Pass(prompt="a", steps=2, edits=[LoRA(model=file)]) for file in files]
    wanted = [_latents(SD.editor(), go) for go in passes]
    editors = [SD.editor() for _ in passes]
    before = nn.Module.register_parameter

    def work(number: int) -> list[bool]:
        made = [_latents(editors[number], passes[number]) for _ in range(6)]
        return [torch.equal(one, wanted[number]) for one in made]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(same) for same in pool.map(work, range(2)))
    assert nn.Module.register_parameter is before


def test_one_thread_loads_in_another_type_while_another_runs(tmp_path: Path) -> None:
    SD.pipeline().save_pretrained(tmp_path / "model")
    editor, go = SD.editor(), Pass(prompt="a", steps=2)
    wanted, done = _latents(editor, go), threading.Event()

    def load() -> int:
        loaded = 0
        while not done.is_set():
            Editor.load(tmp_path / "model", device="cpu", dtype="bfloat16")
            loaded += 1
        return loaded

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        try:
            same = [torch.equal(_latents(editor, go), wanted) for _ in range(20)]
        finally:
            done.set()
        assert loading.result() > 0
    assert all(same)
    assert torch.get_default_dtype() == torch.float32


# --- turns alone ----------------------------------------------------------------------------------


def _soon(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def test_many_run_at_a_time() -> None:
    turns, both = Turns(), threading.Barrier(2, timeout=10)

    def run() -> None:
        with turns.running():
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(run) for _ in range(2)]:
            one.result()


def test_who_loads_waits_for_those_that_run_and_goes_before_the_next() -> None:
    turns, order = Turns(), list[str]()
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with turns.running():
            entered.set()
            assert leave.wait(10)
            order.append("first")

    def load() -> None:
        with turns.loading():
            order.append("load")

    def second() -> None:
        with turns.running():
            order.append("second")

    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(first)]
        assert entered.wait(10)
        made.append(pool.submit(load))
        assert _soon(lambda: bool(turns._waiting))
        made.append(pool.submit(second))
        time.sleep(0.05)
        assert order == []
        leave.set()
        for one in made:
            one.result(10)
    assert order == ["first", "load", "second"]


def test_two_runs_that_load_do_not_wait_for_each_other() -> None:
    turns, both, order = Turns(), threading.Barrier(2, timeout=10), list[str]()

    def run(name: str) -> None:
        with turns.running():
            both.wait()
            with turns.loading():
                order.append(name)
                with turns.running(), turns.loading():
                    order.append(name)

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(run, name) for name in "ab"]:
            one.result(20)
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert not turns._running
    assert not turns._waiting
    assert turns._loader is None


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    for turn in (turns.running, turns.loading):
        with pytest.raises(KeyError), turn():
            raise KeyError
    with turns.running(), pytest.raises(KeyError), turns.loading():
        raise KeyError
    assert not turns._running
    assert not turns._waiting
    assert turns._loader is None


def test_a_download_keeps_nobody_waiting() -> None:
    """Neither within a step nor within a load; afterwards the turn is as it was."""
    turns, other = Turns(), ThreadPoolExecutor(1)

    def load() -> str:
        with turns.loading():
            return "loaded"

    with other:
        for turn in (turns.running, turns.loading):
            with turn():
                with turns.aside():
                    assert other.submit(load).result(10) == "loaded"
                waits = other.submit(load)
                with pytest.raises(TimeoutError):
                    waits.result(0.05)
            assert waits.result(10) == "loaded"


def test_a_forked_process_waits_for_no_thread_that_it_does_not_have() -> None:
    turns, entered, leave = Turns(), threading.Event(), threading.Event()

    def run() -> None:
        with turns.running():
            entered.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run)
        assert entered.wait(10)
        turns.alone()
        with turns.loading():
            leave.set()


def test_each_step_has_a_turn_and_what_is_between_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Turns()
    monkeypatch.setattr("diffedit.editor.turns", seen)
    within = list[str | None]()

    class Told(Edit):
        name: ClassVar[str] = "told"

        def contribute(self, run: Run) -> Contribution:
            within.append(seen._turn)
            return Contribution()

    editor = SD.editor()
    events = editor.stream(None, Pass(prompt="a", steps=2, edits=[Told()]))
    next(events)
    assert within == ["running"]
    assert seen._turn is None
    # Cancelling waits for nobody.
    with ThreadPoolExecutor(1) as pool:
        begun, leave = threading.Event(), threading.Event()

        def load() -> None:
            with seen.loading():
                begun.set()
                assert leave.wait(10)

        loading = pool.submit(load)
        assert begun.wait(10)
        events.close()
        leave.set()
        loading.result(10)
