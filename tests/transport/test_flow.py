"""Flow matching: paths and their identities, losses by hand, sampling as a whole."""

import math

import pytest
import torch

from config.objective import FlowConfig, SamplingConfig
from core.errors import UserError
from core.types import ModelOutput, RoutingRecord
from transport.objective import Flow, interval
from transport.path import PATHS, expand
from transport.prediction import TO_SCORE, TO_VELOCITY, noise_from_velocity

KINDS = ("velocity", "noise", "score", "x")
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def draws():
    generator = torch.Generator().manual_seed(3)
    shape = (len(TIMES), 2, 3, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_noise_at_time_zero_and_data_at_time_one(name):
    x, noise = draws()
    path = PATHS[name]
    zero, one = torch.zeros_like(TIMES), torch.ones_like(TIMES)
    torch.testing.assert_close(path.interpolate(x, noise, zero), noise)
    torch.testing.assert_close(path.interpolate(x, noise, one), x)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_of_the_path(name):
    x, noise = draws()
    path = PATHS[name]
    step = 1e-6
    rise = path.interpolate(x, noise, TIMES + step) - path.interpolate(x, noise, TIMES - step)
    torch.testing.assert_close(
        rise / (2 * step), path.velocity(x, noise, TIMES), rtol=1e-6, atol=1e-6
    )


def test_vp_and_gvp_preserve_variance():
    for name in ("vp", "gvp"):
        path = PATHS[name]
        torch.testing.assert_close(
            path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, torch.ones_like(TIMES)
        )


def truth(path, kind):
    """x_t, and what a perfect model of `kind` says there."""
    x, noise = draws()
    sigma = path.sigma(TIMES).view(-1, 1, 1, 1)
    said = {"velocity": path.velocity(x, noise, TIMES), "noise": noise, "x": x}
    return path.interpolate(x, noise, TIMES), (said | {"score": -noise / sigma})[kind]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_gives_the_velocity_and_the_score(name, kind):
    path = PATHS[name]
    x_t, said = truth(path, kind)
    for table, wanted in ((TO_VELOCITY, "velocity"), (TO_SCORE, "score")):
        found = table[kind](path, said, x_t, TIMES)
        large = path.sigma(TIMES) > 0.05  # below, a predicted x is divided by 0.05 instead
        torch.testing.assert_close(found[large], truth(path, wanted)[1][large])
    velocity = truth(path, "velocity")[1]
    noise = noise_from_velocity(path, velocity, x_t, TIMES)
    torch.testing.assert_close(noise, truth(path, "noise")[1])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["noise", "score", "x"])
def test_velocity_weighting_is_the_loss_of_the_velocity(name, kind):
    """A wrong prediction of any kind costs what its velocity would cost."""
    x, noise = draws()
    path = PATHS[name]
    x_t, said = truth(path, kind)
    wrong = said + 0.1
    flow = Flow(FlowConfig("flow", name, kind, "velocity"))
    terms = flow.losses_at(lambda *_: ModelOutput(wrong), x, None, TIMES, noise)
    velocity = TO_VELOCITY[kind](path, wrong, x_t, TIMES)
    error = velocity - TO_VELOCITY[kind](path, said, x_t, TIMES)
    wanted = error.square().flatten(1).mean(dim=1)
    torch.testing.assert_close(terms.per_sample, wanted, rtol=1e-4, atol=1e-7)


def test_likelihood_weighting_of_noise_score_and_x_is_one():
    """The three say the same, so that one mistake costs the same."""
    x, noise = draws()
    costs = []
    for kind in ("noise", "score", "x"):
        path = PATHS["gvp"]
        alpha, sigma = (f(TIMES).view(-1, 1, 1, 1) for f in (path.alpha, path.sigma))
        unit = {"noise": 1.0, "score": -1 / sigma, "x": -sigma / alpha}[kind]
        wrong = truth(path, kind)[1] + 0.1 * unit
        flow = Flow(FlowConfig("flow", "gvp", kind, "likelihood"))
        terms = flow.losses_at(lambda *_, w=wrong: ModelOutput(w), x, None, TIMES, noise)
        costs.append(terms.per_sample[path.sigma(TIMES) > 0.05])
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-4, atol=1e-7)


class Linear:
    """Predicts 3 x + t + cond, with records to hand on."""

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
    terms = Flow().losses_at(model, x, cond, t, noise)
    predicted = torch.tensor([3 * -1.0 + 0 + 1, 3 * 0.5 + 0.5])
    torch.testing.assert_close(terms.per_sample, (predicted - 3.0).square())
    assert terms.routing is model.records
    assert terms.named["mse"] is terms.per_sample


def test_draws_are_functions_of_the_generator():
    x, cond = torch.randn(2, 1, 4, 4), torch.zeros(2)

    def loss(seed):
        g = torch.Generator().manual_seed(seed)
        return Flow().training_losses(Linear(), x, cond, g).per_sample

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


@pytest.mark.parametrize(
    ("path", "prediction", "wanted"),
    [
        ("linear", "velocity", (0, 1)),
        ("linear", "x", (0, 1)),
        ("gvp", "noise", (0.001, 0.999)),
        ("vp", "score", (0, 0.999)),
        ("vp", "velocity", (0, 0.999)),
    ],
)
def test_a_flow_is_followed_where_its_formulas_hold(path, prediction, wanted):
    flow = Flow(FlowConfig("flow", path, prediction))
    assert interval(flow.config, flow.sample_eps) == wanted


