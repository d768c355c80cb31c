"""What a training's state takes on each process: arithmetic, and the shards themselves."""

import pytest
import torch
import torch.distributed as dist

from config.load import parse_config
from core.distributed import Processes
from models.build import build_model
from models.memory import state_per_process
from training.parallel import local, shard

PROCESSES = 8


def parsed(name, *flags):
    argv = ["--config", name, "--train.micro_batch_size", "32", *flags]
    return parse_config(argv, "train.py", PROCESSES)


@pytest.mark.parametrize(
    ("name", "ddp", "zero1", "fsdp"),
    [("diffmoe/L_E16_flow", 39.6, 13.5, 6.1), ("dsmoe/3B_E16_flow", 62.0, 32.6, 20.9)],
)
def test_two_billion_experts_on_eight_processes(name, ddp, zero1, fsdp):
    """The second accumulates two micro-batches, whose gradients wait whole."""
    found = state_per_process(parsed(name), PROCESSES)
    wanted = {"ddp": ddp, "zero1": zero1, "fsdp": fsdp}
    assert {way: size / 1e9 for way, size in found.items()} == pytest.approx(wanted, abs=0.05)


def test_further_averages_are_counted():
    one, two = (
        state_per_process(parsed("diffmoe/L_E16_flow", f"--optim.extra_ema_decays={decays}"), 8)
        for decays in ("[]", "[0.5]")
    )
    weights = 4 * 1_981_647_552
    assert two["ddp"] - one["ddp"] == pytest.approx(weights, rel=1e-3)
    for way in ("zero1", "fsdp"):
        assert two[way] - one[way] == pytest.approx(weights / 8, rel=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_each_process_holds_an_eighth(strategy):
    config = parsed("diffmoe/L_E16_flow", "--parallel.strategy", strategy)
    with torch.device("meta"):
        model = build_model(config.model)
    total = sum(p.numel() for p in model.parameters())
    dist.init_process_group("fake", rank=3, world_size=PROCESSES, store=dist.HashStore())
    try:
        shard(model, config, Processes(3, PROCESSES, torch.device("cpu")))
        held = sum(part.numel() for part in local(model.parameters()))
        assert held == pytest.approx(total / PROCESSES, rel=1e-3)
        # Two of 16 experts each, none torn apart.
        assert model.blocks[1].feed_forward.experts.w1.to_local().shape == (2, 1024, 4096)
    finally:
        dist.destroy_process_group()
