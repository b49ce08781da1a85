"""Style transfer by attention shared with a reference picture; needs no weights of its own.

Hertz et al. 2024, "Style Aligned Image Generation via Shared Attention" (arXiv:2312.02133): the
reference is denoised beside the picture, and in self-attention the picture's queries and keys take
on the reference's statistics (AdaIN, Huang & Belongie 2017, arXiv:1703.06868) and look at the
reference's keys and values besides their own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffedit import QKV, Contribution, Edit, ImageField, Pixels, Row, Run, Site, Windowed, hookimpl


class Style(Windowed):
    """Give the picture the look of a reference: its colours, its texture, its way of drawing."""

    name: ClassVar[str] = "style"
    version: ClassVar[str] = "1.0.0"
    needs: ClassVar[frozenset[str]] = frozenset({"shared_attention"})

    image: ImageField = Field(description="The reference whose look is taken")
    strength: float = Field(
        1.0,
        ge=0,
        le=2,
        description="How much of the look is taken; 0 takes nothing, above 1 favours the reference",
        json_schema_extra={"step": 0.05},
    )
    prompt: str = Field(
        "",
        description="What the reference shows; describing it keeps its things out of the picture",
        max_length=2000,
        json_schema_extra={"advanced": True},
    )

    def contribute(self, run: Run) -> Contribution:
        """A reference row, and an attention term that looks at it."""
        if self.strength == 0:
            return Contribution()
        # The reference is a picture of its own: it is fitted to the working size, not cropped to
        # the region. Its name follows its pixels, so its noise does not depend on its neighbours.
        width, height = run.canvas.size
        fitted = cover(self.image.picture.rgb(), width, height)
        row = Row(self.image.digest[:16], Pixels(fitted), prompt=self.prompt)
        reference = f"{self.scope}/{row.name}"

        def attention(qkv: QKV, site: Site) -> QKV:
            return qkv if site.cross else shared(qkv, site, reference, self.strength)

        return Contribution(rows=(row,), attention=attention, during=self.during)


def cover(rgb: object, width: int, height: int) -> Tensor:
    """Scale a picture ``(h, w, 3)`` in [0, 1] to cover a size, and cut its middle out.

    Returns:
        ``(1, 3, height, width)`` in [0, 1].
    """
    pixels = torch.as_tensor(rgb).permute(2, 0, 1)[None]
    scale = max(width / pixels.shape[-1], height / pixels.shape[-2])
    size = max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale))
    scaled = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[..., top : top + height, left : left + width].clamp(0, 1).contiguous()


def shared(qkv: QKV, site: Site, reference: str, strength: float) -> QKV:
    """Self-attention that also looks at a reference's row.

    Args:
        qkv: all rows, ``(rows, heads, tokens, d)``.
        site: where, and which row is what.
        reference: the reference's name.
        strength: up to 1, how far queries and keys take on the reference's statistics; its
            logarithm is added to the scores of the reference's keys, so that their weight in the
            softmax scales with it and 0 is no change.
    """
    beside = site.rows.index_beside(reference, qkv.q.device)
    tokens = qkv.q.shape[2]
    own = qkv.k[:, :, :tokens]  # an earlier term may have appended other references' keys
    k, v = qkv.of_rows(own, beside), qkv.v[beside][:, :, :tokens]
    amount = min(strength, 1.0)
    canvas = site.rows.is_canvas(k.device)[:, None, None, None]

    def alike(x: Tensor) -> Tensor:  # statistics are of what tokens say, not of where they are
        said = qkv.unplaced(x)
        return torch.where(
            canvas, qkv.placed(torch.lerp(said, adain(said, said[beside]), amount)), x
        )

    q, keys = alike(qkv.q), alike(own)
    keys = torch.cat([keys, qkv.k[:, :, tokens:]], dim=2)
    # References look at themselves only.
    bias = torch.where(canvas, math.log(strength), -math.inf).to(k).expand(-1, -1, -1, tokens)
    return replace(qkv, q=q, k=keys).appended(k, v, bias)


def adain(x: Tensor, like: Tensor) -> Tensor:
    """Give `x` the mean and the standard deviation of `like`, per channel over the tokens.

    Both ``(rows, heads, tokens, d)``.
    """
    mean, std = x.mean(2, keepdim=True), (x.var(2, keepdim=True) + 1e-5).sqrt()
    to_mean, to_std = like.mean(2, keepdim=True), (like.var(2, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / std * to_std + to_mean


@hookimpl
def register_edits() -> list[type[Edit]]:
    """The edit of this plugin."""
    return [Style]
