"""python -m benchmarks.sampling --ckpt runs/quickstart/train [--num-images 200] [--repeats 5] ...
python -m benchmarks.sampling --config diffmoe/L_E16_flow [--num-steps 50] ...

Images per second of a checkpoint's own sampler, or of a config with random weights and a decoder
of Stable Diffusion's size, decoding included, in several ways to compute:
float32 (the baseline), TF32 on GPUs, bf16, compiled, and, where guidance joins both halves in one
call, in two calls. Beside them how far the images are from those of float32 of the same noise: mean
absolute difference of a pixel (of 255), and, with --classifier, the Frechet distance in the digit
classifier's features.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import alternate, default_device, device_here, machine, report
from config.files import find_config
from config.load import load_config
from core.command_line import Parser, file_to_write, positive
from core.conditions import Condition
from core.errors import UserError, command
from core.heap import freed_memory_kept
from core.precision import set_tf32
from data.vae import VAE, PixelSpace, open_vae, to_uint8
from evaluations.features import build_extractor
from evaluations.metrics import frechet_distance, statistics
from models.build import build_model
from models.dit import DiT
from models.pretrained import Pretrained, load_pretrained
from sampling.generate import Sampler
from training.router_state import keepers

Draw = Callable[[], Tensor]
"""Makes all images (N, H, W, 3) uint8."""


class Apart(Sampler):
    """Both halves of guidance in calls of their own, whatever the layers are."""

    def shares_a_call(self) -> bool:
        """Never."""
        return False


STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
"""What diffusers' AutoencoderKL is told for the VAE of the papers."""


class RandomVAE(VAE):
    """Stable Diffusion's decoder with random weights: as fast, and of no use."""

    def __init__(self, device: torch.device):
        from diffusers import AutoencoderKL

        self.model = AutoencoderKL(**STABLE_DIFFUSION).to(device).eval()
        self.device, self.factor = device, 8
        self.scaling_factor, self.shift_factor = 1.0, 0.0


def opened(flags: argparse.Namespace, device: torch.device) -> tuple[Pretrained, VAE | PixelSpace]:
    """Model and decoder of the checkpoint, or random ones of the config."""
    if flags.ckpt is not None:
        pretrained = load_pretrained(flags.ckpt)
        vae = open_vae(pretrained.config.data.vae_path, device)
    else:
        config = load_config(find_config(flags.config))
        torch.manual_seed(0)
        pretrained = Pretrained(config, {}, Path(flags.config), build_model(config.model))
        vae = PixelSpace(device) if config.data.vae_path is None else RandomVAE(device)
    config = pretrained.config
    if config.model.text_hidden_size is not None:
        source = flags.ckpt or flags.config
        raise UserError(f"{source}: a model of text; wanted: one of classes")
    if flags.config is not None:
        settle(pretrained.model.to(device), device)
    changed = {"num_steps": flags.num_steps, "cfg_scale": flags.cfg_scale}
    changed = {key: value for key, value in changed.items() if value is not None}
    pretrained.config = replace(config, sampling=replace(config.sampling, **changed))
    pretrained.model.eval()
    return pretrained, vae


@torch.no_grad()
def settle(model: DiT, device: torch.device) -> None:
    """Thresholds at which the experts take, on noise, as many tokens as in training."""
    config, count = model.config, 8
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size, device=device)
    cond = Condition.of_labels([0] * count).to(device)
    routing = model.train()(x, torch.rand(count, device=device), cond).routing
    for keeper, record in zip(keepers(model), routing, strict=False):
        if keeper.state_name == "thresholds":
            keeper.state.copy_(keeper.row(record))


def ways_of(
    pretrained: Pretrained, vae: VAE | PixelSpace, flags: argparse.Namespace
) -> dict[str, Draw]:
    """Ways to draw the same images, by name."""
    device = torch.device(flags.device)
    classes = pretrained.config.model.num_classes

    def draw(sampler: Sampler, tf32: bool) -> Draw:
        def go() -> Tensor:
            set_tf32(tf32)
            blocks = []
            for first in range(0, flags.num_images, flags.batch_size):
                indices = range(first, first + flags.batch_size)
                cond = Condition.of_labels([i % max(classes, 1) for i in indices])
                blocks.append(to_uint8(vae.decode(sampler.latents(indices, cond)[0])))
            return torch.cat(blocks)[: flags.num_images]

        return go

    def sampler(
        kind: type[Sampler] = Sampler, bf16: bool = False, compiled: bool = False
    ) -> Sampler:
        made = kind.of(copy.deepcopy(pretrained), device=device)
        made.bf16 = bf16
        if compiled:
            made.compile()
        return made

    plain = sampler()
    ways = {"fp32": draw(plain, False)}
    if plain.shares_a_call():
        ways["fp32, two calls"] = draw(sampler(Apart), False)
    if device.type == "cuda":
        ways["tf32"] = draw(plain, True)
    ways["bf16"] = draw(sampler(bf16=True), True)
    ways["fp32, compiled"] = draw(sampler(compiled=True), False)
    ways["bf16, compiled"] = draw(sampler(bf16=True, compiled=True), True)
    return ways


def distances(images: dict[str, Tensor], classifier: Path | None) -> dict[str, dict[str, float]]:
    """How far each way's images are from those of the first."""
    first, *_ = images.values()
    found = {
        name: {"pixel difference": (other.float() - first.float()).abs().mean().item()}
        for name, other in images.items()
    }
    if classifier is not None:
        network = build_extractor("digits", classifier, None, torch.device("cpu"))
        facts = {n: statistics(network(x)["pool"].double().numpy()) for n, x in images.items()}
        mean, spread = facts[next(iter(images))]
        for name, (mu, sigma) in facts.items():
            found[name]["FD-digits"] = float(frechet_distance(mean, spread, mu, sigma))
    return found


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("benchmarks.sampling", __doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", type=Path, help="checkpoint of a model of classes, or a run")
    what.add_argument("--config", help="config of a model of classes; its weights are random")
    add("--num-steps", type=positive, help="of the sampler; default: the config's")
    add("--cfg-scale", type=float, help="guidance; default: the config's")
    add("--device", type=device_here, default=default_device(), help="where: cpu or cuda")
    add("--num-images", type=positive, default=200, help="images of a pass; default 200")
    add("--batch-size", type=positive, default=100, help="images in a block; default 100")
    add("--repeats", type=positive, default=5, help="passes of each way; the median counts")
    add("--classifier", type=Path, help="of python -m evaluations.digits, for FD-digits")
    add("--out", type=file_to_write, help="JSON file to write")
    return parser.parse_args(argv)


@command
@freed_memory_kept()
def main(argv: list[str] | None = None) -> None:
    """Measure all ways in turn, and compare their images."""
    flags = parse_flags(argv)
    device, source = torch.device(flags.device), flags.ckpt or flags.config
    ways = ways_of(*opened(flags, device), flags)
    images = {name: draw() for name, draw in ways.items()}  # compiles
    seconds = alternate(ways, flags.repeats, device)
    apart = distances(images, flags.classifier)
    rows = [
        {
            "way": name,
            "speed / fp32": seconds["fp32"] / taken,
            "img/s": flags.num_images / taken,
            **apart[name],
        }
        for name, taken in seconds.items()
    ]
    settings = {k: str(v) for k, v in vars(flags).items() if k != "out"} | machine(device)
    settings |= {"numpy": np.__version__}
    report(f"{source}, {flags.num_images} images", rows, settings, flags.out)


if __name__ == "__main__":
    main()
