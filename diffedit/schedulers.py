"""Samplers by name: which scheduler of diffusers each means, and whether it fits a model."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from diffedit.errors import SchedulerError, nearest
from diffedit.schedule import Schedule, prediction_type

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

__all__ = [
    "SCHEDULERS",
    "SchedulerInfo",
    "build",
    "dynamic_shift",
    "named",
    "usable",
]


@dataclass(frozen=True)
class SchedulerInfo:
    """What a named scheduler is and can do.

    Attributes:
        name: short and stable; what a workflow file says.
        cls: name of the class in diffusers.
        options: constructor arguments that make the name mean one thing, whatever the model's own
            scheduler is configured to.
        order: order of accuracy of the solver (of its deterministic part, if stochastic).
        calls: model calls per step (the last step of a two-call solver takes one).
        stochastic: draws noise at each step.
        add_noise: can start inside the schedule, as img2img and inpaint do.
        flow: name of the class in diffusers for models trained as rectified flows; None: it is not
            for them.
    """

    name: str
    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)
    order: int = 1
    calls: int = 1
    stochastic: bool = False
    add_noise: bool = True
    flow: str | None = None


_MULTISTEP = "DPMSolverMultistepScheduler"
_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
_DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = _DPMPP | {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_BETA = {"use_beta_sigmas": True}

SCHEDULERS: Mapping[str, SchedulerInfo] = {
    info.name: info
    for info in (
        SchedulerInfo("ddim", "DDIMScheduler"),
        SchedulerInfo("ddpm", "DDPMScheduler", stochastic=True),
        SchedulerInfo("deis", "DEISMultistepScheduler",
                      {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"}, 2),
        SchedulerInfo("dpm2", "KDPM2DiscreteScheduler", order=2, calls=2),
        SchedulerInfo("dpm2_a", "KDPM2AncestralDiscreteScheduler", order=2, calls=2,
                      stochastic=True),
        SchedulerInfo("dpmpp_2m", _MULTISTEP, _DPMPP, 2, flow=_MULTISTEP),
        SchedulerInfo("dpmpp_2m_beta", _MULTISTEP, _DPMPP | _BETA, 2),
        SchedulerInfo("dpmpp_2m_exponential", _MULTISTEP, _DPMPP | _EXPONENTIAL, 2),
        SchedulerInfo("dpmpp_2m_karras", _MULTISTEP, _DPMPP | _KARRAS, 2),
        SchedulerInfo("dpmpp_2m_sde", _MULTISTEP, _SDE, 2, stochastic=True, flow=_MULTISTEP),
        SchedulerInfo("dpmpp_2m_sde_karras", _MULTISTEP, _SDE | _KARRAS, 2, stochastic=True),
        SchedulerInfo("dpmpp_sde", "DPMSolverSDEScheduler", order=2, calls=2, stochastic=True),
        SchedulerInfo("dpmpp_sde_karras", "DPMSolverSDEScheduler", _KARRAS, 2, 2, stochastic=True),
        SchedulerInfo("euler", "EulerDiscreteScheduler", flow=_FLOW_EULER),
        SchedulerInfo("euler_a", "EulerAncestralDiscreteScheduler", stochastic=True),
        SchedulerInfo("euler_beta", "EulerDiscreteScheduler", _BETA, flow=_FLOW_EULER),
        SchedulerInfo("euler_exponential", "EulerDiscreteScheduler", _EXPONENTIAL,
                      flow=_FLOW_EULER),
        SchedulerInfo("euler_karras", "EulerDiscreteScheduler", _KARRAS, flow=_FLOW_EULER),
        SchedulerInfo("heun", "HeunDiscreteScheduler", order=2, calls=2,
                      flow="FlowMatchHeunDiscreteScheduler"),
        SchedulerInfo("lcm", "LCMScheduler", stochastic=True, flow="FlowMatchLCMScheduler"),
        SchedulerInfo("lms", "LMSDiscreteScheduler", order=4),
        SchedulerInfo("plms", "PNDMScheduler", {"skip_prk_steps": True}, 4),
        SchedulerInfo("tcd", "TCDScheduler", stochastic=True),
        SchedulerInfo("unipc", "UniPCMultistepScheduler",
                      {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}, 2,
                      flow="UniPCMultistepScheduler"),
    )
}  # fmt: skip

#: Schedulers of diffusers that people ask for by name and that no model here can use, and why.
_REFUSED: Mapping[str, str] = {
    "cm": "CMStochasticIterativeScheduler has the noise levels of consistency models in pixels, not"
    " those that a latent model was trained with; distilled latent models take lcm or tcd",
    "ipndm": "IPNDMScheduler ignores the model's training schedule, and without add_noise it"
    " could do neither img2img nor inpaint",
}

# Latents are not bounded, yet DDIM and DDPM clip to [-1, 1] unless told otherwise; and a model
# whose own scheduler uses Karras sigmas must not turn "euler" into something else.
_COMMON: Mapping[str, Any] = {
    "clip_sample": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}

# Facts about the model, not choices of a sampler. `from_config` drops values that nobody set
# explicitly, and with them what a pipeline patched in later (steps_offset), and takes the new
# class's defaults instead, which differ.
_MODEL_KEYS = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "steps_offset",
})  # fmt: skip


def build(name: str | None, own: SchedulerMixin, mu: float | None = None) -> SchedulerMixin:
    """Return a fresh scheduler for a model whose own scheduler is ``own``, which is left alone.

    ``None`` means a copy of the model's own. A name means that sampler on the model's training
    schedule.

    Args:
        name: of :data:`SCHEDULERS`.
        own: the model's.
        mu: from :func:`dynamic_shift`, for schedulers that are not told of it later.

    Raises:
        SchedulerError: the name is unknown, or that scheduler cannot represent the model's training
            schedule or prediction type.
    """
    if name is None:
        return copy.deepcopy(own)
    scheduler: SchedulerMixin = _construct(name, own, mu)
    if reason := _unfit(scheduler, own):
        raise _not_fitting(name, own, reason)
    return scheduler


def _not_fitting(name: str, own: Any, reason: str) -> SchedulerError:
    rest = ", ".join(other for other in usable(own) if other != name)
    advice = f"use one of: {rest}" if rest else "use the model's own scheduler"
    return SchedulerError(f"scheduler {name!r} does not fit this model: {reason}; {advice}")


def named(name: str) -> SchedulerInfo:
    """What is known of a scheduler by its name; needs no model.

    Raises:
        SchedulerError: the name is unknown, or no model here can use it.
    """
    if name in _REFUSED:
        raise SchedulerError(f"scheduler {name!r} cannot be used: {_REFUSED[name]}")
    if name not in SCHEDULERS:
        raise SchedulerError(f"unknown scheduler {name!r}{nearest(name, SCHEDULERS)}")
    return SCHEDULERS[name]


def usable(own: SchedulerMixin) -> list[str]:
    """Names of the schedulers that :func:`build` accepts for this model."""
    flow = prediction_type(own) == "flow_prediction"
    names = []
    for name, info in SCHEDULERS.items():
        if flow and info.flow is None:
            continue
        try:
            if not _unfit(_construct(name, own), own):
                names.append(name)
        except SchedulerError:  # an optional dependency is missing
            continue
    return names


def _construct(name: str, own: Any, mu: float | None = None) -> Any:
    info = named(name)
    config = dict(own.config)
    options: dict[str, Any] = dict(_COMMON)
    if prediction_type(own) == "flow_prediction":
        if info.flow is None:
            raise _not_fitting(name, own, "it is not for rectified flows")
        cls = getattr(diffusers, info.flow)
        options |= _flow_options(own, info.flow, mu)
    else:
        cls = getattr(diffusers, info.cls)
        config["_use_default_values"] = set(config.get("_use_default_values", ())) - _MODEL_KEYS
    accepted = inspect.signature(cls.__init__).parameters
    options |= info.options
    options = {key: value for key, value in options.items() if key in accepted}
    # diffusers warns of what it does not know.
    config = {key: value for key, value in config.items() if key in accepted or key[0] == "_"}
    try:
        return cls.from_config(config, **options)
    except ImportError as error:
        raise SchedulerError(f"scheduler {name!r} needs a missing package: {error}") from error


def _flow_options(own: Any, cls: str, mu: float | None) -> dict[str, Any]:
    """What makes a scheduler one for the rectified flow of a model."""
    settings = own.config
    if cls == type(own).__name__:
        return {}
    shift = settings.get("shift", settings.get("flow_shift", 1.0))
    if mu is not None:
        # What shifts noise with the picture's size is a constant once the size is known: for one
        # with exp(mu), for the other kind of shift with mu itself.
        shift = mu if settings.get("time_shift_type") == "linear" else math.exp(mu)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return options | {"shift": shift, "flow_shift": shift, "use_dynamic_shifting": False}


def _unfit(scheduler: Any, own: Any) -> str | None:
    """Why ``scheduler`` cannot run the model of ``own``, or None.

    Compares what the scheduler computed, not what its config says: PNDM and Heun keep the zero-SNR
    key of a config and ignore it.
    """
    wanted, got = prediction_type(own), prediction_type(scheduler)
    accepted = inspect.signature(type(scheduler).__init__).parameters
    if "prediction_type" not in accepted and got != "flow_prediction":
        got = "epsilon"
    if got != wanted:
        return f"the model predicts {wanted!r}, the scheduler expects {got!r}"
    if wanted != "flow_prediction" and (reason := _other_levels(scheduler, own)):
        return reason
    try:
        shift: dict[str, Any] = {"mu": 1.0} if needs_size(scheduler) else {}
        Schedule(scheduler, 4, **shift)
    except SchedulerError as error:  # a prediction type that the class accepts and then rejects
        return str(error)
    return None


def _other_levels(scheduler: Any, own: Any) -> str | None:
    """Why the noise levels of two schedulers differ, or None."""
    levels = getattr(own, "alphas_cumprod", None)
    ours = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or ours is None or levels.shape != ours.shape:
        return "its training noise schedule is of another kind"
    # Several classes put 2**-24 in place of the last 0 for zero terminal SNR.
    if not torch.allclose(ours.cpu(), levels.cpu(), rtol=0, atol=1e-4):
        return (
            "it cannot represent the model's training noise schedule (signal left at the last "
            f"timestep: model {levels[-1]:.2g}, scheduler {ours[-1]:.2g})"
        )
    if scheduler.config.get("use_beta_sigmas") and levels[-1] < 1e-6:
        # Measured on the exact denoiser of N(0.7, 0.25²): 30 steps leave a deviation of 0.04-0.12.
        return (
            "it spaces steps along the ratio of noise to signal, which has no end in the model's"
            " training noise schedule"
        )
    return None


def needs_size(scheduler: Any) -> bool:
    """Whether ``set_timesteps`` has to know of a picture's size."""
    return bool(scheduler.config.get("use_dynamic_shifting"))


def dynamic_shift(scheduler: Any, tokens: int, most: float = 1.15) -> float | None:
    """How far noise is shifted for a picture's size, where a model's scheduler asks for it.

    Larger pictures need more noise to be as unclear (Esser et al. 2024, arXiv:2403.03206, section
    5.3.2); the shift `mu` is taken as linear in the number of tokens.

    Args:
        scheduler: the model's own.
        tokens: that the denoiser sees.
        most: the shift for the most tokens, where the configuration does not say it.
    """
    settings = scheduler.config
    if not needs_size(scheduler):
        return None
    fewest, many = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", most)
    slope = (high - low) / (many - fewest)
    return float(tokens * slope + (low - slope * fewest))
