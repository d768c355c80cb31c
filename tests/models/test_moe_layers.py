"""Every MoE layer against the plain loops of Algorithms 1-4: outputs, gradients, records."""

import moe_reference as reference
import pytest
import torch

from config.layers import DiffMoEConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.model import ModelConfig
from config.race import RaceConfig
from core.types import RouterContext, RoutingPlan
from models.build import FEED_FORWARDS
from models.moe.dispatch import chunks, combine, places_of

B, S, D, E = 3, 16, 8, 4


def make(layer, seed=0):
    """A layer in float64 with all parameters random, and an input that wants gradients."""
    torch.manual_seed(seed)
    config = ModelConfig(hidden_size=D, mlp_ratio=2.0, feed_forward=layer)
    module = FEED_FORWARDS[layer.name](config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module, torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)


def without_float32(module, monkeypatch):
    """Let the router and the combine, which compute in float32 by rule, keep float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    return module


def compare(module, x, y, expected, extra=0.0, expected_extra=0.0):
    """Outputs and all gradients of a random projection of them (plus auxiliary losses)."""
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((y * weight).sum() + extra, inputs, allow_unused=True)
    loss = (expected * weight).sum() + expected_extra
    theirs = torch.autograd.grad(loss, inputs, allow_unused=True)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_token_choice_is_algorithm_2(top_k, monkeypatch):
    layer = TokenChoiceConfig(num_experts=E, top_k=top_k, balance_loss_weight=0.5)
    module, x = make(layer)
    y, record = without_float32(module, monkeypatch)(x)
    weight = module.router.affinity.weight
    expected, counts = reference.token_choice(x, weight, module.experts, top_k)
    scores = reference.affinity(x.reshape(-1, D), weight)
    chosen = [e for row in scores for e in row.argsort(descending=True)[:top_k].tolist()]
    balance = 0.5 * reference.balance(scores, chosen, E)
    compare(module, x, y, expected, record.losses["balance"], balance)
    torch.testing.assert_close(record.losses["balance"], balance)
    assert torch.equal(record.counts, counts)
    assert record.capacity_per_sample().tolist() == [top_k] * B


def test_balance_loss_is_a_training_loss_that_can_be_off():
    module, x = make(TokenChoiceConfig(num_experts=E))
    assert "balance" not in module.eval()(x)[1].losses
    module, x = make(TokenChoiceConfig(num_experts=E, balance_loss_weight=0.0))
    assert not module(x)[1].losses


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0, float(E)])
@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_is_algorithm_1(capacity, training, monkeypatch):
    module, x = make(ExpertChoiceConfig(num_experts=E, capacity=capacity))
    y, record = without_float32(module, monkeypatch).train(training)(x)
    k = int(S * capacity / E)
    weight = module.router.affinity.weight
    expected, counts = reference.expert_choice(x, weight, module.experts, k)
    compare(module, x, y, expected)
    assert torch.equal(record.counts, counts)
    assert not record.losses


def test_expert_choice_does_not_look_at_other_samples():
    module, x = make(ExpertChoiceConfig(num_experts=E))
    alone, _ = module(x[:1])
    torch.testing.assert_close(module(x)[0][:1], alone)


@pytest.mark.parametrize("capacity", [1.0, 2.0])
def test_diffmoe_training_is_algorithm_3(capacity, monkeypatch):
    layer = DiffMoEConfig(num_experts=E, capacity=capacity, capacity_loss_weight=0.3)
    module, x = make(layer)
    y, record = without_float32(module, monkeypatch)(x)
    k = int(B * S * capacity / E)
    weight, predictor = module.router.affinity.weight, module.router.predictor
    expected, counts, ones = reference.diffmoe(x, weight, module.experts, [k] * E)
    loss, p = reference.capacity_loss(predictor, x.reshape(-1, D), ones)
    compare(module, x, y, expected, record.losses["capacity"], 0.3 * loss)
    torch.testing.assert_close(record.losses["capacity"], 0.3 * loss)
    assert torch.equal(record.counts, counts)
    assert torch.equal(record.capacity_targets, ones.to(record.capacity_targets))
    kth = p.sort(dim=0, descending=True).values[k - 1]
    torch.testing.assert_close(record.quantiles, kth)


def test_the_forward_writes_no_state():
    module, x = make(DiffMoEConfig(num_experts=E))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module(x)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("thresholds", [(0.2, 0.4, 0.5, 0.8), (0.0, 1.0, 0.5, 0.5), (1.0,) * E])
def test_diffmoe_inference_is_algorithm_4(thresholds, monkeypatch):
    module, x = make(DiffMoEConfig(num_experts=E))
    module = without_float32(module, monkeypatch).eval()
    predictor = module.router.predictor
    predictor.thresholds.copy_(torch.tensor(thresholds))
    y, record = module(x)
    weight = module.router.affinity.weight
    _, p = reference.capacity_loss(predictor, x.reshape(-1, D), torch.zeros(B * S, E))
    k_pred = [int((p[:, e] > thresholds[e]).sum()) for e in range(E)]
    expected, counts, _ = reference.diffmoe(x, weight, module.experts, k_pred)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(record.counts, counts)
    assert not record.losses
    assert record.quantiles is None


def test_static_inference_and_dynamic_choice_within_samples(monkeypatch):
    """The other rows of Table 8: pool, predictor and inference rule combine freely."""
    module, x = make(DiffMoEConfig(num_experts=E, inference="topk"))
    training, _ = module(x)
    torch.testing.assert_close(module.eval()(x)[0], training)

    layer = ExpertChoiceConfig(num_experts=E, capacity_predictor=True, inference="dynamic")
    module, x = make(layer)
    without_float32(module, monkeypatch).eval()
    module.router.predictor.thresholds.fill_(0.5)
    y, record = module(x)
    weight = module.router.affinity.weight
    for b in range(B):
        _, p = reference.capacity_loss(module.router.predictor, x[b], torch.zeros(S, E))
        k = (p > 0.5).sum(dim=0).tolist()
        expected, counts, _ = reference.diffmoe(x[b : b + 1], weight, module.experts, k)
        torch.testing.assert_close(y[b : b + 1], expected, rtol=1e-10, atol=1e-12)
        assert record.counts[b].tolist() == counts[0].tolist()


def test_fewer_tokens_than_experts_leave_the_layer_idle():
    module, x = make(DiffMoEConfig(num_experts=8))
    y, record = module(x[:1, :4])
    assert torch.equal(y, torch.zeros_like(y))
    assert record.quantiles.tolist() == [1.0] * 8
    assert record.counts.sum() == 0


@pytest.mark.parametrize("experts", [3, 7, 11, 13, 22])
def test_full_capacity_loses_no_token_to_rounding(experts):
    module, x = make(DiffMoEConfig(num_experts=experts, capacity=float(experts)))
    assert module(x)[1].counts.tolist() == [[S] * experts] * B


@pytest.mark.parametrize(
    "layer", [TokenChoiceConfig(num_experts=E), DiffMoEConfig(num_experts=E)], ids=lambda c: c.name
)
def test_autocast_keeps_the_router_in_float32(layer):
    module, x = make(layer)
    module, x = module.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = module.router.affinity(x.to(torch.bfloat16))
        y, record = module(x)
    assert scores.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    exact, exact_record = module(x)
    assert torch.equal(record.counts, exact_record.counts)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("budget", [1, 2])
@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_a_few_experts_at_a_time_compute_the_same(pool, budget, training, monkeypatch):
    """A schedule's start in training; in evaluation fresh thresholds let every token pass."""
    module, x = make(DiffMoEConfig(num_experts=E, pool=pool))
    module.train(training)
    context = RouterContext(capacity=3.5)
    found = []
    for rows in (100, budget):
        monkeypatch.setattr("models.moe.layer.ROW_BUDGET", rows)
        calls = []
        hook = module.experts.register_forward_hook(lambda *_, c=calls: c.append(1))
        y, _ = module(x, context)
        hook.remove()
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.experts.parameters()])])
        assert len(calls) == 1 if rows == 100 else len(calls) > 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(x, context)[0], found[0][0], rtol=1e-5, atol=1e-5)


