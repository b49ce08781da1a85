"""What leads a UNet by a hint: ControlNets, unions of them, and T2I-Adapters.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"
(arXiv:2302.05543); xinsir 2024, "ControlNet++" (one net for many kinds of hints); Mou et al. 2023,
"T2I-Adapter" (arXiv:2302.08453), which sees the hint alone, so that it is asked once a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import T2IAdapter
from torch import Tensor

from diffedit.errors import InputError, ModelError
from diffedit.models.control import InMode, OfHoles
from diffedit.models.protocol import ModelInput, Residuals

#: The kinds of hints that unions for Stable Diffusion XL were trained on, by the number of each.
MODES = {
    "openpose": 0,
    "depth": 1, "depth_leres": 1, "depth_midas": 1, "depth_zoe": 1,
    "hed": 2, "pidinet": 2, "scribble": 2,
    "canny": 3, "lineart": 3, "lineart_anime": 3, "mlsd": 3,
    "normal": 4, "normal_bae": 4,
    "segment": 5,
    "tile": 6,
}  # fmt: skip


def residuals(
    net: Any, x: ModelInput, hint: Tensor, weight: float, told: Mapping[str, Any]
) -> Residuals:
    """Run a ControlNet, or one of a union, on the rows of `x`.

    Args:
        hint: ``(1 or rows, 3, H, W)`` in [0, 1].
        told: what else it learns, as the UNet does.
    """
    more: dict[str, Any] = {}
    if isinstance(net, OfHoles):
        net, hint = net.net, holed(hint, x)
    if isinstance(net, InMode):
        kinds = torch.zeros(len(x.rows), net.net.config.num_control_type, device=net.net.device)
        kinds[:, net.number] = 1
        more = {"control_type": kinds.to(net.net.dtype), "control_type_idx": [net.number]}
        net = net.net
    shown = hint.to(net.device, net.dtype).expand(len(x.rows), -1, -1, -1)
    down, middle = net(
        x.latents.to(net.dtype),
        x.timestep,
        **told,
        controlnet_cond=[shown] if more else shown,
        conditioning_scale=weight,
        **more,
        return_dict=False,
    )
    return Residuals((*down, middle))


def holed(hint: Tensor, x: ModelInput) -> Tensor:
    """The picture as a control network for inpainting is shown it: -1 where it is to change.

    As the one of ControlNet 1.1 was trained (Zhang 2023, ``control_v11p_sd15_inpaint``).

    Raises:
        InputError: the pass has no mask.
    """
    if "hole" not in x.channels:
        raise InputError("this control network is one for inpainting: it needs a mask (inpaint)")
    hole = x.channels["hole"]
    return torch.where(hole > 0, -1.0, hint.to(hole))


def features(net: T2IAdapter, hint: Tensor, weight: float) -> tuple[Tensor, ...]:
    """What a T2I-Adapter adds within the UNet's levels, for each picture of the hint."""
    config: Any = net.config
    shown = hint.to(net.device, net.dtype)
    # Sketches and edges are shown to some as one channel; a hint of these is grey.
    shown = shown[:, : config.in_channels].contiguous()
    factor = config.downscale_factor
    height, width = (-side % factor for side in shown.shape[2:])
    if height or width:
        shown = F.pad(shown, (0, width, 0, height), mode="replicate")
    return tuple(one * weight for one in net(shown))


def check_adapter(source: str, net: T2IAdapter, unet: Any) -> None:
    """Refuse a T2I-Adapter of another model.

    Raises:
        ModelError: its levels are not the UNet's.
    """
    its, mine = (tuple(of) for of in (net.config.channels, unet.config.block_out_channels))
    if its[: len(mine)] != mine:
        raise ModelError(
            f"{source}: this T2I-Adapter was made for another model: its channels are"
            f" {list(its)}, the loaded model's are {list(mine)}"
        )
