"""A family in small, and the parts that families share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, T5Config, T5EncoderModel, T5TokenizerFast

from diffedit import Editor, testing
from diffedit.plugins import Plugins

TEXT = 32


@dataclass(frozen=True, eq=False)
class Tiny:
    """A family in small.

    Attributes:
        name: as `ModelFamily.name` has it.
        pipeline: makes the components; takes ``in_channels``, ``seed``, and settings of the
            scheduler.
        model: makes the `LatentModel` of them.
        theirs: the pipeline class of diffusers for each task that there is one for.
        schedulers: those for flows that its pipelines take by name.
        inpaint_channels: of the denoiser of its own inpainting model.
        hint: what diffusers' ControlNet pipeline calls it.
        predicts: what its denoiser's output means.
        channels: of its latents.
        nets: makes a ControlNet for a denoiser; None: there is no such thing.
        instructed: options that make its pipeline one that follows instructions, if there are.
        styled: whether its pictures can attend to another.
        unguided: the guidance scale at which its pipelines do not guide.
        several: whether its pipelines take more than one ControlNet, each in a window.
        union: what its pipelines take in place of several ControlNets: of one, what is shown
            several hints; None: they take several.
        unsaid: what its pipelines have to be told for no negative prompt; None: nothing.
        long: whether texts have up to 512 tokens, which its pipelines do not agree on.
        mended: makes a pipeline of diffusers do what it is meant to, where it does not.
    """

    name: str
    pipeline: Callable[..., DiffusionPipeline]
    model: Any
    theirs: Mapping[str, str]
    schedulers: frozenset[str] = frozenset()
    inpaint_channels: int = 9
    hint: str = "image"
    predicts: str = "epsilon"
    channels: int = 4
    nets: Callable[..., Any] | None = None
    instructed: Mapping[str, Any] | None = None
    styled: bool = True
    unguided: float = 1.0
    several: bool = True
    union: Callable[[Any], Any] | None = None
    unsaid: str | None = None
    long: bool = False
    mended: Callable[[Any], None] = lambda pipe: None

    @property
    def flow(self) -> bool:
        """Whether it was trained as a rectified flow."""
        return self.predicts == "flow_prediction"

    def options(self, variant: str) -> dict[str, Any]:
        """What makes its pipeline a variant: "instructed", or "inpainting", "v" (v-prediction)."""
        made: dict[str, Any] = {}
        if variant == "instructed":
            if self.instructed is None:
                pytest.skip("the family has no model that follows instructions")
            return dict(self.instructed)
        if "inpainting" in variant:
            if "inpaint model" not in self.theirs:
                pytest.skip("the family has no inpainting model")
            made["in_channels"] = self.inpaint_channels
        if variant.endswith("v"):
            if self.flow:
                pytest.skip("a flow predicts a velocity, and nothing else")
            made["prediction_type"] = "v_prediction"
        return made

    def alike(self, scheduler: str | None) -> str | None:
        """A scheduler for this family that is like one for Stable Diffusion."""
        alike = {
            "ddim": "euler",
            "ddpm": "dpmpp_2m_sde",
            "dpmpp_sde": "dpmpp_2m_sde",
            "euler_a": "lcm",
        }
        return alike.get(scheduler, scheduler) if self.flow and scheduler else scheduler

    def carried(self, edits: Sequence[Any]) -> tuple[Any, ...]:
        """Those of some edits that the family carries."""
        lacks = {"controlnet": self.nets is None, "style": not self.styled}
        return tuple(one for one in edits if not lacks.get(one.name))

    def needs_control(self) -> None:
        """Skip a test where there are no control networks."""
        if self.nets is None:
            pytest.skip("the family has no control networks")

    def needs_style(self) -> None:
        """Skip a test of attention where pictures cannot attend to another."""
        if not self.styled:
            pytest.skip("the family's pictures cannot attend to another")

    def editor(self, plugins: Plugins | None = None, **options: Any) -> Editor:
        """An editor on it, with the installed plugins unless others are given."""
        sizes = (testing.NATIVE, 2 * testing.NATIVE, 2 * testing.NATIVE)
        pipe = self.pipeline(**options)
        return Editor(self.model(pipe, f"tiny random {self.name}", sizes), plugins)

    def save(self, pipe: Any, folder: Path) -> None:
        """Write a model's folder, with the sizes that tests can bear."""
        pipe.save_pretrained(folder)
        sides = [testing.NATIVE, 2 * testing.NATIVE]
        sizes = json.dumps({"sides": sides, "whole": 2 * testing.NATIVE})
        (folder / "diffedit.json").write_text(sizes, "utf-8")

    def control_net(self, pipe: Any, seed: int = 1, **options: Any) -> Any:
        """A ControlNet for it, whose zero convolutions are random so that it acts, if any."""
        if self.nets is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.model(pipe).roles:
                pipe = self.pipeline()  # control networks see the latents, no further channels
            net = self.nets(getattr(pipe, self.model.networks[0]), **options)
            for weight in net.parameters():
                if not weight.any():
                    torch.nn.init.normal_(weight, std=0.05)
        return net.eval().requires_grad_(False)


def text_settings(**more: Any) -> CLIPTextConfig:
    """Of a CLIP that fits `testing.tiny_tokenizer`."""
    usual = {
        "vocab_size": 514,
        "hidden_size": TEXT,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    return CLIPTextConfig(**{**usual, **more})


def t5_encoder() -> T5EncoderModel:
    """A random one, from the generator as it stands."""
    settings = T5Config(
        vocab_size=128, d_model=2 * TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return T5EncoderModel(settings).eval().requires_grad_(False)


def t5_tokenizer() -> T5TokenizerFast:
    """A real T5 tokenizer that knows letters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    known = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5TokenizerFast(vocab=known, extra_ids=0)
