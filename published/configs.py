"""The constructors of the published models, as configs of ours."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from config.model import FeedForwardConfig
from config.schema import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    ModelConfig,
    ProMoEConfig,
    TokenChoiceConfig,
)
from config.validate_model import check_model
from core.errors import UserError, unknown_name
from published.keywords import (
    DIT,
    DITMOE,
    DSMOE,
    DSMOE_KEYS,
    JIT,
    JIT_KEYS,
    MOE_KEYS,
    PROMOE,
    PROMOE_KEYS,
)

ANY = 1 << 30
"""A micro-batch that sets no limit to experts: a constructor does not know it."""


@dataclass(frozen=True)
class Family:
    """A family of official models.

    Attributes:
        keywords: of the constructor, with their defaults.
        moe_keys: of MoE_config; True for those that must be there.
        always_moe: there is no such model without experts.
        build: (all keywords, MoE_config) -> our config.
    """

    keywords: dict[str, Any]
    moe_keys: dict[str, bool]
    build: Callable[[dict, dict], ModelConfig]
    always_moe: bool = False


def official_config(family: str, ctor: Mapping[str, Any]) -> ModelConfig:
    """The config of the model that an official constructor makes.

    Raises:
        UserError: for an unknown family or keyword, or what the family cannot have.
    """
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    known = FAMILIES[family]
    for name in ctor:
        if name not in known.keywords:
            raise unknown_name("official constructor", name, known.keywords)
    # JiT's constructor has no such keywords; what they would say is fixed there.
    fixed = {"class_dropout_prob": 0.1, "learn_sigma": False, "head_dim": None, "use_swiglu": False}
    values = fixed | known.keywords | dict(ctor)
    if not values["class_dropout_prob"]:
        raise UserError("class_dropout_prob: 0 has no null class; above 0 is allowed")
    section = "moe_config" if "moe_config" in values else "MoE_config"
    moe = dict(values[section] or {})
    for name in moe:
        if name not in known.moe_keys:
            raise unknown_name(section, name, known.moe_keys)
    missing = [name for name, needed in known.moe_keys.items() if needed and name not in moe]
    if missing and (moe or known.always_moe):
        raise _missing(f"{section}.{missing[0]}")
    model = known.build(values, moe)
    check_model(model, micro_batch_size=ANY)
    return model


def _missing(key: str) -> UserError:
    return UserError(
        f"{key}: missing; the official code fails without it, and what it would mean is not known"
    )


def _dit_model(feed_forward: Callable[[dict, dict], FeedForwardConfig]) -> Callable:
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


def _token_choice(values: dict, moe: dict) -> TokenChoiceConfig:
    return TokenChoiceConfig(
        num_experts=moe["num_experts"],
        top_k=moe["capacity"],
        balance_loss_weight=0.01,
        **_shared(values, moe),
    )


def _expert_choice(values: dict, moe: dict) -> ExpertChoiceConfig:
    return ExpertChoiceConfig(
        num_experts=moe["num_experts"],
        capacity=float(moe["capacity"]),
        round_share_first=True,
        **_shared(values, moe),
    )


def _diffmoe(values: dict, moe: dict) -> DiffMoEConfig:
    schedule = moe.get("capacity_schedule")
    stages = ("capacity_schedule_stage_I_iters", "capacity_schedule_stage_II_iters")
    for stage in stages if schedule else ():
        if stage not in schedule:
            raise _missing(f"MoE_config.capacity_schedule.{stage}")
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


def _dense(values: dict, moe: dict) -> DenseConfig:
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


def _dsmoe_model(values: dict, moe: dict) -> ModelConfig:
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


def _jit_model(values: dict, moe: dict) -> ModelConfig:
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


def _promoe_model(choice: str) -> Callable[[dict, dict], ModelConfig]:
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
            raise _missing("MoE_config.shared_expert_intermediate_size")
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


def _ditmoe_model(flow: bool) -> Callable[[dict, dict], ModelConfig]:
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


FAMILIES: dict[str, Family] = {
    "dit": Family(DIT, MOE_KEYS, _dit_model(_dense)),
    "sit": Family(DIT, MOE_KEYS, _dit_model(_dense)),
    "diffmoe_dense": Family(DIT, MOE_KEYS, _dit_model(_dense)),
    "diffmoe_tc": Family(DIT, MOE_KEYS, _dit_model(_token_choice), always_moe=True),
    "diffmoe_ec": Family(DIT, MOE_KEYS, _dit_model(_expert_choice), always_moe=True),
    "diffmoe": Family(DIT, MOE_KEYS, _dit_model(_diffmoe), always_moe=True),
    "dsmoe": Family(DSMOE, DSMOE_KEYS, _dsmoe_model, always_moe=True),
    "jit": Family(JIT, JIT_KEYS, _jit_model),
    "promoe_tc": Family(PROMOE, PROMOE_KEYS, _promoe_model("token"), always_moe=True),
    "promoe_ec": Family(PROMOE, PROMOE_KEYS, _promoe_model("expert"), always_moe=True),
    "ditmoe": Family(DITMOE, {}, _ditmoe_model(flow=True)),
    "ditmoe_ddpm": Family(DITMOE, {}, _ditmoe_model(flow=False)),
}
"""Families of official models by the name that importers give."""
