"""Whether a model has a counterpart in the published code, so that its weights may go there.

Of ProMoE and DiT-MoE that is asked of weights on their way in as well.
"""

from typing import Any

from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    MoEConfig,
    TokenChoiceConfig,
)
from config.model import FeedForwardConfig, ModelConfig
from config.promoe import ProMoEConfig
from core.errors import UserError
from published.entries import is_ditmoe

Allowed = dict[str, tuple]
"""Keys, and the values that the published code has for them."""

AS_IT_IS: Allowed = {"time_scale": (1.0,), "time_reversed": (False,)}

PLAIN: Allowed = {
    **AS_IT_IS,
    **{"rope": ("none",), "positions": ("sincos",), "qk_norm": ("none",), "num_kv_heads": (None,)},
    **{"norm": ("layernorm",), "final_norm": ("layernorm",), "mlp": ("gelu", "swiglu")},
    **{"context_tokens": (0,), "leading_dense": (0,), "intermediate_size": (None,)},
    "moe_every": (1, 2),
}
"""What DiT, SiT and the models of the DiffMoE repository have in common."""

JIT: Allowed = {
    **AS_IT_IS,
    **{"rope": ("2d",), "positions": ("sincos",), "qk_norm": ("rmsnorm",), "num_kv_heads": (None,)},
    **{"norm": ("rmsnorm",), "final_norm": ("rmsnorm",), "mlp": ("swiglu_bias",)},
    **{"leading_dense": (0,), "learn_sigma": (False,)},
}

DSMOE: Allowed = {
    **AS_IT_IS,
    **{"final_norm": ("layernorm",), "qk_norm": ("none",), "mlp": ("silu",)},
    **{"context_tokens": (0,), "intermediate_size": (None,), "moe_every": (1, 2)},
}


PROMOE: Allowed = PLAIN | {
    **{"qk_norm": ("none", "layernorm"), "mlp": ("gelu",)},
    **{"time_scale": (1000.0,), "time_reversed": (True,)},
}

DITMOE: Allowed = PLAIN | {
    **{"qk_norm": ("none", "layernorm"), "mlp": ("swiglu",), "time_reversed": (True, False)},
}


def check_exportable(model: ModelConfig, objective: str | None = None) -> None:
    """Refuse a model that no published constructor makes.

    Args:
        model: whose weights are to go.
        objective: name of what it was trained with, where it is known.

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
    elif isinstance(layer, ProMoEConfig):
        family, own = "ProMoE", PROMOE | _eps(model, 1e-5)
        if layer.unconditional_expert:
            own = own | {"num_classes": (1000,)}  # a number that its routers hold
    elif is_ditmoe(model):
        family, own = "DiT-MoE", DITMOE | _eps(model, 1e-6)
        own |= {"mlp_ratio": (round(model.mlp_ratio),)}
        if objective is not None:
            own |= {"time_reversed": (objective == "flow",)}
    else:
        family, own = "DiT and DiffMoE", PLAIN
    _check(model, own, "model", family)
    _check(layer, _layer(model, layer, family), "model.feed_forward", family)


def _eps(model: ModelConfig, published: float) -> Allowed:
    return {"qk_norm_eps": (published,)} if model.qk_norm == "layernorm" else {}


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
    if family == "ProMoE":
        return {"expert_mlp": (None, "gelu"), "shared_mlp": ("none", "gelu")}
    if not isinstance(layer, TokenChoiceConfig | ExpertChoiceConfig):
        return {"name": ("dense", "token_choice", "expert_choice", "diffmoe", "deepseek", "promoe")}
    allowed = {"expert_mlp": (None,), "intermediate_size": (None,), "hidden_split": (1,)}
    if family == "DiT-MoE":
        shared = {"shared_mlp": ("swiglu",), "shared_intermediate_size": (2 * model.hidden_size,)}
        return allowed | shared
    diffmoe = isinstance(layer, DiffMoEConfig)
    allowed |= {"shared_mlp": ("none", "gelu" if diffmoe else "swiglu")}
    if diffmoe and layer.shared_mlp != "none":
        allowed |= {"shared_intermediate_size": (8 * model.hidden_size,)}
    if not isinstance(layer, TokenChoiceConfig):
        allowed |= {"capacity_predictor": (diffmoe,), "pool": ("batch" if diffmoe else "sample",)}
        allowed |= {"rounding": ("down",), "scores": ("softmax",)}
        allowed |= {"renormalise": ("none",), "route_scale": (1.0,)}
    return allowed
