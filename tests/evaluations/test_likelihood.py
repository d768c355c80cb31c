"""Bits per dimension: against closed forms, and as a command over held-out latents."""

import json
import math

import pytest
import torch

from config.load import parse_config
from config.objective import DDPMConfig, FlowConfig, SamplingConfig
from core.distributed import Processes
from core.errors import UserError
from core.types import ModelOutput
from diffusion.objective import DDPM
from evaluations import likelihood
from models.pretrained import load_pretrained
from training.trainer import train
from transport.objective import Flow

ALONE = Processes(0, 1, torch.device("cpu"))


def test_a_flow_that_stands_still_has_the_density_of_its_noise():
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    still = Flow(FlowConfig())
    model = lambda x, t, cond: ModelOutput(0 * x)  # noqa: E731
    settings = SamplingConfig(sampler="euler", num_steps=3)
    bits = still.bits_per_dim(model, x, None, settings, lambda: torch.randn_like(x))
    normal = torch.distributions.Normal(0.0, 1.0)
    wanted = -normal.log_prob(x).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(bits, wanted)


def test_the_bound_of_ddpm_is_the_sum_of_its_terms():
    objective = DDPM(DDPMConfig(num_timesteps=30))
    chain, x = objective.diffusion, torch.rand(3, 1, 2, 2) * 2 - 1
    model = lambda x, t, cond: ModelOutput(torch.cat([0.3 * x, 0.1 * x], dim=1))  # noqa: E731
    drawn = torch.randn(30, *x.shape)
    draws = iter(drawn)
    found = objective.bits_per_dim(model, x, None, SamplingConfig(), lambda: next(draws))
    wanted = chain.prior_bpd(x)
    for step in range(30):
        t = torch.full((3,), step)
        x_t = chain.q_sample(x, t, drawn[step])
        wanted = wanted + chain.variational_bound(model(x_t, t, None).prediction, x, x_t, t)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_the_command_gives_the_same_number_whatever_the_batch(
    objective, tiny_config, cache_folder, tmp_path, monkeypatch, capsys
):
    flags = ["--config", tiny_config, "--run_dir", tmp_path, "--train.max_steps", 2]
    flags += ["--objective.name", objective, "--model.feed_forward.name", "dense"]
    if objective == "ddpm":
        flags += ["--objective.num_timesteps", 30]
    train(parse_config([str(flag) for flag in flags], "t"), ALONE)
    found = []
    for batch in (2, 5):
        argv = ["likelihood", "--ckpt", tmp_path, "--val-cached-path", cache_folder]
        argv += ["--num-samples", 6, "--batch-size", batch, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [str(word) for word in argv])
        likelihood.main()
        found.append(float(capsys.readouterr().out.split("dimension:")[1]))
    assert math.isfinite(found[0])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_what_has_no_likelihood_is_refused(trained):
    pretrained = load_pretrained(trained)
    with pytest.raises(UserError, match="names no held-out data; give --val-cached-path"):
        likelihood.bits_per_dim(pretrained, 2, 2, 0, ALONE)
    pretrained.config.sampling.sampler = "euler_maruyama"
    with pytest.raises(UserError, match="euler_maruyama follows an SDE"):
        likelihood.bits_per_dim(pretrained, 2, 2, 0, ALONE)


def test_every_key_of_ddpm_reaches_the_objective(tiny_config):
    keys = {
        "timestep_respacing": "10",
        "prediction": "start_x",
        "variance_type": "fixed_small",
        "loss": "rescaled_mse",
    }
    argv = [
        "--config",
        str(tiny_config),
        "--objective.name",
        "ddpm",
        "--model.learn_sigma",
        "false",
    ]
    argv += [word for key, value in keys.items() for word in (f"--objective.{key}", value)]
    objective = DDPM(parse_config(argv, "t").objective)
    assert objective.diffusion.num_timesteps == 10
    assert objective.diffusion.mean_type == "start_x"
    assert objective.diffusion.variance_type == "fixed_small"
    assert json.dumps(vars(objective.config)).count("rescaled_mse") == 1


def test_ddim_takes_its_eta_and_its_clip():
    objective, x = DDPM(DDPMConfig(num_timesteps=100)), torch.randn(2, 1, 4, 4)
    model = lambda x, t, cond: ModelOutput(0.1 * x)  # noqa: E731

    def sample(**changes):
        generator = torch.Generator().manual_seed(0)
        settings = SamplingConfig(sampler="ddim", num_steps=5, **changes)
        draw = lambda: torch.randn(x.shape, generator=generator)  # noqa: E731
        return objective.sample(model, x, None, settings, draw)

    plain, noisy, clipped = sample(), sample(ddim_eta=1.0), sample(clip_denoised=True)
    assert not torch.allclose(plain, noisy)
    assert clipped.abs().max() <= 1 < plain.abs().max()
