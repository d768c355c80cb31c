"""Schedules, losses and samples against the numbers recorded in tests/golden/ddpm_*.safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from config.schema import DDPMConfig
from core.types import ModelOutput, RoutingRecord
from diffusion.gaussian import GaussianDiffusion
from diffusion.objective import DDPM
from diffusion.respace import kept_timesteps, respaced_betas
from diffusion.sampler import ddim_inverse_step, ddim_sample, ddpm_sample
from diffusion.schedule import named_betas

GOLDEN = Path(__file__).parents[1] / "golden"


def load(case: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN / f"ddpm_{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118


SCHEDULE, SPECS = load("schedule")
LOSSES, LOSS_CONFIG = load("losses")
SAMPLE, SAMPLE_CONFIG = load("sample")

TABLE_NAMES = {
    "alphas_cumprod": "alpha_bar",
    "alphas_cumprod_next": "alpha_bar_next",
    "alphas_cumprod_prev": "alpha_bar_prev",
    "betas": "beta",
    "log_one_minus_alphas_cumprod": "log_noise_variance",
    "posterior_log_variance_clipped": "log_posterior_variance",
    "posterior_mean_coef1": "posterior_x0",
    "posterior_mean_coef2": "posterior_xt",
    "posterior_variance": "posterior_variance",
    "sqrt_alphas_cumprod": "signal",
    "sqrt_one_minus_alphas_cumprod": "sigma",
    "sqrt_recip_alphas_cumprod": "inverse_signal",
    "sqrt_recipm1_alphas_cumprod": "noise_to_signal",
}


class LinearModel:
    """W x + b t / 1000 + c[y], the first `outputs` channels of it; notes the times it gets."""

    def __init__(self, case: dict[str, Tensor], outputs: int = 8):
        self.weight = case["in.W"].clone().requires_grad_()
        self.case = case
        self.outputs = outputs
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        self.times.append(t)
        slope, offset = self.case["in.b"], self.case["in.c"][cond]
        y = torch.einsum("oc,nchw->nohw", self.weight, x)
        y = y + (slope * (t / 1000)[:, None] + offset)[:, :, None, None]
        return ModelOutput(y[:, : self.outputs])


def keys(case: dict[str, Tensor], prefix: str) -> list[str]:
    found = [key for key in case if key.startswith(prefix)]
    assert found
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    limit = tolerance * max(expected.abs().max().item(), 1e-12)
    assert (actual - expected).abs().max().item() <= limit


def spaced(spec: str, schedule: str = "linear", **kinds: str) -> GaussianDiffusion:
    kept = kept_timesteps(1000, spec)
    return GaussianDiffusion(respaced_betas(named_betas(schedule, 1000), kept), kept, **kinds)


@pytest.mark.parametrize("spec", SPECS["specs"])
def test_schedule_tables(spec: str) -> None:
    options = SPECS["specs"][spec]
    schedule = options.get("noise_schedule", "linear")
    chain = spaced(options["timestep_respacing"], schedule)
    for key in keys(SCHEDULE, f"out.{spec}."):
        name = key.removeprefix(f"out.{spec}.")
        if name == "timestep_map":
            assert torch.equal(chain.timesteps, SCHEDULE[key])
        else:
            # Rounding of alpha_bar is magnified where a table divides by a small beta.
            actual = getattr(chain.tables, TABLE_NAMES[name])
            torch.testing.assert_close(actual, SCHEDULE[key], rtol=1e-10, atol=1e-14)


VARIANT_KINDS = {
    "default": {},
    "rescaled": {"loss": "rescaled_mse"},
    "xstart": {"mean_type": "start_x"},
    "fixed_large": {"variance_type": "fixed_large"},
    "fixed_small": {"variance_type": "fixed_small"},
    "kl": {"loss": "kl"},
}


def outputs_of(variant: str) -> int:
    return 8 if LOSS_CONFIG["variants"][variant].get("learn_sigma", True) else 4


def test_every_loss_variant_is_covered() -> None:
    assert set(VARIANT_KINDS) == set(LOSS_CONFIG["variants"])


@pytest.mark.parametrize("variant", VARIANT_KINDS)
def test_losses(variant: str) -> None:
    objective = DDPM(DDPMConfig(), **VARIANT_KINDS[variant])
    model = LinearModel(LOSSES, outputs_of(variant))
    x, t, y, noise = (LOSSES[f"in.{name}"] for name in ("x", "t", "y", "noise"))

    terms = objective.losses_at(model, x, y, t, noise)
    terms.per_sample.mean().backward()

    checked = {"loss": terms.per_sample, "model_t": model.times[0], **terms.named}
    for key in keys(LOSSES, f"out.{variant}."):
        name = key.removeprefix(f"out.{variant}.")
        if not name.startswith("p_"):
            assert_close(checked[name], LOSSES[key], 1e-4)
    assert_close(model.weight.grad, LOSSES[f"grad.{variant}.W"], 1e-4)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("variant", VARIANT_KINDS)
def test_reverse_step(variant: str, clip: int) -> None:
    chain = DDPM(DDPMConfig(), **VARIANT_KINDS[variant]).diffusion
    x_t, t = LOSSES["out.q_sample"], LOSSES["in.t"]
    with torch.no_grad():
        output = LinearModel(LOSSES, outputs_of(variant))(x_t, t, LOSSES["in.y"])
    step = chain.p_mean_variance(output.prediction, x_t, t, clip=bool(clip))
    checked = {
        "p_mean": step.mean,
        "p_log_variance": step.log_variance,
        "p_pred_xstart": step.x0,
    }
    names = [key for key in keys(LOSSES, f"out.{variant}.p_") if key.endswith(f"clip{clip}")]
    assert len(names) == (2 if clip else 3)
    for key in names:
        assert_close(checked[key.split(".")[2]], LOSSES[key])


def test_forward_chain() -> None:
    chain = spaced("")
    x, t, noise = LOSSES["in.x"], LOSSES["in.t"], LOSSES["in.noise"]
    assert_close(chain.q_sample(x, t, noise), LOSSES["out.q_sample"])

    forward = chain.q_mean_variance(x, t)
    assert_close(forward.mean, LOSSES["out.q_mean_variance.mean"])
    assert_close(forward.log_variance, LOSSES["out.q_mean_variance.log_variance"])
    assert_close(forward.log_variance.exp(), LOSSES["out.q_mean_variance.variance"])

    # Recorded with the noise itself in the place of x_t.
    posterior = chain.q_posterior(x, noise, t)
    assert_close(posterior.mean, LOSSES["out.q_posterior.mean"])
    assert_close(posterior.log_variance, LOSSES["out.q_posterior.log_variance"])
    variance = chain.at("posterior_variance", t, x).expand_as(x)
    assert_close(variance, LOSSES["out.q_posterior.variance"])

    assert_close(chain.prior_bpd(x), LOSSES["out.prior_bpd"], 1e-4)


def test_losses_with_capacity_prediction() -> None:
    """The trainer's sum: the objective's loss, and the losses in the records that it hands on."""
    logits = LOSSES["in.pc"].clone().requires_grad_()
    linear = LinearModel(LOSSES)
    # Two layers; the second was recorded with the signs turned.
    bce = {
        1: F.binary_cross_entropy_with_logits(logits, LOSSES["in.ones"]),
        3: F.binary_cross_entropy_with_logits(-logits, LOSSES["in.ones"]),
    }
    weight = LOSS_CONFIG["capacity_weight"]
    counts = LOSSES["in.ones"].sum(dim=1).long()
    records = [RoutingRecord(counts, 4, {"capacity": weight * loss}) for loss in bce.values()]

    def model(x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        return ModelOutput(linear(x, t, cond).prediction, records)

    inputs = (LOSSES[f"in.{name}"] for name in ("x", "y", "t", "noise"))
    terms = DDPM(DDPMConfig()).losses_at(model, *inputs)
    loss = terms.per_sample.mean() + sum(r.losses["capacity"] for r in terms.routing)
    loss.backward()

    checked = {"loss": loss, **terms.named}
    checked |= {f"Capacity_Pred_loss_{layer}": raw for layer, raw in bce.items()}
    for key in keys(LOSSES, "out.diffmoe."):
        assert_close(checked[key.removeprefix("out.diffmoe.")], LOSSES[key], 1e-4)
    assert_close(linear.weight.grad, LOSSES["grad.diffmoe.W"], 1e-4)
    assert_close(logits.grad, LOSSES["grad.diffmoe.pc"], 1e-4)


SAMPLE_KINDS = {
    "learned": (8, {}),
    "fixed_large": (4, {"variance_type": "fixed_large"}),
    "fixed_small": (4, {"variance_type": "fixed_small"}),
    "xstart": (8, {"mean_type": "start_x"}),
}


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_ancestral_sampling(kind: str, clip: int) -> None:
    outputs, options = SAMPLE_KINDS[kind]
    chain = spaced(SAMPLE_CONFIG["respacing"]["p"], **options)
    model = LinearModel(SAMPLE, outputs)
    draw = iter(SAMPLE["in.step_noise"]).__next__
    x = ddpm_sample(chain, model, SAMPLE["in.z"], SAMPLE["in.y"], draw, clip=bool(clip))
    assert_close(x, SAMPLE[f"out.p_sample.{kind}.clip{clip}"])
    first = torch.stack([t[0] for t in model.times])
    assert torch.equal(first, SAMPLE[f"out.p_sample.{kind}.model_t"])


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_sampling(eta: float, clip: int) -> None:
    chain = spaced(SAMPLE_CONFIG["respacing"]["ddim"])
    assert torch.equal(chain.timesteps, SAMPLE["out.ddim.timestep_map"])
    draw = iter(SAMPLE["in.step_noise"]).__next__
    x = ddim_sample(
        chain, LinearModel(SAMPLE), SAMPLE["in.z"], SAMPLE["in.y"], draw, clip=bool(clip), eta=eta
    )
    assert_close(x, SAMPLE[f"out.ddim.eta{eta}.clip{clip}"])


def test_ddim_step_towards_noise() -> None:
    """Recorded for one step of each sample, from steps 0, 3 and 8 of the ten."""
    chain = spaced(SAMPLE_CONFIG["respacing"]["ddim"])
    x, t = SAMPLE["in.z"], torch.tensor([0, 3, 8])
    with torch.no_grad():
        output = LinearModel(SAMPLE)(x, chain.timesteps[t], SAMPLE["in.y"])
    assert_close(ddim_inverse_step(chain, output.prediction, x, t), SAMPLE["out.ddim_reverse"])


def test_no_recorded_sample_is_left_out() -> None:
    covered = {"out.ddim.timestep_map", "out.ddim_reverse"}
    covered |= {f"out.ddim.eta{eta}.clip{clip}" for eta in (0.0, 0.7) for clip in (0, 1)}
    for kind in SAMPLE_KINDS:
        covered |= {f"out.p_sample.{kind}.{end}" for end in ("clip0", "clip1", "model_t")}
    assert covered == {key for key in SAMPLE if key.startswith("out.")}
