"""Thresholds and quantiles of the capacity predictor."""

import torch

from models.moe.capacity import CapacityPredictor, quantile_of_kth


def test_the_kth_largest_prediction_lets_k_minus_one_tokens_pass():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    predictor = CapacityPredictor(8, 3, 0.95)
    for k in (1, 7, 40):
        predictor.thresholds.copy_(quantile_of_kth(logits, k))
        assert predictor.counts(logits).tolist() == [k - 1] * 3


def test_no_token_for_k_zero():
    logits = torch.full((4, 2), 100.0)
    predictor = CapacityPredictor(8, 2, 0.95)
    predictor.thresholds.copy_(quantile_of_kth(logits, 0))
    assert predictor.counts(logits).tolist() == [0, 0]


def test_a_fresh_predictor_lets_every_token_pass():
    """Eq. 17 starts at zero."""
    predictor = CapacityPredictor(8, 2, 0.95)
    assert predictor.counts(torch.randn(5, 2)).tolist() == [5, 5]


def test_thresholds_move_by_equation_17():
    predictor = CapacityPredictor(8, 2, 0.95)
    first, second = torch.tensor([0.4, 0.8]), torch.tensor([0.2, 0.9])
    predictor.thresholds.copy_(predictor.next_state(first))
    predictor.thresholds.copy_(predictor.next_state(second))
    torch.testing.assert_close(predictor.thresholds, 0.95 * (0.05 * first) + 0.05 * second)


def test_no_gradient_reaches_the_tokens():
    predictor = CapacityPredictor(8, 2, 0.95)
    x = torch.randn(5, 8, requires_grad=True)
    predictor(x).sum().backward()
    assert x.grad is None
    assert predictor.mlp[0].weight.grad is not None
