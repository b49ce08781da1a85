"""Scenes: what stands where, in which style, and the words for it.

A :class:`Scene` is a value, free of resolution; :func:`~diffedit.training.world.paint.render` draws
it at any side length. ``draw_scene(seed, index, mix)`` depends on nothing but its arguments, so
that a training run can be stopped and resumed anywhere and any scene can be looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffedit.training.world.forms import SHAPES
from diffedit.training.world.things import COLOURS, OBJECTS, PALETTE, RGB, SKIN, Thing, darker

TEXTURES = ("plain", "striped", "dotted")
STYLES = ("flat", "outlined", "shaded", "watercolor", "neon", "sepia", "mosaic")
UNSEEN_STYLES = ("blueprint",)
"""Drawn only where they are asked for; no caption names them, and no base model has seen them."""
PATTERNS = ("plain", "gradient", "striped", "checkered", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
VIEWS = ("objects", "landscape", "still life", "room", "face")

_JITTER = 10
"""Largest deviation of a drawn colour from its palette entry, per channel, 0-255."""


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind everything: a pattern of one or two colours, or a photograph's crop.

    ``kind`` is one of :data:`PATTERNS`, ``"photo"`` or ``"sky"`` (the first colour above, turning
    into the second); ``seed`` fixes all that is random in it.
    """

    kind: str
    colour: str
    second: str
    seed: int

    @property
    def words(self) -> str:
        """``"blue background"``, ``"striped blue and white background"`` or ``"photo"``."""
        if self.kind == "photo":
            return "photo"
        if self.kind == "plain":
            return f"{self.colour} background"
        return f"{self.kind} {self.colour} and {self.second} background"


@dataclass(frozen=True, slots=True)
class Stage:
    """Ground, hills, a wall's floor or a table: a band across the picture.

    It reaches from ``top`` (a fraction of the height, swinging by ``swing``) down to the frame.
    """

    noun: str
    rgb: RGB
    top: float
    swing: float = 0.0
    waves: float = 1.0
    phase: float = 0.0
    layer: int = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's full description; ``relation`` is between the first and the second object.

    ``told`` is the number of the one thing that the caption is about, where it passes over the
    rest of a view.
    """

    background: Background
    things: tuple[Thing, ...]
    style: str
    relation: str | None
    caption: str
    view: str = "objects"
    stage: tuple[Stage, ...] = ()
    told: int | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of what is drawn, each a probability in [0, 1].

    ``photo`` … ``radius`` are of the view "objects"; ``views`` is the share of all other views,
    and ``told`` the share of these whose caption names one thing and passes over the rest, as the
    prompt of an edit does.
    """

    photo: float = 0.35
    pattern: float = 0.15
    empty: float = 0.03
    pair: float = 0.05
    texture: float = 0.1
    style: float = 0.1
    radius: tuple[float, float] = field(default=(0.14, 0.42))
    nouns: float = 0.0
    views: float = 0.0
    told: float = 0.0


SIMPLE = Mix()
"""The first world: mostly one flat object, half of the time before a plain or gradient colour."""

PLAIN = Mix(photo=0.3, pattern=0.0, empty=0.0, pair=0.0, texture=0.0, style=0.0)
"""The clearest world: one flat object before a plain or gradient colour, or a photograph."""

PAIRS = Mix(photo=0.15, pattern=0.05, empty=0.0, pair=0.7, texture=0.0, style=0.0)
"""Mostly two flat objects, and how they stand to each other."""

RICH = Mix(
    photo=0.25, pattern=0.15, empty=0.03, pair=0.3, texture=0.1, style=0.35, nouns=0.35, views=0.4
)
"""The whole world: things, textures, patterns, styles, pairs, landscapes, still lifes, faces."""

IN_VIEWS = Mix(
    photo=0.2, pattern=0.0, empty=0.0, pair=0.15, texture=0.0, style=0.0, nouns=0.8, views=0.6,
    told=0.3,
)  # fmt: skip
"""Things, alone and in landscapes, still lifes, rooms and faces, all flat."""

