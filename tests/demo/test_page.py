"""The workspace as a person uses it: a real browser, a real server, the embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

import diffedit
from diffedit import Workflow
from diffedit.images import open_picture
from diffedit.models.loading import EMBEDDED
from tests.demo.conftest import ENVIRONMENT, visited
from tests.demo.steps import (
    WAIT,
    adds,
    chooses,
    count_previews,
    downloads,
    field,
    opens,
    paints,
    quick,
    runs,
    starts,
    status,
    unfolds,
    varies,
    workflow_of,
)


def control_net(folder: Path) -> Path:
    """A ControlNet for the embedded model, untrained: its zero convolutions drawn at random."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet")
    net = ControlNetModel.from_unet(unet)
    for one in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(one.weight, std=0.02)
    net.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_whole_story(page: Page, photo: Path, tmp_path: Path) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("a yellow star")
    adds(page, "controlnet")
    net = control_net(tmp_path / "net")
    unfolds(page, field(page, "model", -1)).fill(str(net))
    adds(page, "style")
    field(page, "image", -1).select_option("source")
    page.locator("#add-pass").click()
    adds(page, "img2img", 1)
    field(page, "prompt", -1).fill("a red circle")
    quick(page, 5)
    count_previews(page)
    runs(page)
    assert page.evaluate("window.previews.size") >= 3

    # Compare: the slider moves the line, holding shows the picture before.
    share = page.locator("#viewer .share")
    share.fill("20")
    expect(page.locator("#viewer .viewer")).to_have_attribute("style", re.compile("20%"))
    page.locator("#viewer .hold").focus()
    page.keyboard.down("Space")
    expect(page.locator("#viewer .hold")).to_have_attribute("aria-pressed", "true")
    page.keyboard.up("Space")
    expect(page.locator("#viewer .hold")).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#changes")).to_contain_text("pixels changed")

    # The picture and the workflow as files: both say what was done.
    picture = downloads(page, "Download the picture", tmp_path / "made.png")
    text = workflow_of(picture)
    page.get_by_role("button", name=re.compile("^Workflow")).click()
    file = downloads(page, "Download the workflow", tmp_path / "workflow.yaml")
    assert file.read_text("utf-8") == text
    workflow = Workflow.load(file)
    assert [[edit.name for edit in one.edits] for one in workflow.passes] == [
        ["inpaint", "controlnet", "style"],
        ["img2img"],
    ]

    # Back, forward again, and on another branch.
    history = page.locator("#history img")
    shown = page.locator("#canvas img")
    original = shown.get_attribute("src") or ""
    # Looking back at the picture it was made from keeps what was made.
    page.locator("#history img").first.click()
    expect(page.get_by_role("tab", name="Edit")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Result").click()
    page.get_by_role("button", name="Keep").click()
    expect(history).to_have_count(2)
    expect(shown).not_to_have_attribute("src", original)
    assert page.evaluate("window.diffedit.canvas.state().layers.A.painted")
    page.locator("#undo").click()
    expect(shown).to_have_attribute("src", original)
    expect(page.locator("#redo")).to_be_enabled()
    page.locator("#redo").click()
    expect(page.locator("#redo")).to_be_disabled()
    page.locator("#undo").click()
    field(page, "seed").fill("3")
    runs(page)
    page.get_by_role("button", name="Keep").click()
    expect(history).to_have_count(3)

    # The same file, run by the command line, gives the same pixels.
    out = tmp_path / "out.png"
    command = ["run", str(file), str(photo), "-o", str(out), "--device", "cpu"]
    subprocess.run(
        [sys.executable, "-m", "diffedit", *command],
        check=True,
        env=os.environ | ENVIRONMENT,  # as many threads: sums in another order differ in a bit
    )
    assert (open_picture(out).pixels == open_picture(picture).pixels).all()

    # The picture, opened as a workflow: its settings are back, with the mask it brought, and
    # nothing runs by itself.
    chooses(page, picture, page.get_by_role("button", name="Open a workflow").click)
    status(page, "Nothing was run")
    assert field(page, "seed").input_value() == "0"
    expect(field(page, "mask").locator("option:checked")).to_have_text("From the workflow")
    page.locator("#history img").first.click()
    expect(page.locator("#undo")).to_be_disabled()
    runs(page)
    again = downloads(page, "Download the picture", tmp_path / "again.png")
    assert (open_picture(again).pixels == open_picture(picture).pixels).all()


def test_what_is_wrong_stands_beside_its_field_and_the_next_run_works(
    page: Page, photo: Path
) -> None:
    opens(page, photo)
    field(page, "prompt").fill("a yellow star")
    starts(page)
    expect(page.locator("#status [role=alert]")).to_contain_text("Not run", timeout=WAIT)
    beside = page.locator("[id^='fault-'][id$='.mask']")
    expect(beside).to_contain_text("nothing is painted on mask A")
    expect(field(page, "mask")).to_have_attribute("aria-invalid", "true")
    paints(page)
    steps = unfolds(page, field(page, "steps"))
    steps.fill("0")
    expect(page.locator("[id^='fault-'][id$='.steps']")).to_have_text("Should be 1 to 1000.")
    starts(page)
    status(page, "steps is 0, should be a whole number from 1 to 1000")
    quick(page, 2)
    runs(page)
    expect(beside).to_be_empty()
    expect(page.locator("#changes")).to_contain_text("None of those is further than 8 px")


def test_a_reference_of_ones_own_is_asked_for_and_taken(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    opens(page, photo)
    page.locator("#preset-restyle").click()
    field(page, "prompt").fill("a house")
    quick(page, 3)
    starts(page)
    expect(page.locator("[id^='fault-'][id$='.image']")).to_contain_text(
        "lacks 'image'", timeout=WAIT
    )
    own = tmp_path / "reference.png"
    own.write_bytes(photo.read_bytes())
    chooses(page, own, page.get_by_role("button", name="A file for Image").click)
    expect(field(page, "image").locator("option:checked")).to_have_text("reference.png")
    runs(page)
    made = downloads(page, "Download the picture", tmp_path / "made.png")
    style = Workflow.from_yaml(workflow_of(made)).passes[0].edits[1]
    reference = style.image.picture  # type: ignore[attr-defined]
    assert (reference.pixels == open_picture(photo).pixels).all()


def test_cancelling_ends_the_run_and_the_next_one_works(page: Page, photo: Path) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("a yellow star")
    quick(page, 400)
    starts(page)
    status(page, re.compile(r"step \d+ of 400"))
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    field(page, "steps").fill("2")
    runs(page)


def test_of_several_pictures_one_is_kept_and_others_are_discarded(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    varies(page, photo)
    field(page, "count").fill("3")
    runs(page)
    expect(page.locator("#candidates img")).to_have_count(3)
    first = page.locator("#viewer .after").get_attribute("src") or ""
    page.locator("#candidates button:has(img)").nth(1).click()
    expect(page.locator("#viewer .after")).not_to_have_attribute("src", first)
    second = downloads(page, "Download the picture", tmp_path / "second.png")
    assert Workflow.from_yaml(workflow_of(second)).seed == 1
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#history img")).to_have_count(2)
    expect(page.locator("#history")).to_contain_text("seed 1")
    expect(page.locator("#candidates")).not_to_be_visible()
    runs(page)
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#candidates")).not_to_be_visible()
    expect(page.locator("#history img")).to_have_count(2)


def test_a_picture_is_removed_from_the_history(page: Page, photo: Path) -> None:
    expect(page.locator("#remove")).to_be_disabled()
    varies(page, photo)
    runs(page)
    page.locator("#remove").click()
    status(page, "this picture is being edited")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#history img")).to_have_count(2)
    page.locator("#history img").first.click()
    expect(page.locator("#undo")).to_be_disabled()
    adds(page, "style")
    field(page, "image").select_option("result:0")
    page.locator("#remove").click()
    expect(page.locator("#history img")).to_have_count(1)
    expect(page.locator("#undo")).to_be_disabled()
    starts(page)
    expect(page.locator("[id^='fault-'][id$='.image']")).to_contain_text(
        "not here any more", timeout=WAIT
    )
    page.locator("#remove").click()
    expect(page.locator("#history img")).to_have_count(0)
    expect(page.locator("#remove")).to_be_disabled()
    opens(page, photo)
    expect(page.locator("#history img")).to_have_count(1)


def test_keys_run_and_cancel_wherever_one_is_typing(page: Page, photo: Path) -> None:
    varies(page, photo, 800)
    field(page, "prompt").press("Control+Enter")
    status(page, re.compile(r"step \d+ of"))
    page.keyboard.press("Control+.")
    status(page, "Cancelled")


def test_what_cancel_answers_late_does_not_hide_that_the_run_has_ended(
    page: Page, photo: Path
) -> None:
    varies(page, photo, 800)
    starts(page)
    status(page, re.compile(r"step \d+ of"))

    def late(route: Route) -> None:
        answer = route.fetch()
        page.wait_for_timeout(3000)  # the run ends meanwhile, and says so
        route.fulfill(response=answer)

    page.route("**/run/predict*", late, times=1)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_timeout(5000)
    status(page, "Cancelled")


def test_a_reload_keeps_the_stack_and_the_desk(page: Page, photo: Path, tmp_path: Path) -> None:
    opens(page, photo)
    page.locator("#preset-restyle").click()
    field(page, "prompt").fill("a yellow star")
    own = tmp_path / "reference.png"
    own.write_bytes(photo.read_bytes())
    chooses(page, own, page.get_by_role("button", name="A file for Image").click)
    quick(page, 2)
    runs(page)
    page.reload()
    page.locator("#add-pass").wait_for()
    expect(field(page, "prompt")).to_have_value("a yellow star")
    expect(page.locator("#composer .edit")).to_have_count(2)
    expect(page.locator("#history img")).to_have_count(1)
    page.get_by_role("tab", name="Result").click()
    page.get_by_role("button", name="Keep").click()  # what was made is there as well
    expect(page.locator("#history img")).to_have_count(2)
    expect(field(page, "image").locator("option:checked")).to_have_text("reference.png")
    runs(page)


def test_a_tab_that_is_duplicated_begins_anew(page: Page, photo: Path) -> None:
    """It knows the name of the other's session, which is not left while its page is open."""
    opens(page, photo)
    session = page.evaluate("sessionStorage.getItem('diffedit.session')")
    assert session
    twin = page.context.new_page()
    twin.add_init_script(f"sessionStorage.setItem('diffedit.session', '{session}')")
    twin.goto(page.url)
    twin.locator("#add-pass").wait_for()
    twin.locator("#preset-make").click()
    quick(twin, 2)
    runs(twin)
    expect(twin.locator("#history img")).to_have_count(0)
    page.locator("#preset-vary").click()
    quick(page, 2)
    runs(page)


def test_a_picture_pasted_into_a_prompt_is_not_opened(page: Page, photo: Path) -> None:
    opens(page, photo)
    paints(page)
    paste = """(one, bytes) => {
      const data = new DataTransfer();
      const file = new File([Uint8Array.from(bytes)], "other.png", { type: "image/png" });
      data.items.add(file);
      one.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    }"""
    field(page, "prompt").evaluate(paste, list(photo.read_bytes()))
    page.wait_for_timeout(500)
    expect(page.locator("#canvas [role=alert]")).to_be_empty()
    assert page.evaluate("window.diffedit.canvas.state().layers.A.painted")
    expect(page.locator("#history img")).to_have_count(1)
    # Pasted anywhere else it is.
    page.locator("#canvas canvas").last.evaluate(paste, list(photo.read_bytes()))
    expect(page.locator("#history img")).to_have_count(2)


def test_every_installed_edit_has_its_form(page: Page) -> None:
    for name, cls in diffedit.edits().items():
        adds(page, name)
        for parameter in cls.model_fields:
            expect(field(page, parameter, -1)).to_be_attached()


def test_moving_and_switching_off_is_what_the_engine_runs(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    opens(page, photo)
    paints(page)
    field(page, "prompt").fill("first")
    page.locator("#add-pass").click()
    field(page, "prompt", 1).fill("second")
    adds(page, "img2img", 1)
    page.get_by_role("button", name="Move Pass 2 up").click()
    expect(field(page, "prompt")).to_have_value("second")
    quick(page, 3)
    page.get_by_role("checkbox", name="Pass 2").uncheck()
    runs(page)
    made = downloads(page, "Download the picture", tmp_path / "made.png")
    workflow = Workflow.from_yaml(workflow_of(made))
    said: list[Any] = [(one.prompt, [e.name for e in one.edits]) for one in workflow.passes]
    assert said == [("second", ["img2img"])]


@pytest.mark.slow
def test_typing_and_pressing_run_at_once_loses_nothing(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    """Thirty times: keys, a click on a structure button, keys again, and Run without a pause."""
    opens(page, photo)
    page.locator("#preset-vary").click()
    field(page, "strength").fill("0.5")
    quick(page, 2)
    for time in range(30):
        prompt = field(page, "prompt")
        prompt.click()
        page.keyboard.press("Control+A")
        page.keyboard.type(f"a red circle {time}")
        adds(page, "img2img")
        page.locator("[id^='remove-']").last.click()
        field(page, "seed").fill(str(time))
        runs(page)
        made = downloads(page, "Download the picture", tmp_path / "made.png")
        workflow = Workflow.from_yaml(workflow_of(made))
        assert (workflow.passes[0].prompt, workflow.seed) == (f"a red circle {time}", time)
        assert [edit.name for edit in workflow.passes[0].edits] == ["img2img"]
        page.get_by_role("tab", name="Edit").click()


def test_the_page_speaks_chinese(browser: Browser, address: str) -> None:
    with visited(browser, address, locale="zh-CN") as page:
        expect(page.get_by_role("button", name="运行", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="打开图片")).to_be_visible()
        expect(page.get_by_role("textbox", name="提示词")).to_be_visible()
        expect(page.locator("#preset-paint")).to_have_text("替换涂抹的部分")
