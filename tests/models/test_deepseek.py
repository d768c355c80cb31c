"""The DeepSeek-style layer against a token-by-token reference, and how its bias balances it."""

import dataclasses

import moe_reference as reference
import pytest
import torch
from test_moe_layers import D, S, compare, make, without_float32

from config.layers import DeepSeekConfig
from core.distributed import Processes
from core.types import RouterContext, RoutingRecord
from models.moe.deepseek import DeepSeekRouter
from training import router_state

ALONE = Processes(0, 1, torch.device("cpu"))
E = 8
PLAIN = DeepSeekConfig(num_experts=E, intermediate_size=12, routed_scaling_factor=2.5)
GROUPS = {"num_groups": 4, "top_k_groups": 2}


def layer_with_bias(config, spread=0.3):
    module, x = make(config)
    module.router.correction_bias.copy_(spread * torch.randn(E))
    return module, x


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1},
        {"top_k": E},
        {"top_k": 3, **GROUPS},
        {"top_k": 2, "num_groups": 2, "top_k_groups": 2},
        {"top_k": 1, "num_groups": E, "top_k_groups": 1},
        {"top_k": 3, "zero_masked_groups": True, **GROUPS},
    ],
    ids=str,
)
def test_outputs_gradients_and_counts_are_those_of_the_reference(changes, backend, monkeypatch):
    config = dataclasses.replace(PLAIN, **changes)
    # Half of the scores are below 0, where masking by 0 and leaving out differ.
    module, x = layer_with_bias(config, spread=1.0)
    if backend == "loop":
        module.experts.backend = backend
        module = without_float32(module, monkeypatch)
    y, record = module(x)
    router = module.router
    expected, counts = reference.deepseek(
        x, router.weight, router.correction_bias, module.experts, config
    )
    assert torch.equal(record.counts, counts)
    assert record.counts.sum(dim=1).tolist() == [S * config.top_k] * len(x)
    if backend == "loop":
        compare(module, x, y, expected)
    else:
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_masking_by_zero_lets_other_groups_win_against_negative_scores():
    chosen = {}
    for zero in (False, True):
        config = DeepSeekConfig(
            num_experts=4, top_k=2, num_groups=2, top_k_groups=1, zero_masked_groups=zero
        )
        router = DeepSeekRouter(D, config)
        scores = torch.tensor([[0.9, -0.2, 0.3, 0.2]])  # the sums of the groups: 0.7 and 0.5
        chosen[zero] = sorted(router.choose(scores)[0].tolist())
    assert chosen[False] == [0, 1]
    assert chosen[True] in ([0, 2], [0, 3])


def test_the_bias_decides_the_choice_but_not_the_weights():
    module, x = make(dataclasses.replace(PLAIN, top_k=2))
    bias = torch.zeros(E)
    bias[[2, 5]] = 10.0
    module.router.correction_bias.copy_(bias)
    plan, record = module.router(x, RouterContext())
    assert record.counts.sum(dim=0).nonzero().flatten().tolist() == [2, 5]
    sums = torch.zeros(x.shape[0] * S, dtype=plan.gate.dtype)
    sums.index_add_(0, plan.token_index, plan.gate.detach())
    torch.testing.assert_close(sums, torch.full_like(sums, 2.5))  # normalised, times the factor
    plan.gate.square().sum().backward()
    assert module.router.weight.grad[[2, 5]].abs().min() > 0
    assert module.router.weight.grad[[0, 1, 3, 4, 6, 7]].abs().max() == 0


def test_a_single_choice_is_not_normalised():
    module, x = make(dataclasses.replace(PLAIN, top_k=1))
    plan, _ = module.router(x, RouterContext())
    affinities = torch.sigmoid(x.flatten(0, 1).float() @ module.router.weight.float().T)
    torch.testing.assert_close(2.5 * affinities.amax(dim=1)[plan.token_index], plan.gate)


def test_the_identity_in_place_of_a_shared_expert():
    module, x = make(PLAIN)
    plain = module(x)[0]
    other, _ = make(dataclasses.replace(PLAIN, shared_mlp="identity"))
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x)[0], plain + x)


class OneLayer(torch.nn.Module):
    """What the trainer's router state looks at of a model: its one MoE layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def moe_layers(self):
        return [self.layer]


def records_of(loads):
    """One micro-batch of one layer with these tokens for each expert."""
    return [[RoutingRecord(torch.tensor([loads]), sum(loads))]]


def test_a_step_of_the_bias_is_against_the_sign_of_the_load_error_and_centred():
    module, _ = make(dataclasses.replace(PLAIN, num_experts=4, bias_update_rate=0.25))
    module.router.correction_bias.zero_()
    router_state.update(OneLayer(module), records_of([9, 1, 4, 2]), ALONE)  # mean 4
    # The signs -1, +1, 0, +1 have the mean 1/4.
    wanted = torch.tensor([-1.25, 0.75, -0.25, 0.75], dtype=torch.float64) * 0.25
    torch.testing.assert_close(module.router.correction_bias, wanted)
    router_state.update(OneLayer(module), records_of([5, 5, 5, 5]), ALONE)
    torch.testing.assert_close(module.router.correction_bias, wanted)


def test_micro_batches_are_one_load():
    module, _ = make(dataclasses.replace(PLAIN, num_experts=2, bias_update_rate=0.5))
    two = records_of([9, 1]) + records_of([0, 10])  # together 9 and 11
    router_state.update(OneLayer(module), two, ALONE)
    assert module.router.correction_bias.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("finite", [0.0, 1.0])
def test_a_step_that_went_wrong_leaves_the_bias(finite):
    module, _ = make(dataclasses.replace(PLAIN, num_experts=2, bias_update_rate=0.5))
    router_state.apply(OneLayer(module), torch.tensor([[3.0, 1.0]]), torch.tensor(finite))
    assert module.router.correction_bias.tolist() == [-0.5 * finite, 0.5 * finite]


def test_rate_0_holds_the_bias_fixed():
    module, _ = layer_with_bias(dataclasses.replace(PLAIN, bias_update_rate=0.0))
    before = module.router.correction_bias.clone()
    router_state.update(OneLayer(module), records_of([8, 0, 0, 0, 0, 0, 0, 0]), ALONE)
    assert torch.equal(module.router.correction_bias, before)


def test_a_forward_never_writes_the_bias():
    module, x = layer_with_bias(PLAIN)
    before = module.router.correction_bias.clone()
    module.train()(x)
    assert torch.equal(module.router.correction_bias, before)


@pytest.mark.parametrize("top_k", [2, 5, E])
def test_experts_are_computed_once_however_many_a_token_takes(top_k, monkeypatch):
    module, x = layer_with_bias(dataclasses.replace(PLAIN, top_k=top_k))
    calls, forward = [], module.experts.forward
    monkeypatch.setattr(module.experts, "forward", lambda *args: calls.append(1) or forward(*args))
    module(x)[0].sum().backward()
    assert len(calls) == 1


def test_routing_is_float32_under_autocast():
    module, x = layer_with_bias(PLAIN)
    module, x = module.float(), x.float()
    plain = module.router(x, RouterContext())[0]
    with torch.autocast("cpu", torch.bfloat16):
        plan = module.router(x, RouterContext())[0]
    assert torch.equal(plan.gate, plain.gate)
    assert torch.equal(plan.token_index, plain.token_index)
