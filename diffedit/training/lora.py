"""Low-rank additions (LoRA) to a denoiser, and perhaps to its text encoder: a style, a subject.

The weights W of a layer stay what they are; what is trained is B A of rank r, and the layer
computes W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1). B starts at zero,
so that training starts from the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from diffedit.errors import InputError, nearest
from diffedit.training.config import LoraTraining
from diffedit.training.denoising import Latents, save_settings
from diffedit.training.files import whole_folder
from diffedit.training.kernels import quick_products
from diffedit.training.unet_task import UNetTask, must_fit

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections of a UNet, as diffusers names them."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Those of a CLIP text encoder, as transformers names them."""


class Additions(nn.Module):
    """The trainable parameters of a model, alone: what a checkpoint keeps and what is averaged.

    Shares its parameters with ``model``; loading a state changes them there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A parameter's own name must not have dots.
                self.register_parameter(name.replace(".", "/"), parameter)


def layers_of(model: nn.Module) -> list[str]:
    """The names of all linear layers and convolutions of a model."""
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def add(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> Additions:
    """Give the layers of ``model`` named in ``targets`` additions; all else is frozen.

    A target is a layer's whole name or the end of it: ``to_q`` means every layer whose name ends in
    ``.to_q``. Nothing changes until the additions are trained.

    Raises:
        InputError: a target that is no linear layer or convolution of the model.
    """
    known = layers_of(model)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            ends = {".".join(name.split(".")[-2:]) for name in known}
            ends |= {name.split(".")[-1] for name in known if not name[-1].isdigit()}
            raise InputError(
                f"no layer {target!r}{nearest(target, ends)} in the {type(model).__name__}, should"
                f" be the name of a linear layer or convolution, or its end, such as {known[-1]!r}"
            )
    model.requires_grad_(False)
    # Gaussian A and zero B, as in Hu et al. 2021, section 4.1.
    model.add_adapter(  # type: ignore[operator]
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            init_lora_weights="gaussian",
            target_modules=list(targets),
        )
    )
    quick_products(model)
    return Additions(model)


def save(folder: Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> None:
    """Write the additions as ``StableDiffusionPipeline.load_lora_weights(folder)`` reads them.

    ``pytorch_lora_weights.safetensors``; rank and alpha stand in its metadata.
    """
    given = {"unet": unet} | ({} if text_encoder is None else {"text_encoder": text_encoder})
    saved: dict[str, Any] = {}
    for name, part in given.items():
        state = get_peft_model_state_dict(part)
        # peft's own keys: diffusers' converter renames those of attention and leaves those of
        # kernels, and of such a mixture the loader drops the attention's.
        saved[f"{name}_lora_layers"] = {
            key: value.detach().cpu().contiguous() for key, value in state.items()
        }
        told = part.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
        # A set has another order in every process.
        saved[f"{name}_lora_adapter_metadata"] = {
            key: sorted(value) if isinstance(value, set) else value for key, value in told.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(folder, **saved)


class LoraTask(UNetTask[LoraTraining]):
    """Additions to the UNet, and perhaps to the text encoder, trained on the model's objective."""

    def __init__(self, training: LoraTraining, device: torch.device) -> None:
        super().__init__(training, device)
        parts = self.parts
        must_fit(training.objective, parts, training.model)
        self.latents = Latents(
            training, training.objective, parts, self.examples, embeddings=not training.text
        )
        alpha = float(training.rank if training.alpha is None else training.alpha)
        named = {"attention": ATTENTION, "all": layers_of(parts.unet)}
        targets = [name for said in training.layers for name in named.get(said, (said,))]
        modules = {"unet": add(parts.unet, targets, training.rank, alpha)}
        if training.text:
            modules["text_encoder"] = add(parts.text_encoder, TEXT_ATTENTION, training.rank, alpha)
        self.trains(modules)

    def export(self, folder: Path) -> None:
        """The additions, for ``load_lora_weights``, and what they belong to."""
        training = self.training
        about = {"train": "lora", "model": training.model, "rank": training.rank}
        with whole_folder(folder) as made:
            save(made, self.parts.unet, self.parts.text_encoder if training.text else None)
            save_settings(made, about | {"steps": training.steps, "seed": training.seed})
