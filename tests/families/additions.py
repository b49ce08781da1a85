"""Random LoRAs for the tiny models, in the layouts that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

#: Ends of the names of layers that additions are trained for, as a rule.
USUAL = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "fc1")
#: Tiny Stable Diffusion XL's blocks by the numbers that its original layout gives them.
NUMBERED = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The components that its pipeline loads additions for, the denoiser first."""
    names = type(pipe)._lora_loadable_modules
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def additions(
    pipe: Any,
    seed: int = 0,
    rank: int = 4,
    parts: tuple[str, ...] | None = None,
    ends: tuple[str, ...] = USUAL,
) -> dict[str, Tensor]:
    """Random A and B for its layers, ``component.layer.lora_A.weight``, large enough to act."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for part, module in parts_of(pipe).items():
        for name, layer in module.named_modules():
            fits = isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ends)
            if not fits or (parts is not None and part not in parts):
                continue
            shape: Any = layer.weight.shape
            a, b = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
            made[f"{part}.{name}.lora_A.weight"] = torch.randn(a, generator=rng) * 0.2
            made[f"{part}.{name}.lora_B.weight"] = torch.randn(b, generator=rng) * 0.2
    assert made
    return made


def kohya(
    given: Mapping[str, Tensor], alpha: Callable[[int], float] = lambda index: 2.0, xl: bool = False
) -> dict[str, Tensor]:
    """The same in the layout of Kohya's scripts, with an alpha for each layer.

    Args:
        alpha: of the layers in order.
        xl: whether blocks and text encoders are named as of Stable Diffusion XL.
    """
    heads = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te"}
    heads["text_encoder_2"] = "lora_te2"
    made = {}
    for index, key in enumerate(key for key in given if ".lora_A." in key):
        part, _, name = key.removesuffix(".lora_A.weight").partition(".")
        if part != "unet":
            name = f"text_model.{name.removeprefix('text_model.')}"
        flat = name.replace(".", "_")
        for usual, numbered in NUMBERED.items() if xl else ():
            flat = flat.replace(usual, numbered)
        made[f"{heads[part]}_{flat}.lora_down.weight"] = given[key]
        made[f"{heads[part]}_{flat}.lora_up.weight"] = given[key.replace("lora_A", "lora_B")]
        made[f"{heads[part]}_{flat}.alpha"] = torch.tensor(alpha(index))
    return made


def written(file: Path, state: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Write a state dict, and give its name as an edit takes it."""
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata)
    return str(file)
