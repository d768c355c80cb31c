"""Expert choice as Nucleus-Image has it, against the class in diffusers and against plain loops."""

import math

import moe_reference as reference
import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer
from test_moe_layers import compare, make, without_float32

from config.layers import DiffMoEConfig, ExpertChoiceConfig
from config.model import ModelConfig
from core.types import RouterContext
from models.build import FEED_FORWARDS

B, S, D, E, W = 3, 16, 8, 4, 12


def ours(theirs, capacity, scores, route_scale):
    """Our layer with the weights of a `NucleusMoELayer`."""
    layer = ExpertChoiceConfig(
        num_experts=E,
        capacity=capacity,
        rounding="up",
        scores=scores,
        renormalise="token",
        route_scale=route_scale,
        router_input="decoupled",
        shared_mlp="swiglu",
        shared_intermediate_size=W,
        intermediate_size=W,
    )
    module = FEED_FORWARDS[layer.name](ModelConfig(hidden_size=D, mlp="swiglu", feed_forward=layer))
    with torch.no_grad():
        for parameter, value in pairs(module, theirs):
            parameter.copy_(value)
    return module


def pairs(module, theirs):
    """Our parameters and what theirs are in our layout; for gradients as well."""
    value, gate = theirs.shared_expert.net[0].proj.weight.chunk(2)  # the value comes first there
    return [
        (module.router.affinity.weight, theirs.gate.weight),
        (module.experts.w1, theirs.experts.gate_up_proj),
        (module.experts.w2, theirs.experts.down_proj),
        (module.shared.gate.weight, gate),
        (module.shared.up.weight, value),
        (module.shared.down.weight, theirs.shared_expert.net[2].weight),
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.3])
@pytest.mark.parametrize(("scores", "route_scale"), [("softmax", 2.5), ("sigmoid", 1.0)])
def test_outputs_and_gradients_are_those_of_diffusers(scores, route_scale, capacity, training):
    torch.manual_seed(0)
    theirs = NucleusMoELayer(D, W, E, capacity, scores == "sigmoid", route_scale)
    for parameter in theirs.parameters():  # the experts are memory as it was otherwise
        torch.nn.init.normal_(parameter, std=0.5)
    module = ours(theirs, capacity, scores, route_scale).train(training)
    inputs = [torch.randn(shape) for shape in ((B, S, D), (B, S, D), (B, D))]
    with torch.no_grad():  # no two tokens that are nearly equal to an expert
        found = module.router.affinity(
            torch.cat([inputs[2][:, None].expand(B, S, D), inputs[1]], dim=-1)
        )
        k = math.ceil(capacity * S / E)
        ranked = found.sort(dim=1, descending=True).values
        assert (ranked[:, k - 1] - ranked[:, k]).min() > 1e-5
    mine, other = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    y, record = module(mine[0], RouterContext(tokens=mine[1], time_embedding=mine[2]))
    expected = theirs(*other)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert record.counts.tolist() == [[k] * E] * B
    weight = torch.randn(B, S, D)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    gradients = [parameter.grad for parameter, _ in pairs(module, theirs)]
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    for found, (_, wanted) in zip(gradients, pairs(module, theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def weighted(module, x, plan, scale, sigmoid):
    """Each token's weights over the experts that have it, token by token."""
    weight, D = module.router.affinity.weight, x.shape[-1]
    y, start = torch.zeros_like(x).reshape(-1, D), 0
    taken = {}
    for e, count in enumerate(plan.tokens_per_expert.tolist()):
        for t in plan.token_index[start : start + count].tolist():
            taken.setdefault(t, []).append(e)
        start += count
    for t, experts in taken.items():
        token = x.reshape(-1, D)[t]
        logits = token @ weight.T
        scores = 1 / (1 + (-logits).exp()) if sigmoid else torch.softmax(logits, dim=-1)
        total = sum(scores[e] for e in experts)
        for e in experts:
            out = reference.expert(module.experts, e, token[None])[0]
            y[t] = y[t] + scale * scores[e] / total * out
    return y.view_as(x), len(taken)


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_renormalised_weights_are_those_of_a_plain_loop(pool, sigmoid, monkeypatch):
    layer = ExpertChoiceConfig(
        num_experts=E,
        pool=pool,
        renormalise="token",
        route_scale=0.7,
        scores="sigmoid" if sigmoid else "softmax",
    )
    module, x = make(layer)
    y, record = without_float32(module, monkeypatch)(x)
    expected, tokens = weighted(module, x, record.plan, 0.7, sigmoid)
    assert tokens < B * S  # some tokens have no expert
    compare(module, x, y, expected)


def test_dynamic_inference_is_renormalised_too(monkeypatch):
    module, x = make(DiffMoEConfig(num_experts=E, renormalise="token", route_scale=2.0))
    without_float32(module, monkeypatch).eval().router.predictor.thresholds.fill_(0.5)
    y, record = module(x)
    expected, _ = weighted(module, x, record.plan, 2.0, sigmoid=False)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "capacity", "down", "up"), [(16, 1.0, 4, 4), (16, 0.3, 1, 2), (3, 0.5, 0, 1)]
)
def test_rounding(tokens, capacity, down, up):
    for rounding, wanted in (("down", down), ("up", up)):
        layer = ExpertChoiceConfig(num_experts=E, capacity=capacity, rounding=rounding)
        module, x = make(layer)
        assert module(x[:, :tokens])[1].counts.tolist() == [[wanted] * E] * B
