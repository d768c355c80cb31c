"""Stacked experts: initialisation per slice, and the ways to compute them."""

import math

import pytest
import torch
from torch import nn

from core.types import RoutingPlan
from models.moe.dispatch import places_of
from models.moe.experts import Experts


def test_each_expert_starts_as_a_dit_mlp_does():
    torch.manual_seed(0)
    experts = Experts(16, 96, 384)
    for weight, shape in ((experts.w1, (96, 384)), (experts.w2, (384, 96))):
        linear = nn.Linear(*shape)
        nn.init.xavier_uniform_(linear.weight)
        for e in range(16):
            assert math.isclose(weight[e].std().item(), linear.weight.std().item(), rel_tol=0.03)
            assert weight[e].abs().max() <= math.sqrt(6 / sum(shape))
    assert not experts.b1.any()
    assert not experts.b2.any()
    assert not torch.equal(experts.w1[0], experts.w1[1])


def outputs_and_gradients(experts, backend, counts, autocast=False):
    torch.manual_seed(1)
    experts.backend = backend
    x = torch.randn(sum(counts), 8, dtype=experts.w1.dtype, requires_grad=True)
    N = sum(counts)
    plan = RoutingPlan(torch.arange(N), torch.ones(N), torch.tensor(counts), counts)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = experts(x, plan, places_of(plan, N))
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *experts.parameters()])
    return [y, *gradients]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", [[5, 5, 5], [0, 0, 0], [7, 0, 3], [0, 1, 0]])
@pytest.mark.parametrize("backend", ["bmm", "grouped_mm", "auto"])
def test_all_backends_agree(backend, counts, mlp):
    torch.manual_seed(0)
    experts = Experts(3, 8, 16, mlp)
    for bias in (experts.b1, experts.b2):
        _ = bias is None or nn.init.normal_(bias)
    pairs = (outputs_and_gradients(experts, b, counts) for b in ("loop", backend))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["bmm", "grouped_mm"])
def test_all_backends_agree_under_autocast(backend):
    torch.manual_seed(0)
    experts = Experts(3, 8, 16)
    one, other = (outputs_and_gradients(experts, b, [4, 4, 4], True) for b in ("loop", backend))
    assert one[0].dtype == other[0].dtype == torch.bfloat16
    for wanted, found in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_experts_without_tokens_still_get_a_zero_gradient():
    """DDP waits for a gradient of every parameter."""
    experts = Experts(3, 8, 16)
    x = torch.randn(4, 8)
    plan = RoutingPlan(torch.arange(4), torch.ones(4), torch.tensor([0, 4, 0]))
    experts(x, plan, places_of(plan, 4)).sum().backward()
    assert experts.w1.grad[1].any()
    assert not experts.w1.grad[0].any()
    assert not experts.w2.grad[2].any()
