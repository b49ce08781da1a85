"""Who makes the pictures: diffedit, diffusers on the same weights, and three controls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from bench import models
from bench.quality import pictures
from bench.quality.autoencoder import reconstruct
from bench.quality.cases import Case
from diffedit import Edit, Editor, Pass
from diffedit.models import control
from diffedit.schedulers import build
from diffedit.training.judges import Mask
from diffedit.training.world.backdrops import Pixels
from diffedit_controlnet import ControlNet
from diffedit_img2img import Img2Img
from diffedit_inpaint import Inpaint
from diffedit_lora import LoRA
from diffedit_style import Style

MARGIN = 32
"""Pixels around a mask that both sides see as context: the default of diffedit's `inpaint`."""


class Engine(Protocol):
    """Makes the picture that a case asks for."""

    name: ClassVar[str]

    def declines(self, case: Case) -> str:
        """Why it does not take this case; empty: it does."""
        ...

    def make(self, case: Case) -> Pixels:
        """The picture, (side, side, 3) uint8, of the size of the case's."""
        ...


class Bench:
    """A model, and what all engines sample with.

    Attributes:
        editor: whose components everyone uses.
        steps, guidance: of the sampling.
        scheduler: a scheduler's name; None: the model's own.
        native: the side that the model was made for, in pixels.
        few: the folder of a distillation's result, for the engine that samples in a few steps.
        feather: pixels over which diffedit's masks fade: 8 (its default) at 256 px, and in
            proportion.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        steps: int = 20,
        guidance: float = 5.0,
        scheduler: str | None = None,
        few: Path | None = None,
    ) -> None:
        self.editor, self.steps, self.guidance, self.scheduler = editor, steps, guidance, scheduler
        self.few = few
        self.native = editor.model.sides[0]
        self.feather = max(1, self.native // 32)
        self.source = str(editor.model.info["source"])
        self._nets: dict[str, Any] = {}
        self._pipes: dict[str, Any] = {}

    @property
    def parts(self) -> Any:
        """The components, a diffusers pipeline that is never called."""
        return self.editor.model.pipe  # type: ignore[attr-defined, unused-ignore]

    def unknown(self, case: Case) -> list[str]:
        """Words of the case that the model's tokenizer has no token for: it never learnt them."""
        vocabulary = self.parts.tokenizer.get_vocab()
        return sorted(word for word in case.words if f"{word}</w>" not in vocabulary)

    def net(self, kind: str) -> Path | None:
        """The folder of the model's own control network for hints of a kind."""
        return control.own_control(self.source, kind)

    def pipeline(self, name: str, **extra: Any) -> Any:
        """A pipeline of diffusers' on the same components, with a scheduler of its own."""
        key = "/".join([name, *(str(id(part)) for part in extra.values())])
        if key not in self._pipes:
            cls = getattr(diffusers, name)
            pipe = models.peer(
                (lambda **parts: cls(**parts, **extra)) if extra else cls, self.editor
            )
            if self.scheduler is not None:
                pipe.scheduler = build(self.scheduler, pipe.scheduler)
            self._pipes[key] = pipe
        return self._pipes[key]

    def loaded_net(self, kind: str) -> Any:
        """The control network itself."""
        if kind not in self._nets:
            self._nets[kind] = self.editor.model.load_control(None, kind)  # type: ignore[attr-defined, unused-ignore]
        return self._nets[kind]

    def mask(self, case: Case, number: int) -> Mask:
        return pictures.mask(case, number, self.native)

    def refuses(self, case: Case) -> str:
        """Why no sampling engine takes a case with this model; empty: they do."""
        if words := self.unknown(case):
            return f"words that the model has not learnt: {', '.join(words)}"
        if case.hint is not None and self.net(case.hint) is None:
            return "no net"
        return ""


