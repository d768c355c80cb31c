"""Our configs of the published models, from the keywords of their constructors."""

import dataclasses
from collections.abc import Callable
from typing import Any

from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    TokenChoiceConfig,
)
from config.model import FeedForwardConfig, ModelConfig
from config.promoe import ProMoEConfig
from core.errors import UserError, unknown_name


def missing_key(key: str) -> UserError:
    """The error of a keyword that must be there."""
    return UserError(
        f"{key}: missing; the official code fails without it, and what it would mean is not known"
    )


def dit_model(feed_forward: Callable[[dict, dict], FeedForwardConfig]) -> Callable:
    """Builds the models of DiT's and DiffMoE's repositories, which differ in the layer alone."""

    def build(values: dict, moe: dict) -> ModelConfig:
        layer = feed_forward(values, moe)
        return dataclasses.replace(_backbone(values, moe), feed_forward=layer)

    return build


def _shared(values: dict, moe: dict) -> dict[str, Any]:
    """TC-DiT and EC-DiT share a bias-free SwiGLU of width n D."""
    count = moe.get("n_shared_experts") or 0
    if not count:
        return {}
    width = count * values["hidden_size"]
    return {"shared_mlp": "swiglu", "shared_intermediate_size": width}


def token_choice(values: dict, moe: dict) -> TokenChoiceConfig:
    """The layer of TC-DiT."""
    return TokenChoiceConfig(
        num_experts=moe["num_experts"],
        top_k=moe["capacity"],
        balance_loss_weight=0.01,
        **_shared(values, moe),
    )


def expert_choice(values: dict, moe: dict) -> ExpertChoiceConfig:
    """The layer of EC-DiT."""
    return ExpertChoiceConfig(
        num_experts=moe["num_experts"],
        capacity=float(moe["capacity"]),
        round_share_first=True,
        **_shared(values, moe),
    )


def diffmoe(values: dict, moe: dict) -> DiffMoEConfig:
    """The layer of DiffMoE."""
    schedule = moe.get("capacity_schedule")
    stages = ("capacity_schedule_stage_I_iters", "capacity_schedule_stage_II_iters")
    for stage in stages if schedule else ():
        if stage not in schedule:
            raise missing_key(f"MoE_config.capacity_schedule.{stage}")
    # Whatever the count, one GELU MLP of width 8 D is shared.
    shared = {"shared_mlp": "gelu", "shared_intermediate_size": 8 * values["hidden_size"]}
    return DiffMoEConfig(
        num_experts=moe["num_experts"],
        capacity=float(moe["capacity"]),
        capacity_loss_weight=float(values["CapacityPred_loss_weight"]),
        capacity_schedule=tuple(schedule[s] for s in stages) if schedule else None,
        round_share_first=True,
        **(shared if moe.get("n_shared_experts") else {}),
    )


def dense(values: dict, moe: dict) -> DenseConfig:
    """The layer of DiT and SiT."""
    if moe:
        raise UserError("MoE_config: a dense family has none")
    return DenseConfig()


def _deepseek(moe: dict, expert_mlp: str) -> DeepSeekConfig:
    """The layer of DSMoE and JiTMoE."""
    width = moe["moe_intermediate_size"]
    # Without a shared expert the published code adds the layer's input.
    shared = {"shared_mlp": "identity"}
    if moe["use_shared_expert"]:
        shared = {"shared_mlp": expert_mlp, "shared_intermediate_size": width}
    return DeepSeekConfig(
        num_experts=moe["num_experts"],
        expert_mlp=expert_mlp,
        intermediate_size=width,
        top_k=moe["num_experts_per_tok"],
        num_groups=moe["n_group"],
        top_k_groups=moe["topk_group"],
        routed_scaling_factor=float(moe["routed_scaling_factor"]),
        bias_update_rate=0.0,
        zero_masked_groups=True,
        **shared,
    )


def dsmoe_model(values: dict, moe: dict) -> ModelConfig:
    """DSMoE: dense blocks have a SiLU MLP whatever `use_swiglu` says."""
    for key, off in (("use_sinks", False), ("sliding_window", 0), ("use_kda", False)):
        _only(key, values[key], off)
    _only("MoE_config.skip_last2", moe.get("skip_last2"), False)
    first = moe["skip_first2"]
    rope = _one_of("rope_type", values["rope_type"], ("none", "1d", "2d"))
    return dataclasses.replace(
        _backbone(values, moe),
        mlp="silu",
        norm=_one_of("norm_type", values["norm_type"], ("layernorm", "rmsnorm")),
        rope=rope,
        positions="sincos" if rope == "none" else "none",
        num_kv_heads=values["num_heads"] // 2 if values["enable_gqa"] else None,
        leading_dense=2 if first is True else int(first),
        feed_forward=_deepseek(moe, "swiglu"),
    )


