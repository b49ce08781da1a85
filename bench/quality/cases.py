"""The benchmark's cases, as data: what is edited, what is asked, and what is true of it.

A case is a value without pixels: everything in it is a fraction of the picture's side, so that the
same case serves a model of any native size. `cases()` depends on nothing but `SEED`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest

import numpy as np

from diffedit.training.world.backdrops import KEPT_FOR_JUDGING
from diffedit.training.world.forms import SHAPES
from diffedit.training.world.scenes import (
    RELATIONS,
    STYLES,
    Background,
    Scene,
    Stage,
    article,
)
from diffedit.training.world.things import COLOURS, OBJECTS, PALETTE, Thing

SEED = 20261121
"""Of the whole set; no training draws from it."""

CATEGORIES = (
    "nothing",
    "replace",
    "remove",
    "add",
    "recolour",
    "restyle",
    "restructure",
    "chain",
)

OTHER_PHOTOGRAPHS = (
    *("stereo_motorcycle", "hubble_deep_field", "immunohistochemistry", "retina"),
    *("camera", "coins", "brick", "clock"),
)
"""Photographs in scikit-image's wheel that the autoencoder may have seen in training."""

PHOTOGRAPHS = (*KEPT_FOR_JUDGING, *OTHER_PHOTOGRAPHS)

PHOTO_SCALE = 1.5
"""Side of a photograph (and of a chain's picture), in units of the model's native side."""

LOOKS = 6
"""References that styles are taken from; see `pictures.look`."""

HINTS = ("canny", "depth", "segments")


@dataclass(frozen=True, slots=True)
class Source:
    """What is edited: a drawn scene, or a square crop of a photograph.

    Attributes:
        scene: the drawn scene, if it is one.
        photo: the photograph's name in `skimage.data` otherwise.
        crop: left, top and side of the crop, as fractions of what the photograph leaves over and
            of its shorter side.
        scale: the picture's side in units of the model's native side.
    """

    scene: Scene | None = None
    photo: str = ""
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """A mask: a square or a disc with centre and half width, or a drawn thing's own outline.

    For ``form="thing"`` the thing is number `thing` of the source's scene and `half` is how far
    its outline is grown. All in fractions of the side.
    """

    form: str
    x: float = 0.5
    y: float = 0.5
    half: float = 0.0
    thing: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object that is asked for.

    Attributes:
        colour: of the palette.
        noun: a shape or an object.
        other: a colour that nobody asked for and that does not stand in the source: a control.
        place: the number of the mask that it is to stand in; None: anywhere.
    """

    colour: str
    noun: str
    other: str
    place: int | None = None

    @property
    def words(self) -> str:
        return f"{self.colour} {self.noun}"


@dataclass(frozen=True, slots=True)
class Case:
    """One edit, or a chain of them.

    Attributes:
        id: category and number, ``"replace-017"``.
        category: one of `CATEGORIES`; `group` divides it further.
        seed: of the sampling.
        prompts: one for each pass.
        source: what is edited; None: from nothing.
        places: one mask for each pass; empty: the whole picture changes.
        wanted: the objects to be found in the end.
        relation: between the first and the second of them.
        background: the background's colour, where it is asked for.
        ground: the colour of the ground or table, where it is asked for.
        cleared: the number of the mask that is to show the background in the end.
        style: the style word that is asked for.
        look: the number of the reference whose style is to be taken.
        strength: how far image to image goes; None: it does not.
        hint: which kind of hint is given.
        answer: a drawn scene that would be right, for hints and for the judges' ceiling.
    """

    id: str
    category: str
    group: str
    seed: int
    prompts: tuple[str, ...]
    source: Source | None = None
    places: tuple[Place, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    relation: str | None = None
    background: str | None = None
    ground: str | None = None
    cleared: int | None = None
    style: str | None = None
    look: int | None = None
    strength: float | None = None
    hint: str | None = None
    answer: Scene | None = field(default=None)

    @property
    def number(self) -> int:
        """Its number within the category."""
        return int(self.id.rsplit("-", 1)[1])

    @property
    def lot(self) -> int:
        """A number that has nothing to do with what is asked, to draw parts of the set by."""
        return zlib.crc32(self.id.encode())

    @property
    def scale(self) -> float:
        """Side of the picture, in units of the model's native side."""
        return 1.0 if self.source is None else self.source.scale

    @property
    def words(self) -> frozenset[str]:
        """All words of the prompts."""
        return frozenset(re.findall(r"[a-z]+", " ".join(self.prompts).lower()))


