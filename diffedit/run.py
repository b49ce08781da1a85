"""What an edit sees of the pass it contributes to, and where random numbers come from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from diffedit.canvas import Canvas
from diffedit.errors import DiffeditError, ParameterError, lacking, nearest
from diffedit.models.protocol import LatentModel, ModelInput, Residuals
from diffedit.preprocessors import Preprocess, Preprocessor
from diffedit.rows import RowMap
from diffedit.schedule import Call

if TYPE_CHECKING:
    from diffedit.inversion import Inversion
    from diffedit.sampler import Step

#: What a control network adds in a call of the denoiser.
Lead = Callable[[ModelInput, Call], Residuals]


class Load(Protocol):
    """Loads something heavy once per editor; see `Run.resource`."""

    def __call__(self, key: str, loader: Callable[[], Any], of: str | None = None) -> Any:
        """What the loader made."""


def load_each_time(key: str, loader: Callable[[], Any], of: str | None = None) -> Any:
    """A `Load` that keeps nothing."""
    return loader()


class Streams:
    """Named streams of random numbers.

    A stream is fixed by the item's seed, the pass's place and its purpose alone: an edit that is
    added, a neighbour in the batch or another device shifts nobody's numbers. All are drawn on the
    CPU.

    Args:
        seeds: one per item of the batch.
        index: which pass of a workflow; passes share no numbers.
        single: a generator to give out for every purpose, in diffusers' draw order (compat mode).
    """

    def __init__(
        self, seeds: tuple[int, ...], index: int = 0, single: torch.Generator | None = None
    ) -> None:
        self.seeds = seeds
        self.index = index
        self.single = single

    def seed(self, purpose: str, item: int = 0) -> int:
        """The seed of a stream, in [0, 2**63)."""
        said = f"{self.seeds[item]}/{self.index}/{purpose}".encode()
        return int.from_bytes(hashlib.sha256(said).digest()[:8], "little") >> 1

    def rng(self, purpose: str, item: int = 0) -> torch.Generator:
        """The stream of one purpose and item, from its beginning."""
        return self.single or torch.Generator().manual_seed(self.seed(purpose, item))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers ``(items, *shape)``, float32, on the CPU."""
        items = range(len(self.seeds))
        return torch.cat([torch.randn(1, *shape, generator=self.rng(purpose, i)) for i in items])


