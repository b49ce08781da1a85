"""What a run leaves: pictures, latents, and an account of how they came about."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit.images import Picture, save_picture

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import PIL.Image
    from torch import Tensor

    from diffedit.workflow import Workflow


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a run.

    Attributes:
        pictures: one per seed, in the source's own type: dtype, channels, alpha, ICC profile.
        latents: of the last pass that sampled, before decoding, ``(b, c, h, w)`` over its working
            region; None when none did.
        seeds: one per picture.
        workflow: what was run.
        passes: for each pass the order of its edits, the calls made, the region and the timings.
        model: what the model says of itself.
        source: the picture that was edited; None when the result was made from nothing.
        resources: the heavy parts (control networks, detectors) that the editor had loaded.
        handover: what another run goes on from, where the last pass stopped early.
    """

    pictures: tuple[Picture, ...]
    latents: Tensor | None
    seeds: tuple[int, ...]
    workflow: Workflow
    passes: tuple[dict[str, Any], ...]
    model: dict[str, Any] = field(repr=False)
    source: Picture | None = field(default=None, repr=False)
    resources: tuple[str, ...] = ()
    handover: Any = field(default=None, repr=False)

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The pictures for Pillow. 16-bit RGB becomes 8-bit there; `pixels` does not."""
        return [picture.to_pil() for picture in self.pictures]

    @property
    def image(self) -> PIL.Image.Image:
        """The first picture for Pillow."""
        return self.pictures[0].to_pil()

    @property
    def pixels(self) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """The first picture as the truth: ``(h, w)`` or ``(h, w, c)`` in the source's dtype."""
        return self.pictures[0].pixels

    @property
    def timings(self) -> list[dict[str, float]]:
        """Seconds per phase, for each pass."""
        return [dict(one["timings"]) for one in self.passes]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What made the result, JSON-ready: versions, model, workflow, seeds, passes as run."""
        import diffusers
        import torch

        import diffedit

        return {
            "diffedit": diffedit.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "model": self.model,
            "workflow": self.workflow.model_dump(mode="json"),
            "seeds": list(self.seeds),
            "source": None if self.source is None else self.source.digest,
            "passes": list(self.passes),
            "resources": list(self.resources),
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> list[Path]:
        """Write the picture, or one file per seed (``out-7.png``) when there are several.

        A file is complete or absent. JPEG says in a warning that it loses the exactness of
        everything outside the mask.

        Raises:
            OutputError: the path is one of the inputs, exists while `overwrite` is false, or cannot
                hold these pixels.
        """
        target = Path(path)
        inputs = input_paths(self.source, self.workflow)
        if len(self.pictures) == 1:
            targets = [target]
        else:
            targets = [target.with_stem(f"{target.stem}-{seed}") for seed in self.seeds]
        return [
            save_picture(picture, one, overwrite=overwrite, inputs=inputs)
            for picture, one in zip(self.pictures, targets, strict=True)
        ]

    def _repr_png_(self) -> bytes:
        """Let a notebook show the first picture."""
        data = io.BytesIO()
        self.image.save(data, "PNG")
        return data.getvalue()


def input_paths(source: Picture | None, workflow: Workflow) -> Sequence[Path]:
    """The files a run reads, which it therefore never writes to."""
    found = [] if source is None or source.path is None else [source.path]
    return [*found, *workflow.files()]
