"""Precision, compilation, one call for both halves: samples cost less, and stay what they are."""

import dataclasses

import pytest
import torch

from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    TokenChoiceConfig,
)
from config.model import ModelConfig
from config.objective import SamplingConfig
from config.promoe import ProMoEConfig
from config.race import RaceConfig
from core.conditions import Condition
from models.build import build_model
from sampling.generate import Sampler
from transport.objective import Flow

SHAPE = {"input_size": 4, "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
LABELS = Condition.of_labels([0, 1, 2, 2, 1])
APART = {
    "dense": DenseConfig(),
    "token_choice": TokenChoiceConfig(num_experts=4, top_k=2),
    "expert_choice": ExpertChoiceConfig(num_experts=4),
    "deepseek": DeepSeekConfig(num_experts=4, intermediate_size=16),
    "promoe": ProMoEConfig(num_experts=4),
    "promoe_expert": ProMoEConfig(num_experts=4, choice="expert"),
    "race": RaceConfig(num_experts=4),
}
"""Layers in whose evaluation no sample sees another."""
TOGETHER = {
    "diffmoe": DiffMoEConfig(num_experts=4),
    "diffmoe_topk": DiffMoEConfig(num_experts=4, inference="topk"),
    "race_topk": RaceConfig(num_experts=4, inference="topk"),
}


def sampler(layer, **options):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SHAPE, num_classes=3, feed_forward=layer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("thresholds"):
            buffer.fill_(0.4)
    settings = SamplingConfig(sampler="euler", num_steps=3, cfg_scale=2.0)
    device = torch.device("cpu")
    return Sampler(model, Flow(), settings, (4, 4, 4), 7, device, **options)


def batches_seen(made):
    """Samples in each call of the model while it draws five."""
    sizes = []
    handle = made.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    latents, cost = made.latents(range(5), LABELS)
    handle.remove()
    return latents, cost, sizes


@pytest.mark.parametrize("name", APART)
def test_both_halves_share_a_call_where_no_sample_sees_another(name, monkeypatch):
    made = sampler(APART[name], record=True)
    latents, cost, sizes = batches_seen(made)
    assert sizes == [10, 10, 10]
    monkeypatch.setattr(type(APART[name]), "sampling_sees_batch", lambda self: True)
    wanted, other, sizes = batches_seen(made)
    assert sizes == [5] * 6
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)
    assert cost.calls == other.calls == 6
    if name != "dense":
        torch.testing.assert_close(cost.capacity(), other.capacity())
        one, two = (meter.model.arrays(5)["counts"] for meter in (cost, other))
        assert (one == two).all()


@pytest.mark.parametrize("name", TOGETHER)
def test_halves_stay_apart_where_samples_see_each_other(name):
    assert batches_seen(sampler(TOGETHER[name]))[2] == [5] * 6


@pytest.mark.parametrize("layer", [DenseConfig(), DiffMoEConfig(num_experts=4)])
def test_bf16_is_near_float32_and_its_sums_are_float32(layer):
    exact = sampler(layer).latents(range(5), LABELS)[0]
    rough = sampler(layer, bf16=True).latents(range(5), LABELS)[0]
    assert rough.dtype == torch.float32
    difference = (rough - exact).abs().mean() / exact.abs().mean()
    assert 1e-4 < difference < 0.1
    # Products of bf16 numbers alone would make latents of 8 significant bits.
    assert not torch.equal(rough, rough.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_choice", "diffmoe", "race"])
def test_compiled_samples_are_the_same(name):
    layer = (APART | TOGETHER)[name]
    wanted = sampler(layer).latents(range(5), LABELS)[0]
    made = sampler(layer)
    made.compile(backend="aot_eager")
    for _ in range(2):  # counts of experts differ from call to call
        torch.testing.assert_close(made.latents(range(5), LABELS)[0], wanted, rtol=1e-4, atol=1e-4)
    assert made.model.blocks[0]._compiled_call_impl is not None


def test_guidance_settings_still_rule(monkeypatch):
    """Published joint guidance of a batch's pool is one call, and another sample."""
    made = sampler(TOGETHER["diffmoe"])
    apart = made.latents(range(5), LABELS)[0]
    made.settings = dataclasses.replace(made.settings, cfg_pooling="joint")
    joint, _, sizes = batches_seen(made)
    assert sizes == [10, 10, 10]
    assert not torch.allclose(joint, apart, atol=1e-3)


@pytest.mark.parametrize("negative", [False, True])
def test_captions_and_negative_prompts_share_a_call_too(negative, monkeypatch):
    """Of other lengths than the caption."""
    torch.manual_seed(0)
    text = {"num_classes": 0, "text_hidden_size": 12, "text_max_length": 7}
    model = build_model(ModelConfig(**SHAPE, **text, feed_forward=DenseConfig())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.set_null_text(torch.randn(2, 12))
    settings = SamplingConfig(sampler="euler", num_steps=3, cfg_scale=2.0)
    made = Sampler(model, Flow(), settings, (4, 4, 4), 7, torch.device("cpu"))
    if negative:
        made.negative = Condition.of_rows([torch.randn(3, 12)], 7)
    cond = Condition.of_rows([torch.randn(n, 12) for n in (5, 1, 7)], 7)
    found = made.latents(range(3), cond)[0]
    monkeypatch.setattr(DenseConfig, "sampling_sees_batch", lambda self: True)
    wanted = made.latents(range(3), cond)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