def digest(cases: Iterable[Case]) -> str:
    """A short name for a set of cases: any change of any of them changes it."""
    said = json.dumps([asdict(case) for case in cases], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def cases() -> list[Case]:
    """All cases, category by category."""
    made: list[Case] = []
    for index, category in enumerate(CATEGORIES):
        rng = np.random.default_rng((SEED, index))
        found = _MAKERS[category](rng)
        made += [
            replace(
                one,
                id=f"{category}-{number:03}",
                category=category,
                seed=10_000 * index + number,
            )
            for number, one in enumerate(found)
        ]
    return made


def balanced(found: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` cases, as evenly as possible from every category and every group of it.

    Which cases are taken does not depend on what else is: a smaller limit takes a part of what a
    larger one does.
    """
    groups: dict[str, dict[str, list[Case]]] = {}
    for case in found:
        groups.setdefault(case.category, {}).setdefault(case.group, []).append(case)
    turns = [_in_turn(list(by_group.values())) for by_group in groups.values()]
    return _in_turn(turns)[:limit]


def _in_turn(lists: Sequence[Sequence[Case]]) -> list[Case]:
    return [case for turn in zip_longest(*lists) for case in turn if case is not None]


# --- what stands in them --------------------------------------------------------------------------


def _pick(rng: np.random.Generator, items: Sequence[str], taken: Iterable[str] = ()) -> str:
    return str(rng.choice([item for item in items if item not in set(taken)]))


def _background(
    rng: np.random.Generator, taken: Iterable[str] = (), kinds: Sequence[str] = ("plain",)
) -> Background:
    first = _pick(rng, COLOURS, taken)
    second = _pick(rng, COLOURS, {*taken, first})
    kind = str(rng.choice(kinds))
    return Background(kind, first, second, int(rng.integers(2**31)))


def _colours(background: Background) -> set[str]:
    """The colours that stand in a background."""
    plain = background.kind == "plain"
    return {background.colour} if plain else {background.colour, background.second}


def _thing(
    rng: np.random.Generator, colour: str, noun: str, x: float, y: float, radius: float
) -> Thing:
    angle = float(rng.uniform(-0.15, 0.15)) if noun in SHAPES else 0.0
    return Thing(noun, colour, PALETTE[colour], "plain", x, y, radius, angle)


def _scene(background: Background, *things: Thing, style: str = "flat") -> Scene:
    return Scene(background, things, style, None, "")


def _pairs_of(rng: np.random.Generator, count: int, nouns: Sequence[str]) -> list[tuple[str, str]]:
    """`count` pairs of colour and noun: every pair as often as any other, give or take one."""
    pairs = [(colour, noun) for colour in COLOURS for noun in nouns]
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(count // len(pairs) + 1)])
    return [pairs[int(at)] for at in order[:count]]


def _masks(rng: np.random.Generator, number: int, low: float, high: float) -> Place:
    """A square or a disc anywhere in the frame, `low` to `high` wide from its middle."""
    half = float(rng.uniform(low, high))
    x, y = (float(v) for v in rng.uniform(half, 1 - half, 2))
    return Place("disc" if number % 2 else "square", x, y, half)


_MOST = ("plain", "plain", "gradient", "striped", "checkered", "dotted")
"""Kinds of backgrounds, as often as they are drawn."""


def _photo(rng: np.random.Generator, name: str) -> Source:
    left, top, extent = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.6, 1.0)
    return Source(photo=name, crop=(float(left), float(top), float(extent)), scale=PHOTO_SCALE)


def _photo_group(name: str) -> str:
    return "held-out photographs" if name in KEPT_FOR_JUDGING else "other photographs"


# --- from nothing ---------------------------------------------------------------------------------


def _nothing(rng: np.random.Generator) -> list[Case]:
    return [
        *_single(rng),
        *_two(rng),
        *_objects(rng),
        *_styles(rng),
        *_views(rng),
        *_styled_views(rng),
    ]


def _single(rng: np.random.Generator) -> list[Case]:
    """One shape; every second prompt names a background."""
    made = []
    for number, (colour, noun) in enumerate(_pairs_of(rng, 96, SHAPES)):
        behind, other = (str(c) for c in rng.choice([c for c in COLOURS if c != colour], 2, False))
        asked = behind if number % 2 else None
        prompt = article(f"{colour} {noun}")
        if asked:
            prompt = f"{prompt} on {article(f'{behind} background')}"
        answer = _scene(
            Background("plain", behind, behind, number),
            _thing(rng, colour, noun, 0.5, 0.5, 0.3),
        )
        wanted = (Wanted(colour, noun, other),)
        made.append(_case("one object", prompt, wanted=wanted, background=asked, answer=answer))
    return made


def _two(rng: np.random.Generator) -> list[Case]:
    """Two shapes and how they stand to each other."""
    made = []
    firsts, seconds = _pairs_of(rng, 48, SHAPES), _pairs_of(rng, 48, SHAPES)
    for number, ((colour, noun), (_, noun2)) in enumerate(zip(firsts, seconds, strict=True)):
        relation = RELATIONS[number % len(RELATIONS)]
        colour2 = _pick(rng, COLOURS, [colour])
        behind = _background(rng, [colour, colour2])
        other = _pick(rng, COLOURS, [colour, colour2, behind.colour])
        upright = relation in ("above", "below")
        at = [(0.27, 0.5), (0.73, 0.5)]
        if relation in ("right of", "below"):
            at.reverse()
        if upright:
            at = [(y, x) for x, y in at]
        prompt = f"{article(f'{colour} {noun}')} {relation} {article(f'{colour2} {noun2}')}"
        if number // len(RELATIONS) % 2:
            prompt = f"{prompt} on {article(behind.words)}"
        answer = _scene(
            behind,
            _thing(rng, colour, noun, *at[0], 0.18),
            _thing(rng, colour2, noun2, *at[1], 0.18),
        )
        wanted = (Wanted(colour, noun, other), Wanted(colour2, noun2, other))
        made.append(_case("two objects", prompt, wanted=wanted, relation=relation, answer=answer))
    return made


def _objects(rng: np.random.Generator) -> list[Case]:
    """One composed thing: a house, an apple, …"""
    made = []
    for colour, noun in _pairs_of(rng, 22, OBJECTS):
        behind = _background(rng, [colour])
        other = _pick(rng, COLOURS, [colour, behind.colour])
        prompt = f"{article(f'{colour} {noun}')} on {article(behind.words)}"
        answer = _scene(behind, _thing(rng, colour, noun, 0.5, 0.5, 0.32))
        wanted = (Wanted(colour, noun, other),)
        made.append(_case("one thing", prompt, wanted=wanted, answer=answer))
    return made


def _styles(rng: np.random.Generator) -> list[Case]:
    """One shape in a style that the prompt names."""
    made = []
    for number, (colour, noun) in enumerate(_pairs_of(rng, 24, SHAPES)):
        style = STYLES[1:][number % (len(STYLES) - 1)]
        behind = _background(rng, [colour, *_ink(style, colour)])
        prompt = _styled(style, article(f"{colour} {noun}"))
        if style not in ("sepia", "neon"):
            prompt = f"{prompt} on {article(behind.words)}"
        answer = _scene(behind, _thing(rng, colour, noun, 0.5, 0.5, 0.3), style=style)
        made.append(_case("a style", prompt, style=style, answer=answer))
    return made


@dataclass(frozen=True, slots=True)
class View:
    """Where drawn things stand: a landscape or a table, and the words for it.

    Attributes:
        words: the prompt, with a place for what stands there.
        noun: what stage the things stand on.
        ground: its colour's name, `rgb` the colour itself.
        behind: the background's kind and two colours.
        nouns: what may stand there.
    """

    words: str
    noun: str
    ground: str
    rgb: tuple[int, int, int]
    behind: tuple[str, str, str]
    nouns: tuple[str, ...]

    @property
    def outside(self) -> bool:
        return self.noun == "ground"

    @property
    def colours(self) -> list[str]:
        """Colours that a thing is told from this view by."""
        return [c for c in COLOURS if c not in (self.ground, *self.behind[1:])]

    def scene(self, seed: int, *things: Thing, style: str = "flat") -> Scene:
        stage = Stage(self.noun, self.rgb, 0.58, 0.02 if self.outside else 0.0)
        return Scene(Background(*self.behind, seed), things, style, None, "", stage=(stage,))

    def thing(self, colour: str, noun: str, x: float = 0.5, radius: float = 0.22) -> Thing:
        return Thing(noun, colour, PALETTE[colour], "plain", x, 0.72 - radius, radius)

    def said(self, *things: str) -> str:
        return self.words.format(" and ".join(article(one) for one in things))


_OUTSIDE, _INSIDE = ("house", "tree", "car"), ("apple", "pear", "cup")

VIEWS = (
    View("a landscape with {}", "ground", "green", (84, 168, 62),
         ("sky", "cyan", "white"), _OUTSIDE),
    View("{} in winter", "ground", "white", (232, 236, 244), ("sky", "cyan", "white"), _OUTSIDE),
    View("{} on a brown table", "table", "brown", PALETTE["brown"],
         ("plain", "yellow", "yellow"), _INSIDE),
)  # fmt: skip


def _view(
    rng: np.random.Generator, number: int, count: int = 1
) -> tuple[View, list[tuple[str, str]], str]:
    """A view, `count` pairs of colour and noun that all differ, and a colour of none of them."""
    view = VIEWS[number % len(VIEWS)]
    colours = [str(c) for c in rng.permutation(view.colours)]
    nouns = [str(n) for n in rng.permutation(view.nouns)]
    others = [c for c in colours[count:] if c not in ("black", "brown", "gray", "green")]
    return view, list(zip(colours[:count], nouns, strict=False)), others[0]


def _views(rng: np.random.Generator) -> list[Case]:
    """A thing in a landscape or on a table."""
    made = []
    for number in range(24):
        view, [(colour, noun)], other = _view(rng, number)
        answer = view.scene(number, view.thing(colour, noun))
        wanted = (Wanted(colour, noun, other),)
        made.append(_case("a view", view.said(f"{colour} {noun}"), wanted=wanted,
                          ground=view.ground, answer=answer))  # fmt: skip
    return made


def _styled(style: str, prompt: str) -> str:
    """A prompt that asks for a style, as the drawn world's captions do; sepia names no colours."""
    words = [w for w in prompt.split() if w not in PALETTE] if style == "sepia" else prompt.split()
    bare = " ".join(words[1:] if words[0] in ("a", "an") else words)
    bare = re.sub(r"\ban? (\w)", lambda m: article(m[1]), bare)
    return article(f"{style} {bare}")


def _ink(style: str, colour: str) -> list[str]:
    """The colour of a thing's outline, in front of which nobody could tell the style."""
    if style != "outlined":
        return []
    return ["white" if colour == "black" else "black"]


def _styled_views(rng: np.random.Generator) -> list[Case]:
    """A thing in a landscape or on a table, in a style that the prompt names."""
    made = []
    for number in range(18):
        style = STYLES[1:][number % (len(STYLES) - 1)]
        view, [(colour, noun)], _ = _view(rng, number // (len(STYLES) - 1))
        answer = view.scene(number, view.thing(colour, noun), style=style)
        prompt = _styled(style, view.said(f"{colour} {noun}"))
        made.append(_case("a style", prompt, style=style, answer=answer))
    return made


# --- with a mask ----------------------------------------------------------------------------------


def _replace(rng: np.random.Generator) -> list[Case]:
    """Another object in place of the one under the mask, by a prompt that names only it."""
    made = []
    for number, (colour, noun) in enumerate(_pairs_of(rng, 56, SHAPES)):
        old = _pick(rng, COLOURS, [colour])
        behind = _background(rng, [colour, old], _MOST)
        other = _pick(rng, COLOURS, {colour, old} | _colours(behind))
        radius = float(rng.uniform(0.17, 0.26))
        half = max(0.24, 1.25 * radius)
        x, y = (float(v) for v in rng.uniform(half, 1 - half, 2))
        under = _thing(rng, old, _pick(rng, SHAPES, [noun]), x, y, radius)
        made.append(
            _case(
                "drawn",
                article(f"{colour} {noun}"),
                source=Source(_scene(behind, under)),
                places=(Place("disc" if number % 2 else "square", x, y, half),),
                wanted=(Wanted(colour, noun, other, 0),),
            )
        )
    for number in range(24):
        view, [(old, was), (colour, noun)], other = _view(rng, number, 2)
        x = float(rng.uniform(0.32, 0.68))
        made.append(
            _case(
                "in a view",
                view.said(f"{colour} {noun}"),
                source=Source(view.scene(number, view.thing(old, was, x))),
                places=(Place("disc" if number % 2 else "square", x, 0.5, 0.28),),
                wanted=(Wanted(colour, noun, other, 0),),
            )
        )
    return made


def _remove(rng: np.random.Generator) -> list[Case]:
    """The object's own mask, to be filled with the background that the prompt names."""
    made = []
    for old, noun in _pairs_of(rng, 60, SHAPES):
        behind = _background(rng, [old], ("plain", "plain", "gradient"))
        radius = float(rng.uniform(0.18, 0.3))
        x, y = (float(v) for v in rng.uniform(radius + 0.05, 0.95 - radius, 2))
        made.append(
            _case(
                "drawn",
                article(behind.words),
                source=Source(_scene(behind, _thing(rng, old, noun, x, y, radius))),
                places=(Place("thing", half=0.04),),
                cleared=0,
                answer=_scene(behind),
            )
        )
    for number in range(60):
        view, [(colour, noun), (colour2, noun2)], _ = _view(rng, number, 2)
        left, right = view.thing(colour, noun, 0.27), view.thing(colour2, noun2, 0.73)
        made.append(
            _case(
                "in a view",
                view.said(right.words),
                source=Source(view.scene(number, left, right)),
                places=(Place("thing", half=0.04),),
                cleared=0,
                answer=view.scene(number, right),
            )
        )
    return made


def _add(rng: np.random.Generator) -> list[Case]:
    """An object on empty ground, drawn or photographed."""
    made = []
    for number, (colour, noun) in enumerate(_pairs_of(rng, 44, SHAPES)):
        behind = _background(rng, [colour], _MOST)
        other = _pick(rng, COLOURS, {colour} | _colours(behind))
        made.append(
            _case(
                "drawn",
                article(f"{colour} {noun}"),
                source=Source(_scene(behind)),
                places=(_masks(rng, number, 0.225, 0.375),),
                wanted=(Wanted(colour, noun, other, 0),),
            )
        )
    for number in range(24):
        view, [(colour, noun), (there, noun2)], other = _view(rng, number, 2)
        there_is = view.thing(there, noun2, 0.25, 0.19)
        made.append(
            _case(
                "in a view",
                view.said(there_is.words, f"{colour} {noun}"),
                source=Source(view.scene(number, there_is)),
                places=(Place("disc" if number % 2 else "square", 0.72, 0.52, 0.25),),
                wanted=(Wanted(colour, noun, other, 0),),
            )
        )
    for number, (colour, noun) in enumerate(_pairs_of(rng, 60, SHAPES)):
        # The kept photographs as often as all the others.
        names = KEPT_FOR_JUDGING if number % 2 else OTHER_PHOTOGRAPHS
        name = names[number // 2 % len(names)]
        made.append(
            _case(
                _photo_group(name),
                article(f"{colour} {noun}"),
                source=_photo(rng, name),
                places=(_masks(rng, number // 2, 0.16, 0.24),),
                wanted=(Wanted(colour, noun, _pick(rng, COLOURS, [colour]), 0),),
            )
        )
    return made


def _recolour(rng: np.random.Generator) -> list[Case]:
    """The object's own mask, and the same object in another colour."""
    made = []
    for colour, noun in _pairs_of(rng, 48, SHAPES):
        old = _pick(rng, COLOURS, [colour])
        behind = _background(rng, [colour, old], ("plain", "plain", "gradient"))
        other = _pick(rng, COLOURS, {colour, old} | _colours(behind))
        radius = float(rng.uniform(0.24, 0.36))
        x, y = (float(v) for v in rng.uniform(radius + 0.05, 0.95 - radius, 2))
        made.append(
            _case(
                "drawn",
                article(f"{colour} {noun}"),
                source=Source(_scene(behind, _thing(rng, old, noun, x, y, radius))),
                places=(Place("thing", half=0.01),),
                wanted=(Wanted(colour, noun, other, 0),),
                answer=_scene(behind, _thing(rng, colour, noun, x, y, radius)),
            )
        )
    for number in range(24):
        view, [(old, noun), (colour, _)], other = _view(rng, number, 2)
        x, radius = float(rng.uniform(0.35, 0.65)), 0.26
        made.append(
            _case(
                "in a view",
                view.said(f"{colour} {noun}"),
                source=Source(view.scene(number, view.thing(old, noun, x, radius))),
                places=(Place("thing", half=0.01),),
                wanted=(Wanted(colour, noun, other, 0),),
                answer=view.scene(number, view.thing(colour, noun, x, radius)),
            )
        )
    return made


# --- the whole picture ----------------------------------------------------------------------------


def _restyle(rng: np.random.Generator) -> list[Case]:
    """A reference's look, or a style that the prompt names, on a picture that is there."""
    made = []
    for number, (colour, noun) in enumerate(_pairs_of(rng, 18, SHAPES)):
        behind = _background(rng, [colour])
        made.append(
            _case(
                "by a reference",
                article(f"{colour} {noun}"),
                source=Source(_scene(behind, _thing(rng, colour, noun, 0.5, 0.5, 0.3))),
                wanted=(Wanted(colour, noun, "", None),),
                look=number % LOOKS,
                strength=0.8,
            )
        )
    for number, name in enumerate(PHOTOGRAPHS):
        source = replace(_photo(rng, name), scale=1.0)
        looks = [at for at in range(LOOKS) if at < 4 or name not in ("chelsea", "coffee")]
        look = looks[number % len(looks)]
        made.append(_case(f"by a reference, {_photo_group(name)}", "a photo",
                          source=source, look=look, strength=0.6))  # fmt: skip
    for number, (colour, noun) in enumerate(_pairs_of(rng, 30, SHAPES)):
        style = STYLES[1:][number % (len(STYLES) - 1)]
        behind = _background(rng, [colour, *_ink(style, colour)])
        thing = _thing(rng, colour, noun, 0.5, 0.5, 0.3)
        prompt = _styled(style, article(f"{colour} {noun}"))
        if style not in ("sepia", "neon"):
            prompt = f"{prompt} on {article(behind.words)}"
        made.append(
            _case(
                "by a word",
                prompt,
                source=Source(_scene(behind, thing)),
                style=style,
                strength=0.8,
                answer=_scene(behind, thing, style=style),
            )
        )
    for number in range(18):
        style = STYLES[1:][number % (len(STYLES) - 1)]
        view, [(colour, noun)], _ = _view(rng, number // (len(STYLES) - 1))
        thing = view.thing(colour, noun)
        made.append(
            _case(
                "by a word, a view",
                _styled(style, view.said(thing.words)),
                source=Source(view.scene(number, thing)),
                style=style,
                strength=0.8,
                answer=view.scene(number, thing, style=style),
            )
        )
    return made


def _restructure(rng: np.random.Generator) -> list[Case]:
    """A picture from nothing that follows a hint; every second one of two that overlap."""
    made = []
    for hint, count in zip(HINTS, (16, 12, 12), strict=True):
        for number, (colour, noun) in enumerate(_pairs_of(rng, count, SHAPES)):
            behind = _background(rng, [colour])
            x, y = (float(v) for v in rng.uniform(0.36, 0.64, 2))
            things = [_thing(rng, colour, noun, x, y, 0.3)]
            other = _pick(rng, COLOURS, [colour, behind.colour])
            wanted = [Wanted(colour, noun, other)]
            words = article(f"{colour} {noun}")
            if number % 2:
                # The second stands before the first, and covers a part of it.
                colour2 = _pick(rng, COLOURS, [colour, behind.colour, other])
                noun2 = _pick(rng, SHAPES)
                turn = float(rng.uniform(0, 2 * np.pi))
                middle = 0.5 - 0.13 * np.array([np.cos(turn), np.sin(turn)])
                things = [
                    _thing(rng, colour, noun, float(middle[0]), float(middle[1]), 0.22),
                    _thing(rng, colour2, noun2, float(1 - middle[0]), float(1 - middle[1]), 0.2),
                ]
                wanted.append(Wanted(colour2, noun2, other))
                words = f"{words} and {article(f'{colour2} {noun2}')}"
            made.append(
                _case(
                    hint,
                    f"{words} on {article(behind.words)}",
                    wanted=tuple(wanted),
                    hint=hint,
                    answer=_scene(behind, *things),
                )
            )
    return made


_CORNERS = ((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8))


def _chain(rng: np.random.Generator) -> list[Case]:
    """Five edits on one picture, each on the result of the one before.

    Two objects are added, the first is replaced, a third is added; the fifth edit takes the second
    away again (drawn) or adds another (photographs).
    """
    made = []
    for number in range(40):
        drawn = number % 2 == 0
        colours = [str(c) for c in rng.permutation(COLOURS)]
        nouns = [str(n) for n in rng.permutation(SHAPES)]
        where = [_CORNERS[int(at)] for at in rng.permutation(len(_CORNERS))]
        spots = [Place("disc" if i % 2 else "square", x, y, 0.15) for i, (x, y) in enumerate(where)]
        behind = Background("plain", colours[5], colours[5], number)
        names = KEPT_FOR_JUDGING if number % 4 == 1 else OTHER_PHOTOGRAPHS
        name = names[number // 4 % len(names)]
        source = Source(_scene(behind), scale=PHOTO_SCALE) if drawn else replace(_photo(rng, name))
        said = [article(f"{c} {n}") for c, n in zip(colours[:5], nouns[:5], strict=True)]
        wanted = [Wanted(colours[2], nouns[2], colours[6], 2), Wanted(colours[3], nouns[3],
                  colours[6], 3)]  # fmt: skip
        fifth = spots[1] if drawn else spots[3]
        if not drawn:
            wanted += [
                Wanted(colours[1], nouns[1], colours[6], 1),
                Wanted(colours[4], nouns[4], colours[6], 4),
            ]
        made.append(
            _case(
                "drawn" if drawn else _photo_group(name),
                (*said[:4], article(behind.words) if drawn else said[4]),
                source=source,
                places=(spots[0], spots[1], spots[0], spots[2], fifth),
                wanted=tuple(wanted),
                cleared=4 if drawn else None,
                answer=_scene(behind) if drawn else None,
            )
        )
    return made


def _case(group: str, prompt: str | tuple[str, ...], **said: object) -> Case:
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    return Case("", "", group, 0, prompts, **said)  # type: ignore[arg-type]


_MAKERS: dict[str, Callable[[np.random.Generator], list[Case]]] = {
    "nothing": _nothing,
    "replace": _replace,
    "remove": _remove,
    "add": _add,
    "recolour": _recolour,
    "restyle": _restyle,
    "restructure": _restructure,
    "chain": _chain,
}
