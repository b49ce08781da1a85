"""Few steps without guidance: a guided teacher distilled into a LoRA."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import LCMScheduler, UniPCMultistepScheduler
from torch import Tensor

from diffedit.errors import InputError
from diffedit.training import lora, losses
from diffedit.training.config import DistillTraining, Objective
from diffedit.training.denoising import Latents, samples, save_settings, scheduler_for
from diffedit.training.export import export
from diffedit.training.files import whole_folder
from diffedit.training.loop import Picture, Rows
from diffedit.training.process import Diffusion, scaled
from diffedit.training.unet_task import UNetTask

_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""What gets additions: all of a UNet's blocks, as for LCM-LoRA."""

_C = 1e-3
"""Of the pseudo-Huber loss: where it turns from squares to absolute values."""

_OWN = 7 / 8
"""Of a batch: the share that the student comes to by itself; the rest keeps it the teacher's."""

_SCALING, _SIGMA_DATA = 10.0, 0.5
"""Of the boundary condition, as diffusers' ``LCMScheduler`` has them."""


class DistillTask(UNetTask[DistillTraining], ABC):
    """A LoRA that learns from the model as it was, the teacher, with guidance folded in.

    A subclass says what there is to learn (:meth:`errors`) and what samples it (``sampler``,
    :meth:`scheduler`). The guidance is fixed instead of embedded.
    """

    sampler: ClassVar[str]
    """diffedit's name of :meth:`scheduler`."""

    def __init__(self, training: DistillTraining, device: torch.device) -> None:
        super().__init__(training, device)
        unet = self.parts.unet
        objective = Objective(gamma=None, dropout=0.0)
        self.latents = Latents(training, objective, self.parts, self.examples, embeddings=True)
        self.process, self.kind = self.latents.process, self.latents.kind
        # Its modules are its own, its weights are the student's: the LoRA lies beside them.
        shared: dict[int, Any] = {id(p): p for p in unet.parameters()}
        self.teacher = copy.deepcopy(unet, shared)
        layers = [n for n in lora.layers_of(unet) if n.endswith(tuple(f".{e}" for e in _LAYERS))]
        self.trains({"lora": lora.add(unet, layers, training.rank, training.rank)})

    @abstractmethod
    def errors(self, rows: Rows) -> Tensor:
        """How far the student is from what it learns, (n,)."""

    @abstractmethod
    def scheduler(self) -> Any:
        """What samples the result in ``few`` steps."""

    def loss(self, rows: Rows) -> Tensor:
        """The mean of :meth:`errors`."""
        return self.errors(rows).mean()

    def guided(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """What the teacher predicts, guided; (n, c, h, w) for times (n,) of the process.

        Guidance is Ho & Salimans 2022 (arXiv:2207.12598), of whatever the model predicts.
        """
        steps = self.process.timestep(t).to(self.device)
        guidance = self.training.guidance
        if guidance == 1:
            alone: Tensor = self.teacher(x, steps, encoder_hidden_states=words).sample
            return alone
        empty = self.latents.cache.empty()[1]
        assert empty is not None  # the text encoder is frozen, so embeddings are kept
        both = torch.cat([words, empty.to(words).expand_as(words)])
        twice = self.teacher(
            torch.cat([x, x]), torch.cat([steps, steps]), encoder_hidden_states=both
        ).sample
        asked, free = twice.chunk(2)
        predicted: Tensor = free + guidance * (asked - free)
        return predicted

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on held-out examples, at fixed noise and evenly spread times."""
        found = [self.errors(rows) for rows in self.latents.held_rows()]
        return {"validation loss": float(torch.cat(found).mean())} if found else {}

    def pictures(self) -> list[tuple[str, Picture]]:
        """A sample of every prompt in ``few`` steps, without guidance."""
        few, prompts = self.training.few, self.training.prompts
        return samples(self.parts, prompts, scheduler=self.scheduler(), steps=few, guidance=1.0)

    def export(self, folder: Path) -> None:
        """The LoRA and its scheduler in diffusers' format; in ``fused`` a whole model with it."""
        unet, few = self.parts.unet, self.training.few
        fused = copy.deepcopy(unet)
        fused.fuse_lora()
        fused.unload_lora()
        scheduler = self.scheduler()
        parts = replace(self.parts, unet=fused, scheduler=scheduler)
        factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        training = self.training
        about = {"train": "distill", "method": training.method, "model": training.model}
        sampling = {"scheduler": self.sampler, "steps": few, "guidance": 1.0}
        with whole_folder(folder) as made:
            export(made / "fused", parts, side=factor * int(unet.config.sample_size))
            lora.save(made, copy.deepcopy(unet).half())
            scheduler.save_pretrained(made / "scheduler")
            save_settings(made, about | {"rank": training.rank} | sampling)
            note = _NOTE.format(few=few, cls=type(scheduler).__name__, name=self.sampler)
            (made / "README.md").write_text(note, "utf-8")


class ConsistencyTask(DistillTask):
    """The student says from any noise level where the teacher's trajectory ends.

    Luo et al. 2023 (LCM, arXiv:2310.04378, algorithm 1; LCM-LoRA, arXiv:2311.05556). One DDIM step
    of the teacher leads from t to the grid time before, where the target is taken. The target
    network is the student itself without gradients, as Song & Dhariwal 2023 (arXiv:2310.14189,
    section 3.2) recommend; ``ema`` averages what is exported, not the target.

    The grid has ``solver_steps`` times, those from which ``LCMScheduler`` picks its own. It begins
    at the last one, where a zero-terminal-SNR model sees noise alone: v and x_0 say there what the
    picture is, so nothing is divided by the signal. It ends in the picture itself.
    """

    sampler: ClassVar[str] = "lcm"

    def __init__(self, training: DistillTraining, device: torch.device) -> None:
        super().__init__(training, device)
        if not isinstance(self.process, Diffusion) or self.kind == "flow_prediction":
            raise InputError(
                f"{training.model} is a flow: method consistency takes models with a schedule of"
                " betas, method guidance takes any"
            )
        self.stride = self.process.steps // training.solver_steps
        if not self.stride:
            raise InputError(
                f"solver_steps {training.solver_steps}: should be at most the"
                f" {self.process.steps} of the model"
            )

    def on_grid(self, t: Tensor) -> Tensor:
        """The nearest grid times not below ``t``, the last one for all above it."""
        number = (t // self.stride).clamp_max(self.training.solver_steps - 1)
        return (number + 1) * self.stride - 1

    def errors(self, rows: Rows) -> Tensor:
        """How far the student's ends from two neighbouring times are apart, (n,)."""
        t = self.on_grid(rows["time"])
        x_t = self.latents.noised({**rows, "time": t})[0]
        words = self.latents.words(rows)
        made = self.end(x_t, t, words)
        with torch.no_grad():
            before = t - self.stride
            target = self.end(self.solved(x_t, t, before, words), before, words)
        # The factor 2c taken out again: |x - y| but for the smallest errors (LCM, section 5.1).
        return losses.huber(made, target, c=_C) / (2 * _C)

    def end(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x_0(x_t, t): x itself at t <= 0.

        Song et al. 2023 (arXiv:2303.01469, section 3 and appendix C), in the discrete time of LCM.
        """
        steps = self.process.timestep(t.clamp_min(0)).to(self.device)
        predicted = self.parts.unet(x, steps, encoder_hidden_states=words).sample
        skip, out = boundary(t)
        x0 = self.process.x0(self.kind, predicted.to(x.dtype), x, t)
        return scaled(skip, x) + scaled(out, x0)

    def solved(self, x: Tensor, t: Tensor, before: Tensor, words: Tensor) -> Tensor:
        """One DDIM step of the guided teacher (Song et al. 2021, arXiv:2010.02502, η = 0)."""
        predicted = self.guided(x, t, words).to(x.dtype)
        x0 = self.process.x0(self.kind, predicted, x, t)
        return self.process.noised(x0, self.process.epsilon(self.kind, predicted, x, t), before)

    def scheduler(self) -> LCMScheduler:
        """LCM's own, with the grid."""
        config = dict(self.parts.scheduler.config) | {"prediction_type": self.kind}
        made: LCMScheduler = LCMScheduler.from_config(
            config,
            original_inference_steps=self.training.solver_steps,
            timestep_scaling=_SCALING,
        )
        return made


class GuidanceTask(DistillTask):
    """The student predicts at once what the teacher predicts guided, for half of the work a step.

    Meng et al. 2023 (arXiv:2210.03142, section 3.1, the first of their two stages). Trajectories
    stay those of the teacher, so any sampler of the model takes the result, in any number of steps;
    few are enough for one of high order. A small LoRA cannot follow the teacher everywhere, so that
    most examples are what the student itself comes to in those few steps, with what the teacher
    says of it (Ross et al. 2011, DAgger, arXiv:1011.0686): its errors do not add up unseen.
    """

    sampler: ClassVar[str] = "unipc"

    def __init__(self, training: DistillTraining, device: torch.device) -> None:
        super().__init__(training, device)
        scheduler = self.scheduler()
        scheduler.set_timesteps(training.few)
        times: Tensor = scheduler.timesteps
        flow = self.kind == "flow_prediction"
        self.visited = times.double() / self.process.steps if flow else times

    def batch(self, step: int, generator: torch.Generator) -> Rows:
        """As for every training, and ``calls``: after how many of its own; -1: noised latents."""
        rows = super().batch(step, generator)
        time = rows["time"].clone()
        # Any of them: times may be drawn in ascending order.
        own = torch.randperm(len(time), generator=generator)[: int(_OWN * len(time))]
        calls = torch.full((len(time),), -1)
        calls[own] = torch.arange(step, step + len(own)) % len(self.visited)
        time[own] = self.visited[calls[own]].to(time)
        return {**rows, "time": time, "calls": calls}

    def errors(self, rows: Rows) -> Tensor:
        """The squared error of the student's prediction, (n,)."""
        x_t, steps = self.latents.noised(rows)
        words = self.latents.words(rows)
        if "calls" in rows:
            x_t = self.reached(x_t, rows["noise"].to(self.device), words, rows["calls"])
        made = self.parts.unet(x_t, steps, encoder_hidden_states=words).sample
        with torch.no_grad():
            target = self.guided(x_t, rows["time"], words)
        return losses.mse(made, target)

    @torch.no_grad()
    def reached(self, x_t: Tensor, noise: Tensor, words: Tensor, calls: Tensor) -> Tensor:
        """``x_t``; of rows with ``calls`` ≥ 0 what the student makes of the noise in so many."""
        x_t = x_t.clone()
        for count in sorted(set(calls.tolist()) - {-1}):
            rows = (calls == count).nonzero()[:, 0].to(self.device)
            scheduler = self.scheduler()
            scheduler.set_timesteps(self.training.few, device=self.device)
            x = noise[rows] * scheduler.init_noise_sigma
            for t in scheduler.timesteps[:count]:
                seen = scheduler.scale_model_input(x, t)
                made = self.parts.unet(seen, t, encoder_hidden_states=words[rows]).sample
                x = scheduler.step(made, t, x, return_dict=False)[0]
            x_t[rows] = x.to(x_t.dtype)
        return x_t

    def scheduler(self) -> UniPCMultistepScheduler:
        """A multistep solver that comes near the trajectory's end in few steps."""
        own = scheduler_for(self.latents.objective, self.parts.scheduler)
        made: UniPCMultistepScheduler = UniPCMultistepScheduler.from_config(own.config)
        return made


_NOTE = """\
`pytorch_lora_weights.safetensors` makes the model it was trained on draw in {few} steps, without
guidance. In diffusers:

    pipeline.load_lora_weights("this folder")
    pipeline.scheduler = {cls}.from_pretrained("this folder", subfolder="scheduler")
    pipeline(prompt, num_inference_steps={few}, guidance_scale=1.0)

`fused` is the whole model with the additions in its weights, for diffusers and for diffedit:

    Editor.load("this folder/fused")     # scheduler "{name}" is its own; steps {few}, guidance 1
"""


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at grid times t, (n,) float64; 1 and 0 at t <= 0, the picture itself."""
    time = _SCALING * t.clamp_min(0).double()
    square = time.square() + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / square, time / square.sqrt()
