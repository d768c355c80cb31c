"""Algorithms 1-4 of the paper as plain loops, written from its text; the oracle of the layers."""

import torch
import torch.nn.functional as F


def expert(experts, e, x):
    """Expert e of stacked weights on rows x (n, D)."""
    h = F.gelu(x @ experts.w1[e] + experts.b1[e], approximate="tanh")
    return h @ experts.w2[e] + experts.b2[e]


def affinity(x, weight):
    """softmax over experts of x W_r (Eq. 1)."""
    return torch.softmax(x @ weight.T, dim=-1)


def token_choice(x, weight, experts, top_k):
    """Algorithm 2: token by token."""
    B, S, D = x.shape
    y = torch.zeros(B * S, D, dtype=x.dtype)
    counts = torch.zeros(B, len(weight), dtype=torch.int64)
    scores = affinity(x.reshape(-1, D), weight)
    for s, token in enumerate(x.reshape(-1, D)):
        for e in scores[s].argsort(descending=True)[:top_k].tolist():
            y[s] = y[s] + scores[s, e] * expert(experts, e, token[None])[0]
            counts[s // S, e] += 1
    return y.view(B, S, D), counts


def expert_choice(x, weight, experts, k):
    """Algorithm 1: every expert takes its k best tokens of each sample."""
    B, S, _ = x.shape
    y = torch.zeros_like(x)
    counts = torch.zeros(B, len(weight), dtype=torch.int64)
    for b in range(B):
        scores = affinity(x[b], weight)
        for e in range(len(weight)):
            for s in scores[:, e].argsort(descending=True)[:k].tolist():
                y[b, s] = y[b, s] + scores[s, e] * expert(experts, e, x[b, s][None])[0]
                counts[b, e] += 1
    assert counts.sum() == B * len(weight) * min(k, S)
    return y, counts


def diffmoe(x, weight, experts, k_of_expert):
    """Algorithms 3 and 4: expert e takes its k_of_expert[e] best tokens of the whole batch.

    Returns the output, counts (B, E) and the mask "ones" (B * S, E).
    """
    B, S, D = x.shape
    pool = x.reshape(B * S, D)
    scores = affinity(pool, weight)
    y = torch.zeros_like(pool)
    ones = torch.zeros(B * S, len(weight), dtype=x.dtype)
    for e, k in enumerate(k_of_expert):
        for s in scores[:, e].argsort(descending=True)[:k].tolist():
            y[s] = y[s] + scores[s, e] * expert(experts, e, pool[s][None])[0]
            ones[s, e] = 1
    counts = ones.view(B, S, -1).sum(1).long()
    return y.view(B, S, D), counts, ones


def balance(scores, chosen_experts, num_experts):
    """E * sum_e (mean affinity of e) * (share of choices of e)."""
    total = 0
    for e in range(num_experts):
        share = sum(int(c == e) for c in chosen_experts) / len(chosen_experts)
        total = total + scores[:, e].mean() * share
    return num_experts * total


def capacity_loss(predictor, pool, ones):
    """Eq. 11-12 for one layer: binary cross-entropy of the predictor on detached tokens."""
    first, _, second = predictor.mlp
    hidden = F.silu(pool.detach() @ first.weight.T + first.bias)
    p = torch.sigmoid(hidden @ second.weight.T + second.bias)
    return -(ones * p.log() + (1 - ones) * (1 - p).log()).mean(), p


def deepseek(x, weight, bias, experts, config):
    """Sigmoid routing with groups, token by token, SwiGLU experts; from the issue's formulas.

    Returns the output without what is shared, and counts (B, E).
    """
    B, S, D = x.shape
    E, G = len(weight), config.num_groups
    size = E // G
    y = torch.zeros(B * S, D, dtype=x.dtype)
    counts = torch.zeros(B, E, dtype=torch.int64)
    for s, token in enumerate(x.reshape(-1, D)):
        affinities = torch.sigmoid(token @ weight.T)
        score = (affinities + bias).tolist()
        groups = [score[g * size : (g + 1) * size] for g in range(G)]
        value = [sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(G), key=lambda g: -value[g])[: config.top_k_groups]
        allowed = [e for e in range(E) if e // size in best]
        if config.zero_masked_groups:
            score = [score[e] if e in allowed else 0.0 for e in range(E)]
            allowed = range(E)
        chosen = sorted(allowed, key=lambda e: -score[e])[: config.top_k]
        total = sum(affinities[e] for e in chosen) if config.top_k > 1 else 1.0
        for e in chosen:
            gate, up = (token @ experts.w1[e]).chunk(2)
            out = (F.silu(gate) * up) @ experts.w2[e]
            y[s] = y[s] + config.routed_scaling_factor * affinities[e] / total * out
            counts[s // S, e] += 1
    return y.view(B, S, D), counts
