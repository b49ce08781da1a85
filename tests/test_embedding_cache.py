"""Prompts are read once: what their reading depends on is all that makes it happen again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from diffedit import Contribution, Edit, Pass, Patch, Run
from diffedit.embeddings import Embeddings
from diffedit.models.protocol import Conditioning
from diffedit_instruct import Instruct
from diffedit_region import Region
from diffedit_style import Style
from tests.families import FAMILIES, PIXART, QWEN_IMAGE, SD, SDXL, Tiny
from tests.laws.photographs import mask, photograph
from tests.laws.tools import Custom

SIZE = (64, 64)
PROMPT, NEGATIVE = "a red circle", "blurry"
BOTH = [PROMPT, NEGATIVE]


class Reading:
    """An editor that notes what its model reads."""

    def __init__(self, family: Tiny = SD, **options: Any) -> None:
        self.editor: Any = family.editor(**options)
        self.model: Any = self.editor.model
        self.read: list[str] = []
        embed = self.model.embed

        def noted(texts: Any, *args: Any, **more: Any) -> Any:
            self.read.extend(texts)
            return embed(texts, *args, **more)

        self.model.embed = noted  # type: ignore[assignment, method-assign]

    def run(self, *edits: Edit, image: Any = None, **more: Any) -> Tensor:
        options = {"prompt": PROMPT, "negative": NEGATIVE, "steps": 1, "edits": edits}
        size = more.pop("size", SIZE) if image is None else None
        how = {key: more.pop(key) for key in ("seed", "compat") if key in more}
        what = Pass(**(options | more))
        latents: Tensor = self.editor.run(image, what, size=size, **how).latents
        return latents

    def again(self, *edits: Edit, **more: Any) -> list[str]:
        """What is read for one more pass."""
        before = len(self.read)
        self.run(*edits, **more)
        return sorted(self.read[before:])


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_prompt_is_read_once_and_no_bit_changes(family: Tiny, compat: bool) -> None:
    reading = Reading(family)
    guided = {"true_guidance": 3.0} if family.name == "flux" else {}
    first = reading.run(compat=compat, **guided)
    assert sorted(reading.read) == sorted(BOTH)
    assert reading.again(compat=compat, seed=5, **guided) == []
    assert torch.equal(reading.run(compat=compat, **guided), first)
    fresh = family.editor().run(
        None,
        Pass(prompt=PROMPT, negative=NEGATIVE, steps=1, **guided),
        size=SIZE,
        compat=compat,
    )
    assert fresh.latents is not None
    assert torch.equal(first, fresh.latents)


def test_only_what_is_new_is_read() -> None:
    reading = Reading()
    reading.run()
    assert reading.again(prompt="a boat") == ["a boat"]
    assert reading.again(negative="ugly") == ["ugly"]
    assert reading.again(prompt=NEGATIVE, negative=PROMPT) == sorted(BOTH)  # the other way round
    assert reading.again(guidance=1.0, steps=3, seed=[1, 2, 3]) == []
    house = Region(prompt="a house", mask=mask(SIZE, (0, 0, 32, 64)))
    seen = Style(image=photograph("rgb8", SIZE), prompt=PROMPT)
    assert reading.again(house, seen) == ["a house"]
    assert reading.again(house, seen) == []


def test_every_pass_of_a_workflow_shares_it() -> None:
    reading = Reading()
    reading.editor.run(None, [Pass(prompt=PROMPT, steps=1)] * 3, size=SIZE)
    assert sorted(reading.read) == ["", PROMPT]


@pytest.mark.parametrize(("family", "sized"), [(SD, False), (SDXL, True), (PIXART, True)])
def test_the_size_counts_where_a_family_reads_it(family: Tiny, sized: bool) -> None:
    reading = Reading(family)
    reading.run()
    assert reading.again(size=(96, 64)) == (sorted(BOTH) if sized else [])
    assert reading.again() == []


def test_the_pictures_that_a_prompt_speaks_of_count() -> None:
    assert QWEN_IMAGE.instructed is not None
    reading = Reading(QWEN_IMAGE, **QWEN_IMAGE.instructed)
    one, other = (photograph("rgb8", SIZE, name) for name in ("coffee", "rocket"))
    reading.run(Instruct(image=one), image=one)
    assert reading.again(Instruct(image=one), image=one) == []
    assert reading.again(Instruct(image=other), image=one) == sorted(BOTH)


# --- what reads -----------------------------------------------------------------------------------


def scaled(encoder: Any) -> None:
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(2)


def swapped(encoder: Any) -> None:
    weight = encoder.get_input_embeddings().weight
    weight.data = 2 * weight.data


def replaced(encoder: Any) -> None:
    old = encoder.get_input_embeddings()
    new = torch.nn.Embedding(*old.weight.shape)
    new.load_state_dict({"weight": 2 * old.weight.data})
    encoder.set_input_embeddings(new.requires_grad_(False))


def hooked(encoder: Any) -> None:
    encoder.get_input_embeddings().register_forward_hook(lambda module, given, made: 2 * made)


@pytest.mark.parametrize("change", [scaled, swapped, replaced, hooked])
def test_a_changed_encoder_reads_again(change: Callable[[Any], None]) -> None:
    reading = Reading()
    before = reading.run()
    change(reading.model.pipe.text_encoder)
    assert reading.again() == sorted(BOTH)
    assert not torch.equal(reading.run(), before)
    assert reading.again() == []


def test_a_cast_encoder_reads_again() -> None:
    reading = Reading()
    reading.run()
    reading.model.pipe.to(torch.bfloat16)
    assert reading.again() == sorted(BOTH)


def test_a_changed_denoiser_does_not() -> None:
    reading = Reading()
    reading.run()
    with torch.no_grad():
        reading.model.unet.conv_in.weight.mul_(2)
    assert reading.again() == []


class Louder(Edit):
    """Multiplies what the text encoder takes words for, for one pass."""

    name: ClassVar[str] = "louder"
    times: float = 2.0

    def contribute(self, run: Run) -> Contribution:
        def apply(model: Any) -> Callable[[], None]:
            weight = model.pipe.text_encoder.get_input_embeddings().weight
            before = weight.clone()
            with torch.no_grad():
                weight.mul_(self.times)

            def undo() -> None:
                with torch.no_grad():
                    weight.copy_(before)

            return undo

        return Contribution(patches=(Patch(apply),))


def test_what_patches_the_encoder_has_its_own_and_leaves_the_rest() -> None:
    reading = Reading()
    plain, loud, louder = reading.run(), reading.run(Louder()), reading.run(Louder(times=3))
    assert len(reading.read) == 6
    assert not torch.equal(plain, loud)
    assert not torch.equal(loud, louder)
    # The weights were written to and put back: all three are still good.
    for edits, expected in (((), plain), ((Louder(),), loud), ((Louder(times=3),), louder)):
        assert torch.equal(reading.run(*edits), expected)
    assert len(reading.read) == 6
    both = (Louder(id="a"), Louder(times=3, id="b", after="a"))
    assert reading.again(*both) == sorted(BOTH)
    assert reading.again(*reversed(both)) == []


def test_after_an_error_in_a_patched_pass_it_is_read_as_ever() -> None:
    reading = Reading()
    before = reading.run()

    def boom(x0: Tensor, call: Any) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(Exception, match="boom"):
        reading.run(Louder(), Custom(parts={"refine": boom}))
    assert torch.equal(reading.run(), before)


# --- what is kept ---------------------------------------------------------------------------------


def test_what_is_written_to_is_made_again() -> None:
    reading = Reading()
    before = reading.run()
    kept = [one.made for one in reading.editor._embeddings._kept.values()]
    assert len(kept) == 2
    kept[0].tensors["text"].mul_(2)
    assert len(reading.again()) == 1
    assert torch.equal(reading.run(), before)


def test_nobody_is_given_what_is_kept() -> None:
    """An edit that writes into the conditioning it sees spoils its own pass at most."""
    reading = Reading()
    before = reading.run()
    net = SD.control_net(reading.model.pipe)

    def residuals(x: Any, call: Any) -> Any:
        made = reading.model.control(net, x, torch.zeros(1, 3, 64, 64), 1.0)
        x.conditioning.tensors["text"].zero_()
        return made

    spoilt = reading.run(Custom(parts={"residuals": residuals}))
    assert not torch.equal(spoilt, before)
    assert reading.again() == []
    assert torch.equal(reading.run(), before)


def test_forgetting() -> None:
    reading = Reading()
    reading.run()
    reading.editor.forget()
    assert len(reading.editor._embeddings) == 0
    assert reading.again() == sorted(BOTH)


def test_long_prompts_are_filled_up_from_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading()
    encoder = reading.model.pipe.text_encoder
    calls: list[Any] = []
    forward = encoder.forward

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return forward(*given, **more)

    monkeypatch.setattr(encoder, "forward", counted)
    long = "horse " * 20
    before = reading.run(prompt=long)
    assert len(calls) == 4  # two chunks, the negative prompt, and what fills it up
    assert torch.equal(reading.run(prompt=long), before)
    assert len(calls) == 4


class Still:
    """A model as far as what is kept asks it."""

    def readers(self) -> list[torch.nn.Module]:
        return []


def kept(most: int, size: int, *keys: str) -> list[str]:
    """What is left of entries of 400 bytes that were asked for in turn."""
    embeddings, model = Embeddings(most, size), Still()
    with embeddings.of(model):  # type: ignore[arg-type]
        for key in keys:
            embeddings.get(model, key, lambda: Conditioning({"text": torch.zeros(1, 100)}))  # type: ignore[arg-type]
    assert embeddings.bytes == 400 * len(embeddings)
    return [str(key) for _, key in embeddings._kept]


def test_it_is_bounded_by_number_and_by_size() -> None:
    assert kept(3, 10_000, *"abcd") == ["b", "c", "d"]
    assert kept(3, 10_000, *"abcad") == ["c", "a", "d"]  # what was asked for stays
    assert kept(9, 1000, *"abcd") == ["c", "d"]
    assert kept(9, 399, *"ab") == []  # too large for all of it


def test_models_do_not_share() -> None:
    embeddings, one, other = Embeddings(), Still(), Still()
    for model in (one, other, one):
        with embeddings.of(model):  # type: ignore[arg-type]
            embeddings.get(model, "a", lambda: Conditioning({"text": torch.zeros(1)}))  # type: ignore[arg-type]
    assert len(embeddings) == 2
