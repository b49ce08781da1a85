"""What an edit adds to the sampling of its pass, and how the contributions of all are merged.

The law by which a field merges stands beside the field, in `Contribution`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from diffedit.edit import Edit, labels
from diffedit.errors import ConflictError, PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from diffedit.attention import Addition, Transform
    from diffedit.canvas import Canvas
    from diffedit.models.protocol import Conditioning, LatentModel, ModelInput, Residuals
    from diffedit.run import Run
    from diffedit.sampler import Step
    from diffedit.schedule import Call

T = TypeVar("T")


@dataclass(frozen=True)
class Pixels:
    """A picture that the core encodes when its phase comes: ``(1 or b, 3, h, w)`` in [0, 1].

    Attributes:
        pixels: of the working size (those of `Tokens`: of any); or a function that makes them when
            they are needed, as where a network makes a hint.
    """

    pixels: Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Start:
    """Where sampling begins: latents at the noise level `at`.

    Attributes:
        latents: a canvas or `Pixels`, encoded by the core when its phase comes; clean latents
            ``(1 or b, c, h, w)``; or a function that returns them, called after `prepare`.
        at: the fraction of the schedule that is run, in (0, 1]; 1 is (nearly) pure noise.
        noised: the latents hold the noise of that level already, as an inversion's do.
    """

    latents: Canvas | Pixels | Tensor | Callable[[], Tensor]
    at: float
    noised: bool = False


@dataclass(frozen=True)
class Branch:
    """One more prediction of the canvas, under its own conditioning.

    Attributes:
        name: unique within the edit; guidance terms call it ``f"{edit.scope}/{name}"``.
        prompt: what it is conditioned on, a text or finished conditioning with one row.
        negative: guidance leads away from it, as from the negative prompt.
        without: roles of channels that it does not see: they are zero there.
        within: where it stands in the place of the prediction under the prompt (or, if `negative`,
            of that under the negative prompt) before they are combined: ``(1 or b, 1, h, w)`` over
            the latent grid, from 0, nowhere, to 1, alone. Where those of several add up to more
            than 1 they share it; see `guidance.composed`. Terms see the pass's own predictions.
    """

    name: str
    prompt: str | Conditioning
    negative: bool = False
    without: frozenset[str] = frozenset()
    within: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """A reference picture that is denoised beside each branch, for attention terms to look at.

    Attributes:
        name: unique within the edit; attention terms find it as ``f"{edit.scope}/{name}"``.
        latents: `Pixels`, encoded by the core and noised to each step's level with noise from a
            stream of its own; or a function of the `Call` that returns the latents
            ``(1 or b, c, h, w)`` as the model sees them at that level, unscaled.
        prompt: what it is conditioned on in every branch but the negative one.
    """

    name: str
    latents: Pixels | Callable[[Call], Tensor]
    prompt: str = ""


@dataclass(frozen=True)
class Guidance:
    """A guidance term: ``weight * (toward - away)`` is added to the prediction.

    Attributes:
        weight: a number, or a map ``(1 or b, 1, h, w)`` over the latent grid.
        toward: name of a prediction ("positive", "negative", or a contributed branch).
        away: name of another.
    """

    weight: float | Tensor
    toward: str
    away: str


@dataclass(frozen=True)
class Tokens:
    """Further tokens for models that take pictures as part of their sequence.

    Attributes:
        latents: ``(1 or b, c, h, w)``, or `Pixels` to be encoded; of any size that is a multiple
            of the model's grid.
        role: what they are, such as "reference".
    """

    latents: Tensor | Pixels
    role: str


@dataclass(frozen=True)
class Patch:
    """A change to the model that lasts for one pass.

    Attributes:
        apply: makes the change and returns the function that undoes it.
    """

    apply: Callable[[LatentModel], Callable[[], None]]


# --- merge laws -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owned(Generic[T]):
    """A part of a contribution, and whose it is.

    Attributes:
        owner: the edit's label within its pass.
        value: the part.
        during: the fraction of the calls in which it acts.
        scope: what the names of its parts begin with (`Edit.scope`).
        stream: what random numbers drawn for it are named by. Unlike a name it knows no id, so
            that giving an edit an id shifts nothing.
    """

    owner: str
    value: T
    during: tuple[float, float] = (0.0, 1.0)
    scope: str = ""
    stream: str = ""

    def active(self, call: Call) -> bool:
        """Whether it acts in this call, as diffusers' ControlNet windows count."""
        start, end = self.during
        return not (call.index / call.total < start or (call.index + 1) / call.total > end)


def exclusive(name: str, given: Sequence[Owned[T]]) -> Owned[T] | None:
    """One owner at most; two raise."""
    if len(given) > 1:
        raise ConflictError(
            f"both {given[0].owner!r} and {given[1].owner!r} set {name!r} and only one edit of a"
            " pass can: put them into two passes"
        )
    return given[0] if given else None


