"""Impossible combinations are refused with key, value and what is allowed."""

import pytest

from config.load import parse_config
from config.validate import accumulation_steps, check_memory
from core.errors import ConfigError

DEEPSEEK = ["--model.feed_forward.name", "deepseek"]


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
        (["--train.global_batch_size", "100"], r"64 images x 1 process\(es\) do not divide .* 100"),
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
        (["--model.num_kv_heads", "4"], r"num_kv_heads: 4 does not divide model\.num_heads 6"),
        (
            ["--model.rope", "2d", "--model.head_dim", "6"],
            r"model\.rope: 2d needs heads of a width divisible by 4, not 6",
        ),
        (
            ["--model.rope", "1d", "--model.head_dim", "7"],
            r"model\.rope: 1d needs heads of a width divisible by 2, not 7",
        ),
        (["--model.positions", "none"], r"model\.positions: none with model\.rope none leaves"),
        (
            ["--sampling.cfg_interval", "[100, 900]"],
            r"cfg_interval: \(100\.0, 900\.0\) has none of times from 0 to 1; nothing would be",
        ),
        (
            ["--objective.name", "ddpm", "--sampling.cfg_interval", "[0.1, 1.0]"],
            r"cfg_interval: \(0\.1, 1\.0\) has none of the steps 0 \.\.\. 999",
        ),
        (
            ["--optim.extra_ema_decays", "[0.9, 0.90000000001]"],
            r"extra_ema_decays: .* has the same decay twice",
        ),
        (
            ["--data.vae_path=null", "--data.source=images", "--data.data_path=x"],
            r"in_channels and model\.input_size: 4 and 32 are not those of pixels .*: 3 and .* 256",
        ),
        (
            ["--model.context_tokens", "2", "--model.context_start", "12"],
            r"context_start: 12 is not a block; model\.depth is 12",
        ),
        (
            ["--model.leading_dense", "12"],
            r"leading_dense: 12 leaves no block to the diffmoe",
        ),
        (["--model.dropout", "1"], r"model\.dropout: 1\.0 is not in \[0, 1\)"),
        (["--model.intermediate_size", "0"], r"model\.intermediate_size: 0 is too small"),
        (["--model.bottleneck_size", "0"], r"model\.bottleneck_size: 0 is too small"),
        (
            ["--model.feed_forward.intermediate_size", "0"],
            r"model\.feed_forward\.intermediate_size: 0 is too small",
        ),
        ([*DEEPSEEK, "--model.feed_forward.top_k", "17"], r"top_k: 17 is not in 1 \.\.\. num_exp"),
        ([*DEEPSEEK, "--model.feed_forward.num_groups", "3"], r"num_groups: 3 does not divide"),
        (
            [*DEEPSEEK, "--model.feed_forward.top_k_groups", "2"],
            r"top_k_groups: 2 is not in 1 \.\.\. num_groups \(1\)",
        ),
        (
            [*DEEPSEEK, "--model.feed_forward.num_groups", "8", "--model.feed_forward.top_k", "3"],
            r"top_k: 3 is more than the 2 experts of 1 group\(s\)",
        ),
        (
            [*DEEPSEEK, "--model.feed_forward.routed_scaling_factor", "0"],
            r"routed_scaling_factor: 0\.0 must be above 0",
        ),
        ([*DEEPSEEK, "--model.feed_forward.bias_update_rate", "-1"], r"_rate: -1\.0 is negative"),
        (
            [
                "--model.feed_forward.shared_mlp=identity",
                "--model.feed_forward.shared_intermediate_size=8",
            ],
            r"shared_intermediate_size: 8 does not fit shared_mlp 'identity'",
        ),
        (["--objective.t_eps", "0"], r"objective\.t_eps: 0\.0 is not in \(0, 1\)"),
        (["--objective.time_std", "0"], r"objective\.time_std: 0\.0 must be above 0"),
        (["--objective.noise_scale", "0"], r"objective\.noise_scale: 0\.0 must be above 0"),
        (
            ["--objective.noise_scale", "2", "--objective.prediction", "noise"],
            r"noise_scale: 2\.0 fits a predicted velocity or x and ODE samplers only, not noise",
        ),
        (
            ["--optim.lr", "1e-4", "--optim.base_lr", "1e-4", "--train.global_batch_size", "512"],
            r"optim\.lr: 0\.0001 is not optim\.base_lr 0\.0001 x .* 512 / 256 = 0\.0002; give one",
        ),
        (["--data.vae_path", "null"], r"data\.vae_path: null is for pixels"),
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
    with pytest.raises(ConfigError, match=r"64 images x 8 process\(es\) do not divide .* 256"):
        parse(world_size=8)
    eight = parse("--train.micro_batch_size", "32", world_size=8)
    assert accumulation_steps(eight, 8) == 1


def test_as_many_experts_as_tokens_are_allowed():
    layer = parse("--model.feed_forward.num_experts", "16384").model.feed_forward
    assert layer.num_experts == 16384


def test_what_no_machine_holds_is_refused_before_it_is_built(monkeypatch):
    with pytest.raises(ConfigError, match=r"hidden_size: 10000000 .* than 7\.2e\+15 param"):
        parse("--model.hidden_size", "10000000", "--model.num_heads", "8")
    with pytest.raises(ConfigError, match=r"model\.depth 1000000000 makes more than"):
        parse("--model.depth", "1000000000")
    config = parse("--model.hidden_size", "768")
    check_memory(config, 1)
    monkeypatch.setattr("os.sysconf", lambda name: 2**14)  # 256 MiB
    with pytest.raises(ConfigError, match=r"takes more than 2 GiB for the weights .* has 0 GiB"):
        check_memory(config, 1)


@pytest.mark.parametrize("interval", ["[0, 1.5]", "[0.5, 1.5]", "[998, 1000]"])
def test_intervals_of_guidance_that_hold_a_step(interval):
    guided = ["--objective.name", "ddpm", "--sampling.cfg_scale", "2"]
    parse(*guided, "--sampling.cfg_interval", interval)


def test_the_learning_rate_follows_the_batch_where_it_is_given_for_256_images():
    assert parse().optim.lr == 1e-4
    config = parse("--optim.base_lr", "5e-5", "--train.global_batch_size", "1024")
    assert config.optim.lr == 2e-4
    assert parse("--optim.base_lr", "5e-5", "--optim.lr", "5e-5").optim.lr == 5e-5