@pytest.mark.parametrize("sampler", [s for s in Flow.samplers if "adams" not in s])
def test_sampling_follows_the_velocity_of_the_conditions(sampler):
    """dx/dt = -x + cond; the SDE with w = 0 is the same equation."""
    settings = SamplingConfig(
        sampler=sampler, num_steps=200, atol=1e-8, rtol=1e-8, diffusion_norm=0.0, last_step="euler",
        last_step_size=0.005,
    )  # fmt: skip
    noise, cond = torch.zeros(2, 1, 1, 1), torch.tensor([0.0, 2.0])

    def model(x, t, cond):
        return ModelOutput(-x + cond[:, None, None, None])

    x = Flow().sample(model, noise, cond, settings, lambda: torch.zeros(2, 1, 1, 1))
    expected = cond * (1 - math.exp(-1))
    torch.testing.assert_close(x.flatten(), expected, rtol=5e-3, atol=1e-5)


def test_an_unknown_sampler_is_refused():
    settings = SamplingConfig(sampler="ddim")
    with pytest.raises(UserError, match=r"unknown 'ddim'; known: adaptive_heun, bosh3"):
        Flow().sample(Linear(), torch.zeros(1, 1, 1, 1), torch.zeros(1), settings, None)


# JiT


def test_logit_normal_times():
    flow = Flow(FlowConfig(time_distribution="logit_normal", time_mean=-0.8, time_std=0.8))
    times = flow.time_of((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    logits = torch.log(times / (1 - times))
    assert abs(logits.mean() + 0.8) < 1e-3
    assert abs(logits.std() - 0.8) < 1e-3
    assert (times.diff() > 0).all()
    ends = flow.time_of(torch.tensor([0.0, 1 - 2**-24]))
    assert ends[0] == 0
    assert 0.9 < ends[1] <= 1


def test_times_by_mode_are_those_of_stable_diffusion_3():
    """Its Eq. 20 counts the noise's share; 1 - f(u) is f(1 - u)."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    noise = 1 - u - 1.29 * ((torch.pi / 2 * u).cos().square() - 1 + u)
    found = Flow(FlowConfig(time_distribution="mode")).time_of(u)
    torch.testing.assert_close(found, 1 - noise)
    torch.testing.assert_close(found.flip(0), noise)
    plain = Flow(FlowConfig(time_distribution="mode", time_mode_scale=0.0)).time_of(u)
    torch.testing.assert_close(plain, u)


def test_shifted_times_are_nearer_the_noise():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    noise = 3 * (1 - u) / (1 + 2 * (1 - u))
    torch.testing.assert_close(Flow(FlowConfig(time_shift=3.0)).time_of(u), 1 - noise)
    seen = []

    def model(z, t, cond):
        seen.append(t[0].item())
        return ModelOutput(torch.ones_like(z))

    settings = SamplingConfig(sampler="euler", num_steps=10, time_shift=3.0)
    z = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    found = Flow().sample(model, z, None, settings, None)
    torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), 1 - noise[:-1])
    torch.testing.assert_close(found, torch.ones_like(z))  # all of the way


def test_v_loss_of_a_predicted_x_is_the_error_of_the_clamped_velocity():
    x, noise = draws()
    times = torch.tensor([0.0, 0.5, 0.9, 0.96, 0.99, 1.0, 0.2], dtype=torch.float64)
    flow = Flow(FlowConfig(prediction="x", loss_weighting="velocity", t_eps=0.05, noise_scale=2.0))
    said = torch.randn_like(x)

    def model(z, t, cond):
        expected = times.view(-1, 1, 1, 1) * x + (1 - times.view(-1, 1, 1, 1)) * 2 * noise
        torch.testing.assert_close(z, expected)
        return ModelOutput(said)

    found = flow.losses_at(model, x, None, times, noise).per_sample
    rest = (1 - times).clamp(min=0.05).view(-1, 1, 1, 1)
    # v - v' = (x - x') / max(1 - t, t_eps), whatever z is.
    wanted = ((x - said) / rest).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_noise_of_another_scale_starts_the_sampling():
    seen = []

    def model(z, t, cond):
        seen.append((z.clone(), t[0].item()))
        return ModelOutput(torch.zeros_like(z))

    z = torch.randn(2, 1, 2, 2)
    flow = Flow(FlowConfig(prediction="x", noise_scale=3.0))
    found = flow.sample(model, z, None, SamplingConfig(sampler="heun_euler", num_steps=2), None)
    assert torch.equal(seen[0][0], 3 * z)
    assert [t for _, t in seen] == [0.0, 0.5, 0.5]  # Heun to 1/2, then one step of Euler
    # x = 0 is said everywhere: half the way, then all of the rest.
    torch.testing.assert_close(found, torch.zeros_like(z), atol=1e-6, rtol=0)


def test_noise_of_another_scale_has_no_likelihood():
    flow = Flow(FlowConfig(noise_scale=2.0))
    with pytest.raises(UserError, match=r"noise_scale: 2\.0 has no likelihood"):
        flow.log_likelihood(None, None, None, SamplingConfig(), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_a_true_prediction_gives_the_data_back(name, kind):
    x, noise = draws()
    flow = Flow(FlowConfig(path=name, prediction=kind))
    x_t, sigma = flow.path.interpolate(x, noise, TIMES), flow.path.sigma(expand(TIMES, x))
    true = {
        "velocity": flow.path.velocity(x, noise, TIMES),
        "noise": noise,
        "score": -noise / sigma,
        "x": x,
    }[kind]
    twice = torch.cat([true, torch.full_like(true, torch.nan)], dim=1)  # with a learned variance
    for prediction in (true, twice):
        torch.testing.assert_close(flow.data_of(x_t, TIMES, prediction), x, rtol=1e-12, atol=1e-12)


def test_the_data_of_a_velocity_is_regular_where_there_is_noise_alone():
    x, noise = draws()
    zero = torch.zeros_like(TIMES)
    assert torch.equal(Flow().data_of(noise, zero, x - noise), noise + (x - noise))
