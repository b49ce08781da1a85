"""Denoising diffusion in one page: learn a folder of pictures in pixels, then draw new ones.

    python examples/ddpm.py PHOTOS --size 32 --steps 2000 --out drawn

Algorithms 1 and 2 of Ho et al. 2020 (arXiv:2006.11239), without text or latents. The picture of
samples, and the model as diffusers' ``DDPMPipeline`` loads it, go to ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from diffedit.training.bound import bits_per_dim
from diffedit.training.ema import Ema
from diffedit.training.losses import mse
from diffedit.training.process import BETAS, Diffusion, Process
from diffedit.training.timesteps import uniform


def load(folder: Path, size: int) -> Tensor:
    """All pictures of a folder, cropped to squares, (n, 3, size, size) in [-1, 1]."""
    kinds = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if len(paths) < 2:
        raise SystemExit(f"{folder}: {len(paths)} pictures; at least 2 are needed, one to judge by")
    pictures = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in paths]
    return torch.stack([pil_to_tensor(picture) for picture in pictures]) / 127.5 - 1


def build(size: int, width: int) -> UNet2DModel:
    """A U-Net that halves the side twice, with attention at the coarsest level."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=min(32, width // 2),
        attention_head_dim=width // 2,
    )


def train_step(
    unet: UNet2DModel, process: Process, x0: Tensor, generator: torch.Generator
) -> Tensor:
    """Algorithm 1: noise a batch at random times and compare the noise with what is predicted."""
    t = process.at(uniform(len(x0), generator))
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    x_t = process.noised(x0, noise, t)
    predicted = unet(x_t, process.timestep(t).to(x0.device)).sample
    return mse(predicted, process.target("epsilon", x0, noise, t)).mean()


@torch.no_grad()
def sample(unet: UNet2DModel, process: Process, count: int, generator: torch.Generator) -> Tensor:
    """Algorithm 2: from noise, step by step to the picture that the prediction implies."""
    side = unet.config.sample_size
    x = torch.randn(count, 3, side, side, generator=generator).to(unet.device)
    for t in process.grid():
        t = t.expand(count)
        predicted = unet(x, process.timestep(t).to(x.device)).sample
        x0 = process.x0("epsilon", predicted, x, t).clamp(-1, 1)
        mean, variance = process.posterior(x0, x, t)
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = mean + variance.sqrt().to(x).view(-1, 1, 1, 1) * noise  # The last variance is 0.
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="pictures to learn from")
    parser.add_argument("--out", type=Path, default=Path("ddpm"), help="where the results go")
    parser.add_argument("--size", type=int, default=32, help="side in pixels, a multiple of 4")
    parser.add_argument("--width", type=int, default=64, help="channels of the finest level")
    parser.add_argument("--schedule", choices=sorted(BETAS), default="linear")
    parser.add_argument(
        "--timesteps", type=int, default=1000, help="T, steps from picture to noise"
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--samples", type=int, default=16, help="pictures to draw")
    parser.add_argument("--bound-steps", type=int, default=100, help="timesteps the bound looks at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)  # The weights; everything else draws from the generator.
    generator = torch.Generator().manual_seed(args.seed)
    pictures = load(args.folder, args.size).to(args.device)
    pictures = pictures[torch.randperm(len(pictures), generator=generator).to(args.device)]
    held = max(1, min(32, len(pictures) // 8))  # Never trained on: the bound is judged on them.
    pictures, judged = pictures[held:], pictures[:held]
    process = Diffusion(BETAS[args.schedule](args.timesteps))
    unet = build(args.size, args.width).to(args.device)
    ema = Ema({"unet": unet}, 0.999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr)

    def bound() -> str:
        bits = bits_per_dim(
            lambda x, t: unet(x, t).sample,
            process,
            judged,
            torch.Generator().manual_seed(args.seed),
            samples=min(args.bound_steps, args.timesteps - 1),
        ).bits_per_dim
        return f"{float(bits.mean()):.3f} bits/dim on {held} held-out"

    print(f"{len(pictures)} pictures; untrained {bound()}")
    for step in range(args.steps):
        rows = torch.randint(len(pictures), (args.batch,), generator=generator)
        mirror = torch.rand(args.batch, 1, 1, 1, generator=generator) < 0.5
        x0 = pictures[rows.to(args.device)]
        x0 = torch.where(mirror.to(args.device), x0.flip(3), x0)
        loss = train_step(unet, process, x0, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.update({"unet": unet}, step)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    with ema.applied({"unet": unet}):
        print(f"trained {bound()}")
        drawn = sample(unet, process, args.samples, generator)
        scheduler = DDPMScheduler(args.timesteps, trained_betas=process.betas.tolist())
        DDPMPipeline(unet, scheduler).save_pretrained(args.out / "model")
    grid = make_grid((drawn.cpu() / 2 + 0.5).clamp(0, 1), nrow=max(1, int(args.samples**0.5)))
    to_pil_image(grid).save(args.out / "samples.png")
    print(f"{args.out / 'samples.png'} and {args.out / 'model'} written")


if __name__ == "__main__":
    main()
