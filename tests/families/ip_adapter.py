"""Tiny IP-Adapters with random weights, on disk as those that people have are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, HIDDEN, PROJECTED = 32, 32, 16
#: Tokens that the picture becomes, by kind.
TOKENS = {"plain": 4, "plus": 5, "full": 17}


def write(folder: Path, unet: Any, kind: str = "plain", seed: int = 0) -> Path:
    """Write an adapter for a UNet, and its image encoder beside it; returns the adapter's file.

    Args:
        kind: "plain" (of the whole picture), "plus" (of patches, by a resampler) or "full".
    """
    width = unet.config.cross_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = {f"image_proj.{k}": v for k, v in _projection(kind, width).items()}
        cross = [n for n in unet.attn_processors if not n.endswith("attn1.processor")]
        for number, name in enumerate(cross):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in "kv":
                key = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
                weights[key] = 0.3 * torch.randn(inner, width)
        encoder = _encoder()
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(folder / "image_encoder")
    file = folder / f"ip-adapter-{kind}.safetensors"
    _save(weights, file)
    return file


def write_for_flux(folder: Path, transformer: Any, seed: int = 0, theirs: bool = True) -> Path:
    """Write an adapter for a Flux, in XLabs' names or in those of diffusers; returns its file."""
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    projection = "ip_adapter_proj_model" if theirs else "image_proj"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = {f"{projection}.{k}": v for k, v in _projection("plain", width).items()}
        for number in range(transformer.config.num_layers):
            for part in "kv":
                name = f"ip_adapter.{number}.to_{part}_ip"
                if theirs:
                    block = f"double_blocks.{number}.processor"
                    name = f"{block}.ip_adapter_double_stream_{part}_proj"
                weights[f"{name}.weight"] = 0.3 * torch.randn(inner, width)
                weights[f"{name}.bias"] = 0.3 * torch.randn(inner)
        encoder = _encoder()
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(folder / "image_encoder")
    file = folder / "ip-adapter.safetensors"
    _save(weights, file)
    return file


def _encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
            projection_dim=PROJECTED,
        )
    )


def _save(weights: dict[str, Tensor], file: Path) -> None:
    """Write weights so that the first lies at a multiple of 64 bytes when the file is mapped.

    diffusers computes with some weights where they are mapped, and with others where they were
    copied to. On an AMD processor what MKL adds up depends on that, by 1e-6.
    """
    made = {key: value.contiguous() for key, value in weights.items()}
    save_file(made, file, {"padding": ""})
    begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # a multiple of 8
    save_file(made, file, {"padding": "x" * (-begin % 64)})


def _projection(kind: str, width: int) -> dict[str, Tensor]:
    if kind == "plain":
        return _named({"proj": nn.Linear(PROJECTED, 4 * width), "norm": nn.LayerNorm(width)})
    if kind == "full":
        return _named(
            {
                "proj.0": nn.Linear(HIDDEN, HIDDEN),
                "proj.2": nn.Linear(HIDDEN, width),
                "proj.3": nn.LayerNorm(width),
            }
        )
    inner = 64  # files are taken to have heads of 64
    parts: dict[str, nn.Module] = {
        "proj_in": nn.Linear(HIDDEN, inner),
        "proj_out": nn.Linear(inner, width),
        "norm_out": nn.LayerNorm(width),
    }
    for layer in range(4):
        attention, feed = f"layers.{layer}.0", f"layers.{layer}.1"
        parts |= {
            f"{attention}.norm1": nn.LayerNorm(inner),
            f"{attention}.norm2": nn.LayerNorm(inner),
            f"{attention}.to_q": nn.Linear(inner, inner, bias=False),
            f"{attention}.to_kv": nn.Linear(inner, 2 * inner, bias=False),
            f"{attention}.to_out": nn.Linear(inner, inner, bias=False),
            f"{feed}.0": nn.LayerNorm(inner),
            f"{feed}.1": nn.Linear(inner, 4 * inner, bias=False),
            f"{feed}.3": nn.Linear(4 * inner, inner, bias=False),
        }
    return _named(parts) | {"latents": torch.randn(1, TOKENS["plus"], inner)}


def _named(parts: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
