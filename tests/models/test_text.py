"""Text in the model: cross-attention, masks, pooling, refiner, null text, conditions."""

import pytest
import torch
import torch.nn.functional as F

from config.load import parse_config
from config.model import ModelConfig
from config.objective import DDPMConfig, FlowConfig
from config.schema import FEED_FORWARDS
from core.conditions import Condition
from models.build import build_model
from models.summary import summarize
from sampling.objectives import build_objective
from training.step import auxiliary_losses

SHAPE = {"input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
TEXT = {"text_hidden_size": 12, "text_max_length": 7}
JIT = {
    "in_channels": 3,
    "bottleneck_size": 6,
    "context_tokens": 3,
    "context_start": 2,
    "rope": "2d",
    "norm": "rmsnorm",
}


def small(name="dense", **changes):
    layer = FEED_FORWARDS[name]()
    if name != "dense":
        layer.num_experts = 4
    torch.manual_seed(0)
    values = SHAPE | TEXT | {"feed_forward": layer, "learn_sigma": False} | changes
    model = build_model(ModelConfig(**values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if model.text_embed is not None:
        model.set_null_text(rows_of(2)[0])
    return model


def rows_of(*lengths, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 12, generator=draw) for length in lengths]


def inputs(batch=3, channels=4):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, 8, 8, generator=draw)
    return x, torch.rand(batch, generator=draw)


def text_of(lengths=(1, 4, 6), length=7, seed=3):
    return Condition.of_rows(rows_of(*lengths, seed=seed), length)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


@pytest.mark.parametrize("qk_norm", ["none", "rmsnorm", "layernorm"])
def test_a_block_against_a_plain_loop(qk_norm):
    """x += g1 attn(mod(norm x)); x += cross(norm x, text); x += g2 mlp(mod(norm x))."""
    model = small(qk_norm=qk_norm).double()
    block, cond = model.blocks[1], text_of()
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(3, 16, 16, generator=draw, dtype=torch.float64)
    c = torch.randn(3, 16, generator=draw, dtype=torch.float64)
    text = torch.randn(3, 7, 16, generator=draw, dtype=torch.float64)
    found, _ = block(x, c, text=(text, cond.mask))
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)

    def norm(v):
        return F.layer_norm(v, (16,), eps=1e-6)

    for b in range(3):
        h = x[b] + gate1[b] * block.attn((norm(x[b]) * (1 + scale1[b]) + shift1[b])[None])[0]
        there = text[b][cond.mask[b]]  # only the tokens of this caption
        q = heads(block.cross.q(norm(h)), 2)
        k, v = (heads(part, 2) for part in block.cross.kv(there).chunk(2, dim=-1))
        if qk_norm != "none":
            q = block.cross.q_norm(q)
            k = block.cross.k_norm(k)
        weights = (q @ k.transpose(1, 2) / 8**0.5).softmax(dim=-1)
        h = h + block.cross.proj((weights @ v).transpose(0, 1).flatten(1))
        y = block.feed_forward((norm(h) * (1 + scale2[b]) + shift2[b])[None])[0][0]
        torch.testing.assert_close(found[b], h + gate2[b] * y, atol=1e-12, rtol=1e-9)


