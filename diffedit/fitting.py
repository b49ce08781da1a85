"""Checks what plugins gave a pass against what the pass and its model can take."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffedit.canvas import Canvas
from diffedit.contribution import Contribution, Pixels, Start, Tokens
from diffedit.errors import InputError, PluginError
from diffedit.guard import Guard
from diffedit.models.protocol import Conditioning, LatentModel

#: What stands in the hole of a masked picture, by its role. Mid-grey is 0 to an autoencoder.
HOLES = {"masked": 0.5, "blackened": 0.0}


class Fitting:
    """Tells whose fault it is where a part of a contribution does not fit.

    Args:
        canvas: of the pass.
        model: of the pass.
        items: how many pictures are made at once.
        guard: runs what plugins contributed.
    """

    def __init__(self, canvas: Canvas, model: LatentModel, items: int, guard: Guard) -> None:
        self.canvas, self.model, self.items, self.guard = canvas, model, items, guard

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one item's latents."""
        width, height = (side // self.model.cell for side in self.canvas.size)
        return self.model.channels, height, width

    def check(self, label: str, made: object) -> None:
        """Refuse what cannot be a contribution, and name whose it is."""
        if not isinstance(made, Contribution):
            raise PluginError(
                label, f"contribute returned {type(made).__name__}, not a Contribution"
            )
        width, height = self.canvas.image_size
        for name, given in (("mask", made.mask), ("alpha", made.alpha)):
            if given is None:
                continue
            mask = self.tensor(label, name, given, (1, height, width), move=False)
            if mask.device.type != "cpu":
                raise PluginError(label, f"{name} must be on the CPU, where the canvas is")
            if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise PluginError(label, f"{name} must hold floating-point values in [0, 1]")
        for part in (made.keep, *(term.weight for term in made.terms)):
            if isinstance(part, Tensor):
                self.tensor(label, "keep or weight", part, (1, *self.latent_shape[1:]), move=False)
        start: object = made.start
        if start is not None and not isinstance(start, Start):
            raise PluginError(label, f"start is {type(start).__name__}, not a Start")
        sees: object = made.sees
        known = ["mask", "hole", *HOLES]
        if not isinstance(sees, frozenset) or not sees <= set(known):
            raise PluginError(label, f"sees is {sees!r}, not a frozenset of {', '.join(known)}")
        for row in made.rows:
            if isinstance(row.latents, Pixels):
                self._check_pixels(label, row.latents)
        for value in made.channels.values():
            if isinstance(value, Pixels):
                self._check_pixels(label, value)
        for tokens in made.tokens:
            self._check_tokens(label, tokens)
        for branch in made.branches:
            prompt: object = branch.prompt
            if not isinstance(prompt, str | Conditioning):
                said = type(prompt).__name__
                raise PluginError(label, f"a branch's prompt is {said}, not a text or Conditioning")
            if branch.within is not None:
                grid = (1, *self.latent_shape[1:])
                within = self.tensor(label, "a branch's within", branch.within, grid, move=False)
                if not bool(((within >= 0) & (within <= 1)).all()):
                    raise PluginError(label, "a branch's within must hold values in [0, 1]")
        try:
            first, last = (float(edge) for edge in made.during)
        except (TypeError, ValueError):
            raise PluginError(label, f"during is {made.during!r}, not (start, end)") from None
        if not 0 <= first <= last <= 1:
            raise InputError(f"{label}: needs 0 <= start <= end <= 1, got {first:g} and {last:g}")

    def _check_pixels(self, label: str, value: Pixels) -> None:
        if not callable(value.pixels):
            self.pixels(label, value)

    def _check_tokens(self, label: str, value: object) -> None:
        if not isinstance(value, Tokens):
            raise PluginError(label, f"tokens hold {type(value).__name__}, not Tokens")
        if isinstance(value.latents, Pixels):
            if not callable(value.latents.pixels):
                self.pixels(label, value.latents, any_size=True)
        else:
            self.token_latents(label, value.latents)

    def pixels(self, owner: str, value: Pixels, any_size: bool = False) -> Tensor:
        """A contributed picture, made if it is not yet; of the working size, unless of any."""
        width, height = self.canvas.size
        made = value.pixels
        if callable(made):
            made = self.guard.call(owner, "a picture to encode", made)
        if any_size and getattr(made, "ndim", 0) == 4:
            height, width = (_multiple(side, self.model.grid) for side in made.shape[2:])
        return self.tensor(owner, "a picture to encode", made, (3, height, width), move=False)

    def token_latents(self, owner: str, value: object) -> Tensor:
        """Latents that become tokens, of any size that the denoiser can take."""
        shape = self.latent_shape
        if isinstance(value, Tensor) and value.ndim == 4:
            cells = self.model.grid // self.model.cell
            height, width = (_multiple(side, cells) for side in value.shape[2:])
            shape = (shape[0], height, width)
        return self.tensor(owner, "tokens", value, shape)

    def tensor(
        self, owner: str, what: str, value: Any, shape: tuple[int, ...], move: bool = True
    ) -> Tensor:
        """Check what a plugin gave: one for all items, or one per item; bring it to the model."""
        if not isinstance(value, Tensor):
            raise PluginError(owner, f"{what} is {type(value).__name__}, not a tensor")
        items = self.items
        if value.ndim != 4 or value.shape[1:] != shape or len(value) not in (1, items):
            raise PluginError(
                owner,
                f"{what} is {tuple(value.shape)}, not ({'1 or ' * (items > 1)}{items},"
                f" {', '.join(map(str, shape))})",
            )
        return value.to(self.model.device) if move else value


def _multiple(side: int, of: int) -> int:
    """The nearest multiple, and at least one."""
    return max(1, round(side / of)) * of
