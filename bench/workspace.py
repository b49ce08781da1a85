"""The workspace in a browser: how soon the page is ready, how soon a run shows something, what it
sends, and what visitors cost while they do nothing.

    python -m bench.workspace --readme
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from bench import measure

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
PHOTO = HERE.parent / "examples" / "coffee.png"

# Written down in the page itself: what Playwright tells arrives later.
WATCH = """() => {
  window.seen = { steps: [] };
  const looks = () => {
    const said = document.querySelector("#status").textContent;
    const step = Number(/step (\\d+) of/.exec(said)?.[1] ?? 0);
    const now = performance.now();
    if (step && !window.seen.steps.some(([, known]) => known === step)) {
      window.seen.steps.push([now, step]);
    }
    const preview = document.querySelector("#viewer .preview")?.getAttribute("src");
    if (window.seen.steps.length && preview) window.seen.preview ??= now;
    // Until the first step, it is the run before that is done.
    if (window.seen.steps.length && said.includes("Done in")) window.seen.done ??= now;
  };
  new MutationObserver(looks).observe(
    document.body, {subtree: true, childList: true, characterData: true, attributes: true});
  document.querySelector("#run").addEventListener(
    "click", () => (window.seen = { steps: [], run: performance.now() }), true);
}"""
READY = """async () => {
  while (!document.querySelector("#add-pass") || !document.querySelector("#canvas canvas")) {
    await new Promise(requestAnimationFrame);
  }
  return performance.now();
}"""


@contextmanager
def workspace(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """`diffedit demo` on a free port: its address and its process."""
    command = [sys.executable, "-m", "diffedit", "demo", "--port", "0", "--device", "cpu"]
    if options.model != "tiny":
        command += ["--model", options.model]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def ready(browser: Browser, address: str, rounds: int) -> list[float]:
    """Seconds from the start of a visit until picture and stack can be used; caches are warm."""
    visitor = browser.new_context(locale="en-GB")
    found = []
    for _ in range(rounds + 1):
        page = visitor.new_page()
        page.goto(address, wait_until="commit")
        found.append(page.evaluate(READY) / 1000)
        page.close()
    visitor.close()
    return found[1:]


def run(page: Page) -> dict[str, float]:
    """One run, from the click on Run on."""
    sent: list[str] = []
    page.on("request", lambda one: sent.append(one.url) if "/upload" in one.url else None)
    page.evaluate(WATCH)
    page.locator("#run").click()
    page.wait_for_function("window.seen.done", timeout=600_000)
    seen = page.evaluate("window.seen")
    steps = seen["steps"]
    step = (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1]) / 1000
    preview = (seen["preview"] - seen["run"]) / 1000
    return {"preview": preview, "step": step, "before": preview - step, "uploads": len(sent)}


def prepared(browser: Browser, address: str) -> Page:
    """A page with a photograph, a stroke and a prompt."""
    page = browser.new_context(locale="en-GB", viewport={"width": 1440, "height": 900}).new_page()
    page.goto(address)
    page.locator("#add-pass").wait_for()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open a picture").click()
    chooser.value.set_files(PHOTO)
    page.wait_for_function("document.querySelector('#status').textContent.includes('coffee')")
    page.locator("[id^='control-'][id$='.prompt']").fill("a yellow star")
    paint(page)
    return page


def paint(page: Page) -> None:
    box = page.locator("#canvas canvas").last.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.5
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=6)
    page.mouse.up()


def runs(browser: Browser, address: str, rounds: int) -> list[dict[str, float]]:
    """Runs of one page, each after another stroke, without the first, which loads the model."""
    page = prepared(browser, address)
    found = [run(page)]
    for _ in range(rounds):
        page.get_by_role("tab", name="Edit").click()
        paint(page)
        found.append(run(page))
    page.context.close()
    return found[1:]


def freed(browser: Browser, address: str, rounds: int) -> list[float]:
    """Seconds from the end of a tab whose run is under way until the next visitor's run begins."""
    waits = prepared(browser, address)
    found = []
    for _ in range(rounds):
        leaves = prepared(browser, address)
        leaves.locator("[id^='control-'][id$='.steps']").evaluate(
            "(one) => { one.value = '1000'; one.dispatchEvent(new Event('input')); }"
        )
        leaves.locator("#run").click()
        leaves.wait_for_function("document.querySelector('#status').textContent.includes(' step ')")
        waits.locator("#run").click()
        waits.wait_for_function("document.querySelector('#status').textContent.includes('Waiting')")
        began = time.monotonic()
        leaves.context.close()
        waits.wait_for_function(
            "!document.querySelector('#status').textContent.includes('Waiting')", polling=20
        )
        found.append(time.monotonic() - began)
        waits.locator("#cancel").click()
        waits.wait_for_function(
            "document.querySelector('#status').textContent.includes('Cancelled')"
        )
    waits.context.close()
    return found