def test_tokens_and_pooled_text_against_a_plain_loop():
    model = small(text_refiner=2).double()
    embed, cond = model.text_embed, text_of()
    tokens, pooled = embed(cond.text.double(), cond.mask)
    for b, row in enumerate(rows_of(1, 4, 6)):
        row = row.double()
        row = row / (row.square().mean(-1, keepdim=True) + 1e-6).sqrt() * embed.norm.weight
        torch.testing.assert_close(pooled[b], embed.pool(row.mean(dim=0)), atol=1e-6, rtol=1e-5)
        h = embed.proj(row)
        for block in embed.refiner:
            h = h + block.attn(block.norm1(h)[None])[0]
            h = h + block.mlp(block.norm2(h)[None])[0][0]
        torch.testing.assert_close(tokens[b, : len(row)], h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("refiner", [0, 1])
def test_neither_padding_nor_the_other_captions_change_anything(refiner):
    model, (x, t) = small(text_refiner=refiner).eval(), inputs()
    wanted = model(x, t, text_of()).prediction
    longer = text_of(length=12)
    longer.text[~longer.mask] = 1e3  # what is not there is not looked at
    torch.testing.assert_close(model(x, t, longer).prediction, wanted, atol=1e-5, rtol=0)
    for b, row in enumerate(rows_of(1, 4, 6)):
        alone = model(x[b : b + 1], t[b : b + 1], Condition.of_rows([row], 6)).prediction
        torch.testing.assert_close(alone[0], wanted[b], atol=1e-5, rtol=0)


def test_every_block_sees_the_text_and_heeds_its_mask():
    model, (x, t) = small(text_pooling="none").eval(), inputs()
    for number in range(4):
        for other, block in enumerate(model.blocks):
            block.cross.proj.weight.data.mul_(0 if other != number else 1)
            block.cross.proj.bias.data.zero_()
            if other == number:
                torch.nn.init.normal_(block.cross.proj.weight, std=0.2)
        cond, changed = text_of(), text_of()
        changed.text[~changed.mask] = -7.0
        wanted = model(x, t, cond).prediction
        assert torch.equal(model(x, t, changed).prediction, wanted)
        changed.text[1, 3] += 1.0
        there = (model(x, t, changed).prediction - wanted).abs().amax(dim=(1, 2, 3))
        assert (there > 1e-6).tolist() == [False, True, False]


def test_autocast_leaves_the_residual_stream_of_the_refiner_alone():
    model, cond = small(text_refiner=3).text_embed, text_of()
    for block in model.refiner:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.zero_()
            layer.bias.data.fill_(2**-12)  # which 1 + 2^-12 in bf16 would lose
    seen = []
    for block in model.refiner:
        block.register_forward_hook(lambda _, args, out: seen.append(out - args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model(cond.text, cond.mask)
    assert tokens.dtype == torch.bfloat16
    for moved in seen:
        torch.testing.assert_close(moved, torch.full_like(moved, 2**-11), atol=1e-6, rtol=0)


def test_a_class_beside_a_text_is_also_dropped_by_itself():
    model = small(num_classes=5)
    text = Condition.of_rows(rows_of(*[3] * 3000), 7)
    cond = Condition(torch.arange(3000) % 5, text.text, text.mask)
    dropped = model.drop_condition(cond, torch.Generator().manual_seed(0))
    alone = (dropped.labels == 5) & ~dropped.free
    assert (dropped.labels[dropped.free] == 5).all()
    assert abs(alone.float().mean() - 0.09) < 0.02
    assert torch.equal(dropped.text[alone], text.text[alone])


def test_dropped_captions_are_the_empty_one_with_its_own_mask():
    model, (x, t) = small().eval(), inputs()
    model.config.label_dropout = 0.999999
    cond = text_of()
    dropped = model.drop_condition(cond, torch.Generator().manual_seed(0))
    assert dropped.free.all()
    assert dropped.mask.sum(dim=1).tolist() == [2, 2, 2]  # nothing of the captions' lengths
    null = Condition.of_rows(rows_of(2) * 3, 7)
    assert torch.equal(dropped.text, null.text)
    wanted = model(x, t, null).prediction
    assert torch.equal(model(x, t, dropped).prediction, wanted)
    other = model.null_condition(text_of((3, 3, 2), seed=8))
    assert torch.equal(model(x, t, other).prediction, wanted)
    assert torch.equal(model(x, t, Condition(torch.zeros(3).long())).prediction, wanted)


def test_a_share_of_the_captions_is_dropped_by_the_generator():
    model = small()
    cond = Condition.of_rows(rows_of(*[3] * 3000), 7)
    dropped = model.drop_condition(cond, torch.Generator().manual_seed(0))
    assert abs(dropped.free.float().mean() - 0.1) < 0.02
    assert torch.equal(dropped.text[~dropped.free], cond.text[~dropped.free])
    again = model.drop_condition(cond, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.free, again.free)


def test_routers_hear_which_samples_are_unconditional():
    model, (x, t) = small("diffmoe"), inputs()
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[3].unconditional))
    free = torch.tensor([True, False, True])
    cond = text_of()
    model(x, t, model.null_condition(cond).where(free, cond))
    assert torch.equal(seen[0], free)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"text: 0 tokens; allowed: 1 \.\.\. 5"):
        Condition.of_rows([torch.zeros(2, 3), torch.zeros(0, 3)], 5)
    with pytest.raises(ValueError, match="text: 6 tokens"):
        Condition.of_rows([torch.zeros(6, 3)], 5)
    with pytest.raises(ValueError, match="text_hidden_size is null"):
        small(text_hidden_size=None, num_classes=2)(*inputs(), text_of())


