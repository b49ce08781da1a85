"""Low-rank additions (LoRA) to a loaded model: read, checked against it, added and taken away.

A layer with weights W computes W x + s (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685,
section 4.1); s is the weight that a pass gives it. How layers compute is peft's knowledge, and
`lora_file` reads what there is.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import get_peft_kwargs, set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from diffedit.errors import ModelError
from diffedit.models import holding, lora_file
from diffedit.models.files import first_line
from diffedit.models.lora_file import Loaders
from diffedit.models.turns import turns
from diffedit.models.weights import weights_file

log = logging.getLogger(__name__)

#: What diffusers calls the file of a LoRA in a folder or repository.
USUAL = "pytorch_lora_weights.safetensors"


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
    said = lora_file.read(loaders, modules, file, **options)
    parts: dict[str, tuple[LoraConfig, Mapping[str, Tensor]]] = {}
    used = 0
    for name, module in modules.items():
        part = said.parts[name]
        fitting = _fitting(part.state, module, file)
        if not fitting:
            continue
        used += len(fitting)
        prefix = "^" if name == next(iter(modules)) else ""
        config = _config(fitting, part, prefix, file)
        where, kind = holding.where(module), holding.computing(module)
        parts[name] = config, {k: v.to(where, kind) for k, v in fitting.items()}
    if not parts or (said.denoising and next(iter(modules)) not in parts):
        why = f"none of its {said.count} weights belongs to a layer of it"
        raise lora_file.unfit(file, modules, why)
    if used < said.count:
        log.warning(
            "%s: %d of its %d weights belong to no layer of this model and do nothing",
            source,
            said.count - used,
            said.count,
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
        with turns.loading(), ExitStack() as undo:
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
            its, should = (value.numel(),), (outer,)
        if its != should:
            raise ModelError(
                f"{file}: was made for another model: for {_layer_of(key)} it has"
                f" {'x'.join(map(str, its))}, the loaded model {'x'.join(map(str, should))}"
            )
        made[key] = value
    return made


def _config(
    state: Mapping[str, Tensor], part: lora_file.Part, prefix: str, file: Path
) -> LoraConfig:
    """How peft is to make a component's additions: ranks, alphas, layers.

    Args:
        state: of the part what fits the model.
        part: what the file holds; alpha is the rank where it says none.
        prefix: of layers' names: "^" keeps one from standing for the end of a longer one.
        file: for messages.

    Raises:
        ModelError: the file says of itself what cannot be.
    """
    ups = {key: value for key, value in state.items() if key.endswith("lora_B.weight")}
    if part.told:
        # What mattered in training only; dropout would draw from the global generator.
        told = {**part.told, "lora_dropout": 0.0, "init_lora_weights": True}
        try:
            config = LoraConfig(**told)
            ranks = dict(config.rank_pattern or {})
            rank_of = {key: ranks.get(get_pattern_key(list(ranks), _layer_of(key)), config.r)
                       for key in ups}  # fmt: skip
        except (TypeError, ValueError, re.error) as error:
            said = first_line(error)
            raise ModelError(f"{file}: says of itself what peft cannot read ({said})") from error
        for key, value in ups.items():
            if (rank := rank_of[key]) != value.shape[1]:
                raise ModelError(
                    f"{file}: says that {_layer_of(key)} has the rank {rank}, and it has"
                    f" {value.shape[1]}"
                )
        return config
    made = get_peft_kwargs({f"{prefix}{k}": v.shape[1] for k, v in ups.items()}, None, state)
    if part.alphas:
        each = {
            _layer_of(key): part.alphas.get(_layer_of(key), v.shape[1]) for key, v in ups.items()
        }
        usual = Counter(each.values()).most_common(1)[0][0]
        others = {f"^{layer}": alpha for layer, alpha in each.items() if alpha != usual}
        made |= {"lora_alpha": usual, "alpha_pattern": others}
    return LoraConfig(**made)


__all__ = ["Additions", "LoRA", "components", "load_lora", "own_loras"]