def jit_model(values: dict, moe: dict) -> ModelConfig:
    """JiT and JiTMoE."""
    _only("attn_drop", values["attn_drop"], 0.0)
    layer: FeedForwardConfig = DenseConfig()
    if moe and moe["interleave"]:  # otherwise the published code has no experts
        layer = _deepseek(moe, "swiglu_bias")
    return dataclasses.replace(
        _backbone(values, moe),
        mlp="swiglu_bias",
        intermediate_size=int(int(values["hidden_size"] * values["mlp_ratio"]) * 2 / 3),
        norm="rmsnorm",
        final_norm="rmsnorm",
        qk_norm="rmsnorm",
        rope="2d",
        bottleneck_size=values["bottleneck_dim"],
        context_tokens=values["in_context_len"],
        context_start=values["in_context_start"],
        dropout=_dropout(values, moe) if isinstance(layer, DeepSeekConfig) else values["proj_drop"],
        feed_forward=layer,
    )


def promoe_model(choice: str) -> Callable[[dict, dict], ModelConfig]:
    """ProMoE by token or by expert; every MLP is GELU whatever `use_swiglu` says."""

    def build(values: dict, moe: dict) -> ModelConfig:
        alone = moe.get("use_uncond_expert", True)
        if alone and values["num_classes"] != 1000:
            raise UserError(
                f"num_classes: {values['num_classes']}: the published code takes label 1000 for no "
                "class, so that the expert for it was never trained; allowed: 1000, or "
                "MoE_config.use_uncond_expert false"
            )
        return dataclasses.replace(
            _backbone(values, moe),
            mlp="gelu",
            qk_norm="layernorm" if values["qk_norm"] else "none",
            qk_norm_eps=1e-5,
            time_scale=1000.0,
            time_reversed=True,
            feed_forward=_prototypes(choice, alone, moe),
        )

    return build


def _prototypes(choice: str, alone: bool, moe: dict) -> ProMoEConfig:
    shared: dict[str, Any] = {}
    if moe["use_shared_expert"]:
        if "shared_expert_intermediate_size" not in moe:
            raise missing_key("MoE_config.shared_expert_intermediate_size")
        width = moe["shared_expert_intermediate_size"]
        shared = {"shared_mlp": "gelu", "shared_intermediate_size": width}
    modes = ("identity", "sigmoid", "softmax")
    by_token = choice == "token"  # experts that choose have no balance loss, whatever is said
    return ProMoEConfig(
        num_experts=moe["num_routed_experts"],
        intermediate_size=moe["moe_intermediate_size"],
        choice=choice,
        top_k=moe["top_k"],
        score=_one_of("MoE_config.router_weight_mode", moe["router_weight_mode"], modes),
        unconditional_expert=alone,
        contrastive_loss_weight=float(moe["routing_contrastive_lam"]),
        contrastive_temperature=float(moe["routing_contrastive_temperature"]),
        contrastive_top_k=moe["use_top_k_for_routing_contrastive"],
        balance_loss_weight=float(moe["load_balance_loss_coef"]) if by_token else 0.0,
        balance_per_sample=bool(moe.get("seq_aux", False)) and by_token,
        **shared,
    )


def ditmoe_model(flow: bool) -> Callable[[dict, dict], ModelConfig]:
    """DiT-MoE, whose constructor does not say whether it is trained as a flow."""

    def build(values: dict, moe: dict) -> ModelConfig:
        D, ratio, parts = values["hidden_size"], values["mlp_ratio"], values["pretraining_tp"]
        if ratio != int(ratio):
            raise UserError(f"mlp_ratio: {ratio} fails in the published code; allowed: integers")
        if parts > 1 and (2 * D % parts or int(ratio) * D % parts):
            raise UserError(
                f"pretraining_tp: {parts} does not divide the widths {int(ratio) * D} and {2 * D}; "
                "the published code would drop the rest of them"
            )
        flash = {"qk_norm": "layernorm", "qk_norm_eps": 1e-6} if values["use_flash_attn"] else {}
        return dataclasses.replace(
            _backbone(values | {"use_swiglu": True}, moe),
            **flash,
            time_reversed=flow,
            feed_forward=TokenChoiceConfig(
                num_experts=values["num_experts"],
                top_k=values["num_experts_per_tok"],
                balance_loss_weight=0.01,
                shared_mlp="swiglu",
                shared_intermediate_size=2 * D,
            ),
        )

    return build


def _dropout(values: dict, moe: dict) -> float:
    """That of experts, which a constructor may also give to the rest; ours has one for both."""
    experts, rest = moe.get("proj_drop", 0.0), values["proj_drop"]
    if rest not in (0.0, experts):
        raise UserError(f"proj_drop: {rest} and moe_config.proj_drop {experts} must be equal here")
    return float(experts)


def _one_of(key: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise unknown_name(key, value, known)
    return value


def _only(key: str, value: Any, allowed: Any) -> None:
    if value not in (None, allowed):
        raise UserError(f"{key}: {value!r} has no counterpart; allowed: {allowed!r}")


def _backbone(values: dict, moe: dict) -> ModelConfig:
    """The keys that all families mean alike."""
    shape = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    return ModelConfig(
        **{key: values[key] for key in (*shape, "head_dim", "num_classes", "learn_sigma")},
        mlp="swiglu" if values["use_swiglu"] else "gelu",
        mlp_ratio=float(values["mlp_ratio"]),
        label_dropout=values["class_dropout_prob"],
        moe_every=2 if moe.get("interleave") else 1,
    )
