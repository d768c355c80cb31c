"""What tests of tiny runs share."""

from pathlib import Path

import torch

from config.load import parse_config
from core.distributed import Processes
from models.pretrained import find_checkpoint, read_tensors, weights_path
from training.step import TrainStep
from training.trainer import train

ROOT = Path(__file__).parents[2]
ALONE = Processes(0, 1, torch.device("cpu"))


def run(argv):
    train(parse_config(argv, "train.py"), ALONE)


def final(folder, name="model"):
    return read_tensors(weights_path(find_checkpoint(folder), name))


def same(one, other, *names):
    for name in names or ("model", "ema", "optimizer"):
        wanted, found = final(one, name), final(other, name)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name


def slowly(seconds):
    """Text that makes steps take a while."""
    return f'before(TrainStep, "__call__", lambda *_: time.sleep({seconds}))\n'


HANG = 'before(training.saving, "write_tensors", lambda *_: time.sleep(60))\n'
"""Text that makes writing a checkpoint take forever."""


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def poisoned(monkeypatch, steps):
    """Make the gradient of some steps NaN, in one micro-batch only."""
    micro = TrainStep._micro_batch

    def spoiled(self, batch, step, slot):
        result = micro(self, batch, step, slot)
        if step in steps and slot == 1:
            self.bare.final.linear.bias.grad.mul_(float("nan"))
        return result

    monkeypatch.setattr(TrainStep, "_micro_batch", spoiled)
