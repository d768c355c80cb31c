"""The published checkpoints of DiT, SiT and DiffMoE, tensor by tensor, into our model and back.

A model is described by a family and the official constructor's keywords. Every tensor of ours
stands for one official tensor or for several (stacked experts); the list of these `Entry`s serves
both directions, and a name that is left over or missing on either side is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config.official import official_config
from config.schema import DenseConfig, DiffMoEConfig, ModelConfig, TokenChoiceConfig
from core.errors import UserError
from models.build import build_model
from models.dit import DiT


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the official ones it stands for.

    Attributes:
        ours: name in our state.
        official: names there.
        join: the official tensors to ours.
        split: ours to the official ones.
    """

    ours: str
    official: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    split: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]


def from_official(family: str, ctor: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiT:
    """Our model with official weights.

    Args:
        family: one of `config.official.FAMILIES`.
        ctor: keywords of the official constructor; MoE_config as a plain dictionary.
        state: official state dict.

    Raises:
        UserError: for an unknown family or keyword, and for names of `state` that are missing or
            left over.
    """
    config = official_config(family, ctor)
    model = build_model(config)
    load_official(model, config, state)
    return model


def load_official(model: DiT, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Fill `model`, built from `config`, with an official state dict."""
    known = entries(config)
    wanted = {name for entry in known for name in entry.official} | constants(model)[0].keys()
    missing, extra = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or extra:
        raise UserError(
            f"official checkpoint: {len(missing)} tensor(s) missing {missing[:3]}, {len(extra)} "
            f"left over {extra[:3]}; family and constructor keywords must fit the weights"
        )
    tensors = {entry.ours: entry.join([state[name] for name in entry.official]) for entry in known}
    for name, own in model.state_dict().items():
        if tensors[name].shape != own.shape:
            raise UserError(
                f"official checkpoint: {name} is {tuple(tensors[name].shape)}, the model of these "
                f"keywords has {tuple(own.shape)}"
            )
    _check_constants(model, state)
    model.load_state_dict(tensors)


def to_official(model: DiT, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Official names and shapes of a model's weights.

    Args:
        model: from `build_model` or `from_official`.
        tensors: other tensors under names of our state, gradients for instance; by default the
            model's parameters and buffers, with the official constants (positions, decay).
    """
    whole = tensors is None
    source = model.state_dict() if whole else tensors
    result = {}
    for entry in entries(model.config):
        if entry.ours in source:
            result |= zip(entry.official, entry.split(source[entry.ours]), strict=True)
    if whole:
        result |= constants(model)[0]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def constants(model: DiT) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Official buffers that are options with us: their values, and the tolerance to compare at."""
    values = {"pos_embed": model.positions[None]}
    tolerance = {"pos_embed": 1e-6}
    layer = model.config.feed_forward
    if isinstance(layer, DiffMoEConfig):
        for i in moe_blocks(model.config):
            name = f"blocks.{i}.mlp.ema_decay"
            values[name], tolerance[name] = torch.tensor([layer.threshold_decay]), 1e-6
    return values, tolerance


def _check_constants(model: DiT, state: Mapping[str, Tensor]) -> None:
    values, tolerance = constants(model)
    for name, value in values.items():
        same = state[name].shape == value.shape and torch.allclose(
            state[name].float(), value, rtol=0, atol=tolerance[name]
        )
        if not same:
            raise UserError(f"official checkpoint: {name} is not the fixed value of the models")


def moe_blocks(config: ModelConfig) -> list[int]:
    """Indices of the blocks that have the MoE layer."""
    if isinstance(config.feed_forward, DenseConfig):
        return []
    return [i for i in range(config.depth) if (i + 1) % config.moe_every == 0]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the state of a model of `config`."""
    pairs = _linear("patch_embed.proj", "x_embedder.proj")
    pairs += _linear("time_embed.mlp.0", "t_embedder.mlp.0")
    pairs += _linear("time_embed.mlp.2", "t_embedder.mlp.2")
    pairs.append(Entry("label_embed.table.weight", ("y_embedder.embedding_table.weight",)))
    moe = moe_blocks(config)
    for i in range(config.depth):
        block = f"blocks.{i}"
        pairs += _linear(f"{block}.attn.qkv") + _linear(f"{block}.attn.proj")
        pairs += _linear(f"{block}.modulation.1", f"{block}.adaLN_modulation.1")
        ours, official = f"{block}.feed_forward", f"{block}.mlp"
        pairs += _moe(config, ours, official) if i in moe else _mlp(config.mlp, ours, official)
    pairs += _linear("final.linear", "final_layer.linear")
    pairs += _linear("final.modulation.1", "final_layer.adaLN_modulation.1")
    return pairs


def _linear(ours: str, official: str | None = None) -> list[Entry]:
    official = official or ours
    return [Entry(f"{ours}.{p}", (f"{official}.{p}",)) for p in ("weight", "bias")]


def _mlp(kind: str, ours: str, official: str) -> list[Entry]:
    if kind == "gelu":
        return [e for fc in ("fc1", "fc2") for e in _linear(f"{ours}.{fc}", f"{official}.{fc}")]
    names = ("gate", "up", "down")
    return [Entry(f"{ours}.{n}.weight", (f"{official}.{n}_proj.weight",)) for n in names]


def _moe(config: ModelConfig, ours: str, official: str) -> list[Entry]:
    layer = config.feed_forward
    gate = "gate.weight" if isinstance(layer, TokenChoiceConfig) else "gate_weight"
    pairs = [Entry(f"{ours}.router.affinity.weight", (f"{official}.{gate}",))]
    if isinstance(layer, DiffMoEConfig):
        predictor = f"{ours}.router.predictor"
        pairs.append(Entry(f"{predictor}.thresholds", (f"{official}.expert_threshold",)))
        for part in (0, 2):
            theirs = f"{official}.capacity_predictor.{part}"
            pairs += _linear(f"{predictor}.mlp.{part}", theirs)
    pairs += _experts(config.mlp, layer.num_experts, f"{ours}.experts", f"{official}.experts")
    if layer.shared_mlp != "none":
        pairs += _mlp(layer.shared_mlp, f"{ours}.shared", f"{official}.shared_experts")
    return pairs


def _experts(kind: str, count: int, ours: str, official: str) -> list[Entry]:
    def names(*parts: str) -> tuple[str, ...]:
        return tuple(f"{official}.{e}.{part}" for e in range(count) for part in parts)

    if kind == "gelu":
        return [
            Entry(f"{ours}.w1", names("fc1.weight"), _stack_transposed, _unstack_transposed),
            Entry(f"{ours}.b1", names("fc1.bias"), torch.stack, lambda whole: list(whole)),
            Entry(f"{ours}.w2", names("fc2.weight"), _stack_transposed, _unstack_transposed),
            Entry(f"{ours}.b2", names("fc2.bias"), torch.stack, lambda whole: list(whole)),
        ]
    first = names("gate_proj.weight", "up_proj.weight")
    return [
        Entry(f"{ours}.w1", first, _stack_pairs, _unstack_pairs),
        Entry(f"{ours}.w2", names("down_proj.weight"), _stack_transposed, _unstack_transposed),
    ]


def _stack_transposed(parts: list[Tensor]) -> Tensor:
    """(out, in) of each expert to (E, in, out)."""
    return torch.stack([part.T for part in parts])


def _unstack_transposed(whole: Tensor) -> list[Tensor]:
    return [expert.T for expert in whole]


def _stack_pairs(parts: list[Tensor]) -> Tensor:
    """gate and up (H, D) of each expert in turn to (E, D, 2 H)."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return torch.stack([torch.cat([gate, up]).T for gate, up in pairs])


def _unstack_pairs(whole: Tensor) -> list[Tensor]:
    return [half for expert in whole for half in expert.T.chunk(2)]
