"""Schedules, respacing, Gaussian formulas and samplers against closed forms."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from core.errors import UserError
from core.types import Draw, ModelOutput
from diffusion.gaussian import Gaussian, GaussianDiffusion, decoder_nll, gaussian_kl
from diffusion.respace import kept_timesteps, respaced_betas
from diffusion.sampler import ddim_invert, ddim_sample, ddim_step, ddpm_sample, ddpm_step
from diffusion.schedule import SCHEDULES, linear_betas, named_betas, squaredcos_betas

LABELS = torch.zeros(1, dtype=torch.int64)


def chain_of(spec: str, **kinds: str) -> GaussianDiffusion:
    kept = kept_timesteps(1000, spec)
    return GaussianDiffusion(respaced_betas(linear_betas(1000), kept), kept, **kinds)


def noise_source(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def no_draw() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


class ExactNoise:
    """The noise in x_t when the data is known; `t` counts in the trained chain."""

    def __init__(self, x0: Tensor):
        self.x0 = x0
        self.alpha_bar = torch.cumprod(1 - linear_betas(1000), dim=0)
        self.conditions: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        self.conditions.append(cond)
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return ModelOutput((x - a.sqrt() * self.x0) / (1 - a).sqrt())


class NormalData:
    """The best noise prediction for data that is N(mean, std^2): E[noise | x_t] in closed form."""

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std
        self.alpha_bar = torch.cumprod(1 - linear_betas(1000), dim=0)

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        total = a * self.std**2 + 1 - a
        return ModelOutput((1 - a).sqrt() / total * (x - a.sqrt() * self.mean))


def test_linear_ends_and_scaling() -> None:
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    short = linear_betas(250)
    assert short[[0, -1]].tolist() == pytest.approx([4e-4, 0.08], rel=1e-12)


def test_squared_cosine_is_a_cosine_until_the_cap() -> None:
    betas = squaredcos_betas(100)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
    expected /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert alpha_bar[49].item() == pytest.approx(expected, rel=1e-12)
    assert betas[-1].item() == 0.999


def test_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"noise_schedule.*'quadratic'") as caught:
        named_betas("quadratic", 1000)
    assert all(name in str(caught.value) for name in SCHEDULES)


@pytest.mark.parametrize("steps", [-1, 0, 20])
def test_impossible_length_is_a_user_error(steps: int) -> None:
    with pytest.raises(UserError, match=f"num_timesteps: {steps} "):
        named_betas("linear", steps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [float("nan")]])
def test_betas_must_be_variances(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(torch.tensor(betas))


@pytest.mark.parametrize("count", [2, 7, 50, 250, 999, 1000])
def test_even_spacing_keeps_both_ends(count: int) -> None:
    kept = kept_timesteps(1000, str(count))
    assert (kept[0], kept[-1], len(kept)) == (0, 999, count)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_specs() -> None:
    assert kept_timesteps(5, "") == [0, 1, 2, 3, 4]
    assert kept_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert kept_timesteps(10, "2,3") == [0, 4, 5, 7, 9]
    assert kept_timesteps(11, "6,1") == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("spec", ["0", "-3", "1.5", "ten", "10,", "ddim", "ddim7", "11", "6,1"])
def test_bad_spec_is_a_user_error(spec: str) -> None:
    with pytest.raises(UserError, match="timestep spec"):
        kept_timesteps(10, spec)


def test_respaced_chain_passes_through_the_same_noise_levels() -> None:
    full, short = chain_of("").tables, chain_of("10,15,20")
    expected = full.alpha_bar[short.timesteps]
    torch.testing.assert_close(short.tables.alpha_bar, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [0, 200, 999])
def test_noised_data_has_the_right_moments(step: int) -> None:
    chain = chain_of("")
    x0 = torch.full((4000, 2, 4, 4), 1.5, dtype=torch.float64)
    noise = noise_source(0, tuple(x0.shape))()
    x_t = chain.q_sample(x0, torch.full((4000,), step), noise)
    alpha_bar = torch.cumprod(1 - linear_betas(1000), dim=0)[step].item()
    std = math.sqrt(1 - alpha_bar)
    assert x_t.mean().item() == pytest.approx(1.5 * math.sqrt(alpha_bar), abs=0.012 * std)
    assert x_t.std().item() == pytest.approx(std, rel=0.01)


def test_posterior_is_bayes_rule() -> None:
    """Two Gaussian factors in x_(t-1): forward from x_0, and one step on to x_t."""
    chain, step = chain_of(""), 300
    beta = linear_betas(1000)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    x0, x_t = noise_source(1, (2, 1, 3, 2, 2))()
    posterior = chain.q_posterior(x0, x_t, torch.tensor([step]))

    prior_precision = 1 / (1 - alpha_bar[step - 1])
    likelihood_precision = (1 - beta[step]) / beta[step]
    precision = prior_precision + likelihood_precision
    mean = prior_precision * alpha_bar[step - 1].sqrt() * x0
    mean = (mean + likelihood_precision * x_t / (1 - beta[step]).sqrt()) / precision
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.log_variance, (-precision.log()).expand_as(x0))


def test_noise_and_data_determine_each_other() -> None:
    chain = chain_of("")
    x0, noise = noise_source(2, (2, 3, 2, 4, 4))()
    t = torch.tensor([0, 500, 999])
    x_t = chain.q_sample(x0, t, noise)
    torch.testing.assert_close(chain.x0_from_noise(x_t, t, noise), x0)
    torch.testing.assert_close(chain.noise_from_x0(x_t, t, x0), noise)


def test_learned_variance_spans_posterior_to_beta() -> None:
    chain, t = chain_of(""), torch.tensor([400])
    x_t = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    ends = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64).view(1, 1, 2, 2)
    prediction = torch.cat([x_t, ends], dim=1)
    low, high, middle, _ = chain.p_mean_variance(prediction, x_t, t).log_variance.flatten()
    assert low == chain.tables.posterior_variance[400].log()
    assert high == chain.tables.beta[400].log()
    assert middle.item() == pytest.approx((low + high).item() / 2)


def test_wrong_channel_count_is_refused() -> None:
    with pytest.raises(ValueError, match="5 channels for data of 4"):
        chain_of("").split(torch.zeros(1, 5, 2, 2), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(("field", "value"), [("mean_type", "v"), ("variance_type", "learned")])
def test_unknown_kind_is_refused(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{field}: unknown '{value}'; known: "):
        chain_of("", **{field: value})


def test_kl_matches_torch() -> None:
    numbers = noise_source(3, (4, 2, 3))()
    p, q = Gaussian(*numbers[:2]), Gaussian(*numbers[2:])
    normal = [torch.distributions.Normal(g.mean, (0.5 * g.log_variance).exp()) for g in (p, q)]
    torch.testing.assert_close(gaussian_kl(p, q), torch.distributions.kl_divergence(*normal))


def test_decoder_assigns_probability_one_in_total() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    p = Gaussian(torch.full_like(levels, 0.3), torch.full_like(levels, math.log(0.04)))
    mass = torch.exp(-decoder_nll(levels, p))
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    exact = torch.distributions.Normal(0.3, 0.2)
    expected = exact.cdf(levels[180] + 1 / 255) - exact.cdf(levels[180] - 1 / 255)
    assert mass[180].item() == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("spec", ["", "250", "10", "ddim25"])
def test_ddim_with_the_exact_noise_returns_the_data(spec: str) -> None:
    chain = chain_of(spec)
    x0, z = noise_source(4, (2, 2, 3, 4, 4))()
    model = ExactNoise(x0)
    torch.testing.assert_close(ddim_sample(chain, model, z, LABELS, no_draw), x0)
    assert all(cond is LABELS for cond in model.conditions)


def test_ddim_inversion_is_undone_by_sampling() -> None:
    chain, model = chain_of(""), NormalData(0.5, 0.3)
    x = 0.5 + 0.3 * noise_source(5, (2, 1, 4, 4))()
    z = ddim_invert(chain, model, x, LABELS)
    restored = ddim_sample(chain, model, z, LABELS, no_draw)
    assert (restored - x).abs().max() < 0.02
    assert (z - x).abs().max() > 0.5


SAMPLERS_BY_KIND = {
    "ddpm": ddpm_sample,
    "ddim": ddim_sample,
    "ddim_eta1": lambda *args: ddim_sample(*args, eta=1.0),
}


@pytest.mark.parametrize("kind", SAMPLERS_BY_KIND)
def test_perfect_model_of_normal_data_gives_its_moments(kind: str) -> None:
    shape = (1000, 1, 5, 5)
    chain = chain_of("", variance_type="fixed_small")
    start, draw = noise_source(6, shape)(), noise_source(7, shape)
    x = SAMPLERS_BY_KIND[kind](chain, NormalData(2.0, 0.5), start, LABELS, draw)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.02)


def test_ddim_with_eta_one_is_ancestral_sampling() -> None:
    """Song et al. 2021, Sec. 4.1: with the posterior's variance."""
    chain = chain_of("20", variance_type="fixed_small")
    x_t, prediction, noise = noise_source(8, (3, 3, 2, 4, 4))()
    t = torch.tensor([1, 8, 19])
    expected = ddpm_step(chain, prediction, x_t, t, noise)
    torch.testing.assert_close(ddim_step(chain, prediction, x_t, t, noise, eta=1.0), expected)


