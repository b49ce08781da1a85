"""Networks in the layouts of those who made them: the inverse of what diffusers reads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import single_file_model, single_file_utils
from torch import Tensor

State = dict[str, Tensor]


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str = "") -> State:
    """With every pattern in a name replaced."""
    made = {}
    for name, tensor in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        made[prefix + name] = tensor
    return made


def joined(state: State, parts: Callable[[str], list[str] | None]) -> State:
    """With rows that lie in several tensors in one; `parts` names them for the first of them."""
    left, made = dict(state), {}
    for name in state:
        if name in left and (names := parts(name)):
            made[name] = torch.cat([left.pop(one) for one in names])
    return {**left, **made}


def swapped(state: State, *names: str) -> State:
    """Scale and shift in the other order."""
    for name in names:
        first, second = state[name].chunk(2)
        state[name] = torch.cat([second, first])
    return state


def _qkv(name: str) -> list[str] | None:
    for own in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        if f".{own[0]}." in name:
            return [name.replace(own[0], one) for one in own]
    return None


def sd3(transformer: Any) -> State:
    """The transformer of Stable Diffusion 3."""
    last = transformer.config.num_layers - 1
    out = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    state = swapped(
        transformer.state_dict(), *(f"{one}.{kind}" for one in out for kind in ("weight", "bias"))
    )
    names = {
        r"^pos_embed\.pos_embed": "pos_embed",
        r"^pos_embed\.proj": "x_embedder.proj",
        r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
        r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
        r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
        r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
        r"^transformer_blocks\.(\d+)\.": r"joint_blocks.\1.",
        r"\.attn\.(add_q_proj)": r".context_block.attn.qkv",
        r"\.attn\.norm_added_(q|k)": r".context_block.attn.ln_\1",
        r"\.attn\.to_add_out": ".context_block.attn.proj",
        r"\.(attn2?)\.to_q": r".x_block.\1.qkv",
        r"\.(attn2?)\.norm_(q|k)": r".x_block.\1.ln_\2",
        r"\.(attn2?)\.to_out\.0": r".x_block.\1.proj",
        r"\.norm1\.linear": ".x_block.adaLN_modulation.1",
        r"\.norm1_context\.linear": ".context_block.adaLN_modulation.1",
        r"\.ff\.net\.0\.proj": ".x_block.mlp.fc1",
        r"\.ff\.net\.2": ".x_block.mlp.fc2",
        r"\.ff_context\.net\.0\.proj": ".context_block.mlp.fc1",
        r"\.ff_context\.net\.2": ".context_block.mlp.fc2",
        r"^proj_out": "final_layer.linear",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    }
    return renamed(joined(state, _qkv), names, "model.diffusion_model.")


def flux(transformer: Any) -> State:
    """The transformer of Flux.1."""

    def rows(name: str) -> list[str] | None:
        if found := _qkv(name):
            mlp = re.sub(r"attn\.to_q", "proj_mlp", name)
            return [*found, mlp] if name.startswith("single") else found
        return None

    state = swapped(transformer.state_dict(), "norm_out.linear.weight", "norm_out.linear.bias")
    stage = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
    names = {
        rf"^time_text_embed\.{theirs}_embedder\.linear_{n}": f"{own}.{place}_layer"
        for theirs, own in stage.items()
        for n, place in ((1, "in"), (2, "out"))
    }
    names |= {
        r"^context_embedder": "txt_in",
        r"^x_embedder": "img_in",
        r"^proj_out": "final_layer.linear",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
        r"^single_transformer_blocks\.(\d+)\.attn\.to_q": r"single_blocks.\1.linear1",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight":
            r"single_blocks.\1.norm.query_norm.scale",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight":
            r"single_blocks.\1.norm.key_norm.scale",
        r"^single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
        r"^transformer_blocks\.(\d+)\.": r"double_blocks.\1.",
        r"\.norm1\.linear": ".img_mod.lin",
        r"\.norm1_context\.linear": ".txt_mod.lin",
        r"\.attn\.add_q_proj": ".txt_attn.qkv",
        r"\.attn\.to_q": ".img_attn.qkv",
        r"\.attn\.norm_q\.weight": ".img_attn.norm.query_norm.scale",
        r"\.attn\.norm_k\.weight": ".img_attn.norm.key_norm.scale",
        r"\.attn\.norm_added_q\.weight": ".txt_attn.norm.query_norm.scale",
        r"\.attn\.norm_added_k\.weight": ".txt_attn.norm.key_norm.scale",
        r"\.attn\.to_out\.0": ".img_attn.proj",
        r"\.attn\.to_add_out": ".txt_attn.proj",
        r"\.ff\.net\.0\.proj": ".img_mlp.0",
        r"\.ff\.net\.2": ".img_mlp.2",
        r"\.ff_context\.net\.0\.proj": ".txt_mlp.0",
        r"\.ff_context\.net\.2": ".txt_mlp.2",
    }  # fmt: skip
    return renamed(joined(state, rows), names)


def autoencoder(vae: Any, prefix: str = "first_stage_model.") -> State:
    """An autoencoder of Stable Diffusion or Flux."""
    last = len(vae.config.block_out_channels) - 1

    def up(found: re.Match[str]) -> str:
        return f"decoder.up.{last - int(found[1])}."

    state = {
        re.sub(r"decoder\.up_blocks\.(\d+)\.", up, name): tensor
        for name, tensor in vae.state_dict().items()
    }
    attention = r"(mid_block\.attentions\.0\.)"
    names = {
        r"encoder\.down_blocks\.": "encoder.down.",
        r"(down|up)\.(\d+)\.resnets\.": r"\1.\2.block.",
        r"downsamplers\.0": "downsample",
        r"upsamplers\.0": "upsample",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        rf"{attention}group_norm": r"\1norm",
        rf"{attention}to_(q|k|v)": r"\1\2",
        rf"{attention}to_out\.0": r"\1proj_out",
        r"mid_block\.attentions\.0": "mid.attn_1",
        r"conv_norm_out": "norm_out",
        r"conv_shortcut": "nin_shortcut",
    }
    return renamed(state, names, prefix)


def kernels(state: State) -> State:
    """An autoencoder whose attention is of 1x1 kernels, as Stable Diffusion's files have it."""
    ends = ("q.weight", "k.weight", "v.weight", "proj_out.weight")
    return {
        name: tensor[..., None, None] if "attn_1" in name and name.endswith(ends) else tensor
        for name, tensor in state.items()
    }


