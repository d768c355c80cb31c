"""Options of the backbone: what each one means, and that every layer takes all of them."""

import dataclasses

import pytest
import torch
from torch import nn

from config.layers import DenseConfig, DiffMoEConfig
from config.load import build_config, parse_config
from config.model import ModelConfig
from config.schema import FEED_FORWARDS
from core.errors import ConfigError
from core.types import RoutingPlan
from models.attention import Attention
from models.build import build_model
from models.embeddings import timestep_features
from models.feed_forward import build_mlp
from models.moe.dispatch import places_of
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.norms import RMSNorm, head_norm
from models.positions import after_context, rotary_1d, rotary_2d, rotate, rotation_of
from training.step import auxiliary_losses

SHAPE = {
    **{"input_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 4},
    **{"num_heads": 4, "num_classes": 5, "learn_sigma": False},
}
EVERYTHING = {
    **{"rope": "2d", "norm": "rmsnorm", "final_norm": "rmsnorm", "qk_norm": True},
    **{"num_kv_heads": 2, "bottleneck_size": 6, "context_tokens": 3, "context_start": 2},
    **{"mlp": "swiglu_bias", "dropout": 0.1, "leading_dense": 1, "intermediate_size": 24},
}


def random_model(**changes):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**(SHAPE | changes)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def run(model, batch=2, seed=1):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=random)
    t = torch.rand(batch, generator=random)
    return model(x, t, torch.arange(batch) % 5)


def layer(name):
    made = FEED_FORWARDS[name]()
    return made if name == "dense" else dataclasses.replace(made, num_experts=4)


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("rope", ["none", "1d", "2d"])
def test_every_layer_takes_every_option(name, rope):
    model = random_model(**EVERYTHING | {"rope": rope}, feed_forward=layer(name)).train()
    output = run(model)
    assert output.prediction.shape == (2, 3, 8, 8)
    auxiliary = auxiliary_losses(output.routing, model.patchify(output.prediction))
    (output.prediction.square().mean() + sum(auxiliary.values())).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert not without
    assert run(model.eval()).prediction.isfinite().all()


@pytest.mark.parametrize("positions", ["sincos", "none"])
@pytest.mark.parametrize("context_tokens", [0, 3])
def test_the_residual_stream_is_float32_under_autocast(positions, context_tokens):
    model = random_model(
        rope="2d", positions=positions, context_tokens=context_tokens, feed_forward=DenseConfig()
    )
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert seen == [torch.float32] * 4


# Rotary positions


