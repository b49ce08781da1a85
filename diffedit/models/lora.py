"""Low-rank additions (LoRA) to a loaded model: read, checked against it, added and taken away.

A layer with weights W computes W x + s (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685,
section 4.1); s is the weight that a pass gives it. What the layouts of files mean is diffusers'
knowledge, and how layers compute is peft's.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    get_peft_kwargs,
    set_weights_and_activate_adapters,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffedit.errors import ModelError
from diffedit.models import holding
from diffedit.models.files import first_line, header
from diffedit.models.weights import weights_file

log = logging.getLogger(__name__)

#: What diffusers calls the file of a LoRA in a folder or repository.
USUAL = "pytorch_lora_weights.safetensors"

#: Parts of keys by which a LoRA is known for a family's, the first that fits.
_MARKS = (
    ("Flux.1 or Chroma", ("single_transformer_blocks", "single_blocks")),
    ("Qwen-Image", ("img_mlp", "txt_mlp", "img_mod")),
    ("Stable Diffusion 3", ("joint_blocks", "add_q_proj", "add_k_proj", "add_v_proj")),
    ("Z-Image", (".attention.to_", "noise_refiner", "context_refiner")),
    ("Stable Diffusion XL", ("lora_te2_", "text_encoder_2.")),
)
#: The same for UNets, by the width of the text that they attend to.
_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}


class Loaders(Protocol):
    """What reads a LoRA: a pipeline class of diffusers with a LoRA loader."""

    def lora_state_dict(self, source: str, **options: Any) -> Any:
        """The additions with component and layer as keys, and what their file says besides."""


@dataclass(frozen=True, eq=False)
class LoRA:
    """Additions to a model, as peft takes them.

    Attributes:
        source: where they came from.
        parts: for each component that gets some, how they are made and what they hold.
    """

    source: str
    parts: Mapping[str, tuple[LoraConfig, Mapping[str, Tensor]]]


def components(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that additions may be for, the denoiser first."""
    found = {name: getattr(pipe, name, None) for name in type(pipe)._lora_loadable_modules}
    return {name: module for name, module in found.items() if module is not None}


def own_loras(source: str) -> dict[str, Path]:
    """A model's own LoRAs by name: the folders ``lora/<name>`` in the model's own."""
    found = sorted(Path(source).glob(f"lora/*/{USUAL}"))
    return {file.parent.name: file.parent for file in found}


@torch.inference_mode(False)  # what is read is kept, and may be used outside of it
def load_lora(
    loaders: Loaders, modules: Mapping[str, nn.Module], source: str, **options: Any
) -> LoRA:
    """Read a LoRA and hold it against the modules that it is to be added to.

    Args:
        loaders: the pipeline class whose layouts are read.
        modules: by component, the denoiser first.
        source: a ``.safetensors`` file, a folder, or a place on the hub.
        options: further arguments of `Loaders.lora_state_dict`.

    Raises:
        UnsafeWeights: it is a pickle.
        ModelError: there is none, it is no LoRA, or it is one for another model.
    """
    file = weights_file(source, USUAL)
    shapes = {name: tensor.shape for name, tensor in header(file).items()}
    _check_layout(file, shapes)
    try:
        made = loaders.lora_state_dict(str(file), return_lora_metadata=True, **options)
    except Exception as error:  # of a layout that the family's loader takes for one of its own
        raise _unfit(file, shapes, first_line(error)) from error
    state, *more, metadata = made
    alphas = (more[0] if more else None) or {}
    parts: dict[str, tuple[LoraConfig, Mapping[str, Tensor]]] = {}
    used = 0
    for name, module in modules.items():
        denoiser = name == next(iter(modules))
        own, told = _of_part(state, name), _of_part(metadata or {}, name)
        try:
            peft = _as_peft(own, module, denoiser)
        except ValueError as error:
            raise _unfit(file, shapes, first_line(error)) from error
        fitting = _fitting(peft, module, file)
        if not fitting:
            continue
        used += len(fitting)
        layers = _alphas(_of_part(alphas, name), own, peft, module)
        try:
            config = _config(fitting, told, layers, "^" if denoiser else "")
        except TypeError as error:
            said = first_line(error)
            raise ModelError(f"{file}: says of itself what peft cannot read ({said})") from error
        where, kind = holding.where(module), holding.computing(module)
        parts[name] = config, {k: v.to(where, kind) for k, v in fitting.items()}
    denoising = any(not key.startswith("text_encoder") for key in state)
    if not parts or (denoising and next(iter(modules)) not in parts):
        raise _unfit(file, shapes, f"none of its {len(state)} weights belongs to a layer of it")
    if used < len(state):
        log.warning(
            "%s: %d of its %d weights belong to no layer of this model and do nothing",
            source,
            len(state) - used,
            len(state),
        )
    return LoRA(source, parts)