def maximum(name: str, given: Sequence[Owned[Tensor]]) -> Tensor | None:
    """The larger of all, pixel by pixel."""
    if not given:
        return None
    merged = given[0].value
    for other in given[1:]:
        if other.value.shape[-2:] != merged.shape[-2:]:
            raise PluginError(
                other.owner,
                f"{name} is {tuple(other.value.shape)}, another edit's {tuple(merged.shape)}",
            )
        merged = merged.maximum(other.value)
    return merged


def union(name: str, given: Sequence[Owned[Mapping[str, T]]]) -> dict[str, Owned[T]]:
    """All entries; two owners of one key raise."""
    merged: dict[str, Owned[T]] = {}
    for part in given:
        for key, value in part.value.items():
            if key in merged:
                raise ConflictError(
                    f"both {merged[key].owner!r} and {part.owner!r} set {key!r} in {name!r}:"
                    " put them into two passes"
                )
            merged[key] = Owned(part.owner, value, part.during)
    return merged


def named(name: str, given: Sequence[Owned[tuple[Any, ...]]]) -> tuple[Owned[Any], ...]:
    """All parts; a name given twice raises. Names are the edit's, then the part's."""
    merged: dict[str, Owned[Any]] = {}
    for part in given:
        for value in part.value:
            key = f"{part.scope}/{value.name}"
            if key in merged:
                raise ConflictError(f"{key!r} stands twice in {name!r}: give one edit an id")
            stream = f"{part.stream}/{value.name}"
            merged[key] = Owned(part.owner, replace(value, name=key), part.during, stream=stream)
    return tuple(merged.values())


def flat(name: str, given: Sequence[Owned[tuple[T, ...]]]) -> tuple[Owned[T], ...]:
    """All parts, one after another, in canonical order."""
    return tuple(Owned(part.owner, v, part.during) for part in given for v in part.value)


def joined(name: str, given: Sequence[Owned[frozenset[T]]]) -> frozenset[T]:
    """What any of them holds."""
    return frozenset[T]().union(*(part.value for part in given))


def in_order(name: str, given: Sequence[Owned[T]]) -> tuple[Owned[T], ...]:
    """All of them, in canonical order; the core sums or chains what they return."""
    return tuple(given)


