"""The layers that `benchmarks.moe_layer` compares, by the paper that they are of."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.pseudo_code import Algorithm3
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
from config.race import RaceConfig
from models.build import FEED_FORWARDS


def layers(experts: int) -> dict[str, FeedForwardConfig]:
    """The layers that are compared, by name."""
    return {
        "dense": DenseConfig(),
        "token_choice": TokenChoiceConfig(num_experts=experts),
        "expert_choice": ExpertChoiceConfig(num_experts=experts),
        "diffmoe": DiffMoEConfig(num_experts=experts),
    }


DEEPSEEK = {"deepseek E16-k2": (16, 2, 2.0), "deepseek E48-k5": (48, 5, 1 / 3)}
"""Experts, top-k, and width of an expert in units of D, of DSMoE-S."""

KINDS = {"gelu": "GELU", "swiglu": "SwiGLU"}


def _sizes(kind: str, width: int, shared: int) -> dict[str, object]:
    return {
        **{"expert_mlp": kind, "intermediate_size": width},
        **{"shared_mlp": kind, "shared_intermediate_size": shared},
    }


def deepseek_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """Those of DSMoE-S."""
    found = {}
    for name, (experts, top_k, ratio) in DEEPSEEK.items():
        width = round(ratio * hidden_size)
        sizes = _sizes("swiglu", width, width)
        found[name] = DeepSeekConfig(num_experts=experts, top_k=top_k, **sizes)
    return found


def promoe_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """Those of ProMoE, where all samples have a class."""
    sizes = _sizes("gelu", 2 * hidden_size, 2 * hidden_size)
    return {
        f"promoe E12 by {choice}": ProMoEConfig(num_experts=12, choice=choice, **sizes)
        for choice in ("token", "expert")
    }


def ditmoe_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """That of DiT-MoE with 8 experts."""
    sizes = _sizes("swiglu", 4 * hidden_size, 2 * hidden_size)
    return {"ditmoe E8-k2": TokenChoiceConfig(num_experts=8, top_k=2, **sizes)}


def build(
    layer: FeedForwardConfig, hidden_size: int, backend: str, device: torch.device, **model: object
) -> nn.Module:
    """A layer alone, with thresholds that give C of about 1 in dynamic inference."""
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=hidden_size, feed_forward=layer, expert_backend=backend, **model
    )
    return FEED_FORWARDS[layer.name](config).to(device)


def diffmoe_modules(flags: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of the DiffMoE paper, and for each the name of its dense counterpart."""
    device, D = torch.device(flags.device), flags.hidden_size
    kinds = layers(flags.num_experts)
    modules = {name: build(layer, D, "auto", device) for name, layer in kinds.items()}
    if flags.compile:
        for module in modules.values():
            module.compile()
    for name in kinds.keys() - {"dense"}:
        modules[f"{name}, loop"] = build(kinds[name], D, "loop", device)
    modules["Algorithm 3 as printed"] = Algorithm3(D, flags.num_experts, 4 * D).to(device)
    return modules, dict.fromkeys(modules, "dense")


def published_modules(
    layers: Callable[[int], dict[str, MoEConfig]], flags: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of a paper, and for each the name of its dense counterpart."""
    device, D = torch.device(flags.device), flags.hidden_size
    modules, baselines = {}, {}
    for name, layer in layers(D).items():
        routed = layer.experts_per_token() * layer.intermediate_size
        width, kind = round(routed) + layer.shared_intermediate_size, layer.expert_mlp
        dense = f"dense {KINDS[kind]} of {width}"
        if dense not in modules:
            same = {"mlp": kind, "intermediate_size": width}
            modules[dense] = build(DenseConfig(), D, "auto", device, **same)
        modules[name] = build(layer, D, "auto", device)
        modules[f"{name}, loop"] = build(layer, D, "loop", device)
        baselines |= dict.fromkeys((dense, name, f"{name}, loop"), dense)
    if flags.compile:
        for name in modules:
            if not name.endswith(", loop"):
                modules[name].compile()
    return modules, baselines


RACES: dict[str, FeedForwardConfig] = {
    "race 1-in-8": RaceConfig(num_experts=8, top_k=1),
    "race 2-in-8": RaceConfig(num_experts=8, top_k=2, hidden_split=2),
    "race 4-in-16": RaceConfig(num_experts=16, top_k=4, hidden_split=4),
    "race 4-in-32": RaceConfig(num_experts=32, top_k=4, hidden_split=4),
    "expert_choice, renormalised": ExpertChoiceConfig(
        num_experts=16, renormalise="token", rounding="up"
    ),
}


def race_modules(flags: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of Expert Race and of Nucleus-Image's kind, all activated as wide as the dense one."""
    device, D = torch.device(flags.device), flags.hidden_size
    kinds = {"dense": DenseConfig(), **RACES}
    modules = {name: build(layer, D, "auto", device) for name, layer in kinds.items()}
    if flags.compile:
        for module in modules.values():
            module.compile()
    return modules, dict.fromkeys(modules, "dense")


FAMILIES = {
    "diffmoe": diffmoe_modules,
    "deepseek": partial(published_modules, deepseek_layers),
    "promoe": partial(published_modules, promoe_layers),
    "ditmoe": partial(published_modules, ditmoe_layers),
    "race": race_modules,
}
