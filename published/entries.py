"""Which tensors of ours stand for which tensors of the published models.

DiT, SiT, DiffMoE, DSMoE and JiT name most things alike. Where they differ, what the config has
decides: experts of a DeepSeek-style router, a patch embedding through a bottleneck (JiT).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config.schema import DeepSeekConfig, ExpertChoiceConfig, ModelConfig, TokenChoiceConfig

Tensors = list[Tensor]


@dataclass(frozen=True)
class Entry:
    """Tensors of ours and the official ones that they stand for.

    Attributes:
        ours: names in our state.
        official: names there.
        join: the official tensors to ours.
        split: ours to the official ones.
    """

    ours: tuple[str, ...]
    official: tuple[str, ...]
    join: Callable[[Tensors], Tensors] = list
    split: Callable[[Tensors], Tensors] = list


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the state of a model of `config`."""
    pairs = _patch_embed(config)
    pairs += _linear("time_embed.mlp.0", "t_embedder.mlp.0")
    pairs += _linear("time_embed.mlp.2", "t_embedder.mlp.2")
    pairs.append(_same("label_embed.table.weight", "y_embedder.embedding_table.weight"))
    if config.context_tokens:
        pairs.append(_shaped("class_tokens.positions", "in_context_posemb", (1,)))
    moe = config.moe_blocks()
    for i in range(config.depth):
        block = f"blocks.{i}"
        pairs += _attention(config, f"{block}.attn")
        pairs += _linear(f"{block}.modulation.1", f"{block}.adaLN_modulation.1")
        if config.norm == "rmsnorm":
            pairs += [_same(f"{block}.{norm}.weight") for norm in ("norm1", "norm2")]
        ours, official = f"{block}.feed_forward", f"{block}.mlp"
        pairs += _moe(config, ours, official) if i in moe else _mlp(config.mlp, ours, official)
    if config.final_norm == "rmsnorm":
        pairs.append(_same("final.norm.weight", "final_layer.norm_final.weight"))
    pairs += _linear("final.linear", "final_layer.linear")
    pairs += _linear("final.modulation.1", "final_layer.adaLN_modulation.1")
    return pairs


def halves_of_neighbours(head_dim: int) -> Tensor:
    """(head_dim,) the channel of JiT's heads that each of our channels is.

    There neighbouring channels turn together, with us channel i of a part's first half and channel
    i of its second; queries and keys in another order of channels attend the same.
    """
    part = torch.arange(head_dim).view(2, -1, 2)  # by row or column, pair, member
    return part.transpose(1, 2).flatten()


def is_jit(config: ModelConfig) -> bool:
    """Whether the names are those of JiT."""
    return config.bottleneck_size is not None


def has_predictor(config: ModelConfig) -> bool:
    """Whether the layers have a capacity predictor: DiffMoE, and other pools with one (Table 8)."""
    layer = config.feed_forward
    return isinstance(layer, ExpertChoiceConfig) and layer.capacity_predictor


def _same(ours: str, official: str | None = None) -> Entry:
    return Entry((ours,), (official or ours,))


def _shaped(ours: str, official: str, before: tuple = (), after: tuple = ()) -> Entry:
    """Ours is the official tensor without dimensions of one around it."""

    def join(parts: Tensors) -> Tensors:
        (whole,) = parts
        return [whole.view(whole.shape[len(before) : whole.dim() - len(after)])]

    return Entry(
        (ours,), (official,), join, lambda parts: [parts[0].view(*before, *parts[0].shape, *after)]
    )


def _linear(ours: str, official: str | None = None) -> list[Entry]:
    official = official or ours
    return [_same(f"{ours}.{p}", f"{official}.{p}") for p in ("weight", "bias")]


def _patch_embed(config: ModelConfig) -> list[Entry]:
    if not is_jit(config):
        return _linear("patch_embed.proj", "x_embedder.proj")
    return [
        _same("patch_embed.reduce.weight", "x_embedder.proj1.weight"),
        _shaped("patch_embed.expand.weight", "x_embedder.proj2.weight", after=(1, 1)),
        _same("patch_embed.expand.bias", "x_embedder.proj2.bias"),
    ]