class Ours:
    """diffedit's Editor, with the defaults of its edits."""

    name: ClassVar[str] = "diffedit"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def declines(self, case: Case) -> str:
        return self.bench.refuses(case)

    def make(self, case: Case) -> Pixels:
        bench = self.bench
        source = None if case.source is None else pictures.source(case, bench.native)
        passes = [
            Pass(prompt=prompt, edits=tuple(self.edits(case, number)), **self.sampling)
            for number, prompt in enumerate(case.prompts)
        ]
        return np.asarray(bench.editor.run(source, passes, seed=case.seed).pixels)

    @property
    def sampling(self) -> dict[str, Any]:
        """What a pass is told of its steps."""
        bench = self.bench
        return {"steps": bench.steps, "guidance": bench.guidance, "scheduler": bench.scheduler}

    def edits(self, case: Case, number: int) -> list[Edit]:
        """What acts in a pass."""
        bench, found = self.bench, list[Edit]()
        if case.places:
            grey = Image.fromarray(bench.mask(case, number).astype(np.uint8) * 255)
            found.append(Inpaint(mask=grey, feather=bench.feather, margin=MARGIN))
        if case.strength is not None:
            found.append(Img2Img(strength=case.strength))
        if case.look is not None:
            found.append(Style(image=Image.fromarray(pictures.look(case.look, bench.native))))
        if case.hint is not None:
            hint = Image.fromarray(pictures.hint(case, bench.native))
            found.append(ControlNet(image=hint, kind="none", model=str(bench.net(case.hint))))
        return found


class Without(Ours):
    """diffedit, without the hint or the reference that the case is about."""

    name: ClassVar[str] = "without the edit"

    def declines(self, case: Case) -> str:
        if case.hint is None and case.look is None:
            return "not asked"
        return super().declines(case)

    def edits(self, case: Case, number: int) -> list[Edit]:
        return [
            one for one in super().edits(case, number) if not isinstance(one, Style | ControlNet)
        ]


class Again(Ours):
    """diffedit once more, on one case in twelve: the same seed has to give the same bytes."""

    name: ClassVar[str] = "diffedit again"

    def declines(self, case: Case) -> str:
        return "not asked" if case.lot // 2 % 12 else super().declines(case)


class Few(Ours):
    """diffedit in four steps, on what has to keep its quality.

    With the LoRA of a distillation, and as it was made for, if there is one.
    """

    name: ClassVar[str] = "diffedit, few steps"

    def declines(self, case: Case) -> str:
        return "not asked" if case.category == "chain" else super().declines(case)

    @property
    def sampling(self) -> dict[str, Any]:
        """By the sampler that gives the most in so few steps."""
        few = super().sampling | {"steps": 4, "scheduler": "unipc"}
        if self.bench.few is None:
            return few
        told = json.loads((self.bench.few / "diffedit.json").read_text("utf-8"))
        return few | {key: told[key] for key in ("steps", "guidance", "scheduler") if key in told}

    def edits(self, case: Case, number: int) -> list[Edit]:
        few = self.bench.few
        distilled = () if few is None else (LoRA(model=str(few.resolve())),)
        return [*super().edits(case, number), *distilled]


class Theirs:
    """diffusers' pipeline for the case, on the whole picture.

    Half of the pictures from nothing, where both sides run the same sampling, and half of those
    larger than the model's native side, which take more than twice as long; of chains, which are
    few, all.
    """

    name: ClassVar[str] = "diffusers"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def declines(self, case: Case) -> str:
        if case.look is not None:
            return "none: diffusers has no pipeline for this on these components"
        if (case.category == "nothing" or case.scale > 1) and _spared(case):
            return "not asked"
        return self.bench.refuses(case)

    def make(self, case: Case) -> Pixels:
        bench = self.bench
        if case.places:
            return self._inpaint(case)
        common = self.common(case, 0)
        if case.source is not None:
            image = Image.fromarray(pictures.source(case, bench.native))
            pipe = bench.pipeline("StableDiffusionImg2ImgPipeline")
            return _pixels(pipe(**common, image=image, strength=case.strength))
        side = pictures.side_of(case, bench.native)
        common |= {"width": side, "height": side}
        if case.hint is not None:
            net = bench.loaded_net(case.hint)
            pipe = bench.pipeline("StableDiffusionControlNetPipeline", controlnet=net)
            hint = Image.fromarray(pictures.hint(case, bench.native))
            return _pixels(pipe(**common, image=hint))
        return _pixels(bench.pipeline("StableDiffusionPipeline")(**common))

    def common(self, case: Case, number: int) -> dict[str, Any]:
        """What every pipeline is told, for a pass of the case."""
        return {
            "prompt": case.prompts[number],
            "num_inference_steps": self.bench.steps,
            "guidance_scale": self.bench.guidance,
            "generator": torch.Generator().manual_seed(case.seed + number),
        }

    def _inpaint(self, case: Case) -> Pixels:
        image = Image.fromarray(pictures.source(case, self.bench.native))
        for number in range(len(case.prompts)):
            grey = Image.fromarray(self.bench.mask(case, number).astype(np.uint8) * 255)
            image = self.painted(case, number, image, grey)
        return np.asarray(image.convert("RGB"))

    def painted(
        self, case: Case, number: int, image: Image.Image, grey: Image.Image, **crop: Any
    ) -> Image.Image:
        """A pass of the case, by the network for inpainting where one leads diffedit, too."""
        told = self.common(case, number) | {"image": image, "mask_image": grey, "strength": 1.0}
        told |= {"width": image.width, "height": image.height} | crop
        if not self.led:
            pipe = self.bench.pipeline("StableDiffusionInpaintPipeline")
            return cast(Image.Image, pipe(**told).images[0])
        net = self.bench.loaded_net("inpaint")
        pipe = self.bench.pipeline("StableDiffusionControlNetInpaintPipeline", controlnet=net)
        made = pipe(**told, control_image=_holed(image, grey), controlnet_conditioning_scale=1.0)
        return cast(Image.Image, made.images[0])

    @property
    def led(self) -> bool:
        """Whether the model's own network for inpainting leads."""
        return "inpaint_control" in self.bench.editor.model.capabilities


