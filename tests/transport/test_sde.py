"""The SDE: its steps by hand, its last steps, and that it keeps the data's distribution."""

import pytest
import torch

from config.objective import FlowConfig, SamplingConfig
from core.types import ModelOutput
from transport import sde
from transport.objective import Flow
from transport.path import PATHS

VARIANCE = 0.25
"""Data here are N(0, 0.25)."""


def fields(x, t):
    return 2 * x, x + t


def diffusion(t):
    return 0.5 * t


def test_euler_maruyama_by_hand():
    x, grid = torch.tensor([[1.0]]), torch.tensor([0.0, 0.5, 1.0])
    draws = iter([torch.tensor([[3.0]]), torch.tensor([[-1.0]])])
    found = sde.euler_maruyama(fields, diffusion, x, grid, lambda: next(draws))
    first = 1 + 0.5 * 2.0  # w = 0 at t = 0
    w = 0.25
    second = first + 0.5 * (2 * first + w * (first + 0.5)) + (2 * w * 0.5) ** 0.5 * -1.0
    torch.testing.assert_close(found, torch.tensor([[second]]))


def test_stochastic_heun_by_hand():
    x, grid = torch.tensor([[1.0]]), torch.tensor([0.5, 1.0])
    found = sde.stochastic_heun(fields, diffusion, x, grid, lambda: torch.tensor([[2.0]]))
    noisy = 1 + 2 * (2 * 0.25 * 0.5) ** 0.5
    slope = 2 * noisy + 0.25 * (noisy + 0.5)
    guess = noisy + 0.5 * slope
    ahead = 2 * guess + 0.5 * (guess + 1)
    torch.testing.assert_close(found, torch.tensor([[noisy + 0.25 * (slope + ahead)]]))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("none", 1.0),
        ("euler", 1 + 0.1 * 2),
        ("mean", 1 + 0.1 * (2 + 0.4 * 1.8)),
        ("tweedie", (1 + 0.2**2 * 1.8) / 0.8),
    ],
)
def test_last_steps_by_hand(rule, wanted):
    x, t = torch.tensor([[1.0]]), torch.tensor(0.8)
    found = sde.last_step(rule, PATHS["linear"], fields, diffusion, x, t, 0.1)
    torch.testing.assert_close(found, torch.tensor([[wanted]]))


def test_an_unknown_last_step_is_refused():
    with pytest.raises(ValueError, match="known: none, mean, euler, tweedie"):
        sde.last_step(
            "Mean", PATHS["linear"], fields, diffusion, torch.ones(1, 1), torch.ones(()), 0.1
        )


def normal_model(path, kind):
    """The perfect prediction for data from N(0, VARIANCE)."""

    def model(x, t, cond):
        t = t.view(-1, 1, 1, 1)
        alpha, sigma = path.alpha(t), path.sigma(t)
        marginal = alpha**2 * VARIANCE + sigma**2
        data, noise = alpha * VARIANCE / marginal * x, sigma / marginal * x
        velocity = path.d_alpha(t) * data + path.d_sigma(t) * noise
        said = {"velocity": velocity, "noise": noise, "score": -x / marginal, "x": data}
        return ModelOutput(said[kind])

    return model


@pytest.mark.parametrize("method", sde.SOLVERS)
@pytest.mark.parametrize("form", sde.DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_diffusion_keeps_the_distribution(method, form, path):
    """With the default intervals, where published code divides by zero for some of these."""
    flow = Flow(FlowConfig("flow", path, "velocity"))
    settings = SamplingConfig(sampler=method, num_steps=200, diffusion_form=form, last_step="euler")
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4000, 1, 1, 1, generator=generator)  # noqa: E731
    x = flow.sample(normal_model(flow.path, "velocity"), draw(), None, settings, draw)
    # 4000 draws know the variance to 2 %; the rest is for the steps, coarse where w is large.
    assert x.var().item() == pytest.approx(VARIANCE, rel=0.12)
    assert x.mean().abs() < 0.03


@pytest.mark.parametrize("kind", ["noise", "score", "x"])
@pytest.mark.parametrize("rule", ["none", "mean", "euler", "tweedie"])
def test_every_prediction_and_last_step_keeps_it(kind, rule):
    flow = Flow(FlowConfig("flow", "linear", kind))
    settings = SamplingConfig(sampler="stochastic_heun", num_steps=60, last_step=rule)
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(4000, 1, 1, 1, generator=generator)  # noqa: E731
    x = flow.sample(normal_model(flow.path, kind), draw(), None, settings, draw)
    assert x.var().item() == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize(("rule", "calls", "draws"), [("none", 10, 10), ("mean", 10, 9)])
def test_num_steps_counts_the_last_step(rule, calls, draws):
    asked, drawn = [], []

    def model(x, t, cond):
        asked.append(float(t[0]))
        return ModelOutput(-x)

    def draw():
        drawn.append(1)
        return torch.zeros(1, 1, 1, 1)

    settings = SamplingConfig(sampler="euler_maruyama", num_steps=10, last_step=rule)
    Flow().sample(model, draw(), None, settings, draw)
    assert len(asked) == calls
    assert len(drawn) - 1 == draws
    assert asked[-1] == pytest.approx(0.96 if rule == "mean" else 0.999 * 0.9, abs=1e-6)
