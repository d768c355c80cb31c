"""The backbone: identity at the start, patches, conditions, the pattern of MoE blocks."""

import pytest
import torch
from torch import nn

from config.layers import DenseConfig
from config.model import ModelConfig
from config.schema import FEED_FORWARDS
from models.build import build_model
from models.embeddings import timestep_features
from models.moe.layer import MoEFeedForward
from models.positions import sincos_2d
from training.step import auxiliary_losses

SMALL = {"input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def small(name="diffmoe", **changes):
    layer = FEED_FORWARDS[name]()
    if name != "dense":
        layer.num_experts = 4
    torch.manual_seed(0)
    return build_model(ModelConfig(**SMALL, feed_forward=layer, **changes))


def randomise(model):
    """Take the model out of its start as the identity."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=g)
    return x, torch.rand(batch, generator=g), torch.arange(batch) % 5


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_a_fresh_model_predicts_zero_and_every_block_is_the_identity(name):
    model = small(name)
    x, t, y = inputs()
    assert not model(x, t, y).prediction.any()
    h, c = torch.randn(3, 16, 16), torch.randn(3, 16)
    for block in model.blocks:
        assert torch.equal(block(h, c)[0], h)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_every_parameter_gets_a_gradient(name):
    model = randomise(small(name, learn_sigma=True))
    output = model(*inputs())
    assert output.prediction.shape == (3, 8, 8, 8)
    assert len(output.routing) == (0 if name == "dense" else 2)
    auxiliary = auxiliary_losses(output.routing, model.patchify(output.prediction[:, :4]))
    (output.prediction.square().mean() + sum(auxiliary.values())).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name


@pytest.mark.parametrize(("every", "moe"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2])])
def test_moe_blocks_are_every_nth(every, moe):
    model = small(moe_every=every)
    found = [i for i, b in enumerate(model.blocks) if isinstance(b.feed_forward, MoEFeedForward)]
    assert found == moe


def test_initialisation_is_that_of_dit():
    torch.manual_seed(0)
    model = build_model(ModelConfig(feed_forward=DenseConfig()))
    D = 384
    block = model.blocks[0]
    xavier = (2 / (D + 4 * D)) ** 0.5
    assert abs(block.feed_forward.fc1.weight.std() / xavier - 1) < 0.02
    assert abs(model.label_embed.table.weight.std() / 0.02 - 1) < 0.02
    assert abs(model.time_embed.mlp[0].weight.std() / 0.02 - 1) < 0.02
    patch_fan = 2 * 2 * 4
    patch_xavier = (2 / (patch_fan + D)) ** 0.5
    assert abs(model.patch_embed.proj.weight.std() / patch_xavier - 1) < 0.05
    assert not block.attn.qkv.bias.any()


def test_a_patch_of_the_output_stays_where_the_patch_of_the_input_is():
    """With all mixing off, an output pixel must answer to its own patch alone."""
    model = randomise(small("dense"))
    for block in model.blocks:
        nn.init.zeros_(block.modulation[1].weight)
        nn.init.zeros_(block.modulation[1].bias)
    x, t, y = (v[:1] for v in inputs())
    moved = x.clone()
    moved[0, :, 2:4, 6:8] += 1.0
    change = (model(moved, t, y).prediction - model(x, t, y).prediction).abs().amax(dim=(0, 1))
    assert (change[2:4, 6:8] > 0).all()
    change[2:4, 6:8] = 0
    assert not change.any()


def test_conditions():
    model = randomise(small("dense"))
    x, t, y = inputs()
    null = model.null_condition(y)
    assert null.labels.tolist() == [5, 5, 5]
    assert null.free.all()
    assert not torch.equal(model(x, t, y).prediction, model(x, t, null).prediction)
    labels = torch.zeros(20_000, dtype=torch.int64)
    dropped = model.drop_condition(labels, torch.Generator().manual_seed(0))
    share = (dropped.labels == 5).float().mean()
    assert abs(share - 0.1) < 0.01
    assert torch.equal(dropped.free, dropped.labels == 5)
    assert (dropped.free | (dropped.labels == 0)).all()
    again = model.drop_condition(labels, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.labels, again.labels)


def test_positions_and_times_by_hand():
    table = sincos_2d(8, 3)
    assert table.shape == (9, 8)
    row, column = 2, 1
    angles = torch.tensor([1.0, 0.01])
    expected = [(column * angles).sin(), (column * angles).cos()]
    expected += [(row * angles).sin(), (row * angles).cos()]
    torch.testing.assert_close(table[row * 3 + column], torch.cat(expected))
    features = timestep_features(torch.tensor([0.0, 7.0]), 4)
    expected = [[1, 1, 0, 0], torch.tensor([7.0, 0.07, 7.0, 0.07])]
    torch.testing.assert_close(features[0], torch.tensor(expected[0], dtype=torch.float32))
    torch.testing.assert_close(features[1, :2], expected[1][:2].cos())
    torch.testing.assert_close(features[1, 2:], expected[1][2:].sin())


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({"hidden_size": 384, "depth": 12, "num_heads": 6}, 32858896 / 1e6),
        ({"hidden_size": 768, "depth": 12, "num_heads": 12}, 130303504 / 1e6),
    ],
    ids=["S", "B"],
)
def test_parameter_counts_of_the_published_dense_models(changes, millions):
    with torch.device("meta"):
        model = build_model(ModelConfig(**changes, feed_forward=DenseConfig()))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == millions


def test_parameter_count_of_diffmoe_s_e16():
    with torch.device("meta"):
        model = build_model(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 140160880
