"""The benchmarks run and report what they say; nothing is asserted about speed."""

import json
import os
import subprocess

import pytest
import torch

from benchmarks import families, latent_loader, metrics, moe_layer, sampling, train_step
from benchmarks.measure import activation_memory, sheet_peak
from benchmarks.pseudo_code import Algorithm3
from config.files import find_config
from config.layers import DiffMoEConfig
from config.model import ModelConfig
from core.conditions import Condition
from models.build import build_model
from models.moe.capacity import CapacityPredictor
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.moe.routers import ExpertChoiceRouter

CPU = torch.device("cpu")


def test_a_table_of_layers(tmp_path, capsys):
    sizes = ["--hidden-size", "16", "--tokens", "512", "--repeats", "1", "--device", "cpu"]
    moe_layer.main([*sizes, "--num-experts", "2", "4", "--out", str(tmp_path / "layer.json")])
    printed = capsys.readouterr().out
    for experts in (2, 4):
        found = json.loads((tmp_path / f"layer_E{experts}.json").read_text())
        rows = {row["layer"]: row for row in found["rows"]}
        assert rows["dense"]["train / dense"] == rows["dense"]["memory / dense"] == 1
        assert {"diffmoe", "diffmoe, loop", "Algorithm 3 as printed"} <= rows.keys()
        assert all(row["ms train"] > 0 for row in rows.values())
        assert found["settings"]["torch"] == torch.__version__
        assert f"{experts} experts, 512 tokens" in printed


def test_a_table_of_deepseek_layers_has_a_dense_one_of_the_same_activated_width(tmp_path, capsys):
    sizes = ["--hidden-size", "48", "--tokens", "512", "--repeats", "1", "--device", "cpu"]
    out = tmp_path / "layer.json"
    moe_layer.main([*sizes, "--family", "deepseek", "--out", str(out)])
    rows = {row["layer"]: row for row in json.loads(out.read_text())["rows"]}
    for name in ("dense SwiGLU of 288", "dense SwiGLU of 96"):  # 3 x 2 D, 6 x D / 3
        assert rows[name]["train / dense"] == rows[name]["infer / dense"] == 1
    assert {"deepseek E16-k2", "deepseek E48-k5", "deepseek E48-k5, loop"} <= rows.keys()
    assert "deepseek, 512 tokens" in capsys.readouterr().out


def test_a_table_of_races(tmp_path, capsys):
    sizes = ["--hidden-size", "16", "--tokens", "512", "--repeats", "1", "--device", "cpu"]
    out = tmp_path / "layer.json"
    moe_layer.main([*sizes, "--family", "race", "--out", str(out)])
    rows = {row["layer"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["dense"]["train / dense"] == 1
    assert {"race 2-in-8", "race 4-in-32", "expert_choice, renormalised"} <= rows.keys()
    assert "race, 512 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "dense", "layers"),
    [
        ("promoe", "dense GELU of 64", {"promoe E12 by token", "promoe E12 by expert"}),
        ("ditmoe", "dense SwiGLU of 160", {"ditmoe E8-k2"}),  # 2 x 4 D + 2 D
    ],
)
def test_tables_of_other_papers(family, dense, layers, tmp_path):
    sizes = ["--hidden-size", "16", "--tokens", "512", "--repeats", "1", "--device", "cpu"]
    out = tmp_path / "layer.json"
    moe_layer.main([*sizes, "--family", family, "--out", str(out)])
    rows = {row["layer"]: row for row in json.loads(out.read_text())["rows"]}
    others = {text for name in layers for text in (f"{name}, loop", f"products of {name}")}
    assert rows.keys() == {dense, *layers, *others}
    for name in layers:
        bare = rows[f"products of {name}"]
        assert rows[name]["train / products"] == rows[name]["ms train"] / bare["ms train"]
    assert rows[dense]["train / dense"] == 1


TEXT = """data: {text_cached_path: texts, horizontal_flip: false}
model: {text_hidden_size: 6, text_max_length: 5, num_classes: 0}
"""


@pytest.mark.parametrize("more", ["", TEXT])
def test_a_table_of_steps(tmp_path, capsys, more):
    base, config = tmp_path / "base.yaml", tmp_path / "tiny.yaml"
    base.write_text(
        "model: {input_size: 4, hidden_size: 16, depth: 2, num_heads: 2, num_classes: 3, "
        "feed_forward: {num_experts: 2}}\n"
    )
    config.write_text(f"base: base.yaml\n{more}")
    argv = ["--batch-size", "4", "--micro-batch-size", "2", "--repeats", "1", "--device", "cpu"]
    argv += ["--config", str(config), "--out", str(tmp_path / "step.json")]
    train_step.main([*argv, "--trace", str(tmp_path / "trace.json")])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert row["step / first"] == 1
    assert row["img/s"] == pytest.approx(4 / row["seconds"])
    assert "tiny" in capsys.readouterr().out


def test_a_table_of_loaders(tmp_path, capsys):
    sizes = ["--images", "40", "--batch-size", "8", "--shard-size", "16", "--repeats", "1"]
    out = tmp_path / "loader.json"
    threads = torch.get_num_threads()
    latent_loader.main([*sizes, "--dir", str(tmp_path), "--out", str(out)])
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    rows = {(row["what"], row["format"], row["workers"]): row for row in found["rows"]}
    assert len(rows) == 3 * 3 * 2 + 1
    assert rows["ready, warm", "npz", 2]["x npz"] == 1
    assert all(row["samples/s"] > 0 for row in rows.values())
    assert found["facts"]["s to open 1,281,167 images"] > 0
    assert "40 latents, batches of 8" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_a_table_of_metrics(tmp_path, capsys):
    sizes = ["--samples", "40", "--references", "20", "--width", "8"]
    metrics.main([*sizes, "--out", str(tmp_path / "metrics.json")])
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["what"] for row in rows][2:] == ["Fréchet distance", "precision and recall"]
    assert all(row["seconds"] > 0 for row in rows)
    assert "40 samples, 20 references" in capsys.readouterr().out