class Additions:
    """The LoRAs that act on a model at present, in the order in which their sums are taken."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.acting: list[tuple[str, float]] = []

    def add(self, lora: LoRA, weight: float) -> Callable[[], None]:
        """Add one, and return what takes it away again. The last to come is the first to go."""
        name = f"diffedit{len(self.acting)}"
        with ExitStack() as undo:
            undo.callback(self._weigh)
            for part, (config, state) in lora.parts.items():
                module = self.modules[part]
                if any("magnitude" in key for key in state) and holding.holds(module):
                    raise ModelError(
                        f"{lora.source}: is a DoRA, which reads the weights of layers: some of"
                        " this model are held in eight bits or in main memory (dtype, max_memory)"
                    )
                undo.callback(_Kept(module).put_back, name)
                # peft rewrites the configuration that it is given.
                own, of = copy.deepcopy(config), dict(state)
                inject_adapter_in_model(own, module, name, low_cpu_mem_usage=True, state_dict=of)
                set_peft_model_state_dict(module, of, name, low_cpu_mem_usage=True)
                del module.peft_config  # or peft warns of the next one
                _as_computed(module, of, name)
            self.acting.append((name, weight))
            undo.callback(self.acting.pop)
            self._weigh()
            return undo.pop_all().close

    def _weigh(self) -> None:
        names, weights = [name for name, _ in self.acting], [weight for _, weight in self.acting]
        for module in self.modules.values():
            # What is active counts as trained, as in diffusers: torch multiplies by weights that
            # have gradients in another order, without any being computed.
            set_weights_and_activate_adapters(module, names, weights)


class _Kept:
    """What a module consists of before something is added to it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts = [(one, dict(one._modules)) for one in module.modules()]
        self.grads = [(one, one.requires_grad) for one in module.parameters()]
        self.layers = _layers(module)
        self.told = set(module.__dict__)

    def put_back(self, name: str) -> None:
        """Take the addition of that name away; nothing of it is left, in no attribute either."""
        for layer in self.layers:
            layer.delete_adapter(name)
        for one, parts in self.parts:
            if one._modules != parts:
                one._modules.clear()
                one._modules.update(parts)
        for parameter, grad in self.grads:
            parameter.requires_grad_(grad)
        for key in set(self.module.__dict__) - self.told:
            del self.module.__dict__[key]


