"""Expert Race against a plain loop over all pairs, written from its formulas, in float64."""

import math

import moe_reference as reference
import pytest
import torch
import torch.nn.functional as F
from test_moe_layers import compare, without_float32
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config.model import ModelConfig
from config.objective import DDPMConfig, FlowConfig
from config.race import RaceConfig
from core.distributed import Processes
from core.types import RouterContext
from diffusion.objective import DDPM
from models.build import FEED_FORWARDS, build_model
from models.moe.race import similarity_loss
from training import router_state
from training.step import auxiliary_losses
from transport.objective import Flow

B, S, D, E, K = 3, 16, 8, 4, 2
POOLS = ["batch", "sample", "position", "token", "expert_batch", "expert_sample"]
ALONE = Processes(0, 1, torch.device("cpu"))


def make(seed=0, experts=E, **options):
    """A layer in float64 with all parameters random, and an input that wants gradients."""
    torch.manual_seed(seed)
    layer = RaceConfig(num_experts=experts, top_k=K, hidden_split=2, **options)
    model = ModelConfig(hidden_size=D, mlp_ratio=2.0, feed_forward=layer)
    module = FEED_FORWARDS["race"](model).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module, torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)


def hidden_and_logits(router, token):
    u = token @ router.hidden.weight.T + router.hidden.bias
    u = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
    return u, u @ router.gate.weight.T + router.gate.bias


def score(logits, gate):
    if gate == "softmax":
        return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    return 1 / (1 + (-logits).exp()) if gate == "sigmoid" else logits


def contest_of(pool, b, s, e):
    """Which selection a pair competes in."""
    return {
        "batch": (),
        "sample": (b,),
        "position": (s,),
        "token": (b, s),
        "expert_batch": (e,),
        "expert_sample": (e, b),
    }[pool]


