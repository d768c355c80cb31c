"""ProMoE's layer against plain loops: choices, weights, losses, gradients, samples of no class."""

import pytest
import torch
import torch.nn.functional as F

from config.load import parse_config
from config.model import ModelConfig
from config.promoe import ProMoEConfig
from core.conditions import Condition
from core.errors import ConfigError
from core.types import RouterContext
from models.build import FEED_FORWARDS, build_model
from models.moe.prototypes import contrastive_loss

B, S, D, E = 4, 10, 8, 4
FREE = torch.tensor([False, True, False, False])


def make(seed=0, **options):
    """A layer in float64 with all parameters random, and an input that wants gradients."""
    torch.manual_seed(seed)
    layer = ProMoEConfig(num_experts=E, intermediate_size=12, **options)
    module = FEED_FORWARDS["promoe"](ModelConfig(hidden_size=D, feed_forward=layer)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module, torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _float64(monkeypatch):
    """The router and the combine, which compute in float32 by rule, keep float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def expert(module, e, x):
    w = module.experts
    return F.gelu(x @ w.w1[e] + w.b1[e], approximate="tanh") @ w.w2[e] + w.b2[e]


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def score_of(module, x):
    """(B, S, E) scores, one by one."""
    config = module.router.config
    rows = [[[cosine(t, p) for p in module.router.prototypes] for t in image] for image in x]
    table = torch.stack([torch.stack([torch.stack(row) for row in image]) for image in rows])
    if config.score == "softmax":
        return table.softmax(dim=-1 if config.choice == "token" else 1)
    return torch.sigmoid(table) if config.score == "sigmoid" else table


def reference(module, x, free):
    """Output, pairs (image, token, expert), and the raw contrastive loss."""
    config, scores = module.router.config, score_of(module, x)
    y, pairs, means = torch.zeros_like(x), [], []
    k = max(1, min(int(S / E * config.top_k), S))
    members = [[] for _ in range(E)]
    for b in range(B):
        if config.unconditional_expert and free[b]:
            for s in range(S):
                y[b, s] = y[b, s] + expert(module, E, x[b, s])
                pairs.append((b, s, E))
            continue
        taken = [[] for _ in range(E)]
        if config.choice == "token":
            for s in range(S):
                best = scores[b, s].argsort(descending=True)[: config.top_k].tolist()
                for rank, e in enumerate(best):
                    taken[e].append(s)
                    if rank == 0 or config.contrastive_top_k:
                        members[e].append(x[b, s])
        else:
            taken = [scores[b, :, e].argsort(descending=True)[:k].tolist() for e in range(E)]
            means.append([x[b, tokens].mean(dim=0) for tokens in taken])
        for e, tokens in enumerate(taken):
            for s in tokens:
                y[b, s] = y[b, s] + scores[b, s, e] * expert(module, e, x[b, s])
                pairs.append((b, s, e))
    if config.choice == "token":
        means = [[torch.stack(tokens).mean(dim=0) if tokens else None for tokens in members]]
    losses = []
    for row in means:
        there = [e for e in range(E) if row[e] is not None]
        for e in there:
            heat = config.contrastive_temperature
            logits = [cosine(module.router.prototypes[e], row[j]) / heat for j in there]
            losses.append(-torch.stack(logits).log_softmax(0)[there.index(e)])
    return y, sorted(pairs), torch.stack(losses).mean()


CASES = [
    {"top_k": 1},
    {"top_k": 3, "score": "sigmoid"},
    {"top_k": 2, "score": "softmax", "contrastive_top_k": False},
    {"top_k": 2, "unconditional_expert": False},
    {"choice": "expert"},
    {"choice": "expert", "top_k": 3, "score": "softmax"},
    {"choice": "expert", "top_k": 2, "score": "sigmoid", "unconditional_expert": False},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_its_plain_loop(options, training):
    module, x = make(**options)
    y, record = module.train(training)(x, RouterContext(unconditional=FREE))
    wanted, pairs, loss = reference(module, x, FREE)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)
    mask = record.token_mask().view(B, S, -1)
    assert [tuple(pair) for pair in mask.nonzero().tolist()] == pairs
    assert torch.equal(record.counts, mask.sum(dim=1).long())
    assert set(record.losses) == ({"contrastive"} if training else set())
    extra = record.losses.get("contrastive", 0.0)
    if training:
        torch.testing.assert_close(extra, loss)
    weight = torch.randn_like(y)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((y * weight).sum() + extra, inputs)
    theirs = torch.autograd.grad(
        (wanted * weight).sum() + (loss if training else 0.0), inputs, allow_unused=True
    )
    for mine, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_pairs_are_as_many_whatever_has_no_class(options):
    module, x = make(**options)
    contexts = [RouterContext(unconditional=u) for u in (None, FREE, ~FREE, FREE | ~FREE)]
    found = {len(module.router(x, context)[0].token_index) for context in contexts}
    assert len(found) == 1
    alone = module(x, contexts[3])[1].counts
    if options.get("unconditional_expert", True):
        assert alone.tolist() == [[0] * E + [S]] * B


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_sample_does_not_look_at_others(options):
    module, x = make(**options)
    whole, _ = module.eval()(x, RouterContext(unconditional=FREE))
    for b in range(B):
        alone, _ = module(x[b : b + 1], RouterContext(unconditional=FREE[b : b + 1]))
        torch.testing.assert_close(whole[b : b + 1], alone)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("score", ["identity", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_of_tokens_that_have_a_class(per_sample, score, top_k):
    options = {"balance_loss_weight": 0.2, "balance_per_sample": per_sample}
    module, x = make(top_k=top_k, score=score, contrastive_loss_weight=0.0, **options)
    _, record = module(x, RouterContext(unconditional=FREE))
    assert set(record.losses) == {"balance"}
    share = score_of(module, x)
    share = share if score == "softmax" else share.softmax(dim=-1)
    counts, known = record.counts[:, :E].double(), ~FREE
    images = []
    for b in range(B):
        images.append((share[b].mean(dim=0) * counts[b] / (S * top_k / E)).sum())
    wanted = torch.stack(images)[known].mean()
    if not per_sample:
        tokens = share[known].flatten(0, 1)
        part = E * counts.sum(dim=0) / counts.sum()
        wanted = (tokens.mean(dim=0) * part).sum()
    torch.testing.assert_close(record.losses["balance"], 0.2 * wanted)


@pytest.mark.parametrize("options", [*CASES, {"balance_loss_weight": 1.0}], ids=str)
def test_a_batch_without_any_class_has_no_loss_and_no_nan(options):
    module, x = make(**options)
    y, record = module(x, RouterContext(unconditional=torch.ones(B, dtype=torch.bool)))
    if options.get("unconditional_expert", True):
        assert all(loss == 0 for loss in record.losses.values())
    total = y.square().sum() + sum(record.losses.values())
    grads = torch.autograd.grad(total, list(module.parameters()))
    assert all(gradient.isfinite().all() for gradient in grads)


def test_experts_without_tokens_are_left_out_of_the_contrast():
    torch.manual_seed(0)
    prototypes, means = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([True, False, True])
    found = contrastive_loss(prototypes, means * present[:, None], present, 0.1)
    rows = []
    for e in (0, 2):
        logits = torch.stack([cosine(prototypes[e], means[j]) / 0.1 for j in (0, 2)])
        rows.append(-logits.log_softmax(0)[0 if e == 0 else 1])
    torch.testing.assert_close(found, torch.stack(rows).mean())
    one = contrastive_loss(prototypes, means, torch.tensor([True, False, False]), 0.1)
    assert one == 0
    assert not torch.autograd.grad(one, prototypes)[0].any()


@pytest.mark.parametrize("classes", [0, 5])
def test_which_samples_have_no_class(classes):
    """The null class is num_classes, whatever that is; without classes nothing is missing."""
    layer = ProMoEConfig(num_experts=E)
    shape = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = build_model(ModelConfig(**shape, num_classes=classes, feed_forward=layer)).float()
    labels = torch.tensor([0, classes])
    (record,) = model(torch.randn(2, 4, 8, 8), torch.rand(2), labels).routing
    assert (record.counts[:, E] > 0).tolist() == [False, classes > 0]


@pytest.mark.parametrize("classes", [0, 5])
def test_which_samples_have_no_caption(classes):
    """A class or a caption is a condition; in a model of text alone there is no class to have."""
    layer = ProMoEConfig(num_experts=E)
    shape = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2}
    text = {"text_hidden_size": 6, "text_max_length": 4}
    model = build_model(ModelConfig(**shape, **text, num_classes=classes, feed_forward=layer))
    labels = torch.tensor([0, classes])

    def alone(cond):
        (record,) = model.float()(torch.randn(2, 4, 8, 8), torch.rand(2), cond).routing
        return (record.counts[:, E] > 0).tolist()

    caption = Condition.of_rows([torch.randn(2, 6)] * 2, 4, labels if classes else None)
    assert alone(caption) == [False, False]
    assert alone(model.null_condition(caption)) == [True, True]
    assert alone(labels) == [classes == 0, True]


def test_losses_of_the_routing_are_not_computed_in_evaluation(monkeypatch):
    def refuse(*_):
        raise AssertionError("computed")

    monkeypatch.setattr("models.moe.prototypes.contrastive_loss", refuse)
    monkeypatch.setattr("models.moe.prototypes.masked_balance", refuse)
    for options in (*CASES, {"balance_loss_weight": 1.0}):
        module, x = make(**options)
        module.eval()(x, RouterContext(unconditional=FREE))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--top_k 20", r"top_k: 20 is not in 1 \.\.\. num_experts \(16\)"),
        ("--contrastive_temperature 0", "contrastive_temperature: 0.0 must be above 0"),
        ("--contrastive_loss_weight -1", "contrastive_loss_weight: -1.0 is negative"),
        ("--choice expert --balance_loss_weight 1", "means nothing where experts choose"),
        ("--choice expert --contrastive_top_k false", "it needs .*choice token"),
        (
            "--shared_mlp gelu --shared_intermediate_size -4",
            "shared_intermediate_size: -4 does not fit shared_mlp 'gelu'; allowed: .* above 0",
        ),
        ("--balance_per_sample true", "it needs .*balance_loss_weight above 0"),
        (
            "--contrastive_loss_weight 0 --contrastive_temperature 0.1",
            "it needs model.feed_forward.contrastive_loss_weight above 0",
        ),
    ],
)
def test_impossible_and_idle_keys(flags, wanted):
    argv = ["--name", "promoe", *flags.split()]
    argv = [w.replace("--", "--model.feed_forward.") if w.startswith("--") else w for w in argv]
    with pytest.raises(ConfigError, match=wanted):
        parse_config(argv, "train.py")