def test_thresholds_settle_where_capacity_is_one():
    module = families.build(DiffMoEConfig(num_experts=4), 16, "auto", CPU)
    x = torch.randn(2, 64, 16)
    moe_layer.settle(module, x)
    with torch.no_grad():
        _, record = module.eval()(x)
    assert record.counts.sum().item() == 2 * 64
    race = families.build(families.RACES["race 2-in-8"], 16, "auto", CPU)
    moe_layer.settle(race, x)
    with torch.no_grad():
        assert race.eval()(x)[1].counts.sum().item() == 2 * 64 * 2


def test_the_printed_algorithm_computes_what_our_layer_does():
    torch.manual_seed(0)
    printed = Algorithm3(8, 3, 32).train()
    config = DiffMoEConfig(num_experts=3)
    router = ExpertChoiceRouter(8, config, CapacityPredictor(8, 3, 0.95))
    ours = MoEFeedForward(router, Experts(3, 8, 32)).train()
    with torch.no_grad():
        router.affinity.weight.copy_(printed.router.T)
        router.predictor.mlp.load_state_dict(printed.capacity_predictor.state_dict())
        for i, expert in enumerate(printed.experts):
            ours.experts.w1[i], ours.experts.b1[i] = expert[0].weight.T, expert[0].bias
            ours.experts.w2[i], ours.experts.b2[i] = expert[2].weight.T, expert[2].bias
    x = torch.randn(2, 6, 8)
    wanted, loss = printed(x)
    found, record = ours(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(record.losses["capacity"], loss)
    router.predictor.thresholds.copy_(router.predictor.next_state(record.quantiles))
    torch.testing.assert_close(router.predictor.thresholds, printed.threshold)


def test_memory_counts_what_the_backward_pass_needs():
    layer = torch.nn.Linear(10, 20)
    x = torch.randn(6, 10, requires_grad=True)
    saved = activation_memory(lambda: layer(x).square(), layer, CPU)
    assert saved == 4 * (6 * 10 + 6 * 20)  # the inputs of the product and of the square


@pytest.mark.slow
def test_a_table_of_samplers(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sampling.generate.compile_blocks", lambda model, varying: None)
    sizes = ["--num-images", "3", "--batch-size", "2", "--repeats", "1", "--device", "cpu"]
    sampling.main(["--ckpt", str(trained), *sizes, "--out", str(tmp_path / "s.json")])
    rows = {row["way"]: row for row in json.loads((tmp_path / "s.json").read_text())["rows"]}
    assert {"fp32", "bf16", "fp32, compiled", "bf16, compiled"} == rows.keys()  # DiffMoE
    assert rows["fp32"]["speed / fp32"] == 1
    assert rows["fp32"]["pixel difference"] == rows["fp32, compiled"]["pixel difference"] == 0
    assert 0 < rows["bf16"]["pixel difference"] < 20
    assert "3 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, tera):
    assert sheet_peak(name) == (None if tera is None else tera * 1e12)


def test_a_config_is_sampled_from_with_random_weights(tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {input_size: 2, hidden_size: 16, depth: 2, num_heads: 2, num_classes: 3, "
        "patch_size: 1, feed_forward: {num_experts: 4}}\n"
    )
    small = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    monkeypatch.setattr(sampling, "STABLE_DIFFUSION", sampling.STABLE_DIFFUSION | small)
    out = tmp_path / "sampling.json"
    argv = ["--config", str(config), "--num-steps", "2", "--cfg-scale", "2", "--num-images", "4"]
    argv += ["--batch-size", "4", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sampling.Sampler, "compile", lambda self: None)
    sampling.main(argv)
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["fp32"]["pixel difference"] == 0
    assert rows["bf16"]["img/s"] > 0


def test_random_weights_have_thresholds_of_capacity_one():
    config = ModelConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    model = build_model(config)
    sampling.settle(model, CPU)
    x = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        (record,) = model.eval()(x, torch.rand(4), Condition.of_labels([0, 1, 2, 0])).routing
    assert record.capacity_per_sample().mean().item() == pytest.approx(1, abs=0.5)


def test_every_command_of_the_gpu_day_is_understood(tmp_path):
    """The script with a `python` that only says what it is asked for."""
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\necho "python $*"\n')
    said.chmod(0o755)
    (tmp_path / "nvidia-smi").symlink_to(said)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out")]
    done = subprocess.run(
        script, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("python -m")]
    assert (tmp_path / "out" / "gpu_tables.txt").read_text() == done.stdout
    programs = {"moe_layer": moe_layer, "train_step": train_step}
    programs |= {"sampling": sampling, "latent_loader": latent_loader}
    used = set()
    for _, _, program, *argv in lines:
        if program == "pytest":
            continue
        name = program.removeprefix("benchmarks.")
        flags = programs[name].parse_flags([a.replace("cuda", "cpu") for a in argv])
        for config in [flags.config] if name == "sampling" else getattr(flags, "config", []):
            assert find_config(config).exists()
        used.add(name)
    assert used == programs.keys()
