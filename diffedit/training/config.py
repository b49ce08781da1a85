"""The training file: what is trained, on what, how long. One value, checked before anything loads.

A file holds one training, or several under ``stages:`` that run one after another; what stands
beside ``stages:`` holds for all of them. Relative paths count from the file's folder::

    train: lora
    model: tiny
    data: {folder: pictures, caption: a blueprint drawing}
    out: runs/blueprint
    steps: 300
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from diffedit import yaml
from diffedit.errors import InputError, nearest

Share = Annotated[float, Field(ge=0, le=1)]
Mixes = Literal["plain", "simple", "pairs", "rich", "views", "photos"]


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None or path.is_absolute() else Path(base) / path


LocalPath = Annotated[Path, AfterValidator(_from_base)]
"""A path, relative to the training file's folder."""


class _Value(BaseModel, frozen=True, extra="forbid"):
    """Frozen, and unknown names are errors."""


class Data(_Value):
    """What is trained on: exactly one of ``folder``, ``captions`` and ``world``."""

    folder: LocalPath | None = Field(None, description="Folder of pictures, with its subfolders")
    captions: LocalPath | None = Field(
        None, description="A .jsonl or .parquet file with 'image', 'caption' and perhaps 'hint'"
    )
    world: Mixes | dict[Mixes, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Drawn scenes: a mix's name, or several with their shares"
    )
    style: str | None = Field(None, description="Draw every scene of the world in this style")
    count: int = Field(8192, ge=1, description="How many scenes of the world are drawn")
    first: int = Field(0, ge=0, description="Number of the first scene of the world")
    side: int = Field(256, ge=16, le=2048, description="Side of the square pictures, in pixels")
    caption: str = Field(
        ".txt",
        description="Of pictures in a folder: this text; .txt for the text file beside each"
        " picture; name for the picture's own file name",
    )
    views: int = Field(1, ge=1, description="How many crops of each picture there are")
    flip: bool = Field(False, description="Whether some of the views are mirrored")
    held_out: int = Field(48, ge=0, description="Examples kept for validation")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [n for n in ("folder", "captions", "world") if getattr(self, n) is not None]
        if len(named) != 1:
            said = " and ".join(named) or "no source"
            raise ValueError(f"names {said}, should name one of folder, captions and world")
        return self


class Optimiser(_Value):
    """Which step is made along the gradients.

    ``muon`` orthogonalises the updates of matrices and kernels; everything else is AdamW's.
    """

    name: Literal["adamw", "muon"] = "adamw"
    rate: float = Field(1e-4, gt=0, le=1, description="Learning rate of AdamW")
    muon_rate: float = Field(2e-3, gt=0, le=1, description="Learning rate of Muon")
    weight_decay: float = Field(0.0, ge=0, le=1)
    warmup: int = Field(40, ge=0, description="Steps over which the rate rises")
    decay: Share = Field(0.25, description="Share of the steps over which the rate falls to zero")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradients")


class Objective(_Value):
    """What the network is asked, and how an error counts."""

    target: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = Field(
        None, description="What is predicted; none: what the model's scheduler says"
    )
    loss: Literal["mse", "l1", "huber"] = "mse"
    gamma: float | None = Field(5.0, gt=0, description="Min-SNR weights; none: all weigh 1")
    floor: Share = Field(0.0, description="Least weight where there is more noise than signal")
    timesteps: Literal["uniform", "stratified", "logit_normal"] = "stratified"
    focus: tuple[Share, Share, Share] | None = Field(
        None, description="From, to, and which share of the noise levels is drawn from there"
    )
    dropout: Share = Field(0.1, description="Share of the captions left out, for guidance")
    backdrop: Share = Field(
        1.0, description="Weight of the cells away from objects, where the data knows them"
    )
    shift: float = Field(1.0, gt=0, description="Of flow_prediction: moves the times to noise")