def test_what_the_config_asks_for_is_computed_at_once():
    module, x = make(ExpertChoiceConfig(num_experts=6, capacity=6.0))
    calls = []
    module.experts.register_forward_hook(lambda *_: calls.append(1))
    assert module(x)[1].counts.sum() == 6 * B * S
    assert len(calls) == 1


@pytest.mark.parametrize(
    "index", [[], [3, 3, 3, 0], [0, 1, 2, 3, 4], [2, 2]], ids=["none", "many", "one each", "gaps"]
)
def test_the_combine_sums_what_each_token_has_and_its_gradient_gathers(index):
    torch.manual_seed(0)
    index, T = torch.tensor(index, dtype=torch.int64), 5
    outputs = torch.randn(len(index), 3, requires_grad=True)
    gate = torch.randn(len(index), requires_grad=True)
    plan = RoutingPlan(index, gate, torch.ones(len(index), dtype=torch.int64))
    wanted = torch.zeros(T, 3)
    for pair, token in enumerate(index.tolist()):
        wanted[token] = wanted[token] + gate[pair] * outputs[pair]
    y = combine(outputs, plan, places_of(plan, T))
    torch.testing.assert_close(y, wanted)
    if len(index):
        weight = torch.randn(T, 3)
        ours = torch.autograd.grad((y * weight).sum(), [outputs, gate])
        theirs = torch.autograd.grad((wanted * weight).sum(), [outputs, gate])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_a_plan_holds_its_invariants():
    with pytest.raises(AssertionError):
        RoutingPlan(torch.arange(3), torch.ones(2), torch.tensor([3]))
    with pytest.raises(AssertionError):
        RoutingPlan(torch.arange(3), torch.ones(3), torch.tensor([3]), [2])
    assert RoutingPlan(torch.arange(4), torch.ones(4), torch.tensor([2, 2]), [2, 2]).capacity == 2
    assert (
        RoutingPlan(torch.arange(4), torch.ones(4), torch.tensor([1, 3]), [1, 3]).capacity is None
    )
    assert RoutingPlan(torch.arange(4), torch.ones(4), torch.tensor([2, 2])).capacity is None


