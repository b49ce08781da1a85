"""Muon for matrices and convolution kernels, AdamW for everything else, one learning-rate shape."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.training.config import Optimiser
from diffedit.training.precision import multiplies_bf16
from diffedit.training.threads import in_parallel, shares

_STACK = 4
"""Matrices of one shape that are orthogonalised in one go."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    ``torch.optim.Muon`` takes matrices only; this one flattens a kernel (out, in, h, w) to
    (out, in·h·w). The update is scaled by 0.2·sqrt(max(rows, columns)), which gives it AdamW's
    root mean square, so that learning rates carry over (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                buffer: Tensor = state["momentum"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                nesterov = param.grad.lerp(buffer, group["momentum"])
                matrix = nesterov.reshape(len(param), -1)
                by_shape.setdefault(matrix.shape, []).append((param, matrix))
            stacks = [
                members[first : first + _STACK]
                for members in by_shape.values()
                for first in range(0, len(members), _STACK)
            ]
            matrices = (torch.stack([matrix for _, matrix in stack]) for stack in stacks)
            for stack, updates in zip(stacks, in_parallel(orthogonalise, matrices), strict=True):
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for (param, _), update in zip(stack, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.reshape(param.shape), alpha=-group["lr"] * scale)


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: (n, rows, columns) -> the same, float32.

    Newton-Schulz with the quintic coefficients of Jordan et al.; singular values end in about
    [0.7, 1.2]. Works in bfloat16, for which it was made, where the device multiplies it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    made: Tensor = (x.mT if tall else x).float()
    return made


class ParallelAdamW(torch.optim.AdamW):
    """AdamW of which each core updates a share of the parameters."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        dealt = [shares(group["params"], Tensor.numel) for group in self.param_groups]
        parts = []
        for groups in zip(*dealt, strict=True):
            part = copy.copy(self)  # with the same state
            part.param_groups = [
                {**group, "params": some}
                for group, some in zip(self.param_groups, groups, strict=True)
            ]
            parts.append(part)
        in_parallel(torch.optim.AdamW.step, parts)


def adamw(params: Sequence[nn.Parameter], rate: float, **options: Any) -> torch.optim.AdamW:
    """AdamW as it is fastest where the parameters are."""
    if all(param.device.type == "cpu" for param in params):
        # One pass over the weights instead of a dozen. On CUDA torch's default is as fast.
        return ParallelAdamW(params, lr=rate, fused=True, **options)
    return torch.optim.AdamW(params, lr=rate, **options)


def optimizers(modules: Iterable[nn.Module], how: Optimiser) -> list[torch.optim.Optimizer]:
    """AdamW over what is trainable; with ``muon``, Muon over all hidden weights of it.

    Embeddings and a model's first and last layers (three or four channels wide) are no hidden
    matrices: their rows are features of their own, so AdamW takes them.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        for param in module.parameters():
            if not param.requires_grad:
                continue
            hidden = param.ndim >= 2 and min(len(param), param.shape[1]) >= 8
            hidden = hidden and how.name == "muon" and id(param) not in embeddings
            (matrices if hidden else others).append(param)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices, lr=how.muon_rate))
    if others:
        made.append(adamw(others, how.rate, betas=(0.9, 0.98), weight_decay=how.weight_decay))
    return made


def lr_factor(step: int, steps: int, warmup: int = 40, decay: float = 0.25) -> float:
    """Warm-up, plateau, straight line to zero over the last ``decay`` share of the run.

    A run may be lengthened while it stands on the plateau without having been in vain.
    """
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return rise * max(fall, 0.0)