PHOTOS = Mix(photo=1.0, pattern=0.0, empty=1.0, pair=0.0, texture=0.0, style=0.0)
"""Crops of photographs, and noise with their statistics: for the autoencoder."""

MIXES = {
    "plain": PLAIN,
    "simple": SIMPLE,
    "pairs": PAIRS,
    "rich": RICH,
    "views": IN_VIEWS,
    "photos": PHOTOS,
}


def draw_scene(seed: int, index: int, mix: Mix = SIMPLE) -> Scene:
    """The scene number ``index`` of the world ``seed``: a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    if mix.views and rng.random() < mix.views:
        scene = _VIEWS[int(rng.integers(len(_VIEWS)))](rng)
        if mix.told and rng.random() < mix.told:
            scene = _telling_one(rng, scene)
        # Styles are learnt best where they change most.
        style = str(rng.choice(STYLES)) if mix.style else "flat"
        return _in_style(rng, scene, style)
    style = str(rng.choice(STYLES[1:])) if rng.random() < mix.style else "flat"
    background = _draw_background(rng, mix)
    taken = {background.colour, background.second} if background.kind != "photo" else set()
    if rng.random() < mix.empty:
        return Scene(background, (), "flat", None, _empty_caption(rng, background))
    if rng.random() < mix.pair:
        things, relation = _draw_pair(rng, mix, taken)
    else:
        low, high = mix.radius
        radius = float(rng.uniform(low, high))
        reach = max(0.0, 0.48 - radius)
        # Two draws averaged: centred more often than not, as the object of an edit is.
        x, y = 0.5 + reach * rng.uniform(-1, 1, (2, 2)).mean(axis=0)
        things, relation = (_draw_thing(rng, mix, taken, x, y, radius),), None
    caption = _caption(rng, background, things, style, relation)
    return Scene(background, things, style, relation, caption)


def _draw_background(rng: np.random.Generator, mix: Mix) -> Background:
    pick = rng.random()
    if pick < mix.photo:
        kind = "photo"
    elif pick < mix.photo + mix.pattern:
        kind = str(rng.choice(PATTERNS[2:]))
    else:
        kind = "plain" if rng.random() < 0.7 else "gradient"
    first, second = rng.choice(COLOURS, 2, replace=False)
    return Background(kind, str(first), str(second), int(rng.integers(2**31)))


def _jittered(rng: np.random.Generator, rgb: RGB) -> RGB:
    jitter = rng.integers(-_JITTER, _JITTER + 1, 3)
    r, g, b = (int(v) for v in np.clip(np.array(rgb) + jitter, 0, 255))
    return r, g, b


def _draw_thing(
    rng: np.random.Generator, mix: Mix, taken: set[str], x: float, y: float, radius: float
) -> Thing:
    colour = str(rng.choice([c for c in COLOURS if c not in taken]))
    rgb = _jittered(rng, PALETTE[colour])
    texture = str(rng.choice(TEXTURES[1:])) if rng.random() < mix.texture else "plain"
    angle = float(rng.uniform(-0.2, 0.2))
    noun = str(rng.choice(SHAPES))
    if mix.nouns and rng.random() < mix.nouns:
        noun, texture, angle = str(rng.choice(OBJECTS)), "plain", angle / 3
    return Thing(noun, colour, rgb, texture, float(x), float(y), radius, angle)


def _draw_pair(
    rng: np.random.Generator, mix: Mix, taken: set[str]
) -> tuple[tuple[Thing, ...], str | None]:
    along = rng.uniform(0.22, 0.3, 2)
    across = 0.5 + rng.uniform(-0.12, 0.12, 2)
    radii = rng.uniform(0.13, 0.21, 2)
    first_low, upright = rng.random(2) < 0.5
    places = [(along[0], across[0]), (1 - along[1], across[1])]
    if not first_low:
        places.reverse()
    if upright:
        places = [(y, x) for x, y in places]
    first = _draw_thing(rng, mix, taken, *places[0], float(radii[0]))
    second = _draw_thing(rng, mix, taken | {first.colour}, *places[1], float(radii[1]))
    relation = RELATIONS[2 * int(upright) + int(not first_low)]
    return (first, second), (relation if rng.random() < 0.75 else None)


def article(words: str) -> str:
    """``words`` with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _empty_caption(rng: np.random.Generator, background: Background) -> str:
    if background.kind == "photo":
        return str(rng.choice(["a photo", "photo", "a photo of something"]))
    return str(rng.choice([article(background.words), background.words]))


