"""The main job on a tiny setting: cache, train, sample, by the functions and by the commands."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config.load import parse_config
from config.objective import OBJECTIVES
from config.schema import FEED_FORWARDS
from core.distributed import Processes
from core.errors import UserError
from data.latents import LatentCache
from evaluations.digit_classifier import DigitClassifier, save_classifier
from evaluations.sampled import parse_flags, sample_and_score
from models.pretrained import load_pretrained
from training.trainer import train

ROOT = Path(__file__).parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))


def run_training(config, run_dir, *flags):
    argv = ["--config", config, "--run_dir", run_dir, *flags]
    train(parse_config([str(a) for a in argv], "train.py"), ALONE)
    return run_dir


def run_sampling(ckpt, out, *flags):
    argv = ["--ckpt", ckpt, "--sample-dir", out, "--num-fid-samples", 5]
    argv += ["--per-proc-batch-size", 4, *flags]
    return json.loads(sample_and_score(parse_flags([str(a) for a in argv]), ALONE).read_text())


def torchrun(processes, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


LOSSES = {"token_choice": {"balance"}, "diffmoe": {"capacity"}, "promoe": {"contrastive"}}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layer", FEED_FORWARDS)
def test_every_layer_trains_and_samples_with_every_objective(
    layer, objective, tiny_config, tmp_path
):
    names = ["--model.feed_forward.name", layer, "--objective.name", objective]
    run_dir = run_training(tiny_config, tmp_path / "run", *names)
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    expected = {"flow": {"mse"}, "ddpm": {"mse", "vb"}}[objective]
    expected |= LOSSES.get(layer, set())
    assert {f"loss/{name}" for name in expected} <= entries[0].keys()
    for entry in entries:
        by_noise = entry.pop("capacity_by_noise", None)
        assert (by_noise is None) == (layer == "dense")
        assert all(np.isfinite(value) for value in entry.values())
    record = run_sampling(run_dir, tmp_path / "samples")
    assert (record["objective"], record["feed_forward"]) == (objective, layer)
    if layer == "dense":
        assert record["capacity_infer"] is None
    if layer in ("token_choice", "expert_choice", "promoe"):
        assert record["capacity_infer"] == pytest.approx(1.0)
    with np.load(next((tmp_path / "samples").glob("*/*/samples.npz"))) as samples:
        assert samples["arr_0"].shape == (5, 16, 16, 3)


def test_images_without_classes_at_another_size(make_cache, tiny_config, tmp_path, image_root):
    """A flat folder at 24 pixels, cached and online: unconditional training and sampling."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(image_root.rglob("*.png")):
        shutil.copy(path, images)
    cache = make_cache(tmp_path / "cache", data_path=str(images), image_size=24)
    assert LatentCache(cache).class_names == ["all"]
    flags = {"data.cached_path": cache, "data.image_size": 24, "model.input_size": 12}
    flags |= {"model.num_classes": 0, "sampling.cfg_scale": 1, "train.sample_every": 4}
    argv = [word for key, value in flags.items() for word in (f"--{key}", value)]
    run_dir = run_training(tiny_config, tmp_path / "run", *argv)
    record = run_sampling(run_dir, tmp_path / "samples")
    assert record["num_samples"] == 5
    with np.load(next((tmp_path / "samples").glob("*/*/samples.npz"))) as samples:
        assert samples["arr_0"].shape == (5, 24, 24, 3)
    with pytest.raises(UserError, match=r"cfg_scale: 2\.0 needs classes"):
        run_sampling(run_dir, tmp_path / "more", "--cfg-scale", 2)
    online = ["--data.source", "images", "--data.data_path", images]
    again = run_training(tiny_config, tmp_path / "online", *argv[2:], *online)
    losses = [
        [json.loads(line)["loss/mse"] for line in (run / "metrics.jsonl").open()]
        for run in (run_dir, again)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the cache is in float16


def test_a_run_leaves_config_logs_pictures_and_checkpoints(trained):
    assert [p.name for p in sorted((trained / "checkpoints").iterdir())] == [
        "latest",
        "step_0000002",
        "step_0000004",
    ]
    assert (trained / "checkpoints" / "latest").resolve().name == "step_0000004"
    assert list((trained / "tensorboard").glob("events*"))
    assert [p.name for p in sorted((trained / "samples").iterdir())] == [
        "step_0000002.png",
        "step_0000004.png",
    ]
    assert load_pretrained(trained).config.run_dir == str(trained)
    assert (trained / "config.yaml").read_text().startswith("seed: 0")


def test_tensorboard_has_losses_capacity_loads_and_grids(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    tags = events.Tags()
    wanted = {"loss/loss", "loss/mse", "loss/capacity", "capacity/moe_layer_0", "lr"}
    assert wanted <= set(tags["scalars"])
    assert "tokens_per_expert/moe_layer_0" in tags["histograms"]
    assert [e.step for e in events.Images("samples/ema")] == [2, 4]


PROMOE = ["--model.feed_forward.router_input", "decoupled", "--model.qk_norm", "layernorm"]
PROMOE += ["--model.feed_forward.name", "promoe", "--model.feed_forward.top_k", "2"]


@pytest.mark.parametrize("layer", [[], PROMOE], ids=["diffmoe", "promoe"])
def test_training_goes_on_where_it_stopped(layer, tiny_config, tmp_path):
    whole = run_training(tiny_config, tmp_path / "whole", *layer, "--train.max_steps", "6")
    run_training(tiny_config, tmp_path / "parts", *layer)
    again = ["--train.max_steps", "6", "--resume", "auto"]
    parts = run_training(tiny_config, tmp_path / "parts", *layer, *again)
    for weights in ("model", "ema"):
        one, other = (load_pretrained(run, weights).model.state_dict() for run in (whole, parts))
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    steps = [json.loads(x)["step"] for x in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_a_finished_run_stays_as_it_is(tiny_config, trained):
    before = (trained / "metrics.jsonl").read_text()
    run_training(tiny_config, trained, "--resume", "auto")
    assert (trained / "metrics.jsonl").read_text() == before


def test_flags_override_the_checkpoints_settings(trained, tmp_path):
    flags = ["--cfg-scale", 1, "--num-sampling-steps", 2, "--sampler", "heun", "--global-seed", 9]
    record = run_sampling(trained, tmp_path, *flags, "--image-size", 16, "--num-classes", 3)
    found = [record[k] for k in ("cfg_scale", "num_steps", "sampler", "global_seed")]
    assert found == [1.0, 2, "heun", 9]
    assert sum(record["label_counts"]) == record["num_samples"] == 5
    assert record["capacity_infer"] > 0


def test_names_of_sets_differ_where_their_settings_do(trained, tmp_path):
    """One folder takes sets of any settings without one replacing another."""
    plain, steps = ["--cfg-scale", 1], ["--num-sampling-steps", 2]
    variants = [
        *(
            steps,
            [*steps, "--cfg-scale", 2],
            [*steps, "--cfg-scale", 2, "--cfg-channels", "first3"],
        ),
        *([*steps, "--per-proc-batch-size", 2], [*steps, "--pixels", "adm"]),
        *([*steps, "--labels", "balanced"], ["--sampler", "dopri5"]),
        ["--sampler", "dopri5", "--overshoot"],
    ]
    for flags in variants:
        run_sampling(trained, tmp_path, *plain, *flags)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/set.json")]
    assert len(records) == len(variants)
    assert {r["nfe"] for r in records if r["sampler"] == "euler"} == {2, 4}


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--image-size", 256], r"--image-size: 256 is not allowed; .*step_0000004 has 16"),
        (["--num-classes", 1000], r"--num-classes: 1000 is not allowed"),
        (["--sampler", "ddim"], r"sampling.sampler: 'ddim' does not belong to objective.name flow"),
        (["--vae", "/nowhere"], r"vae_path: '/nowhere' is not a folder"),
        (["--weights", "model", "--ckpt", "/nowhere"], r"/nowhere: no checkpoint here"),
    ],
)
def test_sampling_refuses_what_does_not_fit(flags, wanted, trained, tmp_path):
    with pytest.raises(UserError, match=wanted):
        run_sampling(trained, tmp_path, *flags)


def test_the_capacity_of_a_dense_model_is_refused(tiny_config, tmp_path):
    run = tmp_path / "run"
    run_training(tiny_config, run, "--model.feed_forward.name", "dense", "--train.max_steps", "2")
    with pytest.raises(UserError, match=r"--capacity: .*step_0000002 is a dense model"):
        run_sampling(run, tmp_path / "samples", "--capacity")


def test_sampling_refuses_a_vae_of_another_scale(trained, tmp_path, vae_folder):
    other = tmp_path / "vae"
    other.mkdir()
    for file in vae_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(UserError, match=r"scaling_factor 0\.5, the checkpoint's latents 0\.7"):
        run_sampling(trained, tmp_path / "samples", "--vae", other)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--data.cached_path", "/nowhere"], r"/nowhere is not a finished cache"),
        (["--model.num_classes", "10"], r"model\.num_classes: 10 is configured, but .* has 3"),
        (["--data.image_size", "32"], r"data\.image_size: 32 is configured, but .* has 16"),
        (["--model.in_channels", "4"], r"in_channels and input_size: \(4, 8, 8\) is configured"),
        (["--train.global_batch_size", "24"], r"24 is more than the 23 training images"),
        (["--data.vae_path", "/nowhere", "--train.sample_every", "1"], r"vae_path: '/nowhere'"),
    ],
)
def test_training_refuses_data_that_does_not_fit(flags, wanted, tiny_config, tmp_path):
    with pytest.raises(UserError, match=wanted):
        run_training(tiny_config, tmp_path / "run", *flags)


