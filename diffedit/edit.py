"""What an edit is, what it contributes, and how the contributions of a pass are merged.

An `Edit` is a value: a frozen, typed set of parameters. `Edit.contribute` turns it into a
`Contribution`, a record of what it adds to the sampling of its pass. The core merges the records of
all edits of a pass; the law by which a field merges stands beside the field, in `Contribution`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from diffedit.errors import ConflictError, ParameterError, PluginError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from diffedit.attention import Transform
    from diffedit.box import Box
    from diffedit.canvas import Canvas
    from diffedit.images import Picture
    from diffedit.models.protocol import Conditioning, LatentModel, ModelInput, Residuals
    from diffedit.run import Run
    from diffedit.sampler import Step
    from diffedit.schedulers import Call

T = TypeVar("T")
Stage = Literal["early", "normal", "late"]
_STAGES: Mapping[Stage, int] = {"early": 0, "normal": 1, "late": 2}


class Edit(BaseModel):
    """A value that says how to change a picture; plugins subclass it.

    Subclasses set `name`, `version` and, where they must come first or last, `stage`, declare their
    parameters as pydantic fields, and implement `contribute`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings"
    )

    name: ClassVar[str]
    version: ClassVar[str] = "0.0.0"
    stage: ClassVar[Stage] = "normal"

    id: str | None = Field(
        None,
        description="A name for this edit within its pass",
        json_schema_extra={"advanced": True},
    )
    after: str | None = Field(
        None,
        description="The id of an edit of the same pass that acts before this one",
        json_schema_extra={"advanced": True},
    )

    def region(self, image: Picture) -> Box | None:
        """The part of the image this edit works on, context margin included; None: no wish.

        Pure geometry, asked before anything is encoded. The pass works on the union of these boxes
        and of the masks of edits without a wish; on the whole image if there are none.

        Args:
            image: the picture so far (the first of a batch).
        """
        return None

    def contribute(self, run: Run) -> Contribution:
        """What this edit adds to the pass. Draws no random numbers and calls no model."""
        raise NotImplementedError(f"{type(self).__name__} does not implement contribute()")

    @property
    def scope(self) -> str:
        """What the names of this edit's branches and rows begin with: its id, else its name."""
        return self.id or self.name

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the outcome: name, version and parameters, images by pixels."""
        said = {key: _stable(value) for key, value in self if key not in ("id", "after")}
        text = json.dumps([self.name, self.version, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: object) -> object:
    """A JSON value that is equal just when the parameter is."""
    if hasattr(value, "digest"):
        return value.digest
    if isinstance(value, BaseModel):
        return {key: _stable(item) for key, item in value}
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_stable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


# --- the parts of a contribution ------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """A picture that the core encodes when its phase comes: ``(1 or b, 3, h, w)`` in [0, 1].

    Attributes:
        pixels: sides are multiples of the model's grid.
    """

    pixels: Tensor


@dataclass(frozen=True)
class Start:
    """Where sampling begins: latents, noised to the level `at`.

    Attributes:
        latents: a canvas or `Pixels`, encoded by the core when its phase comes; clean latents
            ``(1 or b, c, h, w)``; or a function that returns them, called after `prepare`.
        at: the fraction of the schedule that is run, in (0, 1]; 1 is (nearly) pure noise.
    """

    latents: Canvas | Pixels | Tensor | Callable[[], Tensor]
    at: float


@dataclass(frozen=True)
class Branch:
    """One more prediction of the canvas, under its own conditioning.

    Attributes:
        name: unique within the edit; guidance terms call it ``f"{edit.scope}/{name}"``.
        prompt: what it is conditioned on, a text or finished conditioning with one row.
    """

    name: str
    prompt: str | Conditioning


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
        latents: ``(1 or b, c, h, w)``, or `Pixels` to be encoded.
        role: what they are, such as "reference".
        index: tells several of one role apart.
    """

    latents: Tensor | Pixels
    role: str
    index: int = 0


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
        tokens: further tokens. Concatenated.
        branches: further predictions of the canvas. Union by name.
        rows: references sampled beside the canvas. Union by name.
        terms: guidance terms. Summed.
        combine: ``(predictions by name, call) -> prediction``. Exclusive; default:
            classifier-free guidance.
        residuals: ``(model input, call) -> Residuals``. Summed. Sees the canvas's rows only.
        attention: ``(qkv, site) -> qkv``. Chained.
        patches: changes to the model, undone when the pass ends, however it ends. In order.
        prepare: runs before the loop and may call the model; a generator's steps are shown as
            progress. In order.
        refine: ``(x0, call) -> x0``, both ``(b, c, h, w)``. Chained.
        finish: ``pixels -> pixels``, the region that the pass works on (`run.canvas.frame.region`)
            at full resolution, ``(1 or b, 3, h, w)`` in [0, 1], on the CPU. Chained.
        during: the fraction of the scheduler's calls in which residuals, attention, terms and
            refine act: in call i of n unless ``i/n < start or (i+1)/n > end``.
    """

    start: Start | None = _law(exclusive)
    mask: Tensor | None = _law(maximum)
    alpha: Tensor | None = _law(maximum)
    keep: Tensor | Callable[[Call], Tensor] | None = _law(in_order)
    conditioning: Mapping[str, Tensor] = _law(union, {})
    channels: Mapping[str, Tensor | Pixels] = _law(union, {})
    tokens: tuple[Tokens, ...] = _law(flat, ())
    branches: tuple[Branch, ...] = _law(named, ())
    rows: tuple[Row, ...] = _law(named, ())
    terms: tuple[Guidance, ...] = _law(flat, ())
    combine: Callable[[Mapping[str, Tensor], Call], Tensor] | None = _law(exclusive)
    residuals: Callable[[ModelInput, Call], Residuals] | None = _law(in_order)
    attention: Transform | None = _law(in_order, chained=True)
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
    residuals: tuple[Owned[Callable[[ModelInput, Call], Residuals]], ...]
    attention: tuple[Owned[Transform], ...]
    patches: tuple[Owned[Patch], ...]
    prepare: tuple[Owned[Callable[[Run], Any]], ...]
    refine: tuple[Owned[Callable[[Any, Call], Any]], ...]
    finish: tuple[Owned[Callable[[Any], Any]], ...]
    rests: bool


def canonical(edits: Iterable[Edit]) -> list[Edit]:
    """The order in which the edits of a pass act: by stage, name and digest, `after` obeyed.

    Sums of floats depend on their order, so the order must not depend on how a user lists them.
    """
    ranked = sorted(edits, key=lambda e: (_STAGES[e.stage], e.name, e.digest, e.id or ""))
    ids = [edit.id for edit in ranked if edit.id is not None]
    for twice in {i for i in ids if ids.count(i) > 1}:
        raise ParameterError(f"two edits of one pass have the id {twice!r}")
    for edit in ranked:
        if edit.after is not None and edit.after not in ids:
            raise ParameterError(
                f"{edit.name}: after: {edit.after!r} is no edit's id in this pass"
                f"{nearest(edit.after, ids)}"
            )
    done: list[Edit] = []
    waiting = ranked
    while waiting:
        placed = {edit.id for edit in done}
        ready = next((e for e in waiting if e.after is None or e.after in placed), None)
        if ready is None:
            names = ", ".join(repr(e.id or e.name) for e in waiting)
            raise ConflictError(f"the 'after' of {names} form a circle")
        done.append(ready)
        waiting = [edit for edit in waiting if edit is not ready]
    return done


def labels(edits: Sequence[Edit]) -> list[str]:
    """What to call each edit of a pass: its id, else its name, numbered where a name repeats."""
    names = [edit.name for edit in edits]
    said: list[str] = []
    for position, edit in enumerate(edits):
        number = f".{names[:position].count(edit.name) + 1}" if names.count(edit.name) > 1 else ""
        said.append(edit.id or edit.name + number)
    return said


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
    return value is not None and not (isinstance(value, tuple | Mapping) and not value)


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
