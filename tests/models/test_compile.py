"""Every feed-forward variant is one graph for torch.compile: no breaks, equal results."""

import pytest
import torch
from torch import _dynamo as dynamo

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
from core.types import RouterContext
from models.build import build_model
from models.compiled import compile_block
from training.step import auxiliary_losses

SHARED = {"shared_mlp": "swiglu", "shared_intermediate_size": 16}

VARIANTS = {
    "dense": DenseConfig(),
    "token_choice": TokenChoiceConfig(num_experts=4),
    "token_choice_k2": TokenChoiceConfig(num_experts=4, top_k=2, **SHARED),
    "expert_choice": ExpertChoiceConfig(num_experts=4, **SHARED),
    "diffmoe": DiffMoEConfig(num_experts=4),
    "diffmoe_all_experts": DiffMoEConfig(num_experts=4, capacity=4.0),
    "deepseek": DeepSeekConfig(num_experts=4, num_groups=2, intermediate_size=16, **SHARED),
    "deepseek_k5": DeepSeekConfig(num_experts=8, top_k=5, intermediate_size=16),
    "promoe": ProMoEConfig(num_experts=4, balance_loss_weight=0.1, **SHARED),
    "promoe_k2": ProMoEConfig(num_experts=4, top_k=2, router_input="decoupled"),
    "promoe_expert": ProMoEConfig(num_experts=3, choice="expert", top_k=2, score="softmax"),
    "nucleus": ExpertChoiceConfig(
        num_experts=3,
        capacity=1.5,
        rounding="up",
        renormalise="token",
        router_input="decoupled",
        scores="sigmoid",
        route_scale=2.5,
        **SHARED,
    ),
    "race": RaceConfig(num_experts=8, top_k=4, hidden_split=4),
    "race_of_samples": RaceConfig(num_experts=4, pool="sample", gate="softmax", **SHARED),
}

SHAPE = {"input_size": 4, "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}


def model(variant, mlp):
    torch.manual_seed(0)
    config = ModelConfig(
        **SHAPE, num_classes=3, learn_sigma=False, mlp=mlp, feed_forward=VARIANTS[variant]
    )
    made = build_model(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(autouse=True)
def _fresh_graphs():
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_block_has_no_graph_break(variant, mlp):
    block = model(variant, mlp).blocks[1].train()
    x, c = torch.randn(3, 16, 16), torch.randn(3, 16)
    context = RouterContext(unconditional=torch.tensor([False, True, False]), time_embedding=c)
    found = dynamo.explain(block)(x, c, None, context)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


def test_blocks_before_and_after_the_class_tokens_have_fixed_shapes():
    """JiT's sequence grows at `context_start`, which must not make its length a symbol."""
    shapes = []

    def backend(graph, inputs):
        shapes.append([n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"])
        return graph.forward

    config = ModelConfig(
        **(SHAPE | {"depth": 4}), context_tokens=3, context_start=2, feed_forward=DenseConfig()
    )
    made = build_model(config).train()
    for block in made.blocks:
        compile_block(block, backend=backend)
    made(torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 1, 3]))
    tokens = {
        t.shape[1]
        for inputs in shapes
        for t in inputs
        if isinstance(t, torch.Tensor) and t.dim() == 3
    }
    assert tokens == {16, 19}
    assert all(type(t) is int for t in tokens)


def test_a_capacity_schedule_settles_in_few_graphs():
    layer = DiffMoEConfig(num_experts=4, capacity_schedule=(4, 1000))
    made = build_model(ModelConfig(**SHAPE, feed_forward=layer)).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, t, y = torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 1, 3])
    wanted = {step: made(x, t, y, step=step).routing[0].counts for step in range(4, 400, 36)}
    for block in made.blocks:
        compile_block(block, dynamic=None, backend=backend)
    for step, counts in wanted.items():
        assert torch.equal(made(x, t, y, step=step).routing[0].counts, counts)
    assert len(graphs) <= 6  # of eleven steps with other counts, in two blocks


def test_a_block_with_every_option_of_the_backbone_has_no_graph_break():
    options = {"rope": "2d", "norm": "rmsnorm", "qk_norm": True, "num_kv_heads": 1}
    config = ModelConfig(**SHAPE, **options, feed_forward=DiffMoEConfig(num_experts=4))
    made = build_model(config).train()
    x, c = torch.randn(3, 16, 16), torch.randn(3, 16)
    found = dynamo.explain(made.blocks[1])(x, c, (made.rotary_cos, made.rotary_sin))
    assert found.graph_break_count == 0, found.break_reasons


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_training_has_the_same_gradients(variant):
    made = model(variant, "gelu").train()
    x, t, y = torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 1, 3])
    found = []
    for call in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
        output = call(x, t, y)
        auxiliary = sum(auxiliary_losses(output.routing, made.patchify(x)).values())
        loss = output.prediction.square().mean() + auxiliary
        made.zero_grad()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
