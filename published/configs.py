"""The constructors of the published models, as configs of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from config.model import ModelConfig
from config.validate_model import check_model
from core.errors import UserError, unknown_name
from published.builders import (
    dense,
    diffmoe,
    dit_model,
    ditmoe_model,
    dsmoe_model,
    expert_choice,
    jit_model,
    missing_key,
    promoe_model,
    token_choice,
)
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
        raise missing_key(f"{section}.{missing[0]}")
    model = known.build(values, moe)
    check_model(model, micro_batch_size=ANY)
    return model


FAMILIES: dict[str, Family] = {
    "dit": Family(DIT, MOE_KEYS, dit_model(dense)),
    "sit": Family(DIT, MOE_KEYS, dit_model(dense)),
    "diffmoe_dense": Family(DIT, MOE_KEYS, dit_model(dense)),
    "diffmoe_tc": Family(DIT, MOE_KEYS, dit_model(token_choice), always_moe=True),
    "diffmoe_ec": Family(DIT, MOE_KEYS, dit_model(expert_choice), always_moe=True),
    "diffmoe": Family(DIT, MOE_KEYS, dit_model(diffmoe), always_moe=True),
    "dsmoe": Family(DSMOE, DSMOE_KEYS, dsmoe_model, always_moe=True),
    "jit": Family(JIT, JIT_KEYS, jit_model),
    "promoe_tc": Family(PROMOE, PROMOE_KEYS, promoe_model("token"), always_moe=True),
    "promoe_ec": Family(PROMOE, PROMOE_KEYS, promoe_model("expert"), always_moe=True),
    "ditmoe": Family(DITMOE, {}, ditmoe_model(flow=True)),
    "ditmoe_ddpm": Family(DITMOE, {}, ditmoe_model(flow=False)),
}
"""Families of official models by the name that importers give."""
