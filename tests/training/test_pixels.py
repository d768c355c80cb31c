"""JiTMoE in pixel space: training, exact resume, validation, sampling and scoring without a VAE."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from config.load import load_config, parse_config
from core.distributed import Processes
from core.errors import ConfigError, UserError
from data.dataset import ImageDataset
from data.images import load_image, to_float
from data.sources import training_data
from evaluations.capacity import numbers, read_run
from evaluations.sampled import parse_flags, sample_and_score
from models.pretrained import find_checkpoint, load_pretrained, read_tensors, weights_path
from training.trainer import train

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def pixel_config(tmp_path_factory, image_root):
    """JiTMoE on the 23 small images, with dropout and a bias that is updated."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    path = tmp_path_factory.mktemp("config") / "pixels.yaml"
    path.write_text(
        f"""
base: {root}/config/quickstart_jitmoe.yaml
data: {{data_path: {image_root}, image_size: 16, val_data_path: {image_root}}}
model:
  {{input_size: 16, patch_size: 4, hidden_size: 16, depth: 4, num_heads: 2, num_classes: 3,
    bottleneck_size: 6, context_start: 2, dropout: 0.2, intermediate_size: 24,
    feed_forward: {{num_experts: 4, intermediate_size: 12, shared_intermediate_size: 12,
      bias_update_rate: 0.01}}}}
optim: {{warmup_steps: 2, ema_warmup: false}}
train:
  {{max_steps: 6, global_batch_size: 8, micro_batch_size: 4, log_every: 2, ckpt_every: 3,
    sample_every: 6, num_grid_samples: 3, val_every: 6, num_val_samples: 8}}
sampling: {{num_steps: 3}}
"""
    )
    return path


def run(path, run_dir, *flags):
    train(
        parse_config([str(a) for a in ("--config", path, "--run_dir", run_dir, *flags)], "t"), ALONE
    )
    return run_dir


@pytest.fixture(scope="session")
def pixel_run(pixel_config, tmp_path_factory):
    return run(pixel_config, tmp_path_factory.mktemp("runs") / "jitmoe")


def test_batches_are_the_images_themselves(pixel_config, image_root):
    config = load_config(pixel_config)
    config.data.horizontal_flip = False
    data = training_data(config, ALONE)
    assert type(data) is ImageDataset
    images, cond = data.finish(data.__getitems__([(0, 5), (3, 20)]))
    paths = [sorted(image_root.rglob("*.png"))[i] for i in (5, 20)]
    wanted = torch.stack([to_float(load_image(str(path), 16)) for path in paths])
    assert torch.equal(images, wanted)
    assert cond.labels.tolist() == [int(path.parent.name[-1]) for path in paths]


def test_mirrored_half_the_time(pixel_config):
    config = load_config(pixel_config)
    config.data.horizontal_flip = True
    data = training_data(config, ALONE)
    plain = data.source.floats(data.source.images([4]))[0]
    seen = [data.finish(data.__getitems__([(epoch, 4)]))[0][0] for epoch in range(40)]
    mirrored = sum(torch.equal(image, plain.flip(-1)) for image in seen)
    assert mirrored + sum(torch.equal(image, plain) for image in seen) == 40
    assert 10 < mirrored < 30