class Training(_Value):
    """What every training has; the fields of one kind stand in its own class."""

    train: str
    model: str = Field("tiny", min_length=1, description="Folder or hub id of what is started from")
    data: Data
    out: LocalPath = Field(description="Folder for checkpoints, curves and the result")
    steps: int = Field(1000, ge=1)
    batch: int = Field(16, ge=1, description="Examples in a step, over all devices")
    accumulate: int = Field(1, ge=1, description="Parts of a batch that go through one by one")
    seed: int = Field(0, ge=0, lt=2**31)
    device: str | None = Field(None, description="Default: a GPU if there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpointing: bool = Field(False, description="Compute activations twice to save memory")
    optimiser: Optimiser = Optimiser()
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of the averaged weights; none: the last weights"
    )
    ema_width: float | None = Field(
        None, gt=0, lt=0.28, description="Instead: the averages' width in units of the training"
    )
    save_minutes: float = Field(3.0, ge=0, description="Between checkpoints")
    validate_every: int = Field(200, ge=1, description="Steps between validations")
    sample_every: int = Field(500, ge=1, description="Steps between sample grids")
    prompts: tuple[str, ...] = Field((), description="What the sample grids show")

    #: May differ between a checkpoint and the file it is resumed with.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"out", "steps", "device", "save_minutes", "validate_every", "sample_every", "prompts"}
        | {"accumulate", "checkpointing", "precision"}
    )

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema is not None and self.ema_width is not None:
            raise ValueError("names both ema and ema_width, should name one")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate {self.accumulate} is more than batch {self.batch}")
        return self


class AutoencoderTraining(Training):
    """An autoencoder: reconstruction, and a whisper of KL."""

    train: Literal["autoencoder"]
    widths: tuple[int, ...] | None = Field(
        None, description="Channels per level of a new one; none: go on with the model's"
    )
    crop: int = Field(64, ge=8, description="Side of the crops in a batch, in pixels")
    mse: float = Field(4.0, ge=0)
    l1: float = Field(1.0, ge=0)
    gradient: float = Field(0.0, ge=0, description="Weight of the L1 error of the edges")
    kl: float = Field(1e-5, ge=0)
    adversarial: float = Field(0.0, ge=0, description="Weight of the patch discriminator")
    adversarial_from: int = Field(0, ge=0, description="First step with the discriminator")
    decoder_only: bool = Field(False, description="Keep the latents what they are")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.widths is not None:
            if len(self.widths) != 4 or any(width < 8 or width % 8 for width in self.widths):
                raise ValueError(f"widths {list(self.widths)} should be four multiples of 8")
            if self.decoder_only:
                raise ValueError("decoder_only keeps the model's latents, widths makes new ones")
        if self.adversarial and self.crop < 16:
            raise ValueError(f"crop {self.crop} with adversarial: should be at least 16")
        return self


class DenoiserTraining(Training):
    """A UNet, with its text encoder."""

    train: Literal["denoiser"]
    widths: tuple[int, ...] | None = Field(
        None, description="Channels per level of a new UNet; none: go on with the model's"
    )
    plain_levels: int = Field(0, ge=0, description="Finest levels of a new UNet without attention")
    text: Literal["new", "train", "frozen"] = Field(
        "train", description="A text encoder with a vocabulary of the captions, the model's, or so"
    )
    grounding: float = Field(
        0.0,
        ge=0,
        description="Weight of attention off the place of what a word says, where the data has it",
    )
    objective: Objective = Objective()


HintKind = Annotated[str, Field(pattern=r"^\w[\w-]*$", max_length=64)]


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class ControlNetTraining(Training):
    """A ControlNet for the model's UNet."""

    train: Literal["controlnet"]
    kind: Annotated[tuple[HintKind, ...], BeforeValidator(_listed)] = Field(
        ("canny",),
        min_length=1,
        max_length=16,
        description="How hints are made: canny or inpaint from any picture, depth or segments from"
        " drawn scenes; hint or any other name: the 'hint' column of the data; several: each"
        " example has one of them",
    )
    small: bool = Field(False, description="Without attention: half the size")
    start: LocalPath | None = Field(
        None, description="Folder of a ControlNet to go on from; none: a new one"
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=4,
        description="How strongly the result acts where it is asked for at a weight of 1",
    )
    objective: Objective = Objective()


class LoraTraining(Training):
    """Low-rank additions (LoRA) to the UNet, for a style or a subject."""

    train: Literal["lora"]
    rank: int = Field(8, ge=1, le=256)
    alpha: float | None = Field(None, gt=0, description="Default: the rank")
    layers: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        ("attention",),
        min_length=1,
        description="Of the UNet: attention for its projections, all for every linear layer and"
        " kernel, or a layer's name or its end; or several of these",
    )
    text: bool = Field(False, description="Whether the text encoder gets additions too")
    objective: Objective = Objective()


class InversionTraining(Training):
    """Textual inversion: new words for something the pictures show, all else frozen."""

    train: Literal["textual_inversion"]
    token: str = Field("<new>", min_length=1, pattern=r"^\S+$", description="The new word")
    like: str = Field(description="A known word to start from")
    vectors: int = Field(1, ge=1, le=16, description="Tokens that the new word stands for")
    objective: Objective = Objective()


