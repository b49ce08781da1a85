"""Z-Image (Alibaba Tongyi 2025, arXiv:2511.22699): base and Turbo.

A transformer over one sequence of the picture's tokens and the text's, with rotary positions in
three axes, trained as a rectified flow. Texts are as long as they are, and the picture stands
behind its own in the first axis: a longer prompt puts it further off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ZImageControlNetModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from diffedit.attention import Layout
from diffedit.errors import ModelError
from diffedit.guidance import NEGATIVE, POSITIVE
from diffedit.models import loading
from diffedit.models.pipeline import PipelineModel
from diffedit.models.protocol import Conditioning, ModelInput, Residuals
from diffedit.prompts import tell_unread
from diffedit.schedule import flow_calls_kept

#: Tokens of a prompt, and of the question that it is put into, that are read.
LONGEST = 512
#: What a ControlNet has of the transformer that it was made for, and no weights of its own for.
BORROWED = (
    "t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner",
    "context_refiner", "x_pad_token", "cap_pad_token",
)  # fmt: skip


class ZImage(PipelineModel):
    """The `LatentModel` of Z-Image. Turbo was distilled to do without guidance: a scale of 1."""

    family: ClassVar[str] = "z-image"
    carries: ClassVar[frozenset[str]] = frozenset({"control", "lora", "shared_attention"})
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    control_nets: ClassVar[tuple[type, ...]] = (ZImageControlNetModel,)
    kinship: ClassVar[tuple[str, ...]] = ("dim", "n_heads")

    native: ClassVar[int] = 128
    patch = 2
    aside: ClassVar[tuple[str, ...]] = ("context_refiner",)
    kept = staticmethod(flow_calls_kept)

    def _ready(self) -> None:
        super()._ready()
        self._known_places(min(self.denoiser.config.axes_lens[1:]))
        self._picture = 0
        self._settle("text_encoder")

    @property
    def compat_dtype(self) -> torch.dtype:
        """Latents are float32, whatever the transformer computes in."""
        return torch.float32

    @property
    def compat_source_dtype(self) -> torch.dtype:
        """Once they have been noised, in the type of the transformer."""
        return self.dtype

    @staticmethod
    def spacing(steps: int) -> list[float]:
        """Noise levels before the shift: even, and none is left out at the end."""
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def embed(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        *,
        negative: bool = False,
        pictures: Sequence[Tensor] = (),
    ) -> Conditioning:
        """Embed prompts.

        Returns:
            ``text``: ``(prompts, tokens, d)`` of Qwen3, zeros where a text is over; ``lengths``:
            ``(prompts,)``, how many tokens each has, on the CPU: they decide shapes.
        """
        made = [
            self.pipe.encode_prompt(
                text,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=LONGEST,
            )
            for text in prompts
        ]
        for text in prompts:
            asked = self.pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            tell_unread(text, self.pipe.tokenizer, LONGEST, asked)
        texts = [text for (text,), _ in made]
        return Conditioning(
            {
                "text": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
                "lengths": torch.tensor([len(text) for text in texts]),
            },
            ragged=frozenset({"text"}),
        )

    @staticmethod
    def combine(predictions: Mapping[str, Tensor], scale: float) -> Tensor:
        """Classifier-free guidance, written from the prompt on: the sums round otherwise."""
        positive, negative = predictions[POSITIVE], predictions.get(NEGATIVE)
        if negative is None:
            return positive
        return positive + (scale - 1) * (positive - negative)

    def _given(self, x: ModelInput, latents: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Each row's picture ``(c, 1, h, w)``, the share of the way made, each row's text."""
        said = x.conditioning.tensors
        pairs = zip(said["text"].to(latents.dtype), said["lengths"].tolist(), strict=True)
        time = (1000 - x.timestep.expand(len(x.rows))) / 1000
        return list(latents[:, :, None].unbind()), time, [text[:length] for text, length in pairs]

    def load_control(self, source: str | None, kind: str | None = None) -> Any:
        """Load a ControlNet, of either version."""
        net = super().load_control(source, kind)
        known = (self.channels, 2 * self.channels + 1)
        if (said := net.config.control_in_dim) not in known:
            raise ModelError(
                f"{source}: a control network of {said} input channels is not supported;"
                f" {known[0]} and {known[1]} (that sees the mask) are"
            )
        return net

    def control_roles(self, net: Any) -> frozenset[str]:
        """From version 2 on they take the mask and what it leaves of the picture."""
        more = net.config.control_in_dim > self.channels
        return frozenset({"mask", "masked"}) if more else frozenset()

    def control(self, net: Any, x: ModelInput, hint: Tensor, weight: float) -> Residuals:
        """Run a ControlNet; its places are the transformer's layers, nothing at those it skips."""
        shown = [self._shown(hint, len(hint)).expand(len(x.rows), -1, -1, -1)]
        more = net.config.control_in_dim - self.channels
        if more and "mask" in x.channels:  # in what it takes, 1 means that a cell stays
            shown += [1 - x.channels["mask"], x.channels["masked"]]
        else:
            shown.append(shown[0].new_zeros(len(x.rows), more, *x.latents.shape[2:]))
        hints = torch.cat(shown, dim=1).to(net.dtype)[:, :, None]
        pictures, time, texts = self._given(x, x.latents.to(net.dtype))
        self._rows = None  # it uses the transformer's own first layers, and is not the transformer
        with _borrowing(net, self.denoiser):
            made = net(pictures, time, texts, hints, conditioning_scale=weight)
        nothing = made[0].new_zeros(()).expand_as(made[0])
        return Residuals(tuple(made.get(n, nothing) for n in range(self.denoiser.config.n_layers)))

    def _layout(self, given: Mapping[str, Any], tokens: int) -> Layout:
        """The picture's tokens come first; then what fills them up, and the text."""
        picture = slice(0, self._picture)
        return Layout(picture, places=given["freqs_cis"][:, None, picture])

    def predict(self, x: ModelInput) -> Tensor:
        """The velocity for every row, float32; the transformer predicts it towards the picture."""
        self._rows = x.rows
        pictures, time, texts = self._given(x, self._seen(x))
        height, width = x.latents.shape[2:]
        self._picture = height * width // self.patch**2
        longest = _filled_up(self._picture) + max(_filled_up(len(text)) for text in texts)
        added = dict(enumerate(x.residuals.places)) if x.residuals else {}
        for layer, place in added.items():
            if more := longest - place.shape[1]:  # references have longer texts than the canvas
                added[layer] = F.pad(place, (0, 0, 0, more))
        output = self.denoiser(
            pictures, time, texts, controlnet_block_samples=added or None, return_dict=False
        )[0]
        return -torch.stack([one.float() for one in output])[:, :, 0]


def _filled_up(tokens: int) -> int:
    """The transformer has tokens that only fill up, to lengths that are quick to compute."""
    return -(-tokens // int(SEQ_MULTI_OF)) * int(SEQ_MULTI_OF)


@contextmanager
def _borrowing(net: Any, denoiser: Any) -> Iterator[None]:
    """While inside, a ControlNet has the transformer's embedders and first layers."""
    before = {name: getattr(net, name) for name in BORROWED}
    try:
        net.from_transformer(net, denoiser)
        yield
    finally:
        for name, part in before.items():
            setattr(net, name, part)


class Family:
    """How Z-Image is recognised and loaded."""

    name = ZImage.family
    carries = ZImage.carries
    sometimes = ZImage.sometimes
    half = "bfloat16"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Pipelines named ZImage…, but Omni, which takes pictures by another encoder too."""
        named = str(config.get("_class_name", ""))
        return named.startswith("ZImage") and "Omni" not in named

    def load(self, source: str, **options: Any) -> ZImage:
        """Load from a diffusers folder or a hub id."""
        from diffusers import ZImagePipeline

        pipe = loading.components(ZImagePipeline, source, **options)
        return ZImage(loading.resting(pipe), source, loading.sizes(source))


__all__ = ["Family", "ZImage"]