def _as_computed(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Give additions the type computed in; peft gives that of weights, which may be narrower."""
    for key, value in state.items():
        layer, _, rest = key.rpartition(".lora_")
        matrix, _, what = rest.partition(".")
        if what and matrix in ("A", "B"):
            addition = module.get_submodule(f"{layer}.lora_{matrix}.{name}")
            made = getattr(addition, what)
            if made.dtype != value.dtype:
                setattr(addition, what, nn.Parameter(value, requires_grad=made.requires_grad))


def _layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [one for one in module.modules() if isinstance(one, BaseTunerLayer)]


# --- reading --------------------------------------------------------------------------------------


def _as_peft(state: dict[str, Tensor], module: nn.Module, denoiser: bool) -> dict[str, Tensor]:
    """One component's additions with peft's names for their matrices."""
    if not state:
        return state
    if denoiser:
        peft = "lora_A" in next(iter(state))
        return state if peft else convert_unet_state_dict_to_peft(state)
    state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return {_flat(key, module): value for key, value in state.items()}


def _flat(key: str, module: nn.Module) -> str:
    """A text encoder's key as its layers are called: transformers 5 took a level out."""
    return key if hasattr(module, "text_model") else key.removeprefix("text_model.")


def _of_part(said: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What is said of a component, by names within it."""
    start = f"{part}."
    return {key.removeprefix(start): v for key, v in said.items() if key.startswith(start)}


def _layer_of(key: str) -> str:
    return key.split(".lora_")[0]


def _fitting(state: Mapping[str, Tensor], module: nn.Module, file: Path) -> dict[str, Tensor]:
    """Those of some additions whose layers the module has.

    Raises:
        ModelError: a layer has another shape.
    """
    layers = dict(module.named_modules())
    made = {}
    for key, value in state.items():
        layer = layers.get(_layer_of(key))
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
            continue
        outer, *rest = holding.unpacked(layer.weight)
        inner = tuple(rest)
        if key.endswith("lora_A.weight"):
            if _layer_of(key) == "x_embedder" and value.ndim == 2 and value.shape[1] < inner[0]:
                # Trained on a model that sees latents alone, which come first.
                value = torch.nn.functional.pad(value, (0, inner[0] - value.shape[1]))
            its, should = tuple(value.shape[1:]), inner
        elif key.endswith("lora_B.weight"):
            its, should = (value.shape[0],), (outer,)
        else:  # a bias, or the magnitudes of DoRA
            its = should = ()
        if its != should:
            raise ModelError(
                f"{file}: was made for another model: for {_layer_of(key)} it has"
                f" {'x'.join(map(str, its))}, the loaded model {'x'.join(map(str, should))}"
            )
        made[key] = value
    return made


def _config(
    state: Mapping[str, Tensor], told: Mapping[str, Any], alphas: Mapping[str, float], prefix: str
) -> LoraConfig:
    """How peft is to make a component's additions: ranks, alphas, layers.

    Args:
        state: the additions by peft's names.
        told: what a file says of it in its metadata.
        alphas: else, by layer; alpha is the rank where nobody says it.
        prefix: of layers' names: "^" keeps one from standing for the end of a longer one.
    """
    if told:
        # What mattered in training only; dropout would draw from the global generator.
        return LoraConfig(**{**told, "lora_dropout": 0.0, "init_lora_weights": True})
    ups = {key: value for key, value in state.items() if key.endswith("lora_B.weight")}
    ranks = {f"{prefix}{key}": value.shape[1] for key, value in ups.items()}
    made = get_peft_kwargs(ranks, None, state)
    if alphas:
        each = {_layer_of(key): alphas.get(_layer_of(key), v.shape[1]) for key, v in ups.items()}
        usual = Counter(each.values()).most_common(1)[0][0]
        others = {f"^{layer}": alpha for layer, alpha in each.items() if alpha != usual}
        made |= {"lora_alpha": usual, "alpha_pattern": others}
    return LoraConfig(**made)


def _alphas(
    said: Mapping[str, Any],
    own: Mapping[str, Tensor],
    peft: Mapping[str, Tensor],
    module: nn.Module,
) -> dict[str, float]:
    """Alphas by layer, which files say by their own names of matrices.

    diffusers itself goes by those names, and so gives all attention of a UNet and of a text encoder
    the most frequent alpha.
    """
    names = {id(value): key for key, value in peft.items()}
    made = {}
    for key, alpha in said.items():
        matrix = key.removesuffix(".alpha")
        known = names.get(id(own[matrix])) if matrix in own else None
        made[_layer_of(known) if known else _flat(matrix, module)] = float(alpha)
    return made


# --- refusing -------------------------------------------------------------------------------------


def _check_layout(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for mark, name in (("hada_", "LoHa"), ("lokr_", "LoKr"), ("lora_controlnet", "Control-LoRA")):
        if any(mark in key for key in shapes):
            raise ModelError(f"{file}: holds additions of the kind {name}; only LoRA is supported")
    if not any("lora" in key for key in shapes):
        raise ModelError(
            f"{file}: no LoRA: none of its {len(shapes)} tensors is called lora, such as"
            f" {next(iter(shapes), 'none')!r}"
        )


def _unfit(file: Path, shapes: Mapping[str, tuple[int, ...]], why: str) -> ModelError:
    """The refusal of a LoRA for another family."""
    seems = _seems(shapes)
    said = f"it seems to be for {seems}" if seems else "it is for another model"
    return ModelError(f"{file}: does not fit the loaded model ({why}); {said}")


def _seems(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The family that a LoRA was made for, by its file's keys; None: nobody knows."""
    for family, marks in _MARKS:
        if any(mark in key for key in shapes for mark in marks):
            return family
    for key, shape in shapes.items():
        crosses = "attn2" in key and ("to_k" in key or "to_v" in key)
        if crosses and ("lora_down" in key or "lora_A" in key or "lora.down" in key):
            return _WIDTHS.get(shape[1])
    return None


__all__ = ["Additions", "LoRA", "components", "load_lora", "own_loras"]
