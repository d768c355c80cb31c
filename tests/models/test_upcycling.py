"""Models with experts that start from a dense one."""

import copy
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
from config.promoe import ProMoEConfig
from config.race import RaceConfig
from config.schema import FEED_FORWARDS, Config
from core.distributed import Processes
from core.errors import UserError
from core.types import RoutingPlan
from models.build import build_model
from models.feed_forward import build_mlp
from models.moe.dispatch import places_of
from models.moe.experts import Experts
from models.upcycling import experts_of
from training.checkpoint import TrainingState, initialise, save_checkpoint
from training.ema import EMA
from training.optim import build_optimizer
from training.saving import CheckpointWriter

ALONE = Processes(0, 1, torch.device("cpu"))
D, E, W = 16, 4, 64
SHAPE = {"input_size": 8, "hidden_size": D, "num_heads": 2, "depth": 4, "num_classes": 3}


def model_config(layer, **changes):
    return ModelConfig(**(SHAPE | changes), learn_sigma=False, feed_forward=layer)


@pytest.fixture
def dense(tmp_path):
    """A checkpoint of a dense model with random weights, for any kind of MLP."""

    def save(mlp="gelu", layer=None, **changes):
        torch.manual_seed(0)
        model = build_model(model_config(layer or DenseConfig(), mlp=mlp, **changes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        config = Config(run_dir=str(tmp_path / "dense"), model=model.config)
        facts = {"vae_path": "", "scaling_factor": 1, "shift_factor": 0, "latent_channels": 4}
        ema, optimizer = EMA(copy.deepcopy(model), 0.9, False), build_optimizer(model, config.optim)
        facts |= {"class_names": []}
        state = TrainingState(config, model, {"ema": ema}, optimizer, facts, step=1)
        writer = CheckpointWriter(config, ALONE)
        save_checkpoint(state, writer)
        writer.finish()
        return model

    return save


def upcycled(tmp_path, layer, **changes):
    config = model_config(layer, **changes)
    torch.manual_seed(1)
    model = build_model(config)
    run = Config(
        run_dir=str(tmp_path / "new"),
        model=config,
        init_from=str(tmp_path / "dense"),
        init_upcycle=True,
    )
    initialise(run, model, None)
    return model


def predictions(*models):
    """Of the first step of training."""
    torch.manual_seed(2)
    inputs = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    with torch.no_grad():
        return [model(*inputs, step=0).prediction for model in models]


SAME = {
    "deepseek": (DeepSeekConfig(num_experts=E, top_k=2, expert_mlp=None), {}),
    "every block": (DeepSeekConfig(num_experts=E, top_k=3, expert_mlp=None), {"moe_every": 1}),
    "token_choice of all": (TokenChoiceConfig(num_experts=E, top_k=E), {}),
    "expert_choice of all": (ExpertChoiceConfig(num_experts=E, capacity=E), {}),
    "renormalised": (
        ExpertChoiceConfig(num_experts=E, capacity=E, renormalise="token", scores="sigmoid"),
        {"leading_dense": 2},
    ),
    "scheduled": (DiffMoEConfig(num_experts=E, capacity_schedule=(2, 9)), {}),
    "promoe of all": (ProMoEConfig(num_experts=E, top_k=E, score="softmax"), {}),
    "race of all": (RaceConfig(num_experts=E, top_k=E, gate="softmax"), {}),
}


@pytest.mark.parametrize("mlp", ["gelu", "silu", "swiglu", "swiglu_bias"])
@pytest.mark.parametrize("name", SAME)
def test_the_first_forward_is_the_dense_models(name, mlp, dense, tmp_path, monkeypatch):
    layer, changes = SAME[name]
    told = []
    monkeypatch.setattr("training.checkpoint.log.info", lambda text, *a: told.append(text % a))
    old, new = dense(mlp), upcycled(tmp_path, layer, mlp=mlp, **changes)
    assert [text for text in told if text.endswith("there the first forward is the dense model's")]
    wanted, found = predictions(old, new)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.abs().max() > 0.1


DIFFERENT = {
    "token_choice": (TokenChoiceConfig(num_experts=E), "their affinities, below one"),
    "deepseek of one": (DeepSeekConfig(num_experts=E, top_k=1, expert_mlp=None), "times its aff"),
    "scaled": (
        DeepSeekConfig(num_experts=E, expert_mlp=None, routed_scaling_factor=2.5),
        "sum to 2.5",
    ),
    "expert_choice": (ExpertChoiceConfig(num_experts=E), "affinities of those that take it"),
    "diffmoe": (DiffMoEConfig(num_experts=E), "affinities of those that take it"),
    "nucleus": (
        ExpertChoiceConfig(num_experts=E, renormalise="token"),
        "one, or to none where no expert takes it",
    ),
    "promoe": (
        ProMoEConfig(num_experts=E, top_k=2, hidden_split=2),
        "sum to the scores of its e",
    ),
    "race": (RaceConfig(num_experts=E, hidden_split=2), "scores of those that it wins"),
    "parts": (
        DeepSeekConfig(num_experts=E, expert_mlp=None, hidden_split=2),
        "those of the 2 parts of an MLP",
    ),
    "shared": (
        DeepSeekConfig(
            num_experts=E, expert_mlp=None, shared_mlp="gelu", shared_intermediate_size=8
        ),
        "the shared gelu adds to it",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_log_says_where_it_is_not(name, dense, tmp_path, monkeypatch):
    layer, reason = DIFFERENT[name]
    told = []
    monkeypatch.setattr("training.checkpoint.log.warning", lambda text, *a: told.append(text % a))
    old, new = dense(), upcycled(tmp_path, layer)
    assert len(told) == 1
    assert f"the {layer.name} layers (blocks 1, 3)" in told[0]
    assert reason in told[0]
    wanted, found = predictions(old, new)
    assert (wanted - found).abs().max() > 1e-3
    for name, tensor in old.state_dict().items():
        if name in new.state_dict():
            assert torch.equal(new.state_dict()[name], tensor), name


def test_every_layer_is_upcycled(dense, tmp_path):
    """Each expert has its part of the MLP, those that no router chooses included."""
    old = dense()
    for name in FEED_FORWARDS.keys() - {"dense"}:
        layer = dataclasses.replace(
            FEED_FORWARDS[name](), num_experts=E, expert_mlp=None, hidden_split=2
        )
        experts = upcycled(tmp_path, layer).blocks[3].feed_forward.experts
        mlp = old.blocks[3].feed_forward
        assert len(experts.w1) == layer.all_experts()
        for e in range(len(experts.w1)):
            part = slice(32 * (e % 2), 32 * (e % 2) + 32)
            assert torch.equal(experts.w1[e].T, mlp.fc1.weight[part])
            assert torch.equal(experts.w2[e].T, mlp.fc2.weight[:, part])
            assert torch.equal(experts.b1[e], mlp.fc1.bias[part])
            assert torch.equal(experts.b2[e], mlp.fc2.bias / 2)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("mlp", ["gelu", "silu", "swiglu", "swiglu_bias"])
def test_the_parts_of_an_mlp_sum_to_it(mlp, parts):
    torch.manual_seed(0)
    whole = build_mlp(mlp, D, W)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    experts = Experts(2 * parts, D, W // parts, mlp)
    experts.load_state_dict(experts_of(whole.state_dict(), mlp, 2 * parts, W // parts))
    x, count = torch.randn(5, D), 2 * parts
    index = torch.arange(5).repeat(count)
    plan = RoutingPlan(index, torch.ones(5 * count), torch.full((count,), 5), [5] * count)
    outputs = experts(x, plan, places_of(plan, 5)).view(2, parts, 5, D).sum(dim=1)
    for copy_of_all in outputs:
        torch.testing.assert_close(copy_of_all, whole(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "saved", "wanted"),
    [
        (DiffMoEConfig(num_experts=E), {"layer": DiffMoEConfig(num_experts=E)}, "a dense model"),
        (
            DeepSeekConfig(num_experts=E),
            {},
            "experts of model.feed_forward.name deepseek are 'swiglu', .* 'gelu'; wanted: --model",
        ),
        (
            DiffMoEConfig(num_experts=E, intermediate_size=24),
            {},
            "width 24 are not whole parts of MLPs of width 64; wanted: .*size that divides 64",
        ),
        (DiffMoEConfig(num_experts=E, intermediate_size=128), {}, "of width 128 are not whole"),
        (DiffMoEConfig(num_experts=3, hidden_split=2), {}, "3 experts cannot have the 2 parts"),
        (DiffMoEConfig(num_experts=E), {"depth": 3}, r"blocks\.3\..* is missing in the file"),
    ],
)
def test_what_cannot_be_made_of_a_dense_model_is_refused(layer, saved, wanted, dense, tmp_path):
    dense(**saved)
    with pytest.raises(UserError, match=wanted):
        upcycled(tmp_path, layer)
