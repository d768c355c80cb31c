"""What routers read: the modulated tokens, or time and unmodulated tokens (decoupled)."""

import dataclasses

import pytest
import torch
from torch import nn

from config.model import ModelConfig
from config.schema import FEED_FORWARDS
from core.types import RouterContext
from models.build import build_model
from models.flops import forward_flops
from models.moe.layer import router_tokens
from training.step import auxiliary_losses

D, E = 16, 4
SHAPE = {"input_size": 8, "hidden_size": D, "depth": 2, "num_heads": 2, "num_classes": 5}
ROUTED = [name for name in FEED_FORWARDS if name != "dense"]


def config(name, router_input="decoupled", **changes):
    layer = dataclasses.replace(FEED_FORWARDS[name](), num_experts=E, router_input=router_input)
    return ModelConfig(**(SHAPE | changes), learn_sigma=False, feed_forward=layer)


def random_model(name, **changes):
    torch.manual_seed(0)
    model = build_model(config(name, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 5])


def seen_by_routers(model, *args):
    """What the router of each layer reads, and what its block's norm gives."""
    seen = []
    for layer in model.moe_layers():
        layer.router.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(*args)
    return seen


def test_the_time_is_repeated_over_the_tokens_and_comes_first():
    x, tokens, time = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    context = RouterContext(tokens=tokens, time_embedding=time)
    assert router_tokens(x, context, "modulated") is x
    found = router_tokens(x, context, "decoupled")
    assert found.shape == (2, 3, 8)
    assert torch.equal(found[:, :, 4:], tokens)
    for place in range(3):
        assert torch.equal(found[:, place, :4], time)


@pytest.mark.parametrize("name", ROUTED)
def test_every_router_can_read_time_and_unmodulated_tokens(name):
    model = random_model(name)
    x, t, y = inputs()
    ((read, context),) = seen_by_routers(model, x, t, y)
    assert read.shape == (3, 16, 2 * D)
    time = model.time_embed(t)
    assert torch.equal(read[..., :D], time[:, None].expand(-1, 16, -1))
    assert torch.equal(read[..., D:], context.tokens)
    torch.testing.assert_close(read[..., D:].mean(-1), torch.zeros(3, 16), atol=1e-5, rtol=0)
    assert torch.equal(context.condition, time + model.label_embed(y))


@pytest.mark.parametrize("name", ROUTED)
def test_a_decoupled_router_does_not_see_the_class_and_every_parameter_learns(name):
    model = random_model(name).train()
    layer, tokens = model.moe_layers()[0], torch.randn(3, 16, D)
    known = RouterContext(tokens=tokens, time_embedding=torch.randn(3, D))
    one, other = (layer(x, known)[1] for x in torch.randn(2, 3, 16, D))
    assert torch.equal(one.plan.token_index, other.plan.token_index)
    assert torch.equal(one.plan.gate, other.plan.gate)
    output = model(*inputs())
    auxiliary = sum(auxiliary_losses(output.routing, model.patchify(inputs()[0])).values())
    (output.prediction.square().mean() + auxiliary).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ROUTED)
def test_a_decoupled_router_is_wider_and_says_so(name):
    flops = {kind: forward_flops(config(name, kind)) for kind in ("modulated", "decoupled")}
    widths = {}
    for kind in flops:
        router = build_model(config(name, kind)).moe_layers()[0].router
        widths[kind] = sum(p.numel() for p in router.parameters() if p.dim() == 2)
    more = widths["decoupled"] - widths["modulated"]
    assert more >= E * D
    assert flops["decoupled"] - flops["modulated"] == 2 * 16 * more


@pytest.mark.parametrize("name", ROUTED)
def test_decoupled_routing_compiles_whole_and_is_recomputed_alike(name):
    model = random_model(name).train()
    found = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.gradient_checkpointing = len(found) == 2
        model.zero_grad()
        call(*inputs()).prediction.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-6)
