"""The objective as the trainer and the samplers' callers use it."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from config.objective import SAMPLERS, DDPMConfig, SamplingConfig
from core.errors import UserError
from core.types import ModelOutput, RoutingRecord
from diffusion.objective import DDPM
from diffusion.schedule import SCHEDULES

SHAPE = (6, 2, 4, 4)


class Recorder:
    """Predicts 0.3 x in `outputs` channels; keeps what it was called with."""

    def __init__(self, outputs: int = 4):
        self.scale = torch.tensor(0.3, requires_grad=True)
        self.outputs = outputs
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.records = [RoutingRecord(torch.ones(SHAPE[0], 2, dtype=torch.int64), 4)]

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        self.calls.append((x, t, cond))
        prediction = (self.scale * x).repeat(1, self.outputs // x.shape[1], 1, 1)
        return ModelOutput(prediction, self.records)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int = SHAPE[0]) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *SHAPE[1:], generator=seeded(0)), torch.arange(batch)


def run(objective: DDPM, model: Recorder, num_steps: int, sampler: str | None, seed: int) -> Tensor:
    x, y = data()
    generator = seeded(seed)
    settings = SamplingConfig(sampler=sampler, num_steps=num_steps)
    return objective.sample(
        model, x, y, settings, lambda: torch.randn(x.shape, generator=generator)
    )


def test_names_agree_with_the_config_schema() -> None:
    assert DDPM.samplers == SAMPLERS["ddpm"]
    assert set(get_args(get_type_hints(DDPMConfig)["noise_schedule"])) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains(schedule: str) -> None:
    model = Recorder()
    objective = DDPM(DDPMConfig(noise_schedule=schedule))
    loss = objective.training_losses(model, *data(), seeded(1)).per_sample.mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(model.scale.grad)
    assert model.scale.grad != 0


def test_loss_is_a_function_of_the_generator() -> None:
    objective, model = DDPM(DDPMConfig()), Recorder()
    torch.manual_seed(0)
    first = objective.training_losses(model, *data(), seeded(1)).per_sample
    torch.manual_seed(1)
    again = objective.training_losses(model, *data(), seeded(1)).per_sample
    other = objective.training_losses(model, *data(), seeded(2)).per_sample
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    (x1, t1, _), _, (x2, t2, _) = model.calls
    assert not torch.equal(x1, x2)
    assert not torch.equal(t1, t2)


def test_timesteps_are_uniform_over_the_whole_chain() -> None:
    model = Recorder()
    DDPM(DDPMConfig(num_timesteps=25)).training_losses(model, *data(50_000), seeded(3))
    t = model.calls[0][1]
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=25)
    assert len(counts) == 25
    assert (counts - 2000).abs().max() < 6 * 2000**0.5


def test_conditions_and_records_pass_through() -> None:
    model, (x, y) = Recorder(), data()
    terms = DDPM(DDPMConfig()).training_losses(model, x, y, seeded(1))
    assert terms.routing is model.records
    assert model.calls[0][2] is y
    assert len(model.calls) == 1


def test_variance_is_learned_iff_it_is_predicted() -> None:
    objective = DDPM(DDPMConfig())
    learned = objective.training_losses(Recorder(outputs=4), *data(), seeded(1))
    fixed = objective.training_losses(Recorder(outputs=2), *data(), seeded(1))
    assert set(learned.named) == {"mse", "vb"}
    assert set(fixed.named) == {"mse"}
    assert torch.equal(learned.named["mse"], fixed.named["mse"])
    assert torch.equal(fixed.per_sample, fixed.named["mse"])
    torch.testing.assert_close(learned.per_sample, learned.named["mse"] + learned.named["vb"])
    assert learned.per_sample.shape == (SHAPE[0],)
    assert learned.per_sample.requires_grad
    assert not any(part.requires_grad for part in learned.named.values())


def test_bound_trains_the_variance_alone() -> None:
    prediction = torch.randn(6, 4, 4, 4, generator=seeded(5)).requires_grad_()
    x, _ = data()
    chain = DDPM(DDPMConfig()).diffusion
    t = torch.tensor([0, 1, 10, 100, 500, 999])
    noise = torch.randn(x.shape, generator=seeded(6))
    terms = chain.loss_terms(prediction, x, chain.q_sample(x, t, noise), t, noise)
    terms["vb"].sum().backward()
    assert torch.count_nonzero(prediction.grad[:, :2]) == 0
    assert torch.count_nonzero(prediction.grad[:, 2:]) == prediction[:, 2:].numel()


def test_perfect_noise_prediction_has_no_mse() -> None:
    x, y = data()
    noise = torch.randn(x.shape, generator=seeded(4))
    terms = DDPM(DDPMConfig()).losses_at(
        lambda x_t, t, cond: ModelOutput(noise), x, y, torch.full((6,), 500), noise
    )
    assert torch.count_nonzero(terms.per_sample) == 0


def test_rescaled_bound_is_times_steps_over_1000() -> None:
    config = DDPMConfig(num_timesteps=250)
    plain = DDPM(config).training_losses(Recorder(), *data(), seeded(1))
    rescaled = dataclasses.replace(config, loss="rescaled_mse")
    scaled = DDPM(rescaled).training_losses(Recorder(), *data(), seeded(1))
    torch.testing.assert_close(scaled.named["vb"], 0.25 * plain.named["vb"])
    assert torch.equal(scaled.named["mse"], plain.named["mse"])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_uses_the_trained_timesteps(sampler: str) -> None:
    model, (_, y) = Recorder(), data()
    x = run(DDPM(DDPMConfig()), model, 4, sampler, seed=1)
    assert [t.unique().tolist() for _, t, _ in model.calls] == [[999], [666], [333], [0]]
    assert all(torch.equal(cond, y) for _, _, cond in model.calls)
    assert all(t.shape == (SHAPE[0],) and t.dtype == torch.int64 for _, t, _ in model.calls)
    assert x.shape == SHAPE
    assert not x.requires_grad


def test_ancestral_sampling_depends_on_the_draws_and_ddim_does_not() -> None:
    objective = DDPM(DDPMConfig())
    ancestral = [run(objective, Recorder(outputs=2), 5, "ddpm", seed) for seed in (1, 1, 2)]
    assert torch.equal(ancestral[0], ancestral[1])
    assert not torch.equal(ancestral[0], ancestral[2])
    ddim = [run(objective, Recorder(outputs=2), 5, "ddim", seed) for seed in (1, 2)]
    assert torch.equal(ddim[0], ddim[1])
    assert not torch.equal(ddim[0], ancestral[0])


def test_ancestral_is_the_default() -> None:
    objective = DDPM(DDPMConfig())
    default, named = (
        run(objective, Recorder(outputs=2), 5, name, seed=1) for name in (None, "ddpm")
    )
    assert torch.equal(default, named)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_are_not_clipped(sampler: str) -> None:
    x, y = data()
    target = torch.full(SHAPE, 5.0)
    objective = DDPM(DDPMConfig(prediction="start_x"))
    settings = SamplingConfig(sampler=sampler, num_steps=10)
    sample = objective.sample(
        lambda x_t, t, cond: ModelOutput(target), x, y, settings, lambda: torch.zeros(SHAPE)
    )
    torch.testing.assert_close(sample, target)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_one_step_starts_from_the_noise(sampler: str) -> None:
    model = Recorder()
    x = run(DDPM(DDPMConfig()), model, 1, sampler, seed=1)
    assert [t.unique().tolist() for _, t, _ in model.calls] == [[999]]
    assert torch.isfinite(x).all()


def test_unknown_sampler_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"sampling\.sampler: unknown 'euler'; known: ddim, ddpm"):
        run(DDPM(DDPMConfig()), Recorder(), 5, "euler", seed=1)


@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_impossible_number_of_steps_is_a_user_error(num_steps: int) -> None:
    with pytest.raises(UserError, match=rf"sampling\.num_steps: {num_steps} must be .* 1000"):
        run(DDPM(DDPMConfig()), Recorder(), num_steps, "ddpm", seed=1)


@pytest.mark.parametrize("respacing", ["", "50"])
@pytest.mark.parametrize("kind", ["epsilon", "start_x"])
def test_a_true_prediction_gives_the_data_back_at_any_step(kind: str, respacing: str) -> None:
    objective = DDPM(DDPMConfig(prediction=kind, timestep_respacing=respacing))
    x, noise = (torch.randn(SHAPE, generator=seeded(i), dtype=torch.float64) for i in range(2))
    t = torch.tensor([0, 1, 19, 400, 900, 999])  # of the whole chain, as models are asked
    alpha_bar = (1 - objective.betas).cumprod(0)[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    true = noise if kind == "epsilon" else x
    for prediction in (true, torch.cat([true, true], dim=1)):
        found = objective.data_of(x_t, t, prediction)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
