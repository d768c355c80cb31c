"""Experts that start from the MLPs of a dense model (Komatsuzaki et al. 2023).

Where experts are as wide as the MLP, each is a copy. Where they are narrower by a factor s, each
is one of s parts: H of the hidden units, expert e those of part e mod s. The outputs of the s parts
sum to that of the MLP, of whose last bias each has 1 / s.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from config.layers import DenseConfig, MoEConfig
from config.model import ModelConfig
from core.errors import ConfigError

FRESH = (".router.", ".shared.")
"""Parts of the names of what a dense model has nothing for."""

AT = "init_upcycle"
NAMES = {
    **dict.fromkeys(("gelu", "silu"), (("fc1",), "fc2")),
    **dict.fromkeys(("swiglu", "swiglu_bias"), (("gate", "up"), "down")),
}
"""First and last layer of each kind of MLP."""


def upcycle(
    tensors: dict[str, Tensor], dense: ModelConfig, config: ModelConfig, own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a dense model with experts in place of MLPs where `config` has them.

    Args:
        tensors: of the dense model by name.
        dense: its config.
        config: of the model with experts.
        own: tensors of that model, for their names and shapes.

    Raises:
        ConfigError: the layers do not come from such a model.
    """
    layer = config.feed_forward
    if not isinstance(dense.feed_forward, DenseConfig):
        raise ConfigError(
            f"{AT}: init_from has {dense.feed_forward.name} layers; wanted: a dense model"
        )
    kind = layer.expert_mlp or config.mlp
    if kind != dense.mlp:
        raise ConfigError(
            f"{AT}: the experts of model.feed_forward.name {layer.name} are {kind!r}, the MLPs of "
            f"init_from {dense.mlp!r}; wanted: --model.feed_forward.expert_mlp {dense.mlp}"
        )
    parts = max(1, dense.dense_width() // config.expert_width())
    if layer.num_experts % parts:
        raise ConfigError(
            f"{AT}: {layer.num_experts} experts cannot have the {parts} parts of an MLP equally "
            f"often; wanted: a model.feed_forward.num_experts that {parts} divides"
        )
    result = dict(tensors)
    for block in config.moe_blocks():
        at = f"blocks.{block}.feed_forward."
        if f"{at}experts.w2" not in own:
            raise ConfigError(f"{AT}: model.feed_forward.name {layer.name} has no experts to fill")
        mlp = {name: result.pop(name) for name in tensors if name.startswith(at)}
        if mlp:  # else the dense model is not as deep, which a comparison of names tells
            E, H, _ = own[f"{at}experts.w2"].shape
            experts = experts_of({n.removeprefix(at): t for n, t in mlp.items()}, kind, E, H)
            result |= {f"{at}experts.{name}": tensor for name, tensor in experts.items()}
    return result


def experts_of(
    mlp: dict[str, Tensor], kind: str, num_experts: int, width: int
) -> dict[str, Tensor]:
    """Weights of `models.moe.experts.Experts` from those of a dense layer.

    Args:
        mlp: its tensors by name.
        kind: `gelu`, `silu`, `swiglu` or `swiglu_bias`.
        num_experts: E.
        width: H of an expert.
    """
    first, last = NAMES[kind]
    whole = mlp[f"{last}.weight"].shape[1]
    parts, rest = divmod(whole, width)
    if parts == 0 or rest:
        raise ConfigError(
            f"{AT}: experts of width {width} are not whole parts of MLPs of width {whole}; wanted: "
            f"a model.feed_forward.intermediate_size that divides {whole}"
        )

    def copies(values: Iterable[Tensor]) -> Tensor:
        """(parts, ...) of each, side by side, in turn for all experts."""
        return torch.cat(list(values), dim=-1)[torch.arange(num_experts) % parts]

    weights = (mlp[f"{name}.weight"].unflatten(0, (parts, width)).mT for name in first)
    found = {"w1": copies(weights)}  # (E, D, H or 2 H)
    found["w2"] = copies([mlp[f"{last}.weight"].mT.unflatten(0, (parts, width))])  # (E, H, D)
    if f"{last}.bias" in mlp:
        found["b1"] = copies(mlp[f"{name}.bias"].unflatten(0, (parts, width)) for name in first)
        found["b2"] = copies([(mlp[f"{last}.bias"] / parts).expand(parts, -1)])
    return found


def departures(dense: ModelConfig, config: ModelConfig) -> list[str]:
    """Why the first forward pass is not that of the dense model, in words; empty if it is."""
    layer: MoEConfig = config.feed_forward
    found, parts = [], dense.dense_width() // config.expert_width()
    if parts > 1:
        found.append(f"a token gets those of the {parts} parts of an MLP that its router takes")
    if layer.gate_sum() != "one":
        found.append(f"the weights of a token's experts sum to {layer.gate_sum()}")
    if layer.shared_mlp != "none":
        found.append(f"the shared {layer.shared_mlp} adds to it")
    return found
