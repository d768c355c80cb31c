"""Which tensors of ours stand for which tensors of the published models.

DiT, SiT, DiffMoE, DSMoE, JiT, ProMoE and DiT-MoE name most things alike. Where they differ, what
the config has decides: experts of a DeepSeek-style router, a patch embedding through a bottleneck
(JiT), prototypes (ProMoE), token choice in every block (DiT-MoE).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config.layers import DeepSeekConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.model import ModelConfig
from config.promoe import ProMoEConfig

Tensors = list[Tensor]

UP_AND_DOWN = ("up_proj", "down_proj")
"""The two layers of a GELU MLP in ProMoE, but for its dense blocks."""


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


def entries(config: ModelConfig, up_and_down: bool = False) -> list[Entry]:
    """Every tensor of the state of a model of `config`.

    Args:
        config: of the model.
        up_and_down: names of the other kind for the dense layers of ProMoE, whose constructor
            with `use_swiglu` has the same layers under these names.
    """
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
        ours, official = f"{block}.feed_forward", f"{block}.{'moe' if is_ditmoe(config) else 'mlp'}"
        if i in moe:
            pairs += _moe(config, ours, official)
        else:
            pairs += _mlp(config.mlp, ours, official, up_and_down)
    if config.final_norm == "rmsnorm":
        pairs.append(_same("final.norm.weight", "final_layer.norm_final.weight"))
    final = _linear("final.linear", "final_layer.linear")
    # What counts its times from the data predicts noise - data, the other way round.
    pairs += [_negated(pair) for pair in final] if config.time_reversed else final
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


def is_ditmoe(config: ModelConfig) -> bool:
    """Whether the names are those of DiT-MoE: token choice in every block, which TC-DiT lacks."""
    return isinstance(config.feed_forward, TokenChoiceConfig) and config.moe_every == 1


def has_predictor(config: ModelConfig) -> bool:
    """Whether the layers have a capacity predictor: DiffMoE, and other pools with one (Table 8)."""
    layer = config.feed_forward
    return isinstance(layer, ExpertChoiceConfig) and layer.capacity_predictor


def _same(ours: str, official: str | None = None) -> Entry:
    return Entry((ours,), (official or ours,))


def _negated(entry: Entry) -> Entry:
    def negative(parts: Tensors) -> Tensors:
        return [-part for part in parts]

    return Entry(entry.ours, entry.official, negative, negative)


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

    flash = is_ditmoe(config) and config.qk_norm != "none"  # another class of theirs
    pairs = _linear(f"{name}.proj", f"{name}.out_proj" if flash else None)
    for p in ("weight", "bias"):
        if config.num_kv_heads is None:
            names, split = (f"{name}.{'Wqkv' if flash else 'qkv'}.{p}",), list
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
        kinds = ("weight", "bias") if config.qk_norm == "layernorm" else ("weight",)
        pairs += [
            Entry((n,), (n,), lambda parts: [parts[0][there]], lambda parts: [parts[0][back]])
            for n in (f"{name}.{part}_norm.{kind}" for part in "qk" for kind in kinds)
        ]
    return pairs


def _mlp(kind: str, ours: str, official: str, up_and_down: bool = False) -> list[Entry]:
    if kind in ("gelu", "silu"):
        theirs = UP_AND_DOWN if up_and_down else ("fc1", "fc2")
        pairs = zip(("fc1", "fc2"), theirs, strict=True)
        return [e for a, b in pairs for e in _linear(f"{ours}.{a}", f"{official}.{b}")]
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
    promoe = isinstance(layer, ProMoEConfig)
    names = UP_AND_DOWN if promoe else ("fc1", "fc2")
    pairs += _experts(kind, layer.all_experts(), f"{ours}.experts", f"{official}.{stem}", names)
    if promoe and layer.shared_mlp == "gelu":
        return pairs + _mlp("gelu", f"{ours}.shared", f"{official}.shared_expert", True)
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
    if isinstance(layer, ProMoEConfig):
        return [_same(f"{ours}.prototypes", f"{official}.cluster_centers")]
    gate = "gate.weight" if isinstance(layer, TokenChoiceConfig) else "gate_weight"
    pairs = [_same(f"{ours}.affinity.weight", f"{official}.{gate}")]
    if has_predictor(config):
        pairs.append(_same(f"{ours}.predictor.thresholds", f"{official}.expert_threshold"))
        for part in (0, 2):
            theirs = f"{official}.capacity_predictor.{part}"
            pairs += _linear(f"{ours}.predictor.mlp.{part}", theirs)
    return pairs


def _experts(
    kind: str, count: int, ours: str, official: str, layers: tuple[str, str]
) -> list[Entry]:
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
    one, two = ("w12", "w3") if kind == "swiglu_bias" else layers
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