def test_ddim_with_variance_needs_noise() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"eta: 0\.5 needs noise"):
        ddim_step(chain_of("10"), x, x, torch.tensor([3]), eta=0.5)


def test_last_step_adds_no_noise() -> None:
    chain = chain_of("10")
    x_t, prediction, noise, other = noise_source(9, (4, 2, 2, 4, 4))()
    t = torch.tensor([0, 1])
    first = ddpm_step(chain, prediction, x_t, t, noise)
    second = ddpm_step(chain, prediction, x_t, t, other)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[0], chain.p_mean_variance(prediction, x_t, t).mean[0])


def test_noise_is_drawn_once_per_step() -> None:
    calls: list[Tensor] = []
    source = noise_source(10, (2, 1, 4, 4))

    def draw() -> Tensor:
        calls.append(source())
        return calls[-1]

    ddpm_sample(chain_of("12"), NormalData(0.0, 1.0), source(), LABELS, draw)
    assert len(calls) == 12


def test_low_precision_prediction_is_taken_up_to_that_of_the_data() -> None:
    chain = chain_of("10")
    x_t = noise_source(11, (2, 1, 4, 4), torch.float32)()
    prediction = torch.cat([x_t, x_t], dim=1).bfloat16()
    step = chain.p_mean_variance(prediction, x_t, torch.tensor([2, 9]))
    assert {step.mean.dtype, step.log_variance.dtype, step.x0.dtype} == {torch.float32}
    same = chain.p_mean_variance(prediction.float(), x_t, torch.tensor([2, 9]))
    assert torch.equal(step.mean, same.mean)
    assert torch.equal(step.log_variance, same.log_variance)
