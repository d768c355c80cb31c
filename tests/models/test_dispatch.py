"""Between tokens and pairs: what is computed, how precisely, and what is kept for gradients."""

import pytest
import torch

from benchmarks.measure import activation_memory
from config.layers import DenseConfig, DiffMoEConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.model import ModelConfig
from core.types import RouterContext, RoutingPlan
from models.build import FEED_FORWARDS
from models.moe.capacity import SiluLinear
from models.moe.dispatch import GatheredProduct, batched_product, combine, gather, places_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_the_gathered_product_keeps_no_rows_and_has_their_gradients(dtype, biased):
    """Against the library's, whose gradient adds by index."""
    torch.manual_seed(0)
    E, K, D, H, T = 3, 4, 8, 5, 7
    tokens, weight = torch.randn(T, D, dtype=dtype), torch.randn(E, D, H, dtype=dtype)
    bias = torch.randn(E, H, dtype=dtype) if biased else None
    index = torch.randint(0, T, (E * K,))
    places = places_of(RoutingPlan(index, torch.ones(E * K), torch.full((E,), K)), T)
    leaves = [t.requires_grad_() for t in (tokens, weight, bias) if t is not None]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        found = GatheredProduct.apply(tokens, index, *places, weight, bias)
    assert (E, K, D) not in kept
    assert (E * K, D) not in kept
    wanted = batched_product(tokens[index].view(E, K, D), weight, bias)
    assert torch.equal(found, wanted)
    grad = torch.randn(E, K, H, dtype=dtype)
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **close)


def test_bf16_outputs_are_kept_as_they_are_and_summed_in_float32():
    torch.manual_seed(0)
    index, gate = torch.tensor([0, 0, 0, 2]), torch.tensor([1.0, 2**-9, 2**-9, 3.0])
    outputs = torch.ones(4, 2, dtype=torch.bfloat16).requires_grad_()
    plan = RoutingPlan(index, gate, torch.tensor([4]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = combine(outputs, plan, places_of(plan, 3))
    assert y.dtype == torch.float32
    assert y[:, 0].tolist() == [1 + 2**-8, 0, 3]  # in bf16 alone the small ones would be lost
    assert not [t for t in kept if t.dtype == torch.float32 and t.dim() == 2]
    (gradient,) = torch.autograd.grad(y.sum(), outputs)
    assert gradient.dtype == torch.bfloat16
    assert gradient[:, 0].tolist() == gate.tolist()


def test_taking_rows_sums_their_gradients_in_the_order_of_the_experts():
    torch.manual_seed(0)
    tokens = torch.randn(4, 3, requires_grad=True)
    index = torch.tensor([2, 0, 2, 1, 2])
    plan = RoutingPlan(index, torch.ones(5), torch.tensor([5]))
    rows = gather(tokens, plan, places_of(plan, 4))
    assert torch.equal(rows, tokens[index])
    grad = torch.randn(5, 3)
    (found,) = torch.autograd.grad(rows, tokens, grad)
    wanted = torch.stack([grad[1], grad[3], grad[0] + grad[2] + grad[4], torch.zeros(3)])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (DiffMoEConfig(num_experts=4), 1.4),
        (ExpertChoiceConfig(num_experts=4), 1.25),
        (TokenChoiceConfig(num_experts=4), 1.4),
    ],
)
def test_a_layer_keeps_little_more_than_its_dense_counterpart(layer, most):
    """Nothing of gathered tokens, where counts are equal, and of the predictor's activations."""
    x = torch.randn(2, 128, 96, requires_grad=True)
    kept = []
    for config in (DenseConfig(), layer):
        module = FEED_FORWARDS[config.name](ModelConfig(hidden_size=96, feed_forward=config))
        kept.append(activation_memory(lambda m=module: m(x, RouterContext()), module, x.device))
    assert 1 < kept[1] / kept[0] < most


def test_the_last_product_of_the_predictor_keeps_its_input_alone():
    torch.manual_seed(0)
    x, linear = torch.randn(6, 4, requires_grad=True), torch.nn.Linear(4, 3)
    leaves = [x, *linear.parameters()]
    found, wanted = SiluLinear.apply(x, *linear.parameters()), linear(torch.nn.functional.silu(x))
    assert torch.equal(found, wanted)
    grad = torch.randn(6, 3)
    for one, other in zip(
        *(torch.autograd.grad(y, leaves, grad) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other)