def _caption(
    rng: np.random.Generator,
    background: Background,
    things: tuple[Thing, ...],
    style: str,
    relation: str | None,
) -> str:
    nouns = [thing.words if rng.random() < 0.8 else _spelled_out(thing) for thing in things]
    if style == "sepia":
        nouns = [thing.noun for thing in things]
    first = nouns[0]
    if style != "flat":
        first = f"{style} {first}"
    if len(things) == 1 and rng.random() < 0.12:
        radius = things[0].radius
        size = "big" if radius > 0.32 else "small" if radius < 0.2 else ""
        first = f"{size} {first}".strip()
    words = article(first)
    if len(things) == 2:
        words = f"{words} {relation or 'and'} {article(nouns[1])}"
    if rng.random() < 0.3:
        words = words.replace("gray", "grey")
    opening = rng.random()
    if opening < 0.1:
        medium = "a photo" if background.kind == "photo" else "a drawing"
        words = f"{rng.choice(['a picture', 'an image', medium])} of {words}"
    elif opening < 0.16:
        words = words.removeprefix("an ").removeprefix("a ")
    if background.kind == "photo":
        return f"{words} in a photo" if opening > 0.9 else words
    if rng.random() < 0.45 or style in ("sepia", "neon"):
        return words
    if rng.random() < 0.15 and background.kind == "plain":
        return f"{words} on {background.colour}"
    return f"{words} on {article(background.words)}"


def _spelled_out(thing: Thing) -> str:
    if thing.texture == "plain":
        return thing.words
    return f"{thing.colour} {thing.noun} with {'stripes' if thing.texture == 'striped' else 'dots'}"


def _telling_one(rng: np.random.Generator, scene: Scene) -> Scene:
    """``scene`` of a view with a caption of one of its things, where it has one with a name."""
    named = [
        at
        for at, thing in enumerate(scene.things)
        if thing.words in scene.caption and thing.noun not in ("hair", "eyes")
    ]
    if not named:
        return scene
    told = int(rng.choice(named))
    return replace(scene, caption=article(scene.things[told].words), told=told)


def _in_style(rng: np.random.Generator, scene: Scene, style: str) -> Scene:
    """``scene`` of a view, painted in ``style`` and said to be."""
    caption = scene.caption
    if style == "sepia":
        kept = [word for word in caption.split() if word not in PALETTE]
        caption = " ".join(kept)
        for noun in {kept[at + 1] for at, word in enumerate(kept[:-1]) if word in ("a", "an")}:
            caption = caption.replace(f"a {noun}", article(noun)).replace(
                f"an {noun}", article(noun)
            )
    if style != "flat":
        medium = f"{style} {rng.choice(['picture', 'drawing', 'painting'])}"
        bare = caption.removeprefix("an ").removeprefix("a ")
        named = article(f"{style} {bare}") if bare != caption else f"{style} {caption}"
        caption = f"{article(medium)} of {caption}" if rng.random() < 0.5 else named
    return replace(scene, style=style, caption=caption)


_TIMES: dict[str, tuple[str, str, float]] = {
    # What is said: the sky's two colours, and how much darker all below it is.
    "": ("cyan", "white", 0.0),
    "at sunset": ("purple", "orange", 0.15),
    "at night": ("black", "blue", 0.45),
}

_SEASONS: dict[str, RGB] = {
    "": (84, 168, 62),
    "in winter": (232, 236, 244),
    "in the desert": (226, 190, 110),
    "by the sea": (38, 104, 190),
}


def _pick(rng: np.random.Generator, items: Sequence[str], taken: Sequence[str] = ()) -> str:
    return str(rng.choice([item for item in items if item not in taken]))