class DistillTraining(Training):
    """A LoRA that makes good pictures in a few steps, each of them half as dear."""

    train: Literal["distill"]
    method: Literal["consistency", "guidance"] = Field(
        "consistency",
        description="What the student says: where the guided teacher's trajectory ends, or what"
        " the guided teacher predicts",
    )
    rank: int = Field(16, ge=1, le=256)
    few: int = Field(4, ge=1, le=16, description="Steps that the result is made for")
    solver_steps: int = Field(
        50, ge=2, le=1000, description="Steps of the teacher's DDIM solver, for consistency"
    )
    guidance: float = Field(5.0, ge=1, description="Guidance of the teacher, distilled in")

    @model_validator(mode="after")
    def _enough_steps(self) -> Self:
        if self.method == "guidance":
            # Not whether it was said: a checkpoint says all settings.
            if self.solver_steps != type(self).model_fields["solver_steps"].default:
                raise ValueError("solver_steps: of method consistency, method guidance solves none")
        elif self.few > self.solver_steps:
            raise ValueError(f"few {self.few} is more than solver_steps {self.solver_steps}")
        return self


AnyTraining = Annotated[
    AutoencoderTraining
    | DenoiserTraining
    | ControlNetTraining
    | LoraTraining
    | InversionTraining
    | DistillTraining,
    Field(discriminator="train"),
]

KINDS: dict[str, type[Training]] = {
    "autoencoder": AutoencoderTraining,
    "controlnet": ControlNetTraining,
    "denoiser": DenoiserTraining,
    "distill": DistillTraining,
    "lora": LoraTraining,
    "textual_inversion": InversionTraining,
}

_ADAPTER: TypeAdapter[Training] = TypeAdapter(AnyTraining)


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a training file, for editors that check as one types.

    A stage's settings may stand beside ``stages`` for all of them, so there nothing is required.
    """
    single = _ADAPTER.json_schema()
    definitions: dict[str, Any] = single.pop("$defs")
    settings: dict[str, Any] = {}
    for kind in KINDS.values():
        settings |= definitions[kind.__name__]["properties"]
    settings["train"] = {"enum": list(KINDS), "title": "Train"}
    several = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Stage"}}
    definitions["Stage"] = {
        "type": "object",
        "properties": settings,
        "additionalProperties": False,
    }
    staged = {
        "type": "object",
        "properties": settings | {"stages": several},
        "required": ["stages"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Training",
        "anyOf": [single, staged],
        "$defs": definitions,
    }


def load(path: str | Path) -> list[Training]:
    """Read a training file: its stages, in order.

    Raises:
        InputError: no such file, not YAML, not a training. Names the place.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be read as a training file ({said})") from None
    data, marks = yaml.parse(text, str(file))
    if not isinstance(data, Mapping):
        raise InputError(f"{file} holds no training, should have 'train:', 'data:' and 'out:'")
    shared = {key: value for key, value in data.items() if key != "stages"}
    stages = data.get("stages", [{}])
    if (
        not isinstance(stages, list)
        or not all(isinstance(s, Mapping) for s in stages)
        or not stages
    ):
        raise InputError(f"{file}: 'stages' should be a list of trainings")
    several = "stages" in data
    made = []
    for number, stage in enumerate(stages):
        place = ("stages", number) if several else ()
        made.append(_training(shared | dict(stage), file, place, marks))
    outs = [training.out for training in made]
    for number, out in enumerate(outs):
        if out in outs[:number]:
            raise InputError(f"{file}: two stages write to {out}, give each its own 'out'")
    return made


def _training(
    data: Mapping[str, Any], file: Path, place: tuple[str | int, ...], marks: yaml.Marks
) -> Training:
    kind = data.get("train")
    where = marks.get((*place, "train"), marks.get(("train",), str(file)))
    if kind not in KINDS:
        near = nearest(kind, KINDS) if isinstance(kind, str) else ""
        raise InputError(f"{where}: train is {kind!r}{near}, should be one of {', '.join(KINDS)}")
    try:
        return _ADAPTER.validate_python(data, context={"base": file.parent})
    except ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if part != kind]
        spot = next(
            (
                marks[(*start, *path[:length])]
                for length in range(len(path), 0, -1)
                for start in (place, ())
                if (*start, *path[:length]) in marks
            ),
            str(file),
        )
        name = ".".join(str(part) for part in path)
        if first["type"] == "extra_forbidden":
            known = _fields(KINDS[kind], path[:-1])
            said = f"no such setting{nearest(str(path[-1]), known)}"
        elif first["type"] == "missing":
            said = "is missing"
        else:
            said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{spot}: {name + ' ' if name else ''}{said}") from None


def _fields(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The names that may stand at ``path`` in a training of this kind."""
    for part in path:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