def _attention(config: ModelConfig, name: str) -> list[Entry]:
    head_dim = config.head_dim or config.hidden_size // config.num_heads
    kv_heads = config.num_kv_heads or config.num_heads
    rows = [config.num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    # Another order of channels, and its inverse.
    there = torch.arange(head_dim)
    if is_jit(config) and config.rope != "none":
        there = halves_of_neighbours(head_dim)
    back = there.argsort()

    def reordered(qkv: Tensor, order: Tensor) -> Tensor:
        q, k, v = qkv.split(rows)
        q, k = (part.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1) for part in (q, k))
        return torch.cat([q, k, v])

    pairs = _linear(f"{name}.proj")
    for p in ("weight", "bias"):
        if config.num_kv_heads is None:
            names, split = (f"{name}.qkv.{p}",), list
        else:
            names = tuple(f"{name}.{part}_proj.{p}" for part in "qkv")

            def split(parts: Tensors) -> Tensors:
                return list(parts[0].split(rows))

        pairs.append(
            Entry(
                (f"{name}.qkv.{p}",),
                names,
                lambda parts: [reordered(torch.cat(parts), there)],
                lambda parts, split=split: split([reordered(parts[0], back)]),
            )
        )
    if config.qk_norm != "none":
        pairs += [
            Entry((n,), (n,), lambda parts: [parts[0][there]], lambda parts: [parts[0][back]])
            for n in (f"{name}.q_norm.weight", f"{name}.k_norm.weight")
        ]
    return pairs


def _mlp(kind: str, ours: str, official: str) -> list[Entry]:
    if kind in ("gelu", "silu"):
        return [e for fc in ("fc1", "fc2") for e in _linear(f"{ours}.{fc}", f"{official}.{fc}")]
    if kind == "swiglu":
        names = ("gate", "up", "down")
        return [_same(f"{ours}.{n}.weight", f"{official}.{n}_proj.weight") for n in names]
    halves = [
        Entry(
            (f"{ours}.gate.{p}", f"{ours}.up.{p}"),
            (f"{official}.w12.{p}",),
            lambda parts: list(parts[0].chunk(2)),
            lambda parts: [torch.cat(parts)],
        )
        for p in ("weight", "bias")
    ]
    return halves + _linear(f"{ours}.down", f"{official}.w3")


def _moe(config: ModelConfig, ours: str, official: str) -> list[Entry]:
    layer = config.feed_forward
    pairs = _router(config, f"{ours}.router", official)
    stem = "experts.blocks" if isinstance(layer, DeepSeekConfig) else "experts"
    kind = layer.expert_mlp or config.mlp
    pairs += _experts(kind, layer.num_experts, f"{ours}.experts", f"{official}.{stem}")
    if layer.shared_mlp not in ("none", "identity"):
        pairs += _mlp(layer.shared_mlp, f"{ours}.shared", f"{official}.shared_experts")
    return pairs


def _router(config: ModelConfig, ours: str, official: str) -> list[Entry]:
    layer = config.feed_forward
    if isinstance(layer, DeepSeekConfig):
        return [
            _same(f"{ours}.weight", f"{official}.gate.weight"),
            _same(f"{ours}.correction_bias", f"{official}.gate.e_score_correction_bias"),
        ]
    gate = "gate.weight" if isinstance(layer, TokenChoiceConfig) else "gate_weight"
    pairs = [_same(f"{ours}.affinity.weight", f"{official}.{gate}")]
    if has_predictor(config):
        pairs.append(_same(f"{ours}.predictor.thresholds", f"{official}.expert_threshold"))
        for part in (0, 2):
            theirs = f"{official}.capacity_predictor.{part}"
            pairs += _linear(f"{ours}.predictor.mlp.{part}", theirs)
    return pairs


def _experts(kind: str, count: int, ours: str, official: str) -> list[Entry]:
    def names(*parts: str) -> tuple[str, ...]:
        return tuple(f"{official}.{e}.{part}" for e in range(count) for part in parts)

    def stacked(name: str, part: str) -> Entry:
        join, split = (_stack, _unstack) if part.endswith("bias") else (_stack_t, _unstack_t)
        return Entry((f"{ours}.{name}",), names(part), join, split)

    if kind == "swiglu":
        first = names("gate_proj.weight", "up_proj.weight")
        return [
            Entry((f"{ours}.w1",), first, _stack_pairs, _unstack_pairs),
            stacked("w2", "down_proj.weight"),
        ]
    one, two = ("w12", "w3") if kind == "swiglu_bias" else ("fc1", "fc2")
    return [
        stacked("w1", f"{one}.weight"),
        stacked("b1", f"{one}.bias"),
        stacked("w2", f"{two}.weight"),
        stacked("b2", f"{two}.bias"),
    ]


def _stack(parts: Tensors) -> Tensors:
    return [torch.stack(parts)]


def _unstack(parts: Tensors) -> Tensors:
    return list(parts[0])


def _stack_t(parts: Tensors) -> Tensors:
    """(out, in) of each expert to (E, in, out)."""
    return [torch.stack([part.T for part in parts])]


def _unstack_t(parts: Tensors) -> Tensors:
    return [expert.T for expert in parts[0]]


def _stack_pairs(parts: Tensors) -> Tensors:
    """gate and up (H, D) of each expert in turn to (E, D, 2 H)."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [torch.stack([torch.cat([gate, up]).T for gate, up in pairs])]


def _unstack_pairs(parts: Tensors) -> Tensors:
    return [half for expert in parts[0] for half in expert.T.chunk(2)]
