"""Law 6: after a pass, an error or a cancel the model is what it was, and the editor goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from diffedit import Call, Editor, Guidance, Pass, Patch, Row
from diffedit.attention import QKV
from diffedit.errors import Busy, DiffeditError, PluginError
from diffedit.models.protocol import Residuals
from diffedit_controlnet import ControlNet
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.families import Tiny
from tests.laws.photographs import mask, photograph
from tests.laws.state import state, unchanged
from tests.laws.tools import CHOSEN, Custom

STEPS = 4
IMAGE = photograph("rgb8", (64, 64))


def the_following() -> Pass:
    edits = [Inpaint(mask=mask((64, 64), (9, 9, 40, 40))), Style(image=photograph(which="coffee"))]
    return Pass(prompt="after", steps=2, edits=CHOSEN.family.carried(edits))


@pytest.fixture
def editor() -> Editor:
    return CHOSEN.family.editor()


@pytest.fixture(scope="module")
def expected(family: Tiny) -> torch.Tensor:
    latents = family.editor().run(IMAGE, the_following(), seed=5).latents
    assert latents is not None
    return latents


def check(editor: Editor, before: Any, expected: torch.Tensor) -> None:
    unchanged(before, state(editor))
    following = editor.run(IMAGE, the_following(), seed=5).latents
    assert following is not None
    assert torch.equal(following, expected)


def a_pass(**parts: Any) -> Pass:
    """A pass in which everything acts that could leave something behind."""
    edits = [
        Style(image=photograph(which="coffee")),
        Custom(parts={"patches": (Patch(scaled), Patch(hooked)), **parts}),
    ]
    return Pass(prompt="x", steps=STEPS, edits=CHOSEN.family.carried(edits))


def scaled(model: Any) -> Callable[[], None]:
    """A change of weights in place, as merging a LoRA makes it."""
    weight = next(iter(model.denoiser.parameters()))
    was = weight.clone()
    weight.mul_(1.5)
    return lambda: weight.copy_(was)


def hooked(model: Any) -> Callable[[], None]:
    handle = next(iter(model.denoiser.children())).register_forward_hook(lambda *a: None)
    remove: Callable[[], None] = handle.remove
    return remove


def failing(at: int) -> dict[str, Any]:
    """For every callable of a contribution, a version that raises in call `at`."""
    calls = {"n": 0}
    first: dict[str, str] = {}

    def boom(*args: Any) -> Any:
        raise RuntimeError("boom")

    def late(value: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            return boom() if args[1].index == at else value(*args)

        return function

    def attention(qkv: QKV, site: Any) -> QKV:
        first.setdefault("site", site.name)
        calls["n"] += site.name == first["site"]
        return boom() if calls["n"] > at else qkv

    def keep(step: Call) -> torch.Tensor:
        return boom() if step.index == at else torch.zeros(1, 1, 8, 8)

    def row(call: Call) -> torch.Tensor:
        return boom() if call.index == at else torch.zeros(1, CHOSEN.family.channels, 8, 8)

    def prepare(run: Any) -> Iterator[Any]:
        boom()
        yield None

    return {
        "attention": {"attention": attention},
        "refine": {"refine": late(lambda x0, step: x0)},
        "residuals": {"residuals": late(lambda x, step: Residuals(()))},
        "combine": {"combine": late(lambda predictions, step: predictions["positive"])},
        "keep": {"keep": keep},
        "row": {"rows": (Row("r", row),)},
        "finish": {"finish": boom},
        "prepare": {"prepare": boom},
        "prepare, late": {"prepare": prepare},
        "patch": {"patches": (Patch(scaled), Patch(hooked), Patch(boom))},
        "undo": {"patches": (Patch(scaled), Patch(lambda model: boom), Patch(hooked))},
    }


def test_after_a_pass(editor: Editor, expected: torch.Tensor) -> None:
    before = state(editor)
    acting = editor.run(IMAGE, a_pass(), seed=5).latents
    plain = editor.run(IMAGE, a_pass(patches=()), seed=5).latents
    assert acting is not None
    assert plain is not None
    assert not torch.equal(acting, plain)  # the patches did act
    check(editor, before, expected)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("what", list(failing(0)))
def test_after_an_error(editor: Editor, expected: torch.Tensor, what: str, at: int) -> None:
    if what == "residuals":
        CHOSEN.family.needs_control()
    if what in {"attention", "row"}:
        CHOSEN.family.needs_style()
    before = state(editor)
    with pytest.raises(PluginError, match=r"custom.*boom") as caught:
        editor.run(IMAGE, a_pass(**failing(at)[what]), seed=5)
    assert caught.value.plugin == "custom"
    check(editor, before, expected)


@pytest.mark.parametrize("at", [1, 3])
def test_after_leaving_the_stream(editor: Editor, expected: torch.Tensor, at: int) -> None:
    before = state(editor)
    with editor.stream(IMAGE, [a_pass(), a_pass()], seed=5) as events:
        for _ in range(at):
            next(events)
    with pytest.raises(DiffeditError, match="no result"):
        _ = events.result
    check(editor, before, expected)


def test_after_an_error_of_the_one_who_looks_on(editor: Editor, expected: torch.Tensor) -> None:
    before = state(editor)
    events = editor.stream(IMAGE, a_pass(), seed=5)
    next(events)
    error = ZeroDivisionError()
    events.__exit__(type(error), error, None)
    check(editor, before, expected)


def test_after_an_interrupt(editor: Editor, expected: torch.Tensor) -> None:
    def refine(x0: torch.Tensor, step: Call) -> torch.Tensor:
        if step.index == 1:
            raise KeyboardInterrupt
        return x0

    before = state(editor)
    with pytest.raises(KeyboardInterrupt):
        editor.run(IMAGE, a_pass(refine=refine), seed=5)
    check(editor, before, expected)


def test_after_a_stream_that_nobody_closed(editor: Editor, expected: torch.Tensor) -> None:
    before = state(editor)
    events = editor.stream(IMAGE, a_pass(), seed=5)
    next(events)
    del events
    check(editor, before, expected)


def test_the_callers_grad_mode_is_its_own(editor: Editor) -> None:
    with editor.stream(IMAGE, a_pass()) as events:
        for _ in events:
            assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with torch.no_grad(), editor.stream(IMAGE, a_pass()) as events:
        for _ in events:
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_inside_inference_mode(editor: Editor, expected: torch.Tensor) -> None:
    with torch.inference_mode():
        editor.run(IMAGE, a_pass(patches=()), seed=5)
        latents = editor.run(IMAGE, the_following(), seed=5).latents
    assert latents is not None
    assert torch.equal(latents, expected)


def test_one_run_at_a_time(editor: Editor) -> None:
    with editor.stream(IMAGE, a_pass()) as events:
        next(events)
        with pytest.raises(Busy):
            editor.run(IMAGE, a_pass())
        assert sum(1 for _ in events) == STEPS - 1  # the first goes on
        assert events.result.latents is not None
    editor.run(IMAGE, a_pass())


def test_a_term_with_an_unknown_name_leaves_nothing(editor: Editor, expected: torch.Tensor) -> None:
    before = state(editor)
    terms = (Guidance(1.0, "positive", "nothing"),)
    with pytest.raises(DiffeditError, match="nothing"):
        editor.run(IMAGE, a_pass(terms=terms), seed=5)
    check(editor, before, expected)


def test_control_networks_stay_as_they_are(editor: Editor) -> None:
    CHOSEN.family.needs_control()
    net = CHOSEN.family.control_net(editor.model.pipe)  # type: ignore[attr-defined]
    editor._resources["control:net:"] = net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    editor.run(IMAGE, Pass(prompt="x", steps=2, edits=[ControlNet(model="net")]))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