def _law(law: Callable[[str, Any], Any], default: Any = None, *, chained: bool = False) -> Any:
    metadata = {"law": law, "chained": chained}
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one edit adds to the sampling of its pass. Every field is optional.

    Attributes:
        start: where sampling begins. Exclusive; without one it is pure noise.
        mask: ``(1 or b, 1, H, W)`` over the full image, 1 = may change, values between change
            late. On the CPU. Maximum: the union of what edits may change.
        alpha: ``(1 or b, 1, H, W)`` over the full image: how much of what was made lies over the
            picture in the end, as in an edge that fades beyond the mask; 0 leaves a pixel as it is.
            On the CPU; the mask, where an edit gives none. Maximum.
        keep: ``(1 or b, 1, h, w)`` over the latent grid, or a function of the `Call` just made that
            returns one; 1 (from 0.5 on) = stays the source. Maximum: it only restricts further.
        conditioning: additions to the conditioning by the model's key. Union by key.
        channels: further inputs of the denoiser by role, `Pixels` or ``(1 or b, c, h, w)``. Union
            by role.
        tokens: further tokens. Concatenated; where an edit stands twice, `after` says in which
            order.
        branches: further predictions of the canvas. Union by name.
        rows: references sampled beside the canvas. Union by name.
        terms: guidance terms. Summed.
        combine: ``(predictions by name, call) -> prediction``. Exclusive; default: the model's
            own way (`LatentModel.combine`), as a rule classifier-free guidance.
        noise: what a sampler that draws is to draw: ``call -> (1 or b, c, h, w)``, of unit
            deviation. Exclusive; for samplers that take it from outside (ddim with eta,
            dpmpp_2m_sde).
        residuals: ``(model input, call) -> Residuals``. Summed. Sees the canvas's rows only.
        sees: roles of channels that `residuals` find in their input where the pass has a mask:
            ``mask``, ``masked``, ``blackened`` and ``hole`` (see `ModelInput`), or none.
            Residuals that see ``hole`` take the place of the model's own network for inpainting.
            Joined.
        attention: ``(qkv, site) -> qkv``. Chained.
        beside: ``(qkv, site) -> Beside``, or None: another attention of the picture's queries, as
            `attention` leaves them, whose result is added to its own. Summed.
        patches: changes to the model, undone when the pass ends, however it ends. In order.
        prepare: runs before the loop and may call the model; a generator's steps are shown as
            progress. In order.
        refine: ``(x0, call) -> x0``, both ``(b, c, h, w)``. Chained.
        finish: ``pixels -> pixels``, the region that the pass works on (`run.canvas.frame.region`)
            at full resolution, ``(1 or b, 3, h, w)`` in [0, 1], on the CPU. Chained.
        during: the fraction of the scheduler's calls in which residuals, attention, beside, terms,
            refine and branches that stand `within` a part act: in call i of n unless
            ``i/n < start or (i+1)/n > end``.
    """

    start: Start | None = _law(exclusive)
    mask: Tensor | None = _law(maximum)
    alpha: Tensor | None = _law(maximum)
    keep: Tensor | Callable[[Call], Tensor] | None = _law(in_order)
    conditioning: Mapping[str, Tensor] = _law(union, {})
    channels: Mapping[str, Tensor | Pixels] = _law(union, {})
    tokens: tuple[Tokens, ...] = _law(flat, (), chained=True)
    branches: tuple[Branch, ...] = _law(named, ())
    rows: tuple[Row, ...] = _law(named, ())
    terms: tuple[Guidance, ...] = _law(flat, ())
    combine: Callable[[Mapping[str, Tensor], Call], Tensor] | None = _law(exclusive)
    noise: Callable[[Call], Tensor] | None = _law(exclusive)
    residuals: Callable[[ModelInput, Call], Residuals] | None = _law(in_order)
    sees: frozenset[str] = _law(joined, frozenset())
    attention: Transform | None = _law(in_order, chained=True)
    beside: Addition | None = _law(in_order)
    patches: tuple[Patch, ...] = _law(flat, ())
    prepare: Callable[[Run], Iterator[Step] | None] | None = _law(in_order)
    refine: Callable[[Tensor, Call], Tensor] | None = _law(in_order, chained=True)
    finish: Callable[[Tensor], Tensor] | None = _law(in_order, chained=True)
    during: tuple[float, float] = (0.0, 1.0)

    @property
    def pasted(self) -> Tensor | None:
        """Where the picture is to be another in the end: `alpha`, or else the mask."""
        return self.mask if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Merged:
    """The contributions of a pass, merged: the same fields, each part with its owner.

    Attributes:
        rests: whether every edit that says anything only finishes, so that nothing is sampled.
    """

    start: Owned[Start] | None
    mask: Tensor | None
    alpha: Tensor | None
    keep: tuple[Owned[Any], ...]
    conditioning: dict[str, Owned[Tensor]]
    channels: dict[str, Owned[Any]]
    tokens: tuple[Owned[Tokens], ...]
    branches: tuple[Owned[Branch], ...]
    rows: tuple[Owned[Row], ...]
    terms: tuple[Owned[Guidance], ...]
    combine: Owned[Callable[[Mapping[str, Any], Call], Any]] | None
    noise: Owned[Callable[[Call], Any]] | None
    residuals: tuple[Owned[Callable[[ModelInput, Call], Residuals]], ...]
    sees: frozenset[str]
    attention: tuple[Owned[Transform], ...]
    beside: tuple[Owned[Addition], ...]
    patches: tuple[Owned[Patch], ...]
    prepare: tuple[Owned[Callable[[Run], Any]], ...]
    refine: tuple[Owned[Callable[[Any, Call], Any]], ...]
    finish: tuple[Owned[Callable[[Any], Any]], ...]
    rests: bool


def merge(given: Sequence[tuple[Edit, Contribution]]) -> Merged:
    """Merge the contributions of a pass, given in canonical order.

    Raises:
        ConflictError: two edits claim the same exclusive thing, or two of one class set the same
            chained field and neither says by `after` which acts first: their order by digest would
            change with a parameter's last digit.
    """
    said = labels([edit for edit, _ in given])
    merged: dict[str, Any] = {}
    for part in fields(Contribution):
        if part.name == "during":
            continue
        name = "pasted" if part.name == "alpha" else part.name
        owned = [
            (edit, Owned(label, getattr(one, name), one.during, edit.scope, edit.name))
            for label, (edit, one) in zip(said, given, strict=True)
            if _given(getattr(one, name))
        ]
        if part.metadata["chained"]:
            _ordered(part.name, owned)
        merged[part.name] = part.metadata["law"](part.name, [one for _, one in owned])
    # An edit that adds no pixels of its own, such as an inpaint, wants the sampler.
    named_by_each = [
        {f.name for f in fields(one) if f.name != "during" and _given(getattr(one, f.name))}
        for _, one in given
    ]
    speaking = [names for names in named_by_each if names]
    rests = all("finish" in names and names <= {"mask", "alpha", "finish"} for names in speaking)
    return Merged(**merged, rests=bool(speaking) and rests)


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, tuple | Mapping | frozenset) and not value)


def _ordered(name: str, owned: Sequence[tuple[Edit, Owned[Any]]]) -> None:
    for position, (edit, one) in enumerate(owned):
        for earlier, other in owned[:position]:
            if type(earlier) is type(edit) and not _follows(edit, earlier, [e for e, _ in owned]):
                raise ConflictError(
                    f"{other.owner!r} and {one.owner!r} both set {name!r}, whose parts act one"
                    " after another: give one an id and name it in the other's 'after'"
                )


def _follows(edit: Edit, earlier: Edit, among: Sequence[Edit]) -> bool:
    """Whether `edit` comes after `earlier` by a chain of 'after's."""
    by_id = {one.id: one for one in among if one.id is not None}
    current: Edit | None = edit
    while current is not None and current.after is not None:
        if current.after == earlier.id:
            return True
        current = by_id.get(current.after)
    return False
