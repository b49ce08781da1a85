"""A plugin that breaks the contract is named, undone, and the editor goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffedit import Box, Branch, Call, Contribution, Guidance, Pass, Patch, Pixels, Row, Start
from diffedit.attention import QKV
from diffedit.errors import DiffeditError, InputError, PluginError
from diffedit.models.protocol import Residuals
from tests.laws.photographs import mask, photograph
from tests.laws.state import state, unchanged
from tests.laws.tools import Custom, Other, Watched

IMAGE = photograph("rgb8", (64, 64))
NAN = float("nan")
STEPS = 4


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def run(watched: Watched, *edits: Any, **options: Any) -> torch.Tensor:
    what = Pass(**{"prompt": "x", "steps": STEPS, "edits": edits, **options})
    latents = watched.editor.run(IMAGE, what, seed=5).latents
    assert latents is not None
    return latents


def refused(watched: Watched, said: str, *edits: Any, who: str = "custom", **options: Any) -> None:
    """The pass ends in an error that names the edit; nothing is left; the editor goes on."""
    model, before = state(watched.editor), run(watched, steps=1)
    with pytest.raises(PluginError, match=said) as caught:
        run(watched, *edits, **options)
    assert caught.value.plugin == who
    assert "\n" not in str(caught.value)
    unchanged(model, state(watched.editor))
    assert torch.equal(run(watched, steps=1), before)


def at(step: int, value: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda given, call: value(given) if call.index == step else _plain(given)


def _plain(given: Any) -> Any:
    return given["positive"] if not isinstance(given, torch.Tensor) else given


def attending(change: Callable[[QKV], Any], step: int = 0) -> Callable[..., Any]:
    del step
    return lambda qkv, site: change(qkv)


def residuals(change: Callable[[torch.Tensor], torch.Tensor], rows: int | None = None) -> Any:
    """Zeros where a control network of the tiny model would speak, changed."""

    def made(x: Any, step: Call) -> Residuals:
        n = rows or len(x.rows)
        sides = ((32, 8), (32, 8), (32, 4), (64, 4), (64, 4))
        places = [torch.zeros(n, c, s, s) for c, s in sides]
        return Residuals(tuple(change(place) for place in places))

    return made


def left_behind(model: Any) -> Callable[[], None]:
    model.unet.conv_in.weight.mul_(2)
    model.unet.mid_block.register_forward_hook(lambda *a: None)
    model.unet.conv_out.forward = model.unet.conv_out.forward
    model.unet.train()
    model.vae.requires_grad_(True)
    model.vae.post_quant_conv = torch.nn.Identity()
    return lambda: None


def swapped(model: Any) -> Callable[[], None]:
    model.unet.conv_in.weight.data = model.unet.conv_in.weight.data * 2
    return lambda: None


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "NaN in refine": ({"refine": at(2, lambda x: x * NAN)}, "refine returned .*not finite"),
    "inf in refine": ({"refine": at(0, lambda x: x / 0)}, "refine returned .*not finite"),
    "NaN in combine": (
        {"combine": at(1, lambda p: p["positive"] * NAN)},
        "combine returned .*not finite",
    ),
    "NaN in attention": (
        {"attention": attending(lambda qkv: replace(qkv, q=qkv.q * NAN))},
        "attention returned .*not finite",
    ),
    "everything hidden": (
        {
            "attention": attending(
                lambda qkv: replace(qkv, bias=torch.full((1, 1, 1, qkv.k.shape[2]), NAN))
            )
        },
        "not finite",
    ),
    "NaN in residuals": (
        {"residuals": residuals(lambda place: place + NAN)},
        "residuals returned .*not finite",
    ),
    "NaN in a term": ({"terms": (Guidance(NAN, "positive", "negative"),)}, "term.*not finite"),
    "NaN at the start": (
        {"start": Start(torch.full((1, 4, 8, 8), NAN), 0.9)},
        "start.*not finite",
    ),
    "NaN in finish": ({"finish": lambda pixels: pixels * NAN}, "finish returned .*not finite"),
    "refine of another shape": ({"refine": lambda x, i: x[..., :4]}, r"\(1, 4, 8, 4\), not"),
    "refine of another type": ({"refine": lambda x, i: None}, "NoneType, not a tensor"),
    "combine of another shape": (
        {"combine": lambda p, i: p["positive"][0]},
        r"\(4, 8, 8\), not \(1, 4, 8, 8\)",
    ),
    "finish of another shape": (
        {"finish": lambda pixels: pixels[..., 1:]},
        "finish returned shape",
    ),
    "attention of another type": (
        {"attention": attending(lambda qkv: None)},
        "attention returned NoneType",
    ),
    "attention of another shape": (
        {"attention": attending(lambda qkv: replace(qkv, k=qkv.k[:, :, :-1]))},
        "unequal numbers",
    ),
    "residuals of another type": ({"residuals": lambda x, i: None}, "must be Residuals of 2 rows"),
    "residuals of too many rows": (
        {"residuals": residuals(lambda place: place, rows=5)},
        "must be Residuals of 2 rows",
    ),
    "residuals of another size": (
        {"residuals": residuals(lambda place: place[..., :3])},
        "cannot use",
    ),
    "keep of another shape": ({"keep": torch.ones(1, 1, 3, 3)}, "keep.*3, 3"),
    "keep(step) of another shape": ({"keep": lambda i: torch.ones(1, 1, 3, 3)}, "keep.*3, 3"),
    "keep(step) of another type": ({"keep": lambda i: 1}, "keep is int"),
    "row of another shape": ({"rows": (Row("r", lambda i: torch.ones(1, 4, 3, 3)),)}, "row.*3, 3"),
    "row of another type": ({"rows": (Row("r", lambda i: "x"),)}, "row is str"),  # type: ignore[arg-type, return-value]
    "start of another shape": ({"start": Start(torch.ones(1, 4, 3, 3), 0.5)}, "start.*3, 3"),
    "start of another batch": ({"start": Start(torch.ones(3, 4, 8, 8), 0.5)}, "start.*3, 4, 8, 8"),
    "mask of another shape": ({"mask": torch.ones(64, 64)}, "mask"),
    "mask of another batch": ({"mask": torch.ones(2, 1, 64, 64)}, "mask"),
    "mask out of range": ({"mask": torch.full((1, 1, 64, 64), 255.0)}, r"mask.*\[0, 1\]"),
    "mask of NaN": ({"mask": torch.full((1, 1, 64, 64), NAN)}, r"mask.*\[0, 1\]"),
    "mask of bool": ({"mask": torch.ones(1, 1, 64, 64).bool()}, r"mask.*\[0, 1\]"),
    "mask of another type": ({"mask": "mask.png"}, "mask is str"),
    "term of another shape": (
        {"terms": (Guidance(torch.ones(1, 1, 3, 3), "positive", "negative"),)},
        "3, 3",
    ),
    "writes into refine": ({"refine": lambda x, i: x.mul_(2)}, "refine wrote into"),
    "writes into combine": ({"combine": lambda p, i: p["positive"].add_(1)}, "combine wrote into"),
    "writes into attention": (
        {"attention": attending(lambda qkv: replace(qkv, v=qkv.v.zero_()))},
        "attention wrote into",
    ),
    "writes into residuals": (
        {"residuals": lambda x, i: residuals(lambda p: p)(x, x.latents.mul_(2))},
        "residuals wrote into",
    ),
    "writes into finish": ({"finish": lambda pixels: pixels.mul_(0.5)}, "finish wrote into"),
    "leaves a patch behind": (
        {"patches": (Patch(left_behind),)},
        "left the model changed.*weights",
    ),
    "leaves swapped weights": ({"patches": (Patch(swapped),)}, "left the model changed.*weights"),
    "no undo": ({"patches": (Patch(lambda model: None),)}, "patch returned NoneType"),  # type: ignore[arg-type, return-value]
    "prepare leaves a hook": (
        {"prepare": lambda run: run.model.unet.conv_in.register_forward_pre_hook(lambda *a: None)},
        "left the model changed.*hook",
    ),
    "prepare yields no step": ({"prepare": lambda run: iter([1])}, "prepare yielded int"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_a_plugin_can_do_wrong(watched: Watched, what: str) -> None:
    parts, said = BROKEN[what]
    # Only patches are watched one by one; what else changes the model has all edits as suspects.
    who = "custom, other" if "hook" in said else "custom"
    refused(watched, said, Custom(parts=parts), Other(parts={"refine": lambda x, i: x}), who=who)


def test_writes_into_the_canvas(watched: Watched) -> None:
    refused(watched, "wrote into", Custom(parts=lambda run: {"mask": run.canvas.pixels.zero_()}))
    refused(watched, "wrote into", Custom(parts=lambda run: {"mask": run.canvas.composite.zero_()}))


@pytest.mark.parametrize("error", [RuntimeError("boom\nand more"), KeyError("k"), StopIteration()])
def test_contribute_raises(watched: Watched, error: Exception) -> None:
    def raising(run: Any) -> Any:
        raise error

    refused(watched, rf"contribute raised {type(error).__name__}", Custom(parts=raising))


@pytest.mark.parametrize("box", [(0, 0, 9, 9), Box(90, 90, 99, 99), Box(9, 9, 9, 20), "all"])
def test_regions_that_are_none(watched: Watched, box: Any) -> None:
    class Regional(Custom):
        def region(self, image: Any) -> Any:
            return box

    refused(watched, "region", Regional())


def test_a_mask_beyond_the_region_it_asked_for(watched: Watched) -> None:
    class Regional(Custom):
        def region(self, image: Any) -> Box:
            return Box(0, 0, 8, 8)

    big = photograph("rgb8", (200, 200))
    what = Pass(prompt="x", edits=[Regional(parts={"mask": torch.ones(1, 1, 200, 200)})])
    with pytest.raises(PluginError, match="beyond the region"):
        watched.editor.run(big, what)


def test_an_edit_that_does_not_contribute_a_contribution(watched: Watched) -> None:
    class Wrong(Custom):
        def contribute(self, run: Any) -> Any:
            return {"refine": None}

    refused(watched, "contribute returned dict", Wrong())


def test_the_innocent_are_not_blamed(watched: Watched) -> None:
    """A neighbour that acts on what is NaN already returns NaN too, and is not at fault."""
    innocent = Other(
        parts={
            "attention": lambda qkv, site: replace(qkv, q=qkv.q * 1),
            "refine": lambda x, i: x * 1,
            "residuals": residuals(lambda place: place),
        }
    )
    for parts in (BROKEN["NaN in a term"], BROKEN["NaN in combine"], BROKEN["NaN in refine"]):
        refused(watched, "not finite", Custom(parts=parts[0]), innocent)


def test_a_model_that_makes_nan_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watched()
    plain = seen.model.predict
    monkeypatch.setattr(seen.model, "predict", lambda x: plain(x) * NAN)
    edit = Custom(parts={"attention": lambda qkv, site: qkv, "refine": lambda x, i: x})
    with pytest.raises(DiffeditError, match="no edit is at fault") as caught:
        run(seen, edit)
    assert not isinstance(caught.value, PluginError)


def test_residuals_of_two_edits_that_do_not_add_up(watched: Watched) -> None:
    one = Custom(parts={"residuals": residuals(lambda place: place)})
    other = Other(parts={"residuals": residuals(lambda place: place[:, :1])})
    refused(watched, "other shapes", one, other, who="other")


def test_errors_of_diffedits_own_keep_their_kind(watched: Watched) -> None:
    def raising(run: Any) -> Any:
        raise InputError("a file is missing")

    with pytest.raises(InputError, match="a file is missing"):
        run(watched, Custom(parts=raising))


def test_interrupts_pass_through(watched: Watched) -> None:
    for error in (KeyboardInterrupt, SystemExit):

        def refine(x: Any, i: int, error: Any = error) -> Any:
            raise error

        with pytest.raises(error):
            run(watched, Custom(parts={"refine": refine}))
    run(watched)


def test_what_is_right_passes(watched: Watched) -> None:
    """The other side of the table: the same parts, done well."""
    plain = run(watched)
    parts: dict[str, Any] = {
        "refine": lambda x, i: x * 1,
        "combine": lambda p, i: p["negative"] + 5.0 * (p["positive"] - p["negative"]),
        "attention": lambda qkv, site: qkv,
        "residuals": residuals(lambda place: place),
        "keep": lambda i: torch.zeros(1, 1, 8, 8),
        "finish": lambda pixels: pixels * 1,
        "rows": (Row("r", Pixels(torch.rand(1, 3, 64, 64))),),
        "branches": (Branch("b", "text"),),
        "terms": (Guidance(0.0, "custom/b", "positive"),),
        "prepare": lambda run: iter(()),
    }
    assert (run(watched, Custom(parts=parts)) - plain).abs().max() < 1e-3
    Contribution(**parts)


def test_masks_of_a_soft_edge_are_fine(watched: Watched) -> None:
    soft = torch.from_numpy(mask((64, 64), (9, 9, 30, 30), value=100) / 255).float()[None, None]
    run(watched, Custom(parts={"mask": soft}))