class TheirsCropped(Theirs):
    """diffusers' inpainting with `padding_mask_crop`: half of the cases with a mask, all chains."""

    name: ClassVar[str] = "diffusers, crop"

    def declines(self, case: Case) -> str:
        if not case.places or _spared(case):
            return "not asked"
        return super().declines(case)

    def painted(
        self, case: Case, number: int, image: Image.Image, grey: Image.Image, **crop: Any
    ) -> Image.Image:
        native, margin = self.bench.native, MARGIN + self.bench.feather
        if not self.led:
            told = {"width": native, "height": native, "padding_mask_crop": margin}
            return super().painted(case, number, image, grey, **told)
        # It takes no tensor for a hint that it is to crop, and -1 stands in nothing else: what it
        # does around its sampling is done here, by its own functions.
        tools = VaeImageProcessor()
        box = tools.get_crop_region(grey, native, native, pad=margin)
        part, hole = (one.resize((native, native), box=box) for one in (image, grey))
        made = super().painted(case, number, part.convert("RGB"), hole)
        return cast(Image.Image, tools.apply_overlay(grey, image, made, box))


class Answer:
    """The right answer, drawn, and put through the autoencoder: what the judges make of it.

    Outside the masks it is the source.
    """

    name: ClassVar[str] = "drawn answer"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def declines(self, case: Case) -> str:
        if pictures.answer(case, 64) is None:
            return "not asked"
        return self.bench.refuses(case)

    def make(self, case: Case) -> Pixels:
        drawn = pictures.answer(case, self.bench.native)
        assert drawn is not None
        made = reconstruct(self.bench.parts.vae, [drawn])[0]
        if not case.places:
            return made
        where = pictures.changed(case, self.bench.native)[..., None]
        return np.where(where, made, pictures.source(case, self.bench.native))


class Untouched:
    """The source as it is (plain grey where there is none): what one gets for doing nothing."""

    name: ClassVar[str] = "source"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def declines(self, case: Case) -> str:
        return self.bench.refuses(case) if case.source is not None else "not asked"

    def make(self, case: Case) -> Pixels:
        return pictures.source(case, self.bench.native)


ENGINES: dict[str, Callable[[Bench], Engine]] = {
    Ours.name: Ours,
    Theirs.name: Theirs,
    TheirsCropped.name: TheirsCropped,
    Without.name: Without,
    Again.name: Again,
    Few.name: Few,
    Answer.name: Answer,
    Untouched.name: Untouched,
}


def _spared(case: Case) -> bool:
    """Whether a comparison is spared a case: every second one, but no chain."""
    return case.category != "chain" and bool(case.lot % 2)


def _holed(image: Image.Image, grey: Image.Image) -> torch.Tensor:
    """A picture with -1 in the mask, ``(1, 3, h, w)``: the hint of ControlNet 1.1."""
    hole = np.asarray(grey)[..., None] > 127
    shown = np.where(hole, np.float32(-1), np.asarray(image.convert("RGB"), np.float32) / 255)
    return torch.from_numpy(shown).permute(2, 0, 1)[None]


def _pixels(made: Any) -> Pixels:
    return np.asarray(made.images[0].convert("RGB"))
