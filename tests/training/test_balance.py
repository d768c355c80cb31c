"""The correction bias against a collapsed router, on real digits."""

import dataclasses

import pytest
import torch
from sklearn.datasets import load_digits

from config.layers import DeepSeekConfig
from config.model import ModelConfig
from config.schema import Config, OptimConfig, TrainConfig
from core.distributed import Processes
from models.build import build_model
from training.optim import build_optimizer
from training.step import TrainStep
from transport.objective import Flow

ALONE = Processes(0, 1, torch.device("cpu"))
E, STEPS, BATCH = 8, 300, 16


def config(rate):
    layer = DeepSeekConfig(
        num_experts=E,
        top_k=2,
        intermediate_size=16,
        shared_mlp="swiglu",
        shared_intermediate_size=16,
        bias_update_rate=rate,
    )
    model = ModelConfig(
        **{"input_size": 8, "in_channels": 1, "patch_size": 1, "hidden_size": 32, "depth": 2},
        **{"num_heads": 2, "num_classes": 10, "rope": "2d", "positions": "none"},
        learn_sigma=False,
        feed_forward=layer,
    )
    train = TrainConfig(max_steps=STEPS, global_batch_size=BATCH, micro_batch_size=BATCH)
    return Config(model=model, train=train, optim=OptimConfig(lr=1e-3))


def digit_batches():
    """Scans as images in [-1, 1], the same order every time."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # (N, 1, 8, 8)
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    while True:
        for index in order.split(BATCH):
            if len(index) == BATCH:
                yield images[index], labels[index]


@torch.no_grad()
def collapse(model):
    """Let every token of every sample prefer experts 0 and 1 by far."""
    block = model.blocks[1]
    direction = torch.ones(32)
    block.modulation[1].bias[3 * 32 : 4 * 32] += direction  # shift of the layer's input
    block.feed_forward.router.weight[:2] += direction / 32
    block.feed_forward.router.weight[2:] -= direction / 32


def max_over_mean(records):
    loads = torch.stack([layers[0].counts.sum(dim=0) for layers in records]).sum(dim=0)
    return (loads.max() / loads.float().mean()).item()


def train(rate):
    """Imbalance at the start, and the mean of the last 20 steps."""
    torch.manual_seed(0)
    settings = config(rate)
    model = build_model(settings.model).train()
    collapse(model)
    optimizer = build_optimizer(model, settings.optim)
    take = TrainStep(model, model, Flow(), optimizer, settings, ALONE)
    batches = digit_batches()
    found = [max_over_mean(take(batches, number).records) for number in range(STEPS)]
    return found[0], sum(found[-20:]) / 20


@pytest.mark.slow
def test_the_bias_balances_a_collapsed_router_within_300_steps():
    first, last = train(rate=0.01)
    assert first > 3.9  # of 8 experts two take everything: 4
    assert last < 1.5


@pytest.mark.slow
def test_without_the_update_it_stays_collapsed():
    first, last = train(rate=0.0)
    assert first > 3.9
    assert last > 3


def test_the_rate_is_the_only_difference():
    assert dataclasses.replace(config(0.01).model.feed_forward, bias_update_rate=0.0) == (
        config(0.0).model.feed_forward
    )
