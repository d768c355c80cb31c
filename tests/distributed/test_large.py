"""The largest model: what lies on each process, and that its pattern trains in shards."""

import json

import pytest
import torch
import torch.distributed as dist
from launch import on_two_processes

from config.load import parse_config
from core.distributed import Processes
from models.build import build_model
from models.pretrained import find_checkpoint, read_tensors, weights_path
from training.parallel import local, shard

CONFIG = "dsmoe/3B_E16_flow"
TOTAL = 3_101_669_024


@pytest.mark.parametrize("rank", [0, 15])
def test_each_of_16_processes_has_a_sixteenth(rank):
    config = parse_config(["--config", CONFIG, "--parallel.strategy", "fsdp"], "train.py")
    with torch.device("meta"):
        model = build_model(config.model)
    assert sum(p.numel() for p in model.parameters()) == TOTAL
    dist.init_process_group("fake", rank=rank, world_size=16, store=dist.HashStore())
    try:
        shard(model, config, Processes(rank, 16, torch.device("cpu")))
        parts = local(model.parameters())
        assert all(part.is_meta for part in parts)
        assert sum(part.numel() for part in parts) == TOTAL / 16
        # One of 16 experts each: (1, D, 2 H).
        experts = model.blocks[1].feed_forward.experts
        assert experts.w1.to_local().shape == (1, 1152, 2 * 2880)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_its_pattern_takes_three_steps_on_two_gloo_processes(cache_folder, vae_folder, tmp_path):
    on_two_processes("large.py", tmp_path, cache_folder, vae_folder)
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert facts["meta"]
        assert facts["elements"] == TOTAL / 2
        assert facts["largest"] == 16 * 1152 * 2 * 2880 / 2
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/loss"] for line in lines]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    checkpoint = find_checkpoint(tmp_path / "run")
    tensors = read_tensors(weights_path(checkpoint, "model"))
    biases = [t for name, t in tensors.items() if name.endswith("correction_bias")]
    assert len(biases) == 3
    for bias in biases:
        assert 0 < bias.abs().max() <= 2 * 3 * 0.01
        assert abs(bias.mean()) < 1e-6
