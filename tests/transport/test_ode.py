"""ODE solvers on fields with known solutions, and the likelihood of a normal distribution."""

import itertools
import math

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

from config.objective import ADAPTIVE, CORRECTED, ODE_METHODS
from transport import ode

START = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)


class Decay:
    """dx/dt = -x + t, solved by x(t) = (x0 + 1) e^-t + t - 1; notes when it is asked."""

    def __init__(self):
        self.times = []

    def __call__(self, x, t):
        self.times.append(float(t))
        return -x + t


def solution(x0, t=1.0):
    return (x0 + 1) * math.exp(-t) + t - 1


def grid(num_steps, first=0.0, last=1.0):
    return torch.linspace(first, last, num_steps + 1, dtype=torch.float64)


def test_all_methods_of_torchdiffeq_are_known():
    usable = SOLVERS.keys() - {"scipy_solver"}  # LSODA's matrix has the square of a block's size
    assert set(ODE_METHODS) == {*usable, *ode.RENAMED, ode.HEUN_THEN_EULER}
    adaptive = {name for name, made in SOLVERS.items() if "Adaptive" in str(made.__mro__)}
    assert set(ADAPTIVE) == adaptive
    implicit = {name for name in usable if SOLVERS[name] is SOLVERS["implicit_adams"]}
    assert set(CORRECTED) == implicit


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)]
)
def test_fixed_methods_converge_with_their_order(method, order):
    errors = [
        (ode.solve(Decay(), START, grid(n), method) - solution(START)).abs().max() for n in (20, 40)
    ]
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.15 * 2**order


def test_evaluations_of_euler_and_heun():
    field = Decay()
    ode.solve(field, START, grid(4), "euler")
    assert field.times == [0.0, 0.25, 0.5, 0.75]
    field.times.clear()
    ode.solve(field, START, grid(2), "heun")
    assert field.times == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_adaptive_methods_are_exact_and_stay_inside(method, ends):
    field = Decay()
    tight = 1e-7 if method in ("fehlberg2", "adaptive_heun") else 1e-9
    start = START if ends[0] == 0 else solution(START)
    x = ode.solve(field, start, grid(1, *ends), method, atol=tight, rtol=tight)
    wanted = solution(START) if ends[0] == 0 else START
    torch.testing.assert_close(x, wanted, rtol=1e3 * tight, atol=1e3 * tight)
    assert min(field.times) >= 0
    assert max(field.times) <= 1
    assert max(field.times) > 1 - 1e-9


def test_a_nearly_still_field_does_not_lead_outside():
    """The first trial step of the library would reach t = 100 here."""
    times = []

    def field(x, t):
        times.append(float(t))
        return 1e-4 * torch.ones_like(x)

    ode.solve(field, START, grid(1), "dopri5")
    assert max(times) <= 1


def test_overshoot_goes_past_the_end_as_published():
    field = Decay()
    x = ode.solve(field, START, grid(1), "dopri5", overshoot=True)
    assert max(field.times) > 1
    torch.testing.assert_close(x, solution(START), rtol=1e-3, atol=1e-3)


def test_trajectory_passes_through_the_grid():
    points = grid(8)
    states = ode.solve(Decay(), START, points, "dopri5", 1e-9, 1e-9, trajectory=True)
    for state, t in zip(states, points, strict=True):
        torch.testing.assert_close(state, solution(START, float(t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_likelihood_of_a_normal_distribution(method):
    """dx/dt = a x takes N(0, 1) to N(0, e^2a)."""
    a, x = 0.7, torch.randn(5, 3, 2, dtype=torch.float64)
    probe = torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0).double()
    log_p, z = ode.log_likelihood(lambda x, t: a * x, x, grid(20), method, probe, 1e-9, 1e-9)
    wanted = torch.distributions.Normal(0.0, math.exp(a)).log_prob(x).flatten(1).sum(dim=1)
    torch.testing.assert_close(log_p, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, x * math.exp(-a), rtol=1e-5, atol=1e-5)


def test_the_divergence_comes_from_the_probe():
    """Of a matrix field, probe^T A probe: exact on average over the probe, not for one."""
    A = torch.tensor([[0.3, 0.5], [0.1, -0.2]], dtype=torch.float64)
    x = torch.zeros(4, 2, dtype=torch.float64)
    probe = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    log_p, _ = ode.log_likelihood(lambda x, t: x @ A.T, x, grid(4), "rk4", probe)
    change = log_p - ode.normal_log_density(x)
    torch.testing.assert_close(change, -torch.einsum("bi,ij,bj->b", probe, A, probe))
    torch.testing.assert_close(change.mean(), -A.trace())


def test_heun_with_a_last_step_of_euler():
    times = grid(4)
    state = START
    for t, after in itertools.pairwise(times):
        h = after - t
        slope = Decay()(state, t)
        second = Decay()(state + h * slope, after)
        state = state + h * (slope if after == 1 else (slope + second) / 2)
    torch.testing.assert_close(ode.solve(Decay(), START, times, "heun_euler"), state)
    one = ode.solve(Decay(), START, grid(1), "heun_euler")
    torch.testing.assert_close(one, ode.solve(Decay(), START, grid(1), "euler"))
    with pytest.raises(ValueError, match="heun_euler gives the last state only"):
        ode.solve(Decay(), START, times, "heun_euler", trajectory=True)
