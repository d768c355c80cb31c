"""Whether a model has a counterpart in the published code, so that its weights may go there."""

from typing import Any

from config.model import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    FeedForwardConfig,
    ModelConfig,
    MoEConfig,
    TokenChoiceConfig,
)
from core.errors import UserError

Allowed = dict[str, tuple]
"""Keys, and the values that the published code has for them."""

PLAIN: Allowed = {
    **{"rope": ("none",), "positions": ("sincos",), "qk_norm": ("none",), "num_kv_heads": (None,)},
    **{"norm": ("layernorm",), "final_norm": ("layernorm",), "mlp": ("gelu", "swiglu")},
    **{"context_tokens": (0,), "leading_dense": (0,), "intermediate_size": (None,)},
    "moe_every": (1, 2),
}
"""What DiT, SiT and the models of the DiffMoE repository have in common."""

JIT: Allowed = {
    **{"rope": ("2d",), "positions": ("sincos",), "qk_norm": ("rmsnorm",), "num_kv_heads": (None,)},
    **{"norm": ("rmsnorm",), "final_norm": ("rmsnorm",), "mlp": ("swiglu_bias",)},
    **{"leading_dense": (0,), "learn_sigma": (False,)},
}

DSMOE: Allowed = {
    **{"final_norm": ("layernorm",), "qk_norm": ("none",), "mlp": ("silu",)},
    **{"context_tokens": (0,), "intermediate_size": (None,), "moe_every": (1, 2)},
}


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that no published constructor makes.

    Raises:
        UserError: naming the first key that stands against it.
    """
    layer = model.feed_forward
    if model.text_hidden_size is not None:
        raise UserError(
            f"model.text_hidden_size: {model.text_hidden_size} has no counterpart: no code of a "
            "model of text was published"
        )
    if model.bottleneck_size is not None:
        family, own = "JiT", JIT
        if not isinstance(layer, DenseConfig):
            own = own | {"moe_every": (2,)}  # otherwise there are no experts there
    elif isinstance(layer, DeepSeekConfig):
        family = "DSMoE"
        own = DSMOE | {"num_kv_heads": (None, model.num_heads // 2)}
        own |= {"positions": ("sincos" if model.rope == "none" else "none",)}
    else:
        family, own = "DiT and DiffMoE", PLAIN
    _check(model, own, "model", family)
    _check(layer, _layer(model, layer, family), "model.feed_forward", family)


def _check(section: Any, allowed: Allowed, at: str, family: str) -> None:
    for key, values in allowed.items():
        value = getattr(section, key)
        if value not in values:
            there = " or ".join(map(repr, values))
            raise UserError(
                f"{at}.{key}: {value!r} has no counterpart in the code of {family}; there: {there}"
            )


def _layer(model: ModelConfig, layer: FeedForwardConfig, family: str) -> Allowed:
    """What the published layer allows."""
    if isinstance(layer, DenseConfig):
        return {}
    return {"router_input": ("modulated",)} | _routed(model, layer, family)


def _routed(model: ModelConfig, layer: MoEConfig, family: str) -> Allowed:
    if family == "JiT" and not isinstance(layer, DeepSeekConfig):
        return {"name": ("dense", "deepseek")}
    if isinstance(layer, DeepSeekConfig):
        kind = "swiglu_bias" if family == "JiT" else "swiglu"
        allowed = {"expert_mlp": (kind,), "shared_mlp": (kind, "identity")}
        if layer.shared_mlp != "identity":
            allowed |= {"shared_intermediate_size": (model.expert_width(),)}
        if layer.top_k_groups < layer.num_groups:
            allowed |= {"zero_masked_groups": (True,)}
        return allowed
    if not isinstance(layer, TokenChoiceConfig | ExpertChoiceConfig):
        return {"name": ("dense", "token_choice", "expert_choice", "diffmoe", "deepseek")}
    allowed = {"expert_mlp": (None,), "intermediate_size": (None,), "hidden_split": (1,)}
    diffmoe = isinstance(layer, DiffMoEConfig)
    allowed |= {"shared_mlp": ("none", "gelu" if diffmoe else "swiglu")}
    if diffmoe and layer.shared_mlp != "none":
        allowed |= {"shared_intermediate_size": (8 * model.hidden_size,)}
    if not isinstance(layer, TokenChoiceConfig):
        allowed |= {"capacity_predictor": (diffmoe,), "pool": ("batch" if diffmoe else "sample",)}
        allowed |= {"rounding": ("down",), "scores": ("softmax",)}
        allowed |= {"renormalise": ("none",), "route_scale": (1.0,)}
    return allowed