@pytest.mark.slow
def test_one_and_two_processes_train_alike_and_sample_the_same_images(
    tiny_config, trained, tmp_path
):
    """Two processes through torchrun; training differs in the order of sums, images do not."""
    run = tmp_path / "two"
    torchrun(2, "train.py", "--config", tiny_config, "--run_dir", run, "--device", "cpu")
    one, two = load_pretrained(trained, "model"), load_pretrained(run, "model")
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], tensor, rtol=1e-3, atol=2e-4)
    archives = []
    for count in (1, 2):
        out = tmp_path / f"samples{count}"
        flags = ["--ckpt", trained, "--sample-dir", out, "--num-fid-samples", 10]
        flags += ["--per-proc-batch-size", 4, "--device", "cpu", "--image-size", 16]
        torchrun(count, "sample_ddp.py", *flags)
        archives.append(np.load(next(out.glob("*/*/samples.npz"))))
        assert next(out.glob("*/*/grid.png")).stat().st_size > 0
        assert json.loads(next(out.glob("*/*/set.json")).read_text())["world_size"] == count
    assert len(archives[0]["arr_0"]) == 10
    np.testing.assert_array_equal(archives[0]["arr_0"], archives[1]["arr_0"])
    np.testing.assert_array_equal(archives[0]["labels"], archives[1]["labels"])


