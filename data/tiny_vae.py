"""python -m data.tiny_vae --data DIR/train --val DIR/val --out FOLDER

Train a small AutoencoderKL on small images, about a minute on two CPU cores for the digits of
`data.digits`: a real VAE for the default that needs no download. 32 x 32 images become latents of
4 x 8 x 8. Saved by `save_pretrained`, it serves as `--vae_path`.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from core.command_line import Parser, above_zero, not_negative, positive
from core.distributed import Processes, processes
from core.errors import UserError, command
from core.logging import get_logger, progress
from core.rng import derive_seed, generator
from data.images import ImageDataset, ImageFolder
from data.making import made_alone, refuse_taken, warm_cosine

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SIZE = 32
WIDTHS = (16, 32, 32)
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class TinyVAEOptions:
    """How the VAE is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        lr: Adam's highest learning rate; it warms up for a twentieth of the steps and then falls
            to zero along a cosine.
        kl_weight: weight of the KL divergence per latent value, against the mean squared error
            per pixel value, images in [-1, 1].
        seed: of weights, order and posterior draws.
    """

    steps: int
    batch_size: int
    lr: float
    kl_weight: float
    seed: int


def build(seed: int) -> "AutoencoderKL":
    """The untrained VAE, about 0.23M parameters, with weights drawn from `seed`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny VAE weights"))
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
            up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
            block_out_channels=WIDTHS,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=SIZE,
        )


def load_images(root: str | Path) -> Tensor:
    """All images (N, 3, SIZE, SIZE) of a folder, in [-1, 1]."""
    dataset = ImageDataset(ImageFolder(root), SIZE)
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def train(
    model: "AutoencoderKL", images: Tensor, options: TinyVAEOptions, group: Processes
) -> None:
    """Minimise reconstruction error plus weighted KL, in place.

    Args:
        model: on `group.device`.
        images: (N, 3, SIZE, SIZE) in [-1, 1].
        options: see there.
        group: for the device and the progress bar.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = warm_cosine(optimizer, options.steps)
    draws = generator(options.seed, "tiny VAE training")
    bar = progress(range(options.steps), group, "tiny VAE", "step")
    for _ in bar:
        picks = torch.randint(len(images), (options.batch_size,), generator=draws)
        batch = images[picks].to(group.device)
        posterior = model.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws).to(group.device)
        output = model.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(output, batch)
        divergence = posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad(set_to_none=True)
        (error + options.kl_weight * divergence).backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{error.item():.5f}", kl=f"{divergence.item():.3f}", refresh=False)


@torch.no_grad()
def posterior_sample(model: "AutoencoderKL", images: Tensor, seed: int) -> Tensor:
    """One posterior draw (N, C, h, w) for each image, on the CPU."""
    draws = generator(seed, "tiny VAE posterior")
    parts = []
    for batch in images.split(256):
        posterior = model.encode(batch.to(model.device)).latent_dist
        mean, std = posterior.mean.cpu(), posterior.std.cpu()
        parts.append(mean + std * torch.randn(mean.shape, generator=draws))
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_mse(model: "AutoencoderKL", images: Tensor) -> float:
    """Mean squared error per value, images in [-1, 1], of decoding the posterior's mean."""
    total = 0.0
    for batch in images.split(256):
        batch = batch.to(model.device)
        output = model.decode(model.encode(batch).latent_dist.mean).sample
        total += F.mse_loss(output, batch, reduction="sum").item()
    return total / images.numel()


def make_tiny_vae(
    data: str, val: str, out: str, options: TinyVAEOptions, group: Processes
) -> float | None:
    """Train on `data`, measure on `val`, save to `out` unless a VAE is there already.

    Returns:
        The validation error, or None where `out` was left as it is.

    Raises:
        UserError: bad image folders; `out` holds something else, is being made, or cannot be
            written.
    """
    log = get_logger("data.tiny_vae")
    folder = Path(out)
    if (folder / "config.json").is_file():
        log.info("%s holds a VAE already; left as it is (remove it to train again)", out)
        return None
    refuse_taken(folder, "holds no VAE")
    images, val_images = load_images(data), load_images(val)
    with made_alone(folder) as temporary:
        model = build(options.seed).to(group.device)
        start = time.perf_counter()
        train(model.train(), images, options, group)
        seconds = time.perf_counter() - start
        model.eval()
        sample = posterior_sample(model, images, options.seed)
        # What a diffusion model sees has mean 0 and standard deviation 1.
        model.register_to_config(
            scaling_factor=1.0 / sample.std().item(), shift_factor=sample.mean().item()
        )
        error = reconstruction_mse(model, val_images)
        _save(model, temporary, folder)
    log.info(
        "%s: %d training images, %d steps, %.0f s; validation MSE %.6f on %d images",
        *(out, len(images), options.steps, seconds, error, len(val_images)),
    )
    return error


def _save(model: "AutoencoderKL", temporary: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(temporary)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise UserError(f"--out: cannot write to {folder}: {error}") from error


@command
def main() -> None:
    """Parse the command line and train."""
    parser = Parser("data.tiny_vae", __doc__)
    required = {"required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--data", **required, help="image folder to train on")
    parser.add_argument("--val", **required, help="image folder to measure on")
    parser.add_argument("--out", **required, help="folder to write")
    parser.add_argument("--steps", type=positive, default=800, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per step")
    parser.add_argument("--lr", type=above_zero, default=3e-3, help="highest learning rate")
    parser.add_argument(
        "--kl-weight", type=not_negative, default=1e-4, help="weight of the KL divergence"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    arguments = vars(parser.parse_args())
    paths = {name: arguments.pop(name) for name in ("data", "val", "out")}
    with processes(arguments.pop("device")) as group:
        make_tiny_vae(**paths, options=TinyVAEOptions(**arguments), group=group)


if __name__ == "__main__":
    main()
