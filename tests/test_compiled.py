"""A compiled denoiser makes the same pictures, and steps aside for what listens to its parts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffedit import Contribution, Edit, Editor, Pass, Run
from diffedit.errors import PluginError
from diffedit.models.compiled import Compiled
from diffedit_img2img import Img2Img
from diffedit_style import Style
from tests.families import FLUX, SD
from tests.families.tiny import Tiny

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PASS = Pass(prompt="a", steps=3, edits=[Img2Img(strength=0.7)])


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile traces and guards as ever, and runs what it traced without code of its own."""
    calls: list[str] = []

    def backend(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append("graph")
            return graph(*args)

        return run

    def compiling(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
        calls.append(mode)
        made: Callable[..., Any] = plain(forward, backend=backend)
        return made

    torch.compiler.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", compiling)
    return calls


def compiled(tiny: Tiny, mode: str = "default") -> Editor:
    editor = tiny.editor()
    editor.model.compile(mode)  # type: ignore[attr-defined]
    return editor


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("tiny", [SD, FLUX], ids=lambda one: one.name)
def test_compiled_steps_make_the_same_picture(tiny: Tiny, traced: list[str]) -> None:
    written = tiny.editor().run(PICTURE, PASS, seed=1).pixels
    editor = compiled(tiny)
    assert "graph" not in traced
    assert apart(editor.run(PICTURE, PASS, seed=1).pixels, written) <= 1
    assert "graph" in traced


def test_a_unet_is_compiled_whole_and_a_transformer_by_its_blocks(traced: list[str]) -> None:
    unet, transformer = (one.editor().model.denoiser for one in (SD, FLUX))  # type: ignore[attr-defined]
    assert Compiled(unet).parts == [unet]
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert Compiled(transformer).parts == blocks


@pytest.mark.parametrize("tiny", [SD, FLUX], ids=lambda one: one.name)
def test_edits_that_act_on_attention_run_as_written(tiny: Tiny, traced: list[str]) -> None:
    styled = PASS.model_copy(update={"edits": (Style(image=PICTURE[::-1].copy()),)})
    editor = compiled(tiny)
    traced.clear()
    made = editor.run(PICTURE, styled, seed=1).pixels
    assert not traced
    np.testing.assert_array_equal(made, tiny.editor().run(PICTURE, styled, seed=1).pixels)
    editor.run(PICTURE, PASS, seed=1)
    assert traced  # and afterwards it is as it was


class Breaks(Edit, frozen=True):
    """Fails in the midst of a pass that acts on attention."""

    name = "breaks"
    version = "1.0.0"

    def contribute(self, run: Run) -> Contribution:
        def attend(qkv: Any, site: Any) -> Any:
            raise ValueError("broken on purpose")

        return Contribution(attention=attend)


def test_it_is_compiled_again_after_an_error(traced: list[str]) -> None:
    editor = compiled(SD)
    held = editor.model.denoiser.forward  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="broken on purpose"):
        editor.run(None, Pass(prompt="a", steps=2, edits=[Breaks()]))
    assert editor.model.denoiser.forward is held  # type: ignore[attr-defined]


def test_what_cuda_graphs_write_over_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x,)

    place = torch.zeros(1)

    def compiling(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
        return lambda x: (place.copy_(x),)

    monkeypatch.setattr(torch, "compile", compiling)
    for mode, first in (("reduce-overhead", 1.0), ("default", 2.0)):
        net = Net()
        Compiled(net, mode)
        (one,), _ = net(torch.ones(1)), net(torch.full((1,), 2.0))
        assert float(one) == first


def test_whoever_loads_a_model_says_how(monkeypatch: pytest.MonkeyPatch, traced: list[str]) -> None:
    for said, mode in ((True, "default"), ("max-autotune", "max-autotune")):
        traced.clear()
        Editor.load(device="cpu", compiled=said)
        assert traced == [mode]
    traced.clear()
    Editor.load(device="cpu")
    assert not traced


def test_torch_itself_compiles_it() -> None:
    """With the compiler of this machine: the one test that is not quick."""
    torch.compiler.reset()
    written = FLUX.editor().run(PICTURE, PASS, seed=1).pixels
    assert apart(compiled(FLUX).run(PICTURE, PASS, seed=1).pixels, written) <= 1
