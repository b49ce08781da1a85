"""Every field of a contribution merges by its law, and a clash names both owners."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffedit import Branch, Call, Contribution, Edit, Guidance, Patch, Row, Run, Start, Tokens
from diffedit.contribution import merge
from diffedit.edit import Windowed, canonical, labels
from diffedit.errors import ConflictError, ParameterError, PluginError


class A(Edit):
    name: ClassVar[str] = "a"
    x: float = 0.0

    def contribute(self, run: Run) -> Contribution:
        return Contribution()


class B(A):
    name: ClassVar[str] = "b"


class Early(A):
    name: ClassVar[str] = "z"
    stage = "early"


class Late(A):
    name: ClassVar[str] = "0"
    stage = "late"


def nothing(*args: Any) -> Any:
    return args[0]


def giving(**parts: Any) -> Contribution:
    return Contribution(**parts)


def both(field: str, one: Any, other: Any) -> Any:
    first, second = giving(**{field: one}), giving(**{field: other})
    return getattr(merge([(A(), first), (B(), second)]), field)


def test_every_field_has_a_law_and_a_test() -> None:
    laws = {
        f.name: (f.metadata["law"].__name__, f.metadata["chained"])
        for f in dataclasses.fields(Contribution)
        if f.name != "during"
    }
    assert laws == {
        "start": ("exclusive", False),
        "mask": ("maximum", False),
        "alpha": ("maximum", False),
        "keep": ("in_order", False),
        "conditioning": ("union", False),
        "channels": ("union", False),
        "tokens": ("flat", True),
        "branches": ("named", False),
        "rows": ("named", False),
        "terms": ("flat", False),
        "combine": ("exclusive", False),
        "noise": ("exclusive", False),
        "residuals": ("in_order", False),
        "sees": ("joined", False),
        "attention": ("in_order", True),
        "beside": ("in_order", False),
        "patches": ("flat", False),
        "prepare": ("in_order", False),
        "refine": ("in_order", True),
        "finish": ("in_order", True),
    }


@pytest.mark.parametrize(
    ("field", "value"), [("start", Start(torch.zeros(1, 4, 8, 8), 1)), ("combine", nothing)]
)
def test_exclusive(field: str, value: Any) -> None:
    with pytest.raises(ConflictError, match=rf"'a'.*'b'.*{field}.*two passes"):
        both(field, value, value)
    merged = merge([(A(), Contribution()), (B(id="mine"), giving(**{field: value}))])
    assert getattr(merged, field).owner == "mine"


def test_mask_is_the_larger() -> None:
    one, other = torch.tensor([[[[0.0, 0.5, 1.0]]]]), torch.tensor([[[[0.2, 0.1, 0.0]]]])
    assert torch.equal(both("mask", one, other), torch.tensor([[[[0.2, 0.5, 1.0]]]]))
    with pytest.raises(PluginError, match="b: mask"):
        both("mask", one, torch.zeros(1, 1, 2, 2))


def test_alpha_is_the_larger_and_where_none_is_given_the_mask() -> None:
    mask, alpha = torch.tensor([[[[0.0, 0.0, 1.0]]]]), torch.tensor([[[[0.2, 0.4, 0.3]]]])
    merged = merge([(A(), giving(mask=mask)), (B(), giving(alpha=alpha, mask=alpha.ceil()))])
    assert merged.alpha is not None
    assert merged.mask is not None
    assert torch.equal(merged.alpha, torch.tensor([[[[0.2, 0.4, 1.0]]]]))
    assert torch.equal(merged.mask, torch.ones(1, 1, 1, 3))
    assert merge([(A(), giving(prepare=nothing))]).alpha is None


def test_what_residuals_see_is_joined() -> None:
    masked = frozenset({"masked"})
    assert both("sees", frozenset({"mask"}), masked) == {"mask", "masked"}
    assert merge([(A(), Contribution())]).sees == frozenset()


@pytest.mark.parametrize("field", ["conditioning", "channels"])
def test_union_by_key(field: str) -> None:
    merged = both(field, {"p": torch.zeros(1)}, {"q": torch.ones(1)})
    assert {key: part.owner for key, part in merged.items()} == {"p": "a", "q": "b"}
    with pytest.raises(ConflictError, match=rf"'a'.*'b'.*'p'.*{field}"):
        both(field, {"p": torch.zeros(1)}, {"p": torch.ones(1)})


def test_tokens_terms_and_patches_stand_one_after_another() -> None:
    for field, one, other in (
        ("tokens", Tokens(torch.zeros(1), "r"), Tokens(torch.zeros(1), "q")),
        ("terms", Guidance(1, "positive", "negative"), Guidance(2, "positive", "negative")),
        ("patches", Patch(nothing), Patch(nothing)),
    ):
        merged = both(field, (one,), (other, one))
        assert [part.owner for part in merged] == ["a", "b", "b"]
        assert [part.value for part in merged] == [one, other, one]


@pytest.mark.parametrize(
    ("field", "part"),
    [("branches", Branch("n", "text")), ("rows", Row("n", lambda call: torch.zeros(1)))],
)
def test_names_belong_to_their_edit(field: str, part: Any) -> None:
    assert [one.value.name for one in both(field, (part,), (part,))] == ["a/n", "b/n"]
    given = giving(**{field: (part,)})
    with pytest.raises(ConflictError, match=r"'a/n'.*id"):
        merge([(A(x=1), given), (A(x=2), given)])
    merged = getattr(merge([(A(x=1, id="p"), given), (A(x=2, id="q"), given)]), field)
    assert [one.value.name for one in merged] == ["p/n", "q/n"]


@pytest.mark.parametrize("field", ["keep", "residuals", "prepare"])
def test_two_of_one_class_may_both_have(field: str) -> None:
    one = giving(**{field: nothing})
    merged = getattr(merge([(A(x=1), one), (A(x=2), one), (B(), one)]), field)
    assert [part.owner for part in merged] == ["a.1", "a.2", "b"]


@pytest.mark.parametrize("field", ["attention", "refine", "finish"])
def test_chained_fields_of_one_class_need_after(field: str) -> None:
    one = giving(**{field: nothing})
    with pytest.raises(ConflictError, match=rf"'a.1'.*'a.2'.*{field}.*after"):
        merge([(A(x=1), one), (A(x=2), one)])
    for chain in (
        [A(x=2, id="p"), A(x=1, after="p")],
        [A(x=3, id="p"), A(x=2, id="q", after="p"), A(x=1, after="q")],
    ):
        for listed in itertools.permutations(chain):
            ordered = canonical(listed)
            assert ordered == chain
            merge([(edit, one) for edit in ordered])
    unordered = canonical([A(x=3, id="p"), A(x=2, after="p"), A(x=1, after="p")])
    with pytest.raises(ConflictError):  # both after the first, in no order themselves
        merge([(edit, one) for edit in unordered])
    merge([(A(x=1), one), (B(), one)])  # of two classes: by name
    merge([(A(x=1), one), (A(x=2), Contribution())])


def test_during_travels_with_every_part() -> None:
    one = Contribution(terms=(Guidance(1, "a", "b"),), refine=nothing, during=(0.25, 0.5))
    merged = merge([(A(), one)])
    assert [part.during for part in merged.terms] == [(0.25, 0.5)]
    assert [part.during for part in merged.refine] == [(0.25, 0.5)]
    # as diffusers' ControlNet windows: off when i/n < start or (i+1)/n > end
    active = [merged.refine[0].active(Call(i, 8, 0.0)) for i in range(8)]
    assert active == [i in (2, 3) for i in range(8)]


@given(st.permutations([A(x=0.5), A(x=0.25), B(), Late(), Early(), B(x=1), A(id="i", after=None)]))
def test_the_order_does_not_depend_on_the_listing(listed: list[Edit]) -> None:
    ordered = canonical(listed)
    assert [edit.name for edit in ordered] == ["z", "a", "a", "a", "b", "b", "0"]
    assert ordered == canonical(reversed(ordered))
    assert len(set(labels(ordered))) == len(ordered)


def test_an_edit_that_is_listed_twice_acts_twice() -> None:
    one = A(x=1)
    assert canonical([one, one, B()]) == [one, one, B()]


def test_after_moves_an_edit_behind_another() -> None:
    assert canonical([A(after="x"), B(id="x")]) == [B(id="x"), A(after="x")]


@pytest.mark.parametrize(
    ("edits", "error", "said"),
    [
        ([A(after="nobdy"), B(id="nobody")], ParameterError, "did you mean 'nobody'"),
        ([A(id="p"), B(id="p")], ParameterError, "two edits.*'p'"),
        ([A(id="p", after="q"), B(id="q", after="p")], ConflictError, "'p'.*'q'.*circle"),
        ([A(id="p", after="p")], ConflictError, "circle"),
    ],
)
def test_what_after_and_id_cannot_say(edits: list[Edit], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        canonical(edits)


def test_only_what_finishes_needs_no_sampler() -> None:
    assert merge([(A(), Contribution(finish=nothing, mask=torch.ones(1, 1, 2, 2)))]).rests
    assert not merge([(A(), Contribution())]).rests
    finishing = (A(), Contribution(finish=nothing))
    assert merge([finishing, (B(), Contribution())]).rests
    assert not merge([finishing, (B(), Contribution(mask=torch.ones(1, 1, 2, 2)))]).rests
    for field, value in (
        ("refine", nothing),
        ("start", Start(torch.zeros(1), 1)),
        ("patches", (Patch(nothing),)),
        ("rows", (Row("r", nothing),)),
        ("channels", {"p": torch.zeros(1)}),
    ):
        assert not merge([(A(), giving(finish=nothing, **{field: value}))]).rests


def test_a_digest_follows_parameters_and_not_names() -> None:
    assert A(x=1).digest == A(x=1, id="p", after="q").digest
    assert len({A(x=1).digest, A(x=2).digest, B(x=1).digest}) == 3


def test_an_edit_with_a_window_says_when_it_acts() -> None:
    class Late(Windowed, frozen=True):
        name = "late"

    assert Late().during == (0, 1)
    assert Late(start=0.25, end=0.5).during == (0.25, 0.5)
    with pytest.raises(ValidationError, match=r"start 0\.6 lies after end 0\.5"):
        Late(start=0.6, end=0.5)