def _colourful(
    rng: np.random.Generator, noun: str, taken: list[str], x: float, y: float, radius: float
) -> Thing:
    """A thing of a colour that is not taken yet; takes it."""
    colour = _pick(rng, COLOURS, taken)
    taken.append(colour)
    rgb = _jittered(rng, PALETTE[colour])
    return Thing(noun, colour, rgb, "plain", x, y, radius, float(rng.uniform(-0.05, 0.05)))


def _landscape(rng: np.random.Generator) -> Scene:
    season = str(rng.choice(list(_SEASONS), p=[0.4, 0.2, 0.2, 0.2]))
    time = str(rng.choice(list(_TIMES), p=[0.5, 0.25, 0.25]))
    high, low, dark = _TIMES[time]
    ground = darker(_SEASONS[season], dark) if dark else _SEASONS[season]
    horizon = float(rng.uniform(0.5, 0.66))
    stage = [Stage("ground", ground, horizon, 0.0 if season == "by the sea" else 0.03)]
    if season != "by the sea" and rng.random() < 0.6:
        hills = Stage(
            "hills",
            darker(ground, 0.22),
            horizon - 0.1,
            float(rng.uniform(0.05, 0.1)),
            float(rng.uniform(0.7, 1.6)),
            float(rng.random()),
            layer=0,
        )
        stage.insert(0, hills)
    things: list[Thing] = []
    said: list[str] = []
    taken = [high, low, "green" if season == "" else "white" if season == "in winter" else ""]
    if rng.random() < 0.6:
        noun = "moon" if time == "at night" else "sun"
        x, y = float(rng.uniform(0.15, 0.85)), float(rng.uniform(0.13, 0.27))
        rgb = (240, 236, 206) if noun == "moon" else PALETTE["yellow"]
        colour = "white" if noun == "moon" else "yellow"
        things.append(Thing(noun, colour, rgb, "plain", x, y, 0.09, layer=0))
        said.append(article(noun))
        taken.append(colour)
    nouns = ["boat"] if season == "by the sea" else ["house", "tree", "pine", "car", "flower"]
    count = 1 if season == "by the sea" or rng.random() < 0.4 else 2
    places = [float(rng.uniform(0.3, 0.7))] if count == 1 else list(rng.permutation([0.27, 0.73]))
    for place in places[:count]:
        noun = _pick(rng, nouns, [thing.noun for thing in things])
        radius = float(rng.uniform(0.16, 0.24))
        foot = horizon + float(rng.uniform(0.12, 0.22))
        thing = _colourful(rng, noun, taken, float(place), foot - radius, radius)
        if noun in ("tree", "pine") and rng.random() < 0.6:
            leaf = darker((44, 130, 50), dark) if dark else (36, 118, 46)
            thing = replace(thing, colour="green", rgb=leaf)
        things.append(thing)
        said.append(article(thing.words))
    order = rng.permutation(len(said))
    words = " and ".join(said[i] for i in order)
    opening = "a landscape with " if rng.random() < 0.5 else ""
    caption = " ".join(part for part in (f"{opening}{words}", season, time) if part)
    background = Background("sky", high, low, int(rng.integers(2**31)))
    return Scene(background, tuple(things), "flat", None, caption, "landscape", tuple(stage))


def _still_life(rng: np.random.Generator) -> Scene:
    wall = _pick(rng, ("white", "gray", "cyan", "yellow", "pink", "green", "blue"))
    table = _pick(rng, ("brown", "black", "white", "red"), [wall])
    taken = [wall, table]
    edge = float(rng.uniform(0.56, 0.66))
    stage = (Stage("table", _jittered(rng, PALETTE[table]), edge),)
    count = int(rng.integers(1, 4))
    places = {1: [0.5], 2: [0.3, 0.7], 3: [0.2, 0.5, 0.8]}[count]
    things: list[Thing] = []
    said: list[str] = []
    for place in places:
        noun = _pick(rng, ("apple", "pear", "cup", "bottle", "vase"), [t.noun for t in things])
        radius = float(rng.uniform(0.13, 0.2)) * (1.25 if noun in ("bottle", "vase") else 1.0)
        radius = radius if count < 3 else min(radius, 0.16)
        foot = edge + float(rng.uniform(0.1, 0.2))
        x = place + float(rng.uniform(-0.04, 0.04))
        things.append(_colourful(rng, noun, taken, x, foot - radius, radius))
        said.append(article(things[-1].words))
    words = ", ".join(said[:-1]) + (" and " if count > 1 else "") + said[-1]
    caption = f"{words} on a {table} table"
    if rng.random() < 0.3:
        caption = f"a still life with {caption}"
    if rng.random() < 0.4:
        caption = f"{caption}, {wall} wall"
    background = Background("plain", wall, wall, int(rng.integers(2**31)))
    return Scene(background, tuple(things), "flat", None, caption, "still life", stage)