def visitors(browser: Browser, address: str, server: psutil.Process, most: int) -> float:
    """MB that so many idle visitors take above one."""

    def resident() -> float:
        return float(sum(one.memory_info().rss for one in (server, *server.children(True)))) / 1e6

    pages = []
    alone = 0.0
    for number in range(most):
        pages.append(browser.new_context(locale="en-GB").new_page())
        pages[-1].goto(address)
        pages[-1].locator("#add-pass").wait_for()
        if not number:
            pages[-1].wait_for_timeout(2000)
            alone = resident()
    pages[-1].wait_for_timeout(2000)
    more = resident() - alone
    for page in pages:
        page.context.close()
    return more


def _row(name: str, values: Sequence[float], unit: str, target: str) -> str:
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"| {name} | **{mid:.2f}** ({low:.2f}–{high:.2f}) {unit} | {target} |"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The workspace in a browser.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, help="where to write; a .md is written beside it")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> str:
    options = parsed(arguments)
    on = measure.machine("float32")
    about: dict[str, Any] = {
        "date": measure.today(),
        "commit": measure.commit(),
        "machine": on,
        "rounds": options.rounds,
    }
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    with workspace(options) as (address, server), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        about["visitors"] = visitors(browser, address, server, options.visitors)
        about["ready"] = ready(browser, address, options.rounds)
        about["runs"] = runs(browser, address, options.rounds)
        about["freed"] = freed(browser, address, options.rounds)
        browser.close()
    made = about["runs"]
    where = (
        f"{about['date']}, commit {about['commit']}: {on['cores']} cores ({on['cpu']}, load"
        f" {on['load']} at the start; the browser runs on the same ones), model"
        f" {options.model}, {options.rounds} rounds, medians (least–most).\n"
    )
    idle = f"| {options.visitors} idle visitors above one | **{about['visitors']:.0f}** MB"
    text = "\n".join(
        [
            where,
            "| | | to reach |",
            "| --- | --- | --- |",
            _row("page ready, warm", about["ready"], "s", "≤ 2.5 s"),
            _row("first preview after Run", [one["preview"] for one in made], "s", ""),
            _row("a sampling step", [one["step"] for one in made], "s", ""),
            _row("first preview less a step", [one["before"] for one in made], "s", "≤ 0.5 s"),
            _row("uploads of a run", [one["uploads"] for one in made], "", "≤ 3"),
            _row("a closed tab frees the queue", about["freed"], "s", "≤ 2 s"),
            f"{idle} | ≤ 100 MB |",
        ]
    )
    print(text)
    name = f"{about['date']}-{str(about['commit']).strip('+')}-workspace.json"
    target = options.json or RESULTS / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    target.with_suffix(".md").write_text(text + "\n", "utf-8")
    if options.readme:
        begin, end = "<!-- workspace -->\n", "<!-- /workspace -->\n"
        head, rest = README.read_text("utf-8").split(begin)
        README.write_text(head + begin + "\n" + text + "\n\n" + end + rest.split(end)[1], "utf-8")
    return text


if __name__ == "__main__":
    main()