def test_chunks_are_consecutive_and_within_the_budget():
    plan = RoutingPlan(torch.arange(12), torch.ones(12), torch.tensor([3, 0, 5, 1, 3]))
    parts = chunks(plan, 4)
    assert [(e.start, e.stop) for e, _ in parts] == [(0, 2), (2, 3), (3, 5)]
    assert [(p.start, p.stop) for _, p in parts] == [(0, 3), (3, 8), (8, 12)]
    assert len(chunks(plan, 12)) == 1
    assert plan.part(*parts[2]).tokens_per_expert.tolist() == [1, 3]


@pytest.mark.parametrize(
    "layer",
    [
        TokenChoiceConfig(num_experts=E, top_k=2),
        DiffMoEConfig(num_experts=E),
        RaceConfig(num_experts=E, gate="softmax", plr_loss_weight=0.0),
    ],
    ids=lambda c: c.name,
)
def test_backends_of_whole_layers_agree(layer):
    module, x = make(layer)
    module, found = module.float(), []
    x = x.detach().float().requires_grad_()
    for backend in ("loop", "bmm", "grouped_mm", "auto"):
        module.experts.backend = backend
        y, record = module.train()(x)
        loss = y.square().sum() + sum(record.losses.values())
        module.eval()
        found.append([y, *torch.autograd.grad(loss, [x, *module.parameters()]), module(x)[0]])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