def _room(rng: np.random.Generator) -> Scene:
    wall = _pick(rng, ("white", "gray", "cyan", "yellow", "pink", "green", "blue", "orange"))
    floor = _pick(rng, ("brown", "gray", "red", "blue"), [wall])
    taken = [wall, floor]
    edge = float(rng.uniform(0.66, 0.76))
    stage = (Stage("floor", _jittered(rng, PALETTE[floor]), edge),)
    flip = -1 if rng.random() < 0.5 else 1
    things, said = [], []
    if rng.random() < 0.5:
        x = 0.5 + flip * float(rng.uniform(0.16, 0.24))
        pane = Thing("window", "cyan", (150, 214, 244), "plain", x, 0.28, 0.2, layer=1)
        things.append(pane)
        said.append("a window")
    if rng.random() < 0.8:
        x = 0.5 - flip * float(rng.uniform(0.0, 0.12))
        sofa = _colourful(rng, "sofa", taken, x, edge - 0.02, float(rng.uniform(0.24, 0.3)))
        things.append(sofa)
        said.append(article(sofa.words))
    if rng.random() < 0.7 or not said:
        x = 0.5 + flip * float(rng.uniform(0.28, 0.34))
        lamp = _colourful(rng, "lamp", taken, x, edge - 0.14, float(rng.uniform(0.22, 0.27)))
        things.append(lamp)
        said.append(article(lamp.words))
    caption = f"{article(wall)} room with {' and '.join(said)}"
    if rng.random() < 0.3:
        caption = f"{caption}, {floor} floor"
    background = Background("plain", wall, wall, int(rng.integers(2**31)))
    return Scene(background, tuple(things), "flat", None, caption, "room", stage)


def _face(rng: np.random.Generator) -> Scene:
    behind = _pick(rng, COLOURS)
    hair = _pick(rng, ("black", "brown", "yellow", "red", "white", "blue", "pink"), [behind])
    skin = SKIN[int(rng.integers(len(SKIN)))]
    x, y = 0.5 + float(rng.uniform(-0.06, 0.06)), 0.56 + float(rng.uniform(-0.04, 0.04))
    size = float(rng.uniform(0.3, 0.38))
    eyes = _pick(rng, ("blue", "green", "brown", "black"))
    mood = "smile" if rng.random() < 0.6 else "frown"
    parts = [("hair", hair, PALETTE[hair]), ("head", "", skin), ("eyes", eyes, PALETTE[eyes])]
    parts.append((mood, "red", (176, 40, 52)))
    said = f"a {'happy' if mood == 'smile' else 'sad'} face with {hair} hair"
    if rng.random() < 0.4:
        said = f"{said} and {eyes} eyes"
    if rng.random() < 0.5:
        hat = _pick(rng, COLOURS, [behind, hair])
        parts.append(("hat", hat, PALETTE[hat]))
        said = f"{said} and {article(hat)} hat"
    things = tuple(Thing(noun, colour, rgb, "plain", x, y, size) for noun, colour, rgb in parts)
    if rng.random() < 0.5:
        said = f"{said} on {article(behind)} background"
    background = Background("plain", behind, behind, int(rng.integers(2**31)))
    return Scene(background, things, "flat", None, said, "face")


_VIEWS: tuple[Callable[[np.random.Generator], Scene], ...] = (
    _landscape,
    _still_life,
    _room,
    _face,
)
