"""What families share whose components diffusers bundles: networks, additions, and facts to tell.

A diffusers pipeline serves as a bundle of components and loaders; it is never called.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffedit.attention import Addition, Layout, Transform, attending, separate
from diffedit.errors import CapabilityError, ModelError, lacking
from diffedit.guidance import classifier_free
from diffedit.images import Picture
from diffedit.models import control, holding, hub
from diffedit.models.autoencoded import AutoencodedModel
from diffedit.models.compiled import Compiled
from diffedit.models.ip_adapter import Places, load_ip_adapter
from diffedit.models.lora import Additions, LoRA, components, load_lora, own_loras
from diffedit.models.protocol import ModelInput, Residuals
from diffedit.models.textual_inversion import Word
from diffedit.rows import RowMap
from diffedit.schedule import Schedule, prediction_type, sd_calls_kept
from diffedit.schedulers import build, dynamic_shift, needs_size

#: Working regions go up to this many times the size the model was trained at.
LARGEST = 2


class PipelineModel(AutoencodedModel):
    """The part of a `LatentModel` that does not depend on how its denoiser is called.

    Args:
        pipe: the components.
        source: where they came from, for messages and provenance.
        sizes: the smallest and largest side of a region and the largest of a whole picture, in
            pixels; None: once and twice the size that the denoiser's configuration names, and
            twice.

    Attributes:
        family: its name, for people.
        carries: capabilities that all models of it have.
        sometimes: capabilities that some models of it have besides.
        networks: the components that hold weights; the denoiser comes first.
        control_nets: what its control networks may be, the usual class first.
        modes: the numbers of kinds of hints in unions of control networks.
        kinship: settings of the denoiser that a control network for it shares.
        sized: whether it is told of the picture's size beside the prompt.
        native: latent cells along a side that it was trained at, where no configuration says it.
        patch: latent cells along one side of what the denoiser takes for one token; 0: as its
            configuration says.
        folded: cells that the denoiser takes as channels of one.
        aside: parts of the denoiser where no token of the picture attends.
        kept: how the family rounds the steps that a strength leaves.
        most_shift: of noise, for the largest pictures; see `dynamic_shift`.
        spacing: the noise levels of so many steps, before any shift; None: the scheduler's.
        replaced: components that came from elsewhere than the others, and where from.
    """

    family: ClassVar[str]
    carries: ClassVar[frozenset[str]]
    sometimes: ClassVar[frozenset[str]] = frozenset()
    networks: ClassVar[tuple[str, ...]]
    control_nets: ClassVar[tuple[type, ...]] = ()
    modes: ClassVar[Mapping[str, int]] = {}
    kinship: ClassVar[tuple[str, ...]] = ()
    sized: bool = False
    native: ClassVar[int] = 64
    patch: int = 1
    folded: ClassVar[int] = 1
    aside: ClassVar[tuple[str, ...]] = ()
    kept = staticmethod(sd_calls_kept)
    most_shift: ClassVar[float] = 1.15
    spacing: Callable[[int], list[float]] | None = None
    replaced: Mapping[str, str] = {}
    one_by_one = False

    def __init__(
        self,
        pipe: DiffusionPipeline,
        source: str = "in memory",
        sizes: tuple[int, int, int] | None = None,
    ) -> None:
        self.pipe: Any = pipe
        super().__init__(self.pipe.vae)
        self.source = source
        self.denoiser: Any = getattr(pipe, self.networks[0])
        self.patch = self.patch or self.denoiser.config.patch_size
        self.grid: int = self.cell * self.patch
        cells = self.denoiser.config.get("sample_size") or self.native
        native = (min(cells) if isinstance(cells, list | tuple) else int(cells)) * self.cell
        smallest, largest, whole = sizes or (native, LARGEST * native, LARGEST * native)
        self.sides, self.whole = (smallest, largest), whole
        self.capabilities: frozenset[str] = self.carries
        inputs = self.denoiser.config.in_channels // self.folded
        self.roles = self._roles(inputs - self.channels, inputs)
        if "mask" in self.roles:
            self.capabilities |= {"mask_channels"}
        if "image" in self.roles:
            self.capabilities |= {"instructions"}
        self._counts = {
            name: sum(math.prod(holding.unpacked(weight)) for weight in part.parameters())
            for name, part in self._parts().items()
        }
        self._compiled: Compiled | None = None
        self._additions = Additions(components(pipe) if "lora" in self.carries else {})
        #: Of the present call of the denoiser.
        self._rows: RowMap | None = RowMap(())
        self._ready()

    def _ready(self) -> None:
        """What a family sets up besides, once all that the families share is."""

    def _known_places(self, tokens: int) -> None:
        """Positions are known for so many tokens to a side, and for no larger pictures."""
        most = tokens * self.grid
        self.sides = (min(self.sides[0], most), min(self.sides[1], most))
        self.whole = min(self.whole, most)

    def _roles(self, more: int, inputs: int) -> Mapping[str, int]:
        """What a denoiser takes besides latents, in order, when it takes so many channels more.

        Raises:
            ModelError: nobody knows.
        """
        latents = self.channels
        known: dict[int, dict[str, int]] = {0: {}}
        if "instructions" in self.sometimes:
            known[latents] = {"image": latents}
        if "mask_channels" in self.sometimes:
            known[latents + 1] = {"mask": 1, "masked": latents}
        if more in known:
            return known[more]
        said = ", ".join(str(latents + more) for more in known)
        raise ModelError(
            f"{self.source}: a denoiser of {inputs} input channels is not supported; of those of"
            f" its family {said} are"
        )

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        # diffusers' own property walks through all modules each time.
        return holding.where(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the denoiser computes in."""
        return holding.computing(self.denoiser)

    @property
    def compat_dtype(self) -> torch.dtype:
        """The type of the latents that diffusers' own pipelines sample."""
        return self.dtype

    @property
    def compat_source_dtype(self) -> torch.dtype:
        """The same of those that start from a picture, or keep one: of it, and of the noise."""
        return self.compat_dtype

    @property
    def info(self) -> Mapping[str, Any]:
        """What to tell people about this model."""
        return {
            **self._origin(),
            **self.replaced,
            "family": self.family,
            "parameters": self._counts,
            "native_side": self.sides[0],
            "largest_side": self.sides[1],
            "largest_whole_picture": self.whole,
            "prediction": prediction_type(self.pipe.scheduler),
            "scheduler": type(self.pipe.scheduler).__name__,
            "capabilities": sorted(self.capabilities),
            "device": str(self.device),
            "saves_memory": self.one_by_one,
            "in_main_memory": sum(holding.away(part) for part in self.parts()),
            "weights": str(holding.narrowest(self.denoiser)).removeprefix("torch."),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _origin(self) -> dict[str, str]:
        """Where it came from: the hub id with the commit, or the place."""
        if (known := hub.origin(self.source)) is None:
            return {"source": self.source}
        return {"source": known[0], "commit": known[1]}

    def save_memory(self) -> str | None:
        """Predictions one by one, and an autoencoder that works on tiles; then weights elsewhere.

        Large pictures come out a little different where their tiles meet.
        """
        if not self.one_by_one:
            self.one_by_one = True
            for name in ("enable_slicing", "enable_tiling"):
                if hasattr(self.vae, name):
                    getattr(self.vae, name)()
            return "predictions one after the other and the autoencoder in tiles"
        there = sum(holding.away(part) for part in self.parts())
        if self.device.type != "cpu":
            holding.place(list(self.parts()), self.device, 0)
        if sum(holding.away(part) for part in self.parts()) == there:
            return None
        return "the weights in main memory until they are needed"

    def parts(self) -> Sequence[torch.nn.Module]:
        """The modules whose state a pass must leave as it found it."""
        return list(self._parts().values())

    def readers(self) -> Sequence[torch.nn.Module]:
        """The text encoders."""
        return [part for name, part in self._parts().items() if name.startswith("text_encoder")]

    def _parts(self) -> dict[str, torch.nn.Module]:
        found = {name: getattr(self.pipe, name) for name in self.networks}
        return {name: part for name, part in found.items() if part is not None}

    def schedule(
        self,
        name: str | None,
        steps: int,
        at: float = 1.0,
        *,
        shape: tuple[int, int, int] | None = None,
        eta: float | None = None,
        since: float = 0.0,
        until: float = 1.0,
        compat: bool = False,
    ) -> Schedule:
        """The calls of a trip that starts at noise level `at`; see `LatentModel.schedule`."""
        own = self.pipe.scheduler
        side = self.sides[0] // self.cell
        _, height, width = shape or (self.channels, side, side)
        tokens = (height // self.patch) * (width // self.patch)
        mu = dynamic_shift(own, tokens, self.most_shift)
        scheduler = build(name, own, mu)
        more: dict[str, Any] = {"mu": mu} if needs_size(scheduler) else {}
        takes = inspect.signature(scheduler.set_timesteps).parameters
        if self.spacing is not None and "sigmas" in takes:
            more["sigmas"] = np.array(self.spacing(steps))
        more |= {"eta": eta, "since": since, "until": until, "compat": compat}
        return Schedule(scheduler, steps, self.device, at=at, kept=self.kept, **more)

    def combine(self, predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """Classifier-free guidance."""
        return classifier_free(predictions, scale)

    def _seen(self, x: ModelInput) -> Tensor:
        """The latents with the channels that the denoiser takes besides."""
        latents = x.latents
        if self.roles:
            latents = torch.cat([latents, *(x.channels[role] for role in self.roles)], dim=1)
        return latents.to(self.dtype)

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a ControlNet; None: the model's own for hints of `kind` (`control.own_control`).

        Raises:
            ModelError: there is none, or it was made for another family.
        """
        if not self.control_nets:
            raise lacking("a control network", ["control"], self.capabilities)
        if source is None:
            own = control.own_control(self.source, kind)
            if own is None:
                raise CapabilityError(
                    f"{self.source} brings no control network of its own for {kind!r}: name one by"
                    " its folder or hub id (controlnet: model)"
                )
            source = str(own)
        return control.load(
            source, self.control_nets, self.denoiser, self.kinship, dtype=self.dtype
        )

    def in_mode(self, net: Any, kind: str, mode: int | None) -> Any:
        """Of a union of control networks the one that is meant; see `control.in_mode`."""
        return control.in_mode(net, kind, mode, self.modes)

    def load_ip_adapter(
        self, source: str, encoder: str | None, load: Callable[[str, Callable[[], Any]], Any]
    ) -> Any:
        """Load an IP-Adapter; see `models.ip_adapter.load_ip_adapter`."""
        if "image_prompt" not in self.capabilities:
            raise lacking("an image prompt", ["image_prompt"], self.capabilities)
        own = getattr(self.pipe, "image_encoder", None)
        return load_ip_adapter(source, self.denoiser, self._looks(), encoder, own, load)

    def image_prompt(
        self, adapter: Any, picture: Picture, weight: float, mask: Tensor | None = None
    ) -> Addition:
        """The attention to a picture, beside that to the text."""
        rgb = (picture.rgb() * 255).round().astype(np.uint8)
        return cast(Addition, adapter.term(rgb, weight, mask))

    def _looks(self) -> Places:
        """Where IP-Adapters of the family act."""
        raise NotImplementedError

    def control_roles(self, net: Any) -> frozenset[str]:
        """Roles of channels that a control network takes besides the hint."""
        return frozenset()

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Refuse: families that have control networks say how they run."""
        raise lacking("a control network", ["control"], self.capabilities)

    def load_textual_inversion(self, source: str, token: str | None = None) -> Word:
        """Refuse: families that can learn words say which encoders read them."""
        raise lacking("a textual inversion", ["textual_inversion"], self.capabilities)

    def add_textual_inversion(self, word: Word) -> Callable[[], None]:
        """Refuse: families that can learn words say which encoders read them."""
        raise lacking("a textual inversion", ["textual_inversion"], self.capabilities)

    def load_lora(self, source: str) -> LoRA:
        """Read a LoRA, the model's own by its name; see `models.lora.load_lora`."""
        loaders: Any = type(self.pipe)
        where = own_loras(self.source).get(source, source)
        return load_lora(loaders, self._additions.modules, str(where), **self._lora_options())

    def _lora_options(self) -> Mapping[str, Any]:
        """What the family's loader wants to be told besides the file."""
        return {}

    def add_lora(self, lora: LoRA, weight: float) -> Callable[[], None]:
        """Add a LoRA to the weights; returns what takes it away.

        Meanwhile a denoiser that was compiled runs as it is written: it has other layers.
        """
        with ExitStack() as undo:
            undo.enter_context(self.as_written())
            undo.callback(self._additions.add(lora, weight))
            return undo.pop_all().close

    def compile(self, mode: str = "default") -> None:
        """Have torch compile the denoiser when it is next called; see `models.compiled`."""
        self._compiled = Compiled(self.denoiser, mode)

    def as_written(self) -> AbstractContextManager[None]:
        """While inside, a denoiser that was compiled runs as it is written."""
        return self._compiled.aside() if self._compiled else nullcontext()

    @contextmanager
    def attending(self, transform: Transform) -> Iterator[None]:
        """While inside, every attention of the denoiser goes through `transform`."""
        rows = lambda: self._rows  # noqa: E731
        listening = attending(self.denoiser, transform, rows, self._layout, self.aside)
        with self.as_written(), listening:
            yield

    def _layout(self, given: Mapping[str, Any], tokens: int) -> Layout:
        """What the tokens of one attention of the denoiser are; see `attention.attending`."""
        return separate(given, tokens)

    @torch.no_grad()
    def _settle(self, *encoders: str) -> None:
        """Have transformers hang its hooks on text encoders.

        It does so when it is first asked for what lies between layers, and lets them hang: in the
        midst of a pass they would be something that the pass has left behind.
        """
        for name in encoders:
            encoder = getattr(self.pipe, name)
            if encoder is not None:
                token = torch.zeros(1, 1, dtype=torch.long, device=holding.where(encoder))
                encoder(token, output_hidden_states=True)
