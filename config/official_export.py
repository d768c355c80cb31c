"""Whether a model has a counterpart in the published code, so that its weights may go there."""

from config.model import DeepSeekConfig, DiffMoEConfig, ModelConfig, MoEConfig, TokenChoiceConfig
from core.errors import UserError

PLAIN = {
    **{"rope": "none", "positions": "sincos", "norm": "layernorm", "final_norm": "layernorm"},
    **{"qk_norm": False, "num_kv_heads": None, "context_tokens": 0, "leading_dense": 0},
    **{"intermediate_size": None, "bottleneck_size": None},
}
"""What DiT, SiT and the models of the DiffMoE repository have in common."""

JIT = {
    **{"rope": "2d", "positions": "sincos", "norm": "rmsnorm", "final_norm": "rmsnorm"},
    **{"qk_norm": True, "num_kv_heads": None, "leading_dense": 0, "mlp": "swiglu_bias"},
    "learn_sigma": False,
}

DSMOE = {
    **{"final_norm": "layernorm", "qk_norm": False, "context_tokens": 0, "mlp": "silu"},
    **{"intermediate_size": None, "bottleneck_size": None},
}


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that no published constructor makes.

    Raises:
        UserError: naming the first key that stands against it.
    """
    layer = model.feed_forward
    deepseek = isinstance(layer, DeepSeekConfig)
    if model.bottleneck_size is not None:
        family, wanted = "JiT", JIT
    elif deepseek:
        family = "DSMoE"
        kv_heads = (None, model.num_heads // 2)
        wanted = DSMOE | {"positions": "sincos" if model.rope == "none" else "none"}
        wanted |= {} if model.num_kv_heads in kv_heads else {"num_kv_heads": kv_heads[1]}
    else:
        family, wanted = "DiT and DiffMoE", PLAIN
    found = {f"model.{key}": (getattr(model, key), value) for key, value in wanted.items()}
    if deepseek:
        found |= _deepseek(layer, "swiglu_bias" if family == "JiT" else "swiglu")
    elif isinstance(layer, MoEConfig):
        found |= _others(layer, family)
    for key, (value, allowed) in found.items():
        if value != allowed:
            raise UserError(
                f"{key}: {value!r} has no counterpart in the code of {family}; there: {allowed!r}"
            )


def _deepseek(layer: DeepSeekConfig, kind: str) -> dict[str, tuple]:
    """Keys of the layer, what they are, and what the published code has."""
    at = "model.feed_forward"
    found = {f"{at}.expert_mlp": (layer.expert_mlp, kind)}
    if layer.shared_mlp != "identity":
        found[f"{at}.shared_mlp"] = (layer.shared_mlp, kind)
        width = layer.intermediate_size
        found[f"{at}.shared_intermediate_size"] = (layer.shared_intermediate_size, width)
    if layer.top_k_groups < layer.num_groups:
        found[f"{at}.zero_masked_groups"] = (layer.zero_masked_groups, True)
    return found


def _others(layer: MoEConfig, family: str) -> dict[str, tuple]:
    at = "model.feed_forward"
    found = {f"{at}.expert_mlp": (layer.expert_mlp, None)}
    found[f"{at}.intermediate_size"] = (layer.intermediate_size, None)
    if family == "JiT":
        found[f"{at}.name"] = (layer.name, "deepseek")
    elif not isinstance(layer, TokenChoiceConfig):
        own = isinstance(layer, DiffMoEConfig)
        found[f"{at}.capacity_predictor"] = (layer.capacity_predictor, own)
        found[f"{at}.pool"] = (layer.pool, "batch" if own else "sample")
    return found
