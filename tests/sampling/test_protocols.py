"""Named protocols, and flags over them over a checkpoint's own settings."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from config.objective import DDPMConfig, SamplingConfig
from config.protocol import known_protocols, load_protocol
from config.schema import Config, ParallelConfig
from core.errors import ConfigError, UserError
from sampling.flags import resolve, sampling_parser


def checkpoint(objective="flow"):
    config = Config(sampling=SamplingConfig(sampler="heun", num_steps=7, cfg_scale=3.0))
    if objective == "ddpm":
        config.objective, config.sampling = DDPMConfig(), SamplingConfig("ddpm", 9)
    return SimpleNamespace(config=config, path="CKPT")


def resolved(*flags, objective="flow"):
    return resolve(sampling_parser().parse_args(["--ckpt", "CKPT", *flags]), checkpoint(objective))


@pytest.mark.parametrize("name", known_protocols())
def test_every_protocol_fits_its_objective(name):
    protocol = load_protocol(name)
    found = resolved("--protocol", name, objective=protocol.objective_name)
    own = Config().data.vae_path  # where a protocol names no decoder
    assert found == dataclasses.replace(protocol, vae=protocol.vae or own)
    assert protocol.sampling.cfg_scale == float(name.partition("_cfg")[2])
    assert protocol.num_fid_samples == 50_000
    official = name.startswith(("dit", "sit")) or protocol.objective_name == "ddpm"
    ours = ("first3", "joint") if official else ("all", "separate")
    assert (protocol.sampling.cfg_channels, protocol.sampling.cfg_pooling) == ours
    assert protocol.sampling.overshoot == (protocol.sampling.sampler == "dopri5")


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "vae", "batch"),
    [
        ("dit_ddpm250_cfg1.5", "ddpm", 250, "ema", 32),
        ("sit_heun125_cfg1.5", "heun", 125, "ema", 32),
        ("sit_sde250_cfg1.0", "euler_maruyama", 250, "ema", 32),
        ("diffmoe_euler250_cfg1.0", "euler", 250, "mse", 125),
        ("diffmoe_heun125_cfg1.0", "heun", 125, "ema", 10),
        ("diffmoe_heun125_cfg1.5", "heun", 125, "ema", 75),
        ("diffmoe_ddpm250_cfg1.5", "ddpm", 250, "ema", 50),
    ],
)
def test_published_settings(name, sampler, steps, vae, batch):
    protocol = load_protocol(name)
    found = protocol.sampling.sampler, protocol.sampling.num_steps
    assert found == (sampler, steps)
    assert (protocol.vae, protocol.per_proc_batch_size) == (vae, batch)


def test_a_protocol_replaces_the_checkpoints_settings_and_flags_replace_its():
    plain = resolved()
    assert (plain.sampling.sampler, plain.sampling.cfg_scale, plain.vae) == (
        *("heun", 3.0),
        "stabilityai/sd-vae-ft-mse",
    )
    named = resolved("--protocol", "diffmoe_euler250_cfg1.0", "--cfg-scale", "1.25")
    assert (named.sampling.sampler, named.sampling.num_steps) == ("euler", 250)
    assert (named.sampling.cfg_scale, named.per_proc_batch_size) == (1.25, 125)
    flags = ["--num-fid-samples", "12", "--per-proc-batch-size", "4", "--labels", "balanced"]
    flagged = resolved("--protocol", "sit_dopri5_cfg1.5", *flags, "--no-overshoot", "--vae", "mse")
    assert (flagged.num_fid_samples, flagged.per_proc_batch_size) == (12, 4)
    assert (flagged.labels, flagged.vae, flagged.sampling.overshoot) == ("balanced", "mse", False)


def test_a_checkpoint_of_a_hybrid_sharded_run_is_sampled_by_one_process():
    pretrained = checkpoint()
    pretrained.config.parallel = ParallelConfig("fsdp", shard_size=8)
    found = resolve(sampling_parser().parse_args(["--ckpt", "CKPT"]), pretrained)
    assert found.sampling.num_steps == 7


def test_tf32_is_on_unless_it_is_switched_off():
    assert resolved().precision == resolved("--tf32").precision == "tf32"
    assert resolved("--no-tf32").precision == "fp32"
    assert resolved("--protocol", "sit_heun125_cfg1.0", "--no-tf32").precision == "fp32"
    assert resolved("--precision", "bf16").precision == "bf16"


def test_published_spellings_of_the_sde_are_taken():
    flags = ["--sampling-method", "Euler_Maruyama", "--diffusion-form", "SBDM"]
    found = resolved(*flags, "--last-step", "Mean", "--last-step-size", "0.1").sampling
    assert (found.sampler, found.diffusion_form) == ("euler_maruyama", "sbdm")
    assert (found.last_step, found.last_step_size) == ("mean", 0.1)
    found = resolved("--cfg-interval", "0.1", "1").sampling
    assert found.cfg_interval == (0.1, 1.0)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--protocol", "dit"], r"--protocol: unknown 'dit'; known: diffmoe_ddpm250_cfg1.0, "),
        (
            ["--protocol", "dit_ddpm250_cfg1.0"],
            r"is for objective ddpm, CKPT was trained with flow",
        ),
        (["--sampler", "ddim"], r"sampling.sampler: 'ddim' does not belong to objective.name flow"),
        (["--cfg-interval", "0.5", "0.2"], r"sampling.cfg_interval: \(0.5, 0.2\) is empty"),
        (["--cfg-scale", "-1"], r"sampling.cfg_scale: -1.0 is too small"),
        (["--last-step-size", "2"], r"sampling.last_step_size: 2.0 is not in \(0, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(flags, wanted):
    with pytest.raises(UserError, match=wanted):
        resolved(*flags)


def test_a_protocol_file_with_an_unknown_key_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("sampling:\n  steps: 5\n")
    monkeypatch.setattr(sys.modules["config.protocol"], "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"mine.yaml: sampling.steps: unknown key"):
        load_protocol("mine")
    (tmp_path / "mine.yaml").write_text("objective_name: ddpm\nsampling:\n  sampler: euler\n")
    with pytest.raises(ConfigError, match=r"sampling.sampler: unknown 'euler'; known: ddim, ddpm"):
        load_protocol("mine")
