"""Stacked experts: initialisation per slice, and the two ways to compute them."""

import math

import pytest
import torch
from torch import nn

from core.types import RoutingPlan
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


@pytest.mark.parametrize("counts", [[5, 5, 5], [0, 0, 0], [4, 4, 4]])
def test_equal_counts_batched_or_one_by_one_are_the_same(counts):
    torch.manual_seed(0)
    experts = Experts(3, 8, 16).double()
    nn.init.normal_(experts.b1)
    nn.init.normal_(experts.b2)
    x = torch.randn(sum(counts), 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for capacity in (counts[0], None):
        plan = RoutingPlan(torch.arange(sum(counts)), torch.ones(3), torch.tensor(counts), capacity)
        y = experts(x, plan)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])))
    for batched, looped in zip(*gradients, strict=True):
        torch.testing.assert_close(batched, looped)


def test_experts_without_tokens_still_get_a_zero_gradient():
    """DDP waits for a gradient of every parameter."""
    experts = Experts(3, 8, 16)
    x = torch.randn(4, 8)
    plan = RoutingPlan(torch.arange(4), torch.ones(4), torch.tensor([0, 4, 0]), None)
    experts(x, plan).sum().backward()
    assert experts.w1.grad[1].any()
    assert not experts.w1.grad[0].any()
    assert not experts.w2.grad[2].any()
