"""Impossible combinations are refused with key, value and what is allowed."""

import pytest

from config.load import parse_config
from config.validate import accumulation_steps
from core.errors import ConfigError


def parse(*argv, world_size=1):
    return parse_config(list(argv), "train.py", world_size)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--model.num_heads", "5"], r"model\.hidden_size: 384 is not divisible by .* 5"),
        (
            ["--model.hidden_size", "6", "--model.num_heads", "1"],
            r"model\.hidden_size: 6 is not divisible by 4",
        ),
        (["--model.patch_size", "3"], r"model\.patch_size: 3 does not divide .* 32"),
        (["--model.depth", "0"], r"model\.depth: 0 is too small; at least 1"),
        (["--model.num_classes", "-1"], r"model\.num_classes: -1 is too small"),
        (
            ["--model.num_classes", "0", "--sampling.cfg_scale", "1.5"],
            r"sampling\.cfg_scale: 1\.5 needs classes",
        ),
        (["--data.source", "npz"], r"data\.npz_contents: source npz needs it"),
        (["--data.source", "images"], r"data\.data_path: source images needs it"),
        (
            ["--data.source", "images", "--data.data_path", "x", "--data.order", "shards"],
            r"data\.order: shards is for cached latents",
        ),
        (["--data.cached_path", "[]"], r"data\.cached_path: names no folder"),
        (["--model.mlp_ratio", "0"], r"model\.mlp_ratio: 0\.0 must be above 0"),
        (["--model.label_dropout", "1"], r"model\.label_dropout: 1\.0 is not in \[0, 1\)"),
        (["--model.moe_every", "13"], r"model\.moe_every: 13 is larger than model\.depth 12"),
        (["--optim.ema_decay", "1"], r"optim\.ema_decay: 1\.0 is not in"),
        (
            ["--model.feed_forward.name", "token_choice", "--model.feed_forward.top_k", "17"],
            r"top_k: 17 is not in 1 \.\.\. num_experts \(16\)",
        ),
        (
            [
                "--model.feed_forward.name",
                "expert_choice",
                "--model.feed_forward.num_experts",
                "300",
            ],
            r"num_experts: 300 is not in 1 \.\.\. 256, the tokens in the pool of a sample",
        ),
        (["--model.feed_forward.num_experts", "16385"], r"not in 1 \.\.\. 16384, .* of a batch"),
        (
            ["--model.feed_forward.name=token_choice", "--model.feed_forward.num_experts=20000"],
            r"num_experts: 20000 is more than the 16384 tokens",
        ),
        (["--model.feed_forward.capacity", "17"], r"capacity: 17\.0 is not in \(0, num_experts"),
        (["--model.feed_forward.threshold_decay", "1"], r"threshold_decay: 1\.0 is not in"),
        (
            ["--model.feed_forward.capacity_predictor", "false"],
            r"inference: 'dynamic' needs .*capacity_predictor true; allowed without: topk",
        ),
        (["--train.global_batch_size", "100"], r"100 is not a multiple of .* 64 x 1 process"),
        (["--objective.loss_weighting", "velocity"], r"'velocity' means nothing for a predicted"),
        (["--objective.train_eps", "0.5"], r"objective\.train_eps: 0\.5 is not in \[0, 0\.5\)"),
        (["--sampling.last_step_size", "0"], r"last_step_size: 0\.0 is not in \(0, 1\)"),
        (["--sampling.diffusion_norm", "-1"], r"diffusion_norm: -1\.0 is negative"),
        (["--sampling.cfg_interval", "[0.5, 0.5]"], r"cfg_interval: \(0\.5, 0\.5\) is empty"),
        (
            ["--sampling.sampler", "euler_maruyama", "--sampling.num_steps", "1"],
            r"num_steps: 1 is too small for euler_maruyama with a last step",
        ),
        (
            ["--model.expert_backend", "grouped_mm", "--model.hidden_size", "12"],
            r"expert_backend: grouped_mm wants widths in multiples of 8; .* are 12 and 48",
        ),
        (["--sampling.sampler", "ddim"], r"'ddim' does not belong to objective\.name flow; known"),
        (
            ["--objective.name", "ddpm", "--sampling.num_steps", "1001"],
            r"sampling\.num_steps: 1001 is more than objective\.num_timesteps 1000",
        ),
    ],
)
def test_impossible_combinations(argv, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parse(*argv)


def test_global_batch_over_processes_and_accumulation():
    assert accumulation_steps(parse(world_size=4), 4) == 1
    assert accumulation_steps(parse(world_size=2), 2) == 2
    with pytest.raises(ConfigError, match=r"256 is not a multiple of .* 64 x 8 process"):
        parse(world_size=8)
    eight = parse("--train.micro_batch_size", "32", world_size=8)
    assert accumulation_steps(eight, 8) == 1


def test_as_many_experts_as_tokens_are_allowed():
    layer = parse("--model.feed_forward.num_experts", "16384").model.feed_forward
    assert layer.num_experts == 16384