def dots(rotation, positions):
    """Inner products of one query and one key, turned at each pair of positions."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8).double()
    turned = [rotate(v.expand(positions, 8), rotation) for v in (q, k)]
    return turned[0] @ turned[1].T


def test_1d_rotation_depends_on_the_distance_alone():
    angles = rotary_1d(8, 12).double()
    found = dots(rotation_of(angles), 12)
    for distance in range(-5, 6):
        diagonal = found.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert (found[0] - found[0, 0]).abs().max() > 0.1


def test_2d_rotation_depends_on_the_difference_of_rows_and_columns():
    grid = 4
    found = dots(rotation_of(rotary_2d(8, grid).double()), grid**2).view(grid, grid, grid, grid)
    for rows in (0, 1, 2):
        for columns in (0, 1):
            same = found[: grid - rows, : grid - columns, rows:, columns:]
            values = torch.stack(
                [same[r, c, r, c] for r in range(grid - rows) for c in range(grid - columns)]
            )
            torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-6)
    assert abs(found[0, 0, 0, 1] - found[0, 0, 1, 0]) > 1e-3  # row and column are told apart


def test_tokens_of_the_context_are_not_turned():
    rotation = rotation_of(after_context(rotary_2d(8, 2), 3))
    x = torch.randn(7, 8)
    turned = rotate(x, rotation)
    assert torch.equal(turned[:4], x[:4])  # the context, and the token in row 0 and column 0
    assert torch.equal(turned[3:], rotate(x[3:], rotation_of(rotary_2d(8, 2))))


def test_rotation_is_computed_in_float32():
    rotation = rotation_of(rotary_1d(8, 500))
    x = torch.randn(500, 8).bfloat16()
    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).bfloat16())


# Attention


def test_grouped_queries_are_attention_with_repeated_keys_and_values():
    torch.manual_seed(0)
    grouped, plain = Attention(32, 4, num_kv_heads=2), Attention(32, 4)
    q, k, v = grouped.qkv.weight.split([32, 16, 16])
    k, v = (part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (k, v))
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([q, k, v]))
        for attention in (grouped, plain):
            attention.qkv.bias.zero_()
        plain.proj.load_state_dict(grouped.proj.state_dict())
    x = torch.randn(2, 10, 32)
    torch.testing.assert_close(grouped(x), plain(x))
    assert grouped.qkv.weight.numel() == 2 / 3 * plain.qkv.weight.numel()


@pytest.mark.parametrize("norm", [RMSNorm, head_norm("layernorm", 1e-8)])
def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant(norm):
    torch.manual_seed(0)
    attention, x = Attention(32, 4, head_norm=norm), torch.randn(2, 10, 32)
    nn.init.zeros_(attention.qkv.bias)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:64] *= 7
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-5)


def test_rms_norm_is_its_formula_in_float32():
    norm = RMSNorm(16)
    nn.init.normal_(norm.weight)
    x = (100 * torch.randn(3, 16)).bfloat16()
    wanted = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16())


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_of_heads_has_weights_and_its_own_eps(eps):
    model = build_model(ModelConfig(**SHAPE, qk_norm="layernorm", qk_norm_eps=eps))
    norm = model.blocks[0].attn.q_norm
    assert {name: p.shape for name, p in norm.named_parameters()} == {
        "weight": (8,),
        "bias": (8,),
    }
    x = torch.randn(3, 8)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(norm(x), wanted)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("old", "new"), [(True, "rmsnorm"), (False, "none")])
def test_older_configs_say_whether_there_is_a_norm(old, new):
    assert ModelConfig(qk_norm=old).qk_norm == new
    flag = parse_config(["--model.qk_norm", str(old).lower()], "train.py")
    assert flag.model.qk_norm == new
    assert build_config({"model": {"qk_norm": old}}) == build_config({"model": {"qk_norm": new}})


# Time


@pytest.mark.parametrize(("scale", "reverse"), [(1.0, False), (1000.0, True), (1.0, True)])
def test_the_time_is_embedded_as_the_config_says(scale, reverse):
    changes = {"time_scale": scale, "time_reversed": reverse}
    model = random_model(**changes, feed_forward=DenseConfig())
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = scale * torch.tensor([1.0, 0.75, 0.0] if reverse else [0.0, 0.25, 1.0])
    wanted = model.time_embed.mlp(timestep_features(seen))
    assert torch.equal(model.time_embed(t), wanted)


@pytest.mark.parametrize("key", ["time_reversed=true", "time_scale=1000"])
def test_steps_of_ddpm_are_embedded_as_they_are(key):
    with pytest.raises(ConfigError, match=rf"model\.{key[:10]}.* is for flows"):
        parse_config([f"--model.{key}", "--objective.name=ddpm"], "train.py")


# Feed-forward layers and their pattern


def test_kinds_of_dense_layers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    gated = build_mlp("swiglu_bias", 8, 12)
    for linear in (gated.gate, gated.up, gated.down):
        nn.init.normal_(linear.bias)
    hidden = nn.functional.silu(gated.gate(x)) * gated.up(x)
    torch.testing.assert_close(gated(x)[0], gated.down(hidden))
    silu = build_mlp("silu", 8, 12)
    torch.testing.assert_close(silu(x)[0], silu.fc2(nn.functional.silu(silu.fc1(x))))
    assert sum(p.numel() for p in build_mlp("swiglu", 8, 12).parameters()) == 3 * 8 * 12


@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu", "swiglu_bias"])
def test_experts_of_every_kind_are_the_dense_layer_of_that_kind(kind):
    torch.manual_seed(0)
    experts = Experts(1, 8, 12, kind)
    dense = build_mlp(kind, 8, 12)
    for parameter in (*experts.parameters(), *dense.parameters()):
        nn.init.normal_(parameter, std=0.5)
    first = [dense.gate, dense.up] if kind.startswith("swiglu") else [dense.fc1]
    last = dense.down if kind.startswith("swiglu") else dense.fc2
    with torch.no_grad():
        experts.w1[0].copy_(torch.cat([linear.weight for linear in first]).T)
        experts.w2[0].copy_(last.weight.T)
        if experts.b1 is not None:
            experts.b1[0].copy_(torch.cat([linear.bias for linear in first]))
            experts.b2[0].copy_(last.bias)
    x = torch.randn(5, 8)
    plan = RoutingPlan(torch.arange(5), torch.ones(5), torch.tensor([5]), [5])
    torch.testing.assert_close(experts(x, plan, places_of(plan, 5)), dense(x)[0])


@pytest.mark.parametrize(
    ("every", "leading", "wanted"),
    [(1, 0, [0, 1, 2, 3]), (2, 0, [1, 3]), (2, 2, [3]), (1, 3, [3]), (2, 1, [1, 3])],
)
def test_leading_blocks_are_dense(every, leading, wanted):
    config = ModelConfig(
        **SHAPE, moe_every=every, leading_dense=leading, feed_forward=DiffMoEConfig(num_experts=4)
    )
    blocks = build_model(config).blocks
    found = [i for i, block in enumerate(blocks) if isinstance(block.feed_forward, MoEFeedForward)]
    assert found == wanted == config.moe_blocks()


def test_widths_of_experts_and_dense_layers():
    experts = DiffMoEConfig(num_experts=4, intermediate_size=20, expert_mlp="swiglu")
    model = build_model(ModelConfig(**SHAPE, intermediate_size=50, feed_forward=experts))
    assert model.blocks[0].feed_forward.fc1.out_features == 50
    assert model.blocks[1].feed_forward.experts.w1.shape == (4, 32, 40)
    assert model.blocks[1].feed_forward.experts.b1 is None


# Tokens of the class


def test_class_tokens_join_before_their_block_and_leave_before_the_output():
    options = {"context_tokens": 3, "context_start": 2, "moe_every": 1}
    model = random_model(**options, feed_forward=DiffMoEConfig(num_experts=4))
    output = run(model)
    assert [record.num_tokens for record in output.routing] == [16, 16, 19, 19]
    assert [record.num_context for record in output.routing] == [0, 0, 3, 3]
    assert output.prediction.shape == (2, 3, 8, 8)


def test_class_tokens_carry_the_label_to_the_image():
    model = random_model(context_tokens=2, context_start=3, feed_forward=DenseConfig()).eval()
    before = run(model).prediction
    with torch.no_grad():
        model.class_tokens.positions += torch.randn(2, 32)
    assert (run(model).prediction - before).abs().max() > 1e-3


# Dropout


def test_dropout_is_in_the_middle_half_and_in_training_only():
    model = random_model(dropout=0.5, feed_forward=layer("deepseek"))
    assert [block.attn.dropout.p for block in model.blocks] == [0.0, 0.5, 0.5, 0.0]
    assert model.blocks[1].feed_forward.experts.dropout == 0.5
    assert model.blocks[3].feed_forward.experts.dropout == 0.0
    assert model.blocks[2].feed_forward.dropout.p == 0.5
    model.eval()
    assert torch.equal(run(model).prediction, run(model).prediction)
    model.train()
    assert not torch.equal(run(model).prediction, run(model).prediction)


# Building without memory


def test_tables_are_filled_after_a_model_was_built_on_the_meta_device():
    config = ModelConfig(**SHAPE, **EVERYTHING, feed_forward=DenseConfig())
    with torch.device("meta"):
        model = build_model(config)
    assert all(table.is_meta for table in (model.positions, model.rotary_cos))
    model.to_empty(device="cpu")
    model.fill_tables()
    model.load_state_dict(random_model(**EVERYTHING, feed_forward=DenseConfig()).state_dict())
    wanted = random_model(**EVERYTHING, feed_forward=DenseConfig()).eval()
    assert torch.equal(run(model.eval()).prediction, run(wanted).prediction)
