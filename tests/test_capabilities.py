"""Every hook is called, and what a model cannot carry is refused before it is called."""

from __future__ import annotations

import types
from typing import Any, ClassVar

import pytest
import torch

from diffedit import (
    Contribution,
    Edit,
    Pass,
    Preprocessor,
    Row,
    Tokens,
    hookimpl,
    hookspecs,
    plugins,
)
from diffedit.errors import Busy, CapabilityError, PluginError
from diffedit.models.protocol import Residuals
from diffedit.plugins import Plugins
from diffedit_controlnet import ControlNet
from diffedit_inpaint import Inpaint
from diffedit_style import Style
from tests.laws.photographs import mask, photograph
from tests.laws.tools import Custom, Watched

IMAGE = photograph("rgb8", (64, 64))


class Observer:
    """Implements every hook, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.raises: str | None = None

    def note(self, hook: str, what: Any) -> None:
        self.told.append((hook, what))
        if self.raises == hook:
            raise RuntimeError("look away")

    def heard(self, hook: str) -> list[Any]:
        return [what for name, what in self.told if name == hook]

    @hookimpl
    def register_edits(self) -> list[type[Edit]]:
        class Made(Edit):
            name: ClassVar[str] = "made"

            def contribute(self, run: Any) -> Contribution:
                return Contribution()

        return [Made]

    @hookimpl
    def register_models(self) -> list[Any]:
        family = types.SimpleNamespace(name="imagined")
        family.recognises = lambda config: False
        family.load = lambda source, **options: None
        return [family]

    @hookimpl
    def register_preprocessors(self) -> list[Preprocessor]:
        return [Preprocessor("same", lambda weights: lambda pixels: pixels, "nothing")]

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        self.note("register_commands", cli)

    @hookimpl
    def pass_started(self, pass_: Pass, run: Any) -> None:
        self.note("pass_started", (pass_, run))

    @hookimpl
    def step_done(self, step: Any) -> None:
        self.note("step_done", step)

    @hookimpl
    def pass_finished(self, pass_: Pass, error: Any) -> None:
        self.note("pass_finished", error)


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
def watched(observer: Observer) -> Watched:
    made = plugins.load()
    made.register(observer, "observer")
    return Watched(made)


def test_this_file_knows_every_hook() -> None:
    hooks = {
        name
        for name, value in vars(hookspecs).items()
        if hasattr(value, f"{hookspecs.PROJECT}_spec")
    }
    assert hooks == {
        name for name, value in vars(Observer).items() if hasattr(value, "diffedit_impl")
    }


def test_what_is_registered_can_be_used(observer: Observer) -> None:
    found = Plugins()
    found.register(observer, "observer")
    assert (set(found.edits), set(found.families)) == ({"made"}, {"imagined"})
    assert set(found.preprocessors) == {"same"}
    watched = Watched(found)
    watched.editor.run(
        IMAGE,
        Pass(
            prompt="x",
            steps=1,
            edits=[found.edit("made")(), ControlNet(model="net1", kind="same")],
        ),
    )


def test_observers_hear_of_every_pass_and_step(watched: Watched, observer: Observer) -> None:
    passes = [Pass(prompt=str(n), steps=2 + n) for n in range(2)]
    result = watched.editor.run(IMAGE, passes)
    assert [name for name, _ in observer.told] == [
        "pass_started", "step_done", "step_done", "pass_finished",
        "pass_started", "step_done", "step_done", "step_done", "pass_finished",
    ]  # fmt: skip
    assert [pass_ for pass_, _ in observer.heard("pass_started")] == passes
    assert observer.heard("pass_finished") == [None, None]
    steps = observer.heard("step_done")
    assert [step.index for step in steps] == [0, 1, 0, 1, 2]
    assert steps[0].preview().shape == (1, 3, 64, 64)
    assert result.latents is not None
    assert torch.equal(steps[-1].latents, result.latents)


def test_observers_know_which_pass_a_step_belongs_to(watched: Watched, observer: Observer) -> None:
    watched.editor.run(IMAGE, [Pass(prompt="x", steps=1), Pass(prompt="y", steps=1)])
    said = [(step.pass_index, step.passes) for step in observer.heard("step_done")]
    assert said == [(0, 2), (1, 2)]


def test_observers_hear_of_errors_and_cancels(watched: Watched, observer: Observer) -> None:
    def refine(x0: Any, call: Any) -> Any:
        raise ValueError("boom")

    with pytest.raises(PluginError) as caught:
        watched.editor.run(IMAGE, Pass(prompt="x", edits=[Custom(parts={"refine": refine})]))
    assert observer.heard("pass_finished") == [caught.value]
    with watched.editor.stream(IMAGE, Pass(prompt="x")) as events:
        next(events)
    assert isinstance(observer.heard("pass_finished")[1], GeneratorExit)


@pytest.mark.parametrize("hook", ["pass_started", "step_done", "pass_finished"])
def test_an_observer_that_raises_is_named(watched: Watched, observer: Observer, hook: str) -> None:
    observer.raises = hook
    with pytest.raises(PluginError, match=f"{hook} raised RuntimeError: look away") as caught:
        watched.editor.run(IMAGE, Pass(prompt="x", steps=2))
    assert caught.value.plugin == "observer"
    assert len(observer.heard("pass_finished")) == 1
    observer.raises = None
    watched.editor.run(IMAGE, Pass(prompt="x", steps=2))


def test_an_observer_hides_no_other_error(watched: Watched, observer: Observer) -> None:
    observer.raises = "pass_finished"
    edit = Custom(parts={"refine": lambda x0, step: None})
    with pytest.raises(PluginError, match="custom"):
        watched.editor.run(IMAGE, Pass(prompt="x", edits=[edit]))


def test_an_observer_cannot_start_a_second_run(watched: Watched, observer: Observer) -> None:
    class Nested:
        @hookimpl
        def step_done(self, step: Any) -> None:
            watched.editor.run(IMAGE, Pass(prompt="x", steps=1))

    watched.editor.plugins.register(Nested(), "nested")
    with pytest.raises(Busy):
        watched.editor.run(IMAGE, Pass(prompt="x", steps=1))


LATENT = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("edit", "lacks"),
    [
        (ControlNet(model="net1"), "control"),
        (Style(image=photograph(which="coffee")), "shared_attention"),
        (Custom(parts={"residuals": lambda x, step: Residuals(())}), "control"),
        (Custom(parts={"attention": lambda qkv, site: qkv}), "shared_attention"),
        (Custom(parts={"rows": (Row("r", lambda call: LATENT),)}), "shared_attention"),
        (Custom(parts={"tokens": (Tokens(LATENT, "reference"),)}), "tokens"),
        (Custom(parts={"channels": {"depth": LATENT}}), "channel 'depth'"),
        (Custom(parts={"conditioning": {"image": LATENT}}), "image"),
    ],
    ids=["controlnet", "style", "residuals", "attention", "rows", "tokens", "channels", "cond"],
)
def test_what_a_model_cannot_carry_is_refused_before_it_is_called(edit: Edit, lacks: str) -> None:
    watched = Watched()
    watched.model.capabilities = frozenset({"imagined"})
    inpaint = Inpaint(mask=mask((64, 64), (9, 9, 30, 30)))
    with pytest.raises(CapabilityError, match=rf"{edit.name}.*{lacks}"):
        watched.editor.run(IMAGE, Pass(prompt="x", edits=[edit, inpaint]))
    assert watched.calls == 0
    watched.editor.run(IMAGE, Pass(prompt="x", steps=1, edits=[inpaint]))
    assert watched.calls > 0
