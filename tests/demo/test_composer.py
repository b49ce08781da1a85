"""The composer in a real browser: what is clicked and typed is what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from diffedit_demo.stack import Stack
from tests.demo.conftest import visited
from tests.demo.steps import adds, field, opens, stack, unfolds


def outline(page: Page) -> list[list[str]]:
    """The passes by their prompts, with their edits."""
    return [
        [one["values"].get("prompt", ""), *(edit["name"] for edit in one["edits"])]
        for one in stack(page)["passes"]
    ]


def test_a_random_walk_keeps_everything_and_goes_back_step_by_step(page: Page) -> None:
    """Moves lose nothing, copies have names of their own, and every step can be taken back."""
    found: dict[str, Any] = page.evaluate(
        """() => {
          const { change, takeBack, makeAgain, stack } = window.diffedit.composer;
          let seed = 7;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          const uids = (one) => one.passes.flatMap((p) => [p.uid, ...p.edits.map((e) => e.uid)]);
          const states = [], faults = [];
          for (let step = 0; step < 45; step++) {
            const before = stack();
            const names = uids(before);
            const uid = names[random(names.length)];
            const pass = before.passes[random(before.passes.length)]?.uid;
            const acts = [
              ["addPass", []],
              ["move", [uid, random(2) ? 1 : -1]],
              ["move", [uid, random(2) ? 1 : -1]],
              ["copy", [uid]],
              ...(pass ? [["addEdit", [pass, "img2img"]]] : []),
              ...(names.length > 6 ? [["remove", [uid]]] : []),
            ].filter(([name]) => name === "addPass" || uid);
            const [name, values] = acts[random(acts.length)];
            change(name, values);
            const after = stack();
            const now = uids(after);
            if (new Set(now).size !== now.length) faults.push(`${name}: two of one name`);
            if (name === "move" && [...now].sort().join() !== [...names].sort().join()) {
              faults.push("a move lost something");
            }
            const told = JSON.stringify(before);
            if (JSON.stringify(after) !== told) states.push(told);
            const drawn = [...document.querySelectorAll("#composer section[id^=item-]")];
            const shown = drawn.map((one) => one.id.slice(5)).join();
            if (shown !== now.join()) faults.push("drawn otherwise");
          }
          const end = stack();
          let back = 0;
          while (states.length) {
            takeBack();
            back += JSON.stringify(stack()) === states.pop();
          }
          for (let step = 0; step < 60; step++) makeAgain();
          return { faults, back, end, again: stack() };
        }"""
    )
    assert found["faults"] == []
    assert found["back"] > 20
    assert found["again"] == found["end"]
    Stack.from_page(found["end"]["passes"])


def test_taking_back_keeps_what_was_typed_since(page: Page) -> None:
    field(page, "prompt").fill("first")
    adds(page, "style")
    field(page, "prompt").fill("second")
    page.get_by_role("button", name="Take the last change").click()
    assert outline(page) == [["second", "inpaint"]]
    expect(field(page, "prompt")).to_have_value("second")
    expect(page.get_by_role("button", name="Take the last change")).to_be_disabled()
    # And forward again, with what was typed in between.
    field(page, "prompt").fill("third")
    page.get_by_role("button", name="Make the change again").click()
    assert outline(page) == [["third", "inpaint", "style"]]
    expect(page.get_by_role("button", name="Make the change again")).to_be_disabled()
    page.get_by_role("button", name="Take the last change").click()
    adds(page, "img2img")  # another way: the one that was taken back is gone
    expect(page.get_by_role("button", name="Make the change again")).to_be_disabled()


def test_a_preset_keeps_the_prompt_and_can_be_chosen_again(page: Page) -> None:
    field(page, "prompt").fill("a cat")
    page.locator("#preset-vary").click()
    field(page, "strength").fill("0.9")
    page.locator("#preset-vary").click()
    assert outline(page) == [["a cat", "img2img"]]
    expect(field(page, "strength")).to_have_value("0.6")
    page.locator("#preset-remove").click()  # says that it wants none
    assert outline(page) == [["", "inpaint"]]


def test_an_edit_that_leaves_its_pass_enters_the_next(page: Page) -> None:
    page.locator("#add-pass").click()
    field(page, "prompt", 1).fill("second")
    page.get_by_role("button", name="Move inpaint down").click()
    assert outline(page) == [[""], ["second", "inpaint"]]
    # The keyboard does the same, and the focus goes with it.
    page.keyboard.press("Alt+ArrowUp")
    assert outline(page) == [["", "inpaint"], ["second"]]
    expect(page.get_by_role("button", name="Move inpaint down")).to_be_focused()


def test_each_mask_gets_a_layer_of_its_own(page: Page) -> None:
    adds(page, "inpaint")
    masks = [edit["values"]["mask"] for edit in stack(page)["passes"][0]["edits"]]
    assert masks == ["layer:A", "layer:B"]


def test_only_what_was_set_is_said_and_it_can_be_set_back(page: Page) -> None:
    edit = stack(page)["passes"][0]["edits"][0]
    assert edit["values"] == {"mask": "layer:A"}
    field(page, "feather").fill("12")
    assert stack(page)["passes"][0]["edits"][0]["values"]["feather"] == 12
    page.get_by_role("button", name="Set Feather back").click()
    expect(field(page, "feather")).to_have_value("8")
    assert stack(page)["passes"][0]["edits"][0]["values"] == {"mask": "layer:A"}


def test_numbers_are_checked_as_they_are_typed(page: Page) -> None:
    guidance = unfolds(page, field(page, "guidance"))
    guidance.fill("101")
    expect(page.locator("[id^='fault-'][id$='.guidance']")).to_have_text("Should be 0 to 100.")
    guidance.fill("7.25")
    expect(page.locator("[id^='fault-'][id$='.guidance']")).to_be_empty()
    assert stack(page)["passes"][0]["values"]["guidance"] == 7.25
    guidance.fill("")
    assert "guidance" not in stack(page)["passes"][0]["values"]


def test_a_slider_and_its_number_are_one(page: Page) -> None:
    page.locator("#preset-vary").click()
    number = field(page, "strength")
    number.focus()
    page.keyboard.press("ArrowUp")
    expect(number).to_have_value("0.65")
    page.locator("#composer .both input[type=range]").last.fill("0.3")
    expect(number).to_have_value("0.3")
    assert stack(page)["passes"][0]["edits"][0]["values"]["strength"] == 0.3


def test_a_hint_is_shown_and_follows_its_parameters(page: Page, photo: Path) -> None:
    opens(page, photo)
    adds(page, "controlnet")
    page.locator(".hint summary").click()
    shown = page.locator(".hint img")
    expect(shown).to_be_visible(timeout=30_000)
    size = shown.evaluate(
        "async (one) => (await one.decode(), [one.naturalWidth, one.naturalHeight])"
    )
    assert size == [160, 128]
    edges = shown.get_attribute("src")
    kind = field(page, "kind")
    kind.fill("none")
    expect(shown).not_to_have_attribute("src", edges or "", timeout=30_000)
    kind.fill("nonsense")
    expect(page.locator(".hint .shown")).to_contain_text(
        "no preprocessor 'nonsense'", timeout=30_000
    )


def test_two_hints_asked_for_at_once_are_both_shown(page: Page, photo: Path) -> None:
    opens(page, photo)
    for _ in range(2):
        adds(page, "controlnet")
    field(page, "kind", 1).fill("none")
    for summary in page.locator(".hint summary").all():
        summary.click()
    for place in range(2):
        expect(page.locator(".hint").nth(place).locator("img")).to_be_visible(timeout=60_000)
    first, second = (one.get_attribute("src") for one in page.locator(".hint img").all())
    assert first != second


def test_a_seed_is_drawn_at_random(page: Page) -> None:
    drawn = set()
    for _ in range(5):
        page.get_by_role("button", name="Draw a Seed at random").click()
        drawn.add(stack(page)["settings"]["seed"])
    assert len(drawn) >= 4
    assert all(0 <= one < 10**6 for one in drawn)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_prompt_of_many_lines_and_signs_arrives_as_it_is(
    browser: Browser, address: str, scheme: str
) -> None:
    said = 'a "quoted" <b>cat</b>\n& a dog — 猫 🐈 \\n'
    with visited(browser, address, color_scheme=scheme) as page:
        field(page, "prompt").fill(said)
        assert stack(page)["passes"][0]["values"]["prompt"] == said
        page.locator("#add-pass").click()
        expect(field(page, "prompt")).to_have_value(said)
        assert "<b>" in json.dumps(stack(page))