@dataclass(frozen=True)
class Run:
    """A pass as its edits see it. Read-only.

    Attributes:
        canvas: the picture being edited and the region being worked on.
        model: the loaded model.
        prompt: what the pass is to show; "" when it says nothing.
        negative: what it is not to show.
        steps: how many steps the pass asks for, before any strength cuts them.
        guidance: scale of classifier-free guidance; at most 1: there is no negative prediction.
        streams: the named streams of random numbers.
        compat: whether this pass is compared with diffusers' own pipelines.
        preprocessors: what can turn a picture into a control hint, by name.
        load: ``load(key, loader, of)``: loads something heavy once per editor; see `resource`.
        inverter: what `invert` calls, from the phase `prepare` on.
    """

    canvas: Canvas
    model: LatentModel
    prompt: str
    negative: str
    steps: int
    guidance: float
    streams: Streams
    compat: bool = False
    preprocessors: Mapping[str, Preprocessor] = field(default_factory=dict)
    load: Load = load_each_time
    inverter: Callable[..., Generator[Step, None, Inversion]] | None = None

    def invert(
        self,
        prompt: str = "",
        *,
        kind: Literal["ddim", "edit_friendly"] = "ddim",
        guidance: float = 1.0,
        refinements: int = 0,
    ) -> Generator[Step, None, Inversion]:
        """Find the noise that this pass's sampler would make the picture of; for `prepare`.

        Use it as ``inversion = yield from run.invert(…)``: its steps are the pass's progress.

        Args:
            prompt: what the picture shows.
            kind: "ddim" for samplers that draw nothing, "edit_friendly" for those that draw; see
                `diffedit.inversion`.
            guidance: towards the prompt; above 1 the path back is less exact.
            refinements: how many times each step of "ddim" is taken again.

        Raises:
            DiffeditError: asked for before the phase `prepare`.
            SchedulerError: the pass's sampler does not fit.
        """
        if self.inverter is None:
            raise DiffeditError("an inversion calls the model: ask for it in prepare")
        return self.inverter(prompt, kind, guidance, refinements)

    def laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the memory layout that the model computes fastest in.

        On a CPU convolutions and norms run up to a third faster with channels last, which the model
        then keeps up from part to part. Bits depend on it, so comparisons leave it alone.
        """
        if self.compat or self.model.device.type != "cpu":
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    @property
    def items(self) -> int:
        """How many pictures this pass makes at once."""
        return len(self.streams.seeds)

    def rng(self, purpose: str, item: int = 0) -> torch.Generator:
        """The random stream of one purpose and item, from its beginning."""
        return self.streams.rng(purpose, item)

    def require(self, capability: str, who: str) -> None:
        """Raise `CapabilityError` unless the model has a capability."""
        if capability not in self.model.capabilities:
            raise lacking(who, [capability], self.model.capabilities)

    def resource(self, key: str, loader: Callable[[], Any], of: str | None = None) -> Any:
        """Load something heavy once per editor; later calls with the same key return it.

        Args:
            of: the file or folder that ``loader`` reads, if it reads one: when that has changed it
                is loaded anew.

        No thread that a loader or a step starts may load or run and be waited for: both are taken
        in turns, and the step has its own.
        """
        return self.load(key, loader, of)

    def control_net(
        self, source: str | None, kind: str | None = None, mode: int | None = None
    ) -> Any:
        """A control network, from a folder or hub id; None: the model's own for `kind`.

        Args:
            mode: of a union of control networks the number of the one that is meant; None: by
                `kind`.
        """
        key = f"control:{source or self.model.info['source']}:{kind if source is None else ''}"
        net = self.resource(key, lambda: self.model.load_control(source, kind), source)
        return self.model.in_mode(net, kind or "", mode)

    def led_by(self, net: Any, hint: Callable[[], torch.Tensor], weight: float = 1.0) -> Lead:
        """What a control network says under a hint: `Contribution.residuals`.

        Args:
            net: of `control_net`.
            hint: makes it when it is first needed, ``(1 or items, 3, H, W)`` in [0, 1] at the
                canvas's working size.
            weight: how strongly it acts.
        """

        @functools.cache
        def per_row(rows: RowMap) -> torch.Tensor:
            shown = hint()
            if len(shown) > 1:  # a picture per item: give each row its own
                shown = shown[[key.item for key in rows.keys]]
            return shown.to(self.model.device)

        return lambda x, call: self.model.control(net, x, per_row(x.rows), weight)

    def textual_inversion(self, source: str, token: str | None = None) -> Any:
        """A word that text encoders learned, from a file, a folder or the hub.

        Args:
            token: how prompts say it; None: as the file has it.
        """
        key = f"textual_inversion:{source}:{token or ''}"
        return self.resource(key, lambda: self.model.load_textual_inversion(source, token), source)

    def lora(self, source: str) -> Any:
        """Low-rank additions to the model's weights: its own by name, or from file or hub."""
        from diffedit.models.lora import own_loras  # imports peft

        where = own_loras(str(self.model.info["source"])).get(source, source)
        return self.resource(f"lora:{source}", lambda: self.model.load_lora(source), str(where))

    def ip_adapter(self, source: str, encoder: str | None = None) -> Any:
        """What makes a prompt of a picture, from a file, a folder or the hub.

        Args:
            encoder: the folder of what it sees pictures with; None: the one beside the file.
        """
        key = f"ip_adapter:{source}:{encoder or ''}"
        return self.resource(
            key, lambda: self.model.load_ip_adapter(source, encoder, self.resource), source
        )

    def preprocess(self, kind: str, weights: str | None = None) -> Preprocess:
        """The preprocessor of that name, ready to use; its weights are loaded once per editor.

        Raises:
            ParameterError: no preprocessor has that name.
        """
        if kind not in self.preprocessors:
            raise ParameterError(f"no preprocessor {kind!r}{nearest(kind, self.preprocessors)}")
        found = self.preprocessors[kind]
        made: Preprocess = self.resource(
            f"preprocessor:{kind}:{weights}", lambda: found.load(weights), weights
        )
        return made
