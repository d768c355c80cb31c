"""Options that combine with every layer: shared experts, SwiGLU, fixed thresholds, schedules."""

import copy

import pytest
import torch

from config.layers import DiffMoEConfig, ExpertChoiceConfig
from config.load import parse_config
from config.model import ModelConfig
from config.schema import Config
from core.distributed import Processes
from core.errors import ConfigError
from models.build import FEED_FORWARDS, build_model

B, S, D, E = 2, 16, 8, 4


def layer_of(config, mlp="gelu"):
    torch.manual_seed(0)
    model = ModelConfig(hidden_size=D, mlp_ratio=2.0, mlp=mlp, feed_forward=config)
    layer = FEED_FORWARDS[config.name](model)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(B, S, D)


def test_swiglu_experts_are_swiglu():
    layer, x = layer_of(ExpertChoiceConfig(num_experts=1), mlp="swiglu")
    gate, up = layer.experts.w1[0].chunk(2, dim=1)
    expected = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ layer.experts.w2[0]
    torch.testing.assert_close(layer(x)[0], expected)
    assert layer.experts.b1 is None


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_the_shared_mlp_sees_every_token_with_weight_one(kind):
    shared = {"shared_mlp": kind, "shared_intermediate_size": 12}
    layer, x = layer_of(ExpertChoiceConfig(num_experts=E, **shared))
    together, _ = layer(x)
    extra = layer.shared(x)[0]
    layer.shared = None
    torch.testing.assert_close(together, layer(x)[0] + extra)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
def test_one_fixed_threshold_for_all_experts(gamma):
    config = DiffMoEConfig(num_experts=E, inference="fixed", fixed_threshold=gamma)
    layer, x = layer_of(config)
    layer.eval().router.predictor.thresholds.fill_(0.9)
    _, record = layer(x)
    above = (record.capacity_logits.sigmoid() > gamma).sum(dim=0)
    assert torch.equal(record.plan.tokens_per_expert, above)


@pytest.mark.parametrize("capacity", [0.5, 0.75, 1.0, 2.0])
def test_static_inference_at_another_capacity(capacity):
    config = DiffMoEConfig(num_experts=E, inference="topk", inference_capacity=capacity)
    layer, x = layer_of(config)
    assert layer(x)[1].counts.sum() == B * S
    assert layer.eval()(x)[1].counts.sum() == B * S * capacity


def test_capacity_schedule():
    config = DiffMoEConfig(num_experts=E, capacity=1.0, capacity_schedule=(10, 30))
    found = [config.capacity_at(step) for step in (0, 10, 15, 20, 30, 1000)]
    assert found == [4.0, 4.0, 3.25, 2.5, 1.0, 1.0]
    model = build_model(ModelConfig(hidden_size=D, num_heads=2, depth=2, feed_forward=config))
    x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([0, 1])
    for step, capacity in ((20, 2.5), (None, 1.0)):
        (record,) = model(x, t, y, step=step).routing
        assert record.counts.sum() == 2 * 256 * capacity
    (record,) = model.eval()(x, t, y, step=20).routing  # thresholds, not the schedule
    assert record.counts.sum() == 2 * 256 * E


@pytest.mark.parametrize("experts", [7, 11, 13, 15, 22])
def test_the_published_rounding_loses_a_token_only_where_asked(experts):
    full = {"num_experts": experts, "capacity": float(experts)}
    layer, _ = layer_of(DiffMoEConfig(**full, round_share_first=True))
    exact, _ = layer_of(DiffMoEConfig(**full))
    tokens = [n for n in range(1, 300) if layer.router._tokens_per_expert(n, None) != n]
    assert tokens
    assert all(layer.router._tokens_per_expert(n, None) == n - 1 for n in tokens)
    assert all(exact.router._tokens_per_expert(n, None) == n for n in range(1, 300))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--inference_capacity", "1.0"], "inference_capacity: 1.0 is not allowed; it belongs to"),
        (["--capacity_schedule", "[5, 5]"], r"capacity_schedule: \(5, 5\) is not two rising"),
        (["--shared_mlp", "gelu"], "shared_intermediate_size: 0 does not fit shared_mlp 'gelu'"),
        (["--fixed_threshold", "1.5"], r"fixed_threshold: 1\.5 is not in \[0, 1\]"),
    ],
)
def test_impossible_variants(flags, wanted):
    argv = [f"--model.feed_forward.{flags[0][2:]}", flags[1]]
    with pytest.raises(ConfigError, match=wanted):
        parse_config(argv, "train.py")


def test_starting_from_another_checkpoint(tmp_path):
    from core.errors import UserError
    from models.pretrained import load_pretrained
    from training.checkpoint import TrainingState, initialise, save_checkpoint
    from training.ema import EMA
    from training.optim import build_optimizer
    from training.saving import CheckpointWriter

    def run(name, classes, **changes):
        shape = {"input_size": 4, "hidden_size": 8, "num_heads": 2, "depth": 2}
        model = ModelConfig(
            **shape,
            num_classes=classes,
            learn_sigma=False,
            feed_forward=DiffMoEConfig(num_experts=4),
        )
        config = Config(run_dir=str(tmp_path / name), model=model, **changes)
        config.sampling.sampler = "euler"
        return config, build_model(model)

    config, old = run("old", 5)
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter)
    facts = {"vae_path": "", "scaling_factor": 1, "shift_factor": 0, "latent_channels": 4}
    latents = facts | {"class_names": []}
    ema, optimizer = EMA(copy.deepcopy(old), 0.9, False), build_optimizer(old, config.optim)
    state = TrainingState(config, old, {"ema": ema}, optimizer, latents, step=1)
    writer = CheckpointWriter(config, Processes(0, 1, torch.device("cpu")))
    save_checkpoint(state, writer)
    writer.finish()
    checkpoint = str(tmp_path / "old")
    assert load_pretrained(tmp_path / "old").config.model.num_classes == 5

    same, model = run("same", 5, init_from=checkpoint)
    initialise(same, model, None)
    assert torch.equal(model.final.linear.weight, old.final.linear.weight)
    other, model = run("other", 3, init_from=checkpoint)
    with pytest.raises(UserError, match=r"label_embed\.table\.weight is \(6, 8\) in the file"):
        initialise(other, model, None)
    other.init_fresh = "labels"
    initialise(other, model, None)
    assert torch.equal(model.blocks[1].attn.qkv.weight, old.blocks[1].attn.qkv.weight)
    other.init_fresh = "both"
    _, fresh = run("fresh", 3)
    before = fresh.final.linear.weight.clone()
    initialise(other, fresh, None)
    assert torch.equal(fresh.final.linear.weight, before)