def test_class_and_text_together():
    model, (x, t) = small(num_classes=5).eval(), inputs()
    text = text_of()
    cond = Condition(torch.tensor([0, 1, 2]), text.text, text.mask)
    wanted = model(x, t, cond).prediction
    for other in (
        Condition(torch.tensor([0, 3, 2]), text.text, text.mask),
        Condition(cond.labels, text.text + 1, text.mask),
    ):
        assert not torch.allclose(model(x, t, other).prediction, wanted)
    null = model.null_condition(cond)
    assert null.labels.tolist() == [5, 5, 5]
    assert null.mask.sum(dim=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("objective", [FlowConfig, DDPMConfig])
@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("changes", [{}, {"rope": "1d", "qk_norm": True}, JIT], ids=str)
def test_every_part_gets_a_gradient(name, objective, changes):
    made = build_objective(objective())
    model = small(name, learn_sigma=objective is DDPMConfig, text_refiner=1, **changes)
    x, _ = inputs(channels=changes.get("in_channels", 4))
    draw = torch.Generator().manual_seed(0)
    terms = made.training_losses(model, x, text_of(), draw)
    auxiliary = auxiliary_losses(terms.routing, model.patchify(terms.target))
    (terms.per_sample.mean() + sum(auxiliary.values())).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name


def test_recomputation_and_compilation_change_nothing():
    grads = []
    for change in ("none", "recompute", "compile"):
        model, (x, t) = small("expert_choice"), inputs()
        if change == "recompute":
            model.enable_gradient_checkpointing()
        if change == "compile":
            for block in model.blocks:
                block.compile(backend="aot_eager")
        model(x, t, text_of()).prediction.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for one in grads[1:]:
        for mine, wanted in zip(one, grads[0], strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_text_adds_nothing_at_the_start():
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE | TEXT | {"learn_sigma": False})
    model, (x, t) = build_model(config), inputs()
    torch.nn.init.normal_(model.final.linear.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation[1].weight, std=0.1)
    wanted = model(x, t, text_of()).prediction
    assert wanted.any()
    other = model(x, t, text_of((5, 2, 3), seed=7)).prediction
    assert torch.equal(other, wanted)


def test_the_null_text_goes_with_the_weights():
    model, other = small(), small()
    other.set_null_text(rows_of(5, seed=11)[0])
    assert not torch.equal(model.null_text, other.null_text)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.null_text, other.null_text)
    assert other.null_mask.tolist() == [True] * 2 + [False] * 5


@pytest.mark.parametrize(
    ("name", "total", "equation"),
    [("t2i/diffmoe_E16_flow", 4.604e9, 1.247e9), ("t2i/dit_flow", 1.244e9, 1.244e9)],
)
def test_counts_are_the_printed_ones(name, total, equation):
    """Table 7: 1.2B activated of 4.6B, and of 1.2B."""
    summary = summarize(parse_config(["--config", name], "train.py").model)
    assert summary.total == pytest.approx(total, rel=3e-4)
    assert summary.activated_by_equation(1.0) == pytest.approx(equation, rel=3e-4)
    D, E = 1408, 4096
    mlp = E * D + D + D * D + D
    cross = 4 * (D * D + D) + 2 * 64
    assert summary.roles["text"] == 28 * cross + 2 * mlp + E