def plain_race(module, x, pool, gate):
    """Pairs in order of their scores, contest by contest.

    Returns the output, the mask (B, S, E), the smallest winner of each contest, and the logits.
    """
    logits = torch.stack(
        [torch.stack([hidden_and_logits(module.router, t)[1] for t in sample]) for sample in x]
    )
    scores = score(logits, gate)
    contests = {}
    for b in range(B):
        for s in range(S):
            for e in range(E):
                pair = scores[b, s, e].item(), b, s, e
                contests.setdefault(contest_of(pool, b, s, e), []).append(pair)
    mask, smallest = torch.zeros(B, S, E, dtype=x.dtype), {}
    y = [[torch.zeros(D, dtype=x.dtype) for _ in range(S)] for _ in range(B)]
    for key, pairs in contests.items():
        won = sorted(pairs, reverse=True)[: B * S * K // len(contests)]
        smallest[key] = won[-1][0]
        for _, b, s, e in won:
            out = reference.expert(module.experts, e, x[b, s][None])[0]
            y[b][s] = y[b][s] + scores[b, s, e] * out
            mask[b, s, e] = 1
    return torch.stack([torch.stack(row) for row in y]), mask, smallest, logits


def plain_similarity(logits, mask):
    """The loss entry by entry."""
    logits, mask = logits.reshape(-1, E), mask.reshape(-1, E)
    p = score(logits, "softmax")
    diagonal = sum(mask[t, i] for t in range(len(mask)) for i in range(E))
    off = sum(
        mask[t, i] * mask[t, j]
        for t in range(len(mask))
        for i in range(E)
        for j in range(E)
        if i != j
    )
    total = 0
    for i in range(E):
        for j in range(E):
            together = (mask[:, i] * mask[:, j]).sum()
            if i == j:
                weight = E * together / diagonal
            else:
                weight = (E**2 - E) * together / off if off > 0 else 0
            total = total + weight * (p[:, i] * p[:, j]).sum()
    return total / len(p)


@pytest.mark.parametrize("gate", ["identity", "softmax", "sigmoid"])
@pytest.mark.parametrize("pool", POOLS)
def test_training_is_the_plain_race(pool, gate, monkeypatch):
    module, x = make(pool=pool, gate=gate, similarity_loss_weight=0.3, plr_loss_weight=0.7)
    y, record = without_float32(module, monkeypatch)(x)
    expected, mask, smallest, logits = plain_race(module, x, pool, gate)
    assert torch.equal(record.token_mask().view(B, S, E), mask)
    assert torch.equal(record.counts, mask.sum(dim=1).long())
    assert mask.sum() == B * S * K
    similarity = plain_similarity(logits, mask)
    torch.testing.assert_close(record.losses["similarity"], 0.3 * similarity)

    head, target = module.router.target, torch.randn(B, S, 16, dtype=torch.float64)
    error = sum(
        ((hidden_and_logits(module.router, x[b, s])[0] @ head.weight.T + head.bias) - target[b, s])
        .square()
        .sum()
        for b in range(B)
        for s in range(S)
    )
    plr = 0.7 * error / target.numel()
    torch.testing.assert_close(record.plr_loss(target), plr)
    ours = record.losses["similarity"] + record.plr_loss(target)
    compare(module, x, y, expected, ours, 0.3 * similarity + plr)

    wanted = torch.tensor(list(smallest.values()), dtype=torch.float64)
    if pool.startswith("expert"):
        wanted = torch.tensor(
            [
                sum(v for (e, *_), v in smallest.items() if e == expert)
                / sum(e == expert for e, *_ in smallest)
                for expert in range(E)
            ],
            dtype=torch.float64,
        )
    else:
        wanted = wanted.mean().expand(E)
    torch.testing.assert_close(record.quantiles, wanted)


@pytest.mark.parametrize("gate", ["identity", "softmax", "sigmoid"])
def test_inference_takes_what_reaches_the_threshold(gate, monkeypatch):
    module, x = make(gate=gate)
    module = without_float32(module, monkeypatch).eval()
    router, tau = module.router, 0.3
    router.thresholds.fill_(tau)
    y, record = module(x)
    expected, taken = torch.zeros_like(x), torch.zeros(B, S, E)
    for b in range(B):
        for s in range(S):
            scores = score(hidden_and_logits(router, x[b, s])[1], gate)
            for e in range(E):
                if scores[e] >= tau:
                    out = reference.expert(module.experts, e, x[b, s][None])[0]
                    expected[b, s] = expected[b, s] + scores[e] * out
                    taken[b, s, e] = 1
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(record.counts, taken.sum(dim=1).long())
    assert 0 < taken.sum() < taken.numel()
    assert not record.losses
    assert record.quantiles is None
    assert record.prediction is None


@pytest.mark.parametrize("threshold", [1e6, -1e6])
def test_thresholds_that_nothing_or_everything_reaches(threshold):
    module, x = make()
    module.eval().router.thresholds.fill_(threshold)
    y, record = module(x)
    assert record.counts.sum() == (0 if threshold > 0 else B * S * E)
    assert y.any() == (threshold < 0)


def test_inference_with_the_top_k_of_the_pool_is_that_of_training():
    module, x = make(inference="topk")
    training, record = module(x)
    torch.testing.assert_close(module.eval()(x)[0], training)
    assert record.prediction is not None
    assert module(x)[1].prediction is None


@pytest.mark.parametrize("pool", POOLS)
def test_training_never_looks_at_the_device(pool):
    """Tensors without data: whatever needed a number of theirs would fail."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        layer = RaceConfig(num_experts=8, top_k=K, pool=pool)
        config = ModelConfig(hidden_size=16, expert_backend="grouped_mm", feed_forward=layer)
        module = FEED_FORWARDS["race"](config)
        y, record = module(torch.randn(B, S, 16))
        loss = y.sum() + sum(record.losses.values()) + record.plr_loss(torch.zeros(B, S, 16))
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            module.eval()(torch.randn(B, S, 16))


def tiny(**options):
    torch.manual_seed(0)
    layer = RaceConfig(num_experts=E, top_k=K, **options)
    shape = {"input_size": 8, "hidden_size": 16, "num_heads": 2, "depth": 3, "moe_every": 1}
    model = build_model(ModelConfig(**shape, num_classes=3, feed_forward=layer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, 8, 8, generator=draw)
    return x, torch.rand(5, generator=draw), torch.tensor([0, 1, 2, 3, 0])


def test_a_sample_is_computed_the_same_alone_and_in_any_batch():
    """To the bit: each pair decides by its own score and a number.

    In float64, since matrix products of other shapes may round otherwise; the sum is float32.
    """
    torch.manual_seed(0)
    layer = RaceConfig(num_experts=8, hidden_split=2)
    module = FEED_FORWARDS["race"](ModelConfig(hidden_size=64, feed_forward=layer)).double().eval()
    module.router.thresholds.fill_(0.2)
    x = torch.randn(6, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        together, record = module(x)
        for b in range(6):
            alone, own = module(x[b : b + 1])
            assert torch.equal(alone[0], together[b])
            assert torch.equal(own.counts[0], record.counts[b])
            assert own.counts.any()
        two, _ = module(x[[4, 1]])
        assert torch.equal(two, together[[4, 1]])


def test_so_is_a_sample_of_a_whole_model():
    model = tiny().double().eval()
    for layer in model.moe_layers():
        layer.router.thresholds.fill_(0.1)
    x, t, labels = batch()
    parts = x.double(), t.double(), labels
    with torch.no_grad():
        together = model(*parts)
        for b in range(5):
            alone = model(*(part[b : b + 1] for part in parts))
            assert torch.equal(alone.prediction[0].float(), together.prediction[b].float())
            for one, many in zip(alone.routing, together.routing, strict=True):
                assert torch.equal(one.counts[0], many.counts[b])


def test_the_trained_threshold_makes_inference_cost_what_training_does():
    module, x = make()
    _, record = module(x)
    router = module.router
    router.thresholds.copy_(router.row(record))
    _, found = module.eval()(x)
    assert torch.equal(found.plan.token_index, record.plan.token_index)


def test_thresholds_after_one_and_two_steps():
    """Of several micro-batches and layers; the forward itself writes nothing."""
    model = tiny(threshold_decay=0.8)
    before = [layer.router.thresholds.clone() for layer in model.moe_layers()]
    wanted = [0.0] * 3
    for step in range(2):
        records = [model(*batch(10 * step + micro)).routing for micro in range(2)]
        for layer, old in zip(model.moe_layers(), before, strict=True):
            assert torch.equal(layer.router.thresholds, old)
        router_state.update(model, records, ALONE)
        for i, layer in enumerate(model.moe_layers()):
            kth = []
            for micro in records:
                gates = micro[i].plan.gate
                assert len(gates) == 5 * 16 * K
                kth.append(gates.min().item())
            wanted[i] = 0.8 * wanted[i] + 0.2 * sum(kth) / 2
            torch.testing.assert_close(layer.router.thresholds, torch.full((E,), wanted[i]))
        before = [layer.router.thresholds.clone() for layer in model.moe_layers()]


def test_similarity_is_one_where_all_is_uniform_and_balanced():
    every_pair = torch.tensor([[i in pair for i in range(E)] for pair in PAIRS]).double()
    uniform = torch.zeros(len(PAIRS), E, dtype=torch.float64)
    assert similarity_loss(uniform, every_pair).item() == pytest.approx(1)


def test_similarity_counts_experts_that_always_work_together():
    same_pair = torch.tensor([[1.0, 1, 0, 0]]).repeat(6, 1).double()
    alike = torch.tensor([[5.0, 5, -5, -5]]).repeat(6, 1).double()
    assert similarity_loss(alike, same_pair).item() == pytest.approx(
        4 * (1 / 4) + 12 * (1 / 4), rel=1e-3
    )
    alone = torch.eye(E).double()  # no pair of experts shares a token
    assert similarity_loss(torch.zeros(E, E).double(), alone).item() == pytest.approx(1 / E)


PAIRS = [(i, j) for i in range(E) for j in range(i)]


def test_losses_can_be_off():
    module, x = make(similarity_loss_weight=0.0, plr_loss_weight=0.0)
    _, record = module(x)
    assert module.router.target is None
    assert record.prediction is None
    assert not record.losses


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (Flow(), lambda x, noise: x - noise),
        (Flow(FlowConfig(prediction="noise")), lambda x, noise: noise),
        (Flow(FlowConfig(prediction="x")), lambda x, noise: x),
        (DDPM(DDPMConfig()), lambda x, noise: noise),
        (DDPM(DDPMConfig(prediction="start_x")), lambda x, noise: x),
    ],
    ids=["flow", "flow of noise", "flow of x", "ddpm", "ddpm of x"],
)
def test_the_second_head_is_compared_with_the_training_target(objective, wanted):
    """Patch by patch: the token at row i and column j predicts what lies there."""
    torch.manual_seed(0)
    layer = RaceConfig(num_experts=E, top_k=K, plr_loss_weight=0.01)
    shape = {"input_size": 8, "hidden_size": 16, "num_heads": 2, "depth": 2, "moe_every": 1}
    shape |= {"context_tokens": 3, "context_start": 1, "learn_sigma": isinstance(objective, DDPM)}
    model = build_model(ModelConfig(**shape, num_classes=3, feed_forward=layer))
    x, t, labels = batch()
    t = objective.time_of(t)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    terms = objective.losses_at(model, x, labels, t, noise)
    target, total = wanted(x, noise), 0
    for record in terms.routing:
        heads = record.prediction[:, record.num_context :]
        assert heads.shape == (5, 16, 16)
        for row in range(4):
            for column in range(4):
                place = target[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                made = heads[:, 4 * row + column].view(5, 2, 2, 4).permute(0, 3, 1, 2)
                total = total + (made - place).square().sum() / target.numel()
    assert [record.num_context for record in terms.routing] == [0, 3]
    losses = auxiliary_losses(terms.routing, model.patchify(terms.target))
    torch.testing.assert_close(losses["plr"], 0.01 * total)
    losses["plr"].backward()
    assert model.blocks[0].feed_forward.router.target.weight.grad.any()
    evaluated = objective.losses_at(model.eval(), x, labels, t, noise)
    assert all(record.prediction is None for record in evaluated.routing)


def test_autocast_keeps_the_race_in_float32():
    module, x = make()
    module, x = module.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, record = module(x)
    assert y.dtype == torch.bfloat16
    assert record.quantiles.dtype == torch.float32
    assert record.losses["similarity"].dtype == record.prediction.dtype == torch.float32
    assert len(record.plan.gate.unique()) > 0.9 * B * S * K  # bf16 would make many equal


def test_the_router_reads_nothing_of_other_tokens():
    module, x = make()
    logits = module.router.gate(F.gelu(module.router.hidden(x)))
    _, record = module.router(x, RouterContext())
    gates = record.plan.table(record.plan.gate, B * S).view(B, S, E)
    assert torch.equal(gates[gates != 0], logits.float()[gates != 0].to(gates))
