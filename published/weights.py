"""The published checkpoints of DiT, SiT, DiffMoE, JiT, DSMoE, ProMoE, DiT-MoE to ours and back.

A model is described by a family and the official constructor's keywords. The list of entries of
its config (`published.entries`) serves both directions, and a name that is left over or
missing on either side is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from config.model import ModelConfig
from config.promoe import ProMoEConfig
from core.errors import UserError
from models.build import build_model
from models.dit import DiT
from published.configs import official_config
from published.entries import entries, has_predictor


def from_official(family: str, ctor: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiT:
    """Our model with official weights.

    Args:
        family: one of `published.configs.FAMILIES`.
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
    up_and_down = isinstance(config.feed_forward, ProMoEConfig) and any(
        re.fullmatch(r"blocks\.\d+\.mlp\.up_proj\.weight", name) for name in state
    )
    known = entries(config, up_and_down)
    wanted = {name for entry in known for name in entry.official} | constants(model)[0].keys()
    missing, extra = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or extra:
        raise UserError(
            f"official checkpoint: {len(missing)} tensor(s) missing {missing[:3]}, {len(extra)} "
            f"left over {extra[:3]}; family and constructor keywords must fit the weights"
        )
    tensors = {}
    for entry in known:
        try:
            parts = entry.join([state[name] for name in entry.official])
        except RuntimeError as error:
            raise UserError(
                f"official checkpoint: {entry.official[0]} does not fit these keywords: {error}"
            ) from None
        tensors |= zip(entry.ours, parts, strict=True)
    for name, own in model.state_dict().items():
        there, here = tuple(tensors[name].shape), tuple(own.shape)
        if there != here:
            hint = ""
            if name.startswith("final.linear") and max(there[0], here[0]) == 2 * min(
                there[0], here[0]
            ):
                wanted = str(there[0] > here[0]).lower()
                hint = f"; they fit with model.learn_sigma {wanted}: twice the outputs, or not"
            raise UserError(
                f"official checkpoint: {name} is {there}, the model of these keywords has {here}"
                f"{hint}"
            )
    _check_constants(model, state)
    model.load_state_dict(tensors)
    model.up_and_down = up_and_down  # for `to_official`: the config does not say it


def to_official(model: DiT, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Official names and shapes of a model's weights.

    Args:
        model: from `build_model` or `from_official`.
        tensors: other tensors under names of our state, gradients for instance; by default the
            model's parameters and buffers, with the official constants (positions, decay).

    Raises:
        UserError: a tensor has no official name.
    """
    whole = tensors is None
    source = model.state_dict() if whole else tensors
    result = {}
    known = entries(model.config, getattr(model, "up_and_down", False))
    unnamed = source.keys() - {name for entry in known for name in entry.ours}
    if unnamed:
        raise UserError(
            f"official names: none for {len(unnamed)} tensor(s), first {min(unnamed)}; no "
            "published model has them"
        )
    for entry in known:
        if all(name in source for name in entry.ours):
            parts = entry.split([source[name] for name in entry.ours])
            result |= zip(entry.official, parts, strict=True)
    if whole:
        result |= constants(model)[0]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def constants(model: DiT) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Official buffers that are options with us: their values, and the tolerance to compare at.

    Averaged weights may hold an average of a constant, which float32 lets drift: by 2e-4 at a decay
    of 0.9999.
    """
    values, tolerance = {}, {"pos_embed": 1e-3}
    if model.config.positions == "sincos":
        values["pos_embed"] = model.positions[None]
    layer = model.config.feed_forward
    if has_predictor(model.config):
        for i in model.config.moe_blocks():
            name = f"blocks.{i}.mlp.ema_decay"
            values[name], tolerance[name] = torch.tensor([layer.threshold_decay]), 1e-3
    return values, tolerance


def _check_constants(model: DiT, state: Mapping[str, Tensor]) -> None:
    values, tolerance = constants(model)
    for name, value in values.items():
        same = state[name].shape == value.shape and torch.allclose(
            state[name].float(), value, rtol=0, atol=tolerance[name]
        )
        if not same:
            raise UserError(f"official checkpoint: {name} is not the fixed value of the models")
