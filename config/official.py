"""The constructors of the published models, as configs of ours."""

from collections.abc import Callable, Mapping
from typing import Any

from config.schema import (
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    FeedForwardConfig,
    ModelConfig,
    TokenChoiceConfig,
)
from core.errors import UserError, unknown_name

DEFAULTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "head_dim": None,
    "use_swiglu": False,
    "CapacityPred_loss_weight": 0.01,
    "MoE_config": None,
}
"""Keywords of the official constructors, with what they mean when left out."""

MOE_KEYS = {
    "n_shared_experts",
    "num_experts",
    "capacity",
    "init_MoeMLP",
    "interleave",
    "capacity_schedule",
}


def official_config(family: str, ctor: Mapping[str, Any]) -> ModelConfig:
    """The config of the model that an official constructor makes.

    Raises:
        UserError: for an unknown family or keyword, or what the family cannot have.
    """
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    for name in ctor:
        if name not in DEFAULTS:
            raise unknown_name("official constructor", name, DEFAULTS)
    values = DEFAULTS | dict(ctor)
    if not values["class_dropout_prob"]:
        raise UserError("class_dropout_prob: 0 has no null class; above 0 is allowed")
    moe = dict(values["MoE_config"] or {})
    for name in moe:
        if name not in MOE_KEYS:
            raise unknown_name("MoE_config", name, MOE_KEYS)
    shape = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    return ModelConfig(
        **{key: values[key] for key in (*shape, "head_dim", "num_classes", "learn_sigma")},
        mlp="swiglu" if values["use_swiglu"] else "gelu",
        mlp_ratio=float(values["mlp_ratio"]),
        label_dropout=values["class_dropout_prob"],
        moe_every=2 if moe.get("interleave") else 1,
        feed_forward=FAMILIES[family](values, moe),
    )


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


FAMILIES: dict[str, Callable[[dict, dict], FeedForwardConfig]] = {
    "dit": _dense,
    "sit": _dense,
    "diffmoe_dense": _dense,
    "diffmoe_tc": _token_choice,
    "diffmoe_ec": _expert_choice,
    "diffmoe": _diffmoe,
}
"""Families of official models: (all keywords, MoE_config) -> our feed-forward section."""
