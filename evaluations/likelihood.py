"""python -m evaluations.likelihood --ckpt RUN [--num-samples 1000]

Bits per dimension that a checkpoint needs for held-out data (the validation data of its config): of
a flow by its ODE, of DDPM by the variational bound over all steps.
"""

import argparse
import sys
from pathlib import Path

import torch

from core.command_line import Parser, as_flags, positive
from core.distributed import Processes, processes
from core.errors import UserError, command
from core.limits import check_memory
from core.logging import progress
from core.rng import SampleNoise, generator
from data.sources import validation_data
from models.pretrained import Pretrained, load_pretrained
from sampling.objectives import build_objective
from sampling.prompts import text_facts
from sampling.request import block_bytes
from transport.sde import SOLVERS as SDE_SOLVERS


def bits_per_dim(
    pretrained: Pretrained, count: int, batch_size: int, seed: int, group: Processes
) -> float:
    """Mean over the first `count` images of the config's validation data.

    Raises:
        UserError: there is no such data, or the config's sampler follows no ODE.
    """
    config, device = pretrained.config, group.device
    if config.sampling.sampler in SDE_SOLVERS:
        raise UserError(
            f"sampling.sampler: {config.sampling.sampler} follows an SDE, which has no likelihood "
            "here; allowed: an ODE method"
        )
    if config.data.val_cached_path is None and config.data.val_data_path is None:
        raise UserError(
            "data.val_cached_path: the checkpoint names no held-out data; give --val-cached-path"
        )
    texts = None if config.model.text_hidden_size is None else text_facts(pretrained)
    with as_flags({"data.val_text_cached_path": "--val-text-cached-path"}):
        data = validation_data(config, group, texts)
    objective = build_objective(config.objective)
    count, total = min(count, len(data)), 0.0
    check_memory("--batch-size", min(batch_size, count), block_bytes(config.model), device)
    model, shape = pretrained.model.to(device), None
    with progress(None, group, "likelihood", "img", total=count) as bar:
        for first in range(0, count, batch_size):
            indices = range(first, min(first + batch_size, count))
            x, cond = data.finish(data.__getitems__([(0, i) for i in indices]))
            shape = tuple(x.shape[1:])
            draws = [generator(seed, "likelihood", i) for i in indices]
            draw = SampleNoise(draws, shape, device)
            x, cond = x.to(device), cond.to(device)
            bits = objective.bits_per_dim(model, x, cond, config.sampling, draw)
            total += bits.detach().double().sum().item()
            bar.update(len(indices))
    return total / count


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.likelihood", __doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint folder, or a run: its newest")
    add("--weights", default="ema", help="averaged, or live `model`")
    add("--val-cached-path", help="cache of held-out latents; default: the checkpoint's")
    add("--val-text-cached-path", help="cache of their texts; default: the checkpoint's")
    add("--num-samples", type=positive, default=1000, help="images")
    add("--batch-size", type=positive, default=32, help="images at a time")
    add("--seed", type=int, default=0, help="of noise and probes")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    return parser.parse_args()


def _take_texts(pretrained: Pretrained, path: str) -> None:
    if pretrained.config.model.text_hidden_size is None:
        raise UserError(
            f"--val-text-cached-path: does nothing here; {pretrained.path} takes no text"
        )
    pretrained.config.data.val_text_cached_path = path


@command
def main() -> None:
    """Parse the command line and print the mean."""
    flags = _parse()
    pretrained = load_pretrained(flags.ckpt, flags.weights)
    if flags.val_cached_path is not None:
        pretrained.config.data.val_cached_path = flags.val_cached_path
    if flags.val_text_cached_path is not None:
        _take_texts(pretrained, flags.val_text_cached_path)
    with processes(flags.device) as group, torch.enable_grad():
        value = bits_per_dim(pretrained, flags.num_samples, flags.batch_size, flags.seed, group)
    sys.stdout.write(f"bits per dimension: {value:.4f}\n")


if __name__ == "__main__":
    main()