def test_a_run_writes_grids_validation_and_both_averages(pixel_run):
    assert Image.open(pixel_run / "samples" / "step_0000006.png").size > (16, 16)
    entries = [json.loads(line) for line in (pixel_run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in entry for entry in entries)
    assert any("bias_range/moe_layer_0" in entry for entry in entries)
    state = json.loads((find_checkpoint(pixel_run) / "state.json").read_text())
    assert (state["latents"]["vae_path"], state["latents"]["scaling_factor"]) == (None, 1.0)
    averages = [load_pretrained(pixel_run, name).model for name in ("ema", "ema_0.996")]
    first, second = (next(m.parameters()) for m in averages)
    assert not torch.equal(first, second)


def test_resume_is_exact_with_dropout_and_a_moving_bias(pixel_config, pixel_run, tmp_path):
    part = run(pixel_config, tmp_path / "part", "--train.max_steps", "3", "--train.val_every", "3")
    run(pixel_config, part, "--resume", "auto")
    whole, resumed = (find_checkpoint(folder) for folder in (pixel_run, part))
    for name in ("model", "ema", "ema_0.996", "optimizer"):
        wanted, found = (read_tensors(weights_path(c, name)) for c in (whole, resumed))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        biases = [t for n, t in found.items() if n.endswith("correction_bias")]
        assert all(bias.abs().max() > 0 for bias in biases)


def test_training_may_go_on_with_another_rate_of_the_bias_and_says_so(
    pixel_config, pixel_run, tmp_path, caplog
):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    source = find_checkpoint(pixel_run)
    (tmp_path / "run" / "checkpoints" / source.name).symlink_to(source)
    flags = ("--resume", "auto", "--train.max_steps", "7")
    rate = ("--model.feed_forward.bias_update_rate", "0.5")
    with caplog.at_level("WARNING", logger="diffmoe"):
        run(pixel_config, tmp_path / "run", *flags, *rate)
    assert "bias_update_rate was 0.01, is 0.5 now" in caplog.text
    tensors = read_tensors(weights_path(find_checkpoint(tmp_path / "run"), "model"))
    biases = [t for n, t in tensors.items() if n.endswith("correction_bias")]
    assert max(bias.abs().max() for bias in biases) > 0.3
    with pytest.raises(UserError, match=r"another architecture: model\.rope is 2d there, 1d here"):
        run(pixel_config, tmp_path / "run", *flags, "--model.rope", "1d")


def test_a_start_from_weights_of_another_computation_is_said(
    pixel_config, pixel_run, tmp_path, caplog
):
    flags = ("--init_from", pixel_run, "--train.max_steps", "1", "--model.rope", "1d")
    with caplog.at_level("WARNING", logger="diffmoe"):
        run(pixel_config, tmp_path / "run", *flags)
    assert "model.rope is 2d there, 1d here" in caplog.text


def sample(run_dir, out, *flags):
    base = ("--ckpt", run_dir, "--num-fid-samples", 5, "--per-proc-batch-size", 2)
    argv = [str(a) for a in (*base, "--sample-dir", out, "--device", "cpu", *flags)]
    return json.loads(sample_and_score(parse_flags(argv), ALONE).read_text())


def test_samples_are_pixels_and_can_be_scored(pixel_run, tmp_path, scoring):
    record = sample(pixel_run, tmp_path, "--capacity", *scoring)
    assert record["vae"] is None
    assert record["sampler"] == "heun_euler"
    assert record["nfe"] == 9  # Heun, Heun, Euler: five evaluations, all but that at 0 guided
    assert "FID" in record["scores"]
    with np.load(next(tmp_path.glob("*/*/capacity.npz"))) as file:
        assert file["tokens"].tolist() == [16, 20]  # the class joins after the first MoE layer
        assert file["maps"].shape == (5, 2, 16)
        assert (file["maps"] == 2).all()
    found = numbers(read_run(next(tmp_path.glob("*/*n5"))))
    assert found["C_infer (Eq. 15)"] == pytest.approx(2)
    assert record["capacity_infer"] == pytest.approx(2)
    with np.load(next(tmp_path.glob("*/*n5/samples.npz"))) as file:
        assert file["arr_0"].shape == (5, 16, 16, 3)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--vae", "mse"], "--vae: mse, but .* makes pixels"),
        (["--protocol", "dsmoe_euler250_cfg1.0"], "cfg1.0: vae: mse, but .* makes pixels"),
    ],
)
def test_a_decoder_for_pixels_is_refused(pixel_run, tmp_path, flags, wanted):
    with pytest.raises(UserError, match=wanted):
        sample(pixel_run, tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            ["--data.source", "latents", "--train.val_every", "0"],
            "data.vae_path: null is for pixels",
        ),
        (["--data.val_cached_path", "x"], "data.vae_path: null is for pixels"),
        (["--train.val_every", "5", "--data.val_data_path", "null"], "needs data.val_cached_path"),
    ],
)
def test_configs_without_a_vae_that_cannot_work_are_refused(pixel_config, flags, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parse_config(["--config", str(pixel_config), *flags], "train.py")


def test_images_of_another_size_are_refused_before_any_is_read(pixel_config):
    with pytest.raises(ConfigError, match="input_size: 3 and 8 are not those of pixels"):
        parse_config(["--config", str(pixel_config), "--model.input_size", "8"], "train.py")