def clip(encoder: Any, prefix: str) -> State:
    """A CLIP text encoder as transformers of that time had it: Stable Diffusion 1, XL's first."""
    inner = "" if hasattr(encoder, "text_model") else "text_model."
    return {f"{prefix}{inner}{key}": value for key, value in encoder.state_dict().items()}


def open_clip(encoder: Any, prefix: str) -> State:
    """A text encoder as OpenCLIP has it: Stable Diffusion 2, XL's second."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    # Rows of what no encoder of Stable Diffusion 2 has, which its files hold all the same.
    width = encoder.config.hidden_size
    projection = state.pop("text_projection.weight", torch.full((width, width), 0.5))

    def rows(name: str) -> list[str] | None:
        if ".self_attn.q_proj." not in name:
            return None
        return [name.replace("q_proj", one) for one in ("q_proj", "k_proj", "v_proj")]

    names = {
        r"^embeddings\.token_embedding": "token_embedding",
        r"^embeddings\.position_embedding\.weight": "positional_embedding",
        r"^final_layer_norm": "ln_final",
        r"^encoder\.layers\.(\d+)\.": r"transformer.resblocks.\1.",
        r"\.layer_norm(\d)": r".ln_\1",
        r"\.self_attn\.q_proj\.(weight|bias)": r".attn.in_proj_\1",
        r"\.self_attn\.out_proj": ".attn.out_proj",
        r"\.mlp\.fc1": ".mlp.c_fc",
        r"\.mlp\.fc2": ".mlp.c_proj",
    }
    made = renamed(joined(state, rows), names, prefix)
    return {**made, f"{prefix}text_projection": projection.T}


def text_encoders(**encoders: Any) -> State:
    """Text encoders as Stable Diffusion 3 and Flux have them: ``clip_l``, ``clip_g``, ``t5xxl``."""
    made: State = {}
    for name, encoder in encoders.items():
        bare = name.startswith("clip") and not hasattr(encoder, "text_model")
        inner = "transformer.text_model." if bare else "transformer."
        state = {f"{inner}{key}": tensor for key, tensor in encoder.state_dict().items()}
        made |= {f"text_encoders.{name}.{key}": tensor for key, tensor in state.items()}
    return made


def sampled(pipe: Any) -> Tensor:
    """Latents of two steps by a pipeline of diffusers', ``(1, c, 8, 8)``."""
    made: Tensor = pipe(
        "a red circle",
        height=64,
        width=64,
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images
    if hasattr(pipe, "_unpack_latents"):
        made = pipe._unpack_latents(made, 64, 64, pipe.vae_scale_factor)
    return made


@contextmanager
def narrow_flux(width: int) -> Iterator[None]:
    """While inside, diffusers reads files of a Flux of another width than 3072, which it fixes."""
    name = "convert_flux_transformer_checkpoint_to_diffusers"
    text = inspect.getsource(getattr(single_file_utils, name))
    assert "inner_dim = 3072" in text
    made: dict[str, Any] = {}
    text = text.replace("inner_dim = 3072", f"inner_dim = {width}")
    exec(text, {**vars(single_file_utils)}, made)
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    before = known["checkpoint_mapping_fn"]
    known["checkpoint_mapping_fn"] = made[name]
    try:
        yield
    finally:
        known["checkpoint_mapping_fn"] = before
