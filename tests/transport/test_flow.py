"""Rectified flow: path and loss by hand, solvers on fields with known solutions."""

import math

import pytest
import torch

from config.schema import SamplingConfig
from core.errors import UserError
from core.types import ModelOutput, RoutingRecord
from transport.objective import RectifiedFlow
from transport.ode import dopri5, euler, heun
from transport.path import interpolate, velocity

START = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)


def decay(x, t):
    """dx/dt = -x + t, solved by x(t) = (x0 + 1) e^-t + t - 1."""
    return -x + t


def solution(x0, t=1.0):
    return (x0 + 1) * math.exp(-t) + t - 1


def test_noise_at_time_zero_and_data_at_time_one():
    x, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), x)
    t = torch.tensor([0.25, 0.75])
    ahead = interpolate(x, noise, t + 0.125)
    slope = (ahead - interpolate(x, noise, t)) / 0.125
    torch.testing.assert_close(slope, velocity(x, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_converge_with_their_order(solver, order):
    errors = [(solver(decay, START, n) - solution(START)).abs().max() for n in (20, 40)]
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.15 * 2**order


def test_euler_takes_equal_steps_from_zero():
    times = []

    def field(x, t):
        times.append(float(t))
        return torch.ones_like(x)

    x = euler(field, START, 4)
    assert times == [0.0, 0.25, 0.5, 0.75]
    torch.testing.assert_close(x, START + 1)
    times.clear()
    heun(field, START, 2)
    assert times == [0.0, 0.5, 0.5, 1.0]


def test_dopri5_is_exact_and_never_leaves_the_unit_interval():
    times = []

    def field(x, t):
        times.append(float(t))
        return decay(x, t)

    x = dopri5(field, START, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(x, solution(START), rtol=1e-7, atol=1e-7)
    assert min(times) >= 0
    assert max(times) <= 1
    assert len(times) > 12


class Linear:
    """Predicts a x + t, with records to hand on."""

    def __init__(self, channels=1):
        self.channels = channels
        self.records = [RoutingRecord(torch.ones(2, 4, dtype=torch.int64), 4)]

    def __call__(self, x, t, cond):
        y = 3 * x + t[:, None, None, None] + cond[:, None, None, None]
        if self.channels == 2:
            y = torch.cat([y, y * math.nan], dim=1)
        return ModelOutput(y, self.records)


@pytest.mark.parametrize("channels", [1, 2])
def test_loss_by_hand(channels):
    x, noise = torch.full((2, 1, 1, 2), 2.0), torch.full((2, 1, 1, 2), -1.0)
    t, cond = torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.0])
    model = Linear(channels)
    terms = RectifiedFlow().losses_at(model, x, cond, t, noise)
    predicted = torch.tensor([3 * -1.0 + 0 + 1, 3 * 0.5 + 0.5])
    torch.testing.assert_close(terms.per_sample, (predicted - 3.0).square())
    assert terms.routing is model.records
    assert terms.named["mse"] is terms.per_sample


def test_draws_are_functions_of_the_generator():
    x, cond = torch.randn(2, 1, 4, 4), torch.zeros(2)

    def loss(seed):
        g = torch.Generator().manual_seed(seed)
        return RectifiedFlow().training_losses(Linear(), x, cond, g).per_sample

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


@pytest.mark.parametrize("sampler", RectifiedFlow.samplers)
def test_sampling_follows_the_velocity_of_the_conditions(sampler):
    settings = SamplingConfig(sampler=sampler, num_steps=200, atol=1e-8, rtol=1e-8)
    noise, cond = torch.zeros(2, 1, 1, 1), torch.tensor([0.0, 2.0])

    def model(x, t, cond):
        return ModelOutput(-x + cond[:, None, None, None])

    x = RectifiedFlow().sample(model, noise, cond, settings, None)
    expected = cond * (1 - math.exp(-1))
    torch.testing.assert_close(x.flatten(), expected, rtol=5e-3, atol=1e-5)


def test_an_unknown_sampler_is_refused():
    settings = SamplingConfig(sampler="ddim")
    with pytest.raises(UserError, match=r"unknown 'ddim'; known: dopri5, euler, heun"):
        RectifiedFlow().sample(Linear(), torch.zeros(1, 1, 1, 1), torch.zeros(1), settings, None)