@pytest.mark.slow
def test_scores_do_not_depend_on_processes_or_kills(trained, scoring, tmp_path):
    base = ["sample_ddp.py", "--ckpt", trained, "--num-fid-samples", 10, "--device", "cpu"]
    base += ["--per-proc-batch-size", 2, "--cfg-scale", 1.5, "--save", "none", *scoring]
    folders = [tmp_path / name for name in ("one", "two", "killed")]
    torchrun(1, *base, "--sample-dir", folders[0])
    torchrun(2, *base, "--sample-dir", folders[1])
    argv = [*map(str, base), "--sample-dir", str(folders[2])]
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            *argv,
        ],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    parts = folders[2].glob
    end = time.monotonic() + 120
    while not list(parts("*/*/parts/0*.npz")):
        assert time.monotonic() < end
        time.sleep(0.002)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in (launcher.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    done = len(list(parts("*/*/parts/0*.npz")))
    assert 1 <= done < 5
    torchrun(1, *base, "--sample-dir", folders[2])
    sets = [dict(np.load(next(folder.glob("*/*/features.npz")))) for folder in folders]
    records = [json.loads(next(folder.glob("*/*/set.json")).read_text()) for folder in folders]
    assert sets[0]["pool"].shape == (10, 2048)
    for other, record in zip(sets[1:], records[1:], strict=True):
        for name, values in sets[0].items():
            np.testing.assert_array_equal(values, other[name])
        assert record["scores"] == records[0]["scores"]
    assert set(records[0]["scores"]) == {"FID", "sFID", "IS", "precision", "recall"}
    assert not list(folders[0].glob("*/*/samples.npz"))


def test_the_quickstarts_report_reads_what_the_stages_wrote(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "train").symlink_to(trained)
    marks = {"accuracy": 0.5, "precision": 0.25, "recall": 0.125, "FD-digits": 2.0}
    for scale in (1, 2):
        run_sampling(trained, run / "samples", "--cfg-scale", scale)
    for path in (run / "samples").glob("*/*/set.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": marks}))
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "heldout.json").write_text(json.dumps({"scores": {"FD-digits": 0.5}}))
    save_classifier(
        shared / "classifier.safetensors", DigitClassifier(("0", "1")), {"heldout_accuracy": 0.98}
    )
    (shared / "images" / "train" / "0").mkdir(parents=True)
    for number in range(23):
        (shared / "images" / "train" / "0" / f"{number}.png").touch()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "quickstart_report.py", shared, run],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = dict(line.rsplit("  ", 1) for line in done.stdout.split("\n\n")[0].strip().split("\n"))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert (rows["training images"], rows["steps"]) == ("23", "4")
    assert rows["class accuracy of 5, guidance 2"] == "0.5000"
    assert rows["FD-digits, training to held-out"] == "0.500"
    assert rows["classifier on held-out digits"] == "0.9800"
    assert float(rows["mean C_infer, guidance 1"]) > 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("quickstart", "runs/quickstart/train 2000 latents 2"),
        ("quickstart_dsmoe", "runs/quickstart_dsmoe/train 2000 latents 2"),
        ("quickstart_jitmoe", "runs/quickstart_jitmoe/train 2000 pixels 2"),
        ("quickstart_t2i", "runs/quickstart_t2i/train 2200 text 5"),
    ],
)
def test_what_the_quickstart_asks_of_its_configs(name, wanted):
    done = subprocess.run(
        [sys.executable, "scripts/quickstart_facts.py", f"config/{name}.yaml"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quickstart_mine", "base: {root}/config/quickstart_dsmoe.yaml"),  # that one's folder
        ("quickstart_mine", "run_dir: runs/quickstart_mine"),
        ("mine", "base: dit/S_flow"),
    ],
)
def test_the_quickstart_takes_no_config_whose_folder_is_not_its_own(tmp_path, name, text):
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.format(root=ROOT))
    done = subprocess.run(
        [sys.executable, "scripts/quickstart_facts.py", path],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert f"the quickstart wants runs/{name}/train" in done.stderr
    assert not done.stdout


def test_the_python_examples_of_the_pages(trained, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/start.md").read_text()
    block = re.search(r"```python\n(from core\.cond.*?)```", text, re.DOTALL)[1]
    block = block.replace("runs/quickstart/train", str(trained))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["images"].shape == (4, 16, 16, 3)
    assert Image.open("four.png").size == (34, 34)
    text = (ROOT / "docs/how/routing.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(block.replace("runs/quickstart/train", str(trained)), names)
    assert names["busy"].shape == (4, 16)
    capacity = names["record"].capacity_per_sample()
    torch.testing.assert_close(names["busy"].mean(dim=1), capacity)
    assert str(capacity) in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train.py", "sample_ddp.py", "main_cache.py"])
def test_help_of_the_commands(script):
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    flags = {
        "train.py": "--config --optim.lr --resume --model.feed_forward.num_experts",
        "sample_ddp.py": "--ckpt --image-size --num-classes --cfg-scale --num-sampling-steps "
        "--global-seed --per-proc-batch-size --num-fid-samples --sample-dir --vae --tf32 "
        "--precision --compile "
        "--sampler --sampling-method --atol --rtol --metrics --save --classes --num-per-class",
        "main_cache.py": "--img-size --vae-path --data-path --cached-path --batch-size",
    }
    for flag in flags[script].split():
        assert flag in done.stdout
