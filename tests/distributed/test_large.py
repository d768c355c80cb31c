"""The largest model: what lies on each process, and that its pattern trains in shards."""

import json

import pytest
import torch
import torch.distributed as dist
from large import narrow_text
from launch import on_two_processes

from config.load import parse_config
from core.distributed import Processes
from models.build import build_model
from models.pretrained import find_checkpoint, read_tensors, weights_path
from training.parallel import local, shard
from training.trainer import train

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


@pytest.mark.parametrize("rank", [0, 31])
def test_text_to_image_on_32_processes(rank):
    config = parse_config(["--config", "t2i/diffmoe_E16_flow"], "train.py", 32)
    with torch.device("meta"):
        model = build_model(config.model)
    total = sum(p.numel() for p in model.parameters())
    assert abs(total - 4.604e9) < 2e6
    dist.init_process_group("fake", rank=rank, world_size=32, store=dist.HashStore())
    try:
        shard(model, config, Processes(rank, 32, torch.device("cpu")))
        parts = local(model.parameters())
        assert all(part.is_meta for part in parts)
        assert sum(part.numel() for part in parts) == pytest.approx(total / 32, rel=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(cache_folder, vae_folder, text_cache_folder, tmp_path_factory):
    out, data = tmp_path_factory.mktemp("large"), (cache_folder, vae_folder, text_cache_folder)
    on_two_processes("large.py", out, *data)
    return out, data


@pytest.mark.slow
def test_text_in_shards_is_text_in_one_process(runs):
    out, data = runs
    alone = Processes(0, 1, torch.device("cpu"))
    train(parse_config(narrow_text(out / "alone", *map(str, data)), "train.py"), alone)
    for name in ("model", "ema"):
        one, other = (
            read_tensors(weights_path(find_checkpoint(out / run), name))
            for run in ("alone", "text")
        )
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=2e-5, rtol=1e-4, msg=key)
        assert one["null_mask"].sum() == 2
        if name == "model":
            assert one["blocks.3.cross.proj.weight"].abs().max() > 1e-3  # it was zero


@pytest.mark.slow
def test_its_pattern_takes_three_steps_on_two_gloo_processes(runs):
    tmp_path, _ = runs
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
