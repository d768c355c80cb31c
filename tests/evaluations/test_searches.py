"""Grids of sets, the search of a threshold, and tables and figures of several sets."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from config.load import to_plain
from config.model import ModelConfig
from config.schema import FEED_FORWARDS, Config
from core.conditions import Condition
from core.errors import UserError
from data.vae import VAE, to_uint8
from evaluations import compare, routing_gap, sweep, threshold_search
from evaluations.compare import markdown, read_rows
from evaluations.sweep import grid_of
from models.pretrained import load_pretrained
from sampling.generate import Sampler


def run(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    module.main()


def flags(trained, scoring, out):
    sizes = ["--num-fid-samples", 4, "--per-proc-batch-size", 4, "--device", "cpu"]
    return ["--ckpt", trained, "--sample-dir", out, "--save", "none", *sizes, *scoring]


def test_a_grid_is_every_combination():
    assert grid_of(["cfg_scale=1,2", "sampler=euler"]) == [
        {"cfg_scale": "1", "sampler": "euler"},
        {"cfg_scale": "2", "sampler": "euler"},
    ]
    for word in ("cfg_scale", "=1", "cfg_scale="):
        with pytest.raises(UserError, match="is not KEY=VALUE,VALUE"):
            grid_of([word])


def test_a_sweep_makes_each_set_once(trained, scoring, tmp_path, monkeypatch, capsys):
    argv = [*flags(trained, scoring, tmp_path), "--grid", "cfg_scale=1,1.5"]
    run(monkeypatch, sweep, *argv)
    printed = capsys.readouterr().out
    sets = sorted(tmp_path.glob("*/*/set.json"))
    assert len(sets) == 2
    assert not list(tmp_path.glob("*.json"))
    rows = read_rows(sets)
    assert [row["cfg"] for row in rows] == [1.0, 1.5]
    assert all(row["FID"] > 0 and row["NFE"] > 0 for row in rows)
    assert printed.splitlines()[-4:] == markdown(rows).splitlines()
    when = [path.stat().st_mtime_ns for path in sets]
    sets[1].unlink()  # this one is made again
    run(monkeypatch, sweep, *argv)
    assert sets[0].stat().st_mtime_ns == when[0]
    again = read_rows(sets)
    assert again[1]["FID"] == rows[1]["FID"]


def test_the_search_names_the_best_threshold_and_writes_it(
    trained, scoring, tmp_path, monkeypatch, capsys
):
    new = tmp_path / "new"
    own = ["--gammas", "1.0,0.0", "--write", new]
    run(monkeypatch, threshold_search, *own, *flags(trained, scoring, tmp_path))
    table = capsys.readouterr().out
    assert "| fixed 1 | 0 |" in table
    assert "| fixed 0 | 4 |" in table  # all four experts take every token
    assert "| dynamic |" in table
    paths = list(tmp_path.glob("*/*/set.json"))
    assert {path.parent.parent.name for path in paths} == {trained.name}
    rows = read_rows(paths)
    best = min((r for r in rows if r["C_infer"] <= 1), key=lambda r: r["FID"])["inference"]
    assert f"best with C_infer <= 1: {best}" in table
    layer = load_pretrained(new).config.model.feed_forward
    assert layer.inference == best.split()[0]
    before, after = load_pretrained(trained).model, load_pretrained(new).model
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    (picture,) = (tmp_path / trained.name).glob("threshold_search-step_0000004-ema-*n4-*.png")
    assert picture.stat().st_size > 5000


def row_of(inference, capacity, fid):
    return {"inference": inference, "C_infer": capacity, "FID": fid}


def test_the_best_is_the_lowest_among_the_cheap():
    rows = [
        row_of("fixed 0.9", 0.7, 17.6),
        row_of("fixed 0.4", 0.97, 14.2),
        row_of("fixed 0.1", 1.2, 12.9),
    ]
    assert threshold_search.best_of(rows, "FID")["inference"] == "fixed 0.4"
    assert threshold_search.best_of(rows[2:], "FID") is None


def test_flags_change_routing_for_sampling(trained):
    model = load_pretrained(trained, routing={"inference": "topk", "inference_capacity": 2.0})
    assert model.config.model.feed_forward.inference_capacity == 2.0
    with pytest.raises(UserError, match=r"fixed_threshold: 2.0 is not in \[0, 1\]"):
        load_pretrained(trained, routing={"inference": "fixed", "fixed_threshold": 2.0})
    wanted = r"inference of .* diffmoe: 'threshold' is not allowed; wanted: 'topk', 'dynamic', 'fi"
    with pytest.raises(UserError, match=wanted):  # a rule of Expert Race
        load_pretrained(trained, routing={"inference": "threshold"})


def test_tables_and_figures(trained, tmp_path, monkeypatch, capsys):
    loaded = load_pretrained(trained)

    config = to_plain(dataclasses.asdict(loaded.config)) | {"run_dir": "runs/one"}
    base = {"config": config, "sampler": "euler", "num_steps": 3, "cfg_scale": 1.5}
    base |= {"per_proc_batch_size": 4, "capacity_infer": 0.5, "nfe": 6.0, "images_per_second": 2.0}
    paths = []
    for step, fid in ((200, 20.0), (100, 30.0)):
        paths.append(tmp_path / f"{step}.json")
        paths[-1].write_text(json.dumps(base | {"step": step, "scores": {"FID": fid}}))
    run(monkeypatch, compare, *paths, "--runs", trained, "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert "sFID" not in cells[0]  # nothing fills it
    first = dict(zip(cells[0], cells[2], strict=True))
    assert (first["run"], first["step"], first["FID"], first["NFE"]) == ("one", "200", "20", "6")
    assert first["inference"] == "dynamic"
    axes = compare.score_figure(read_rows(paths), "FID").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[100, 30.0], [200, 20.0]]
    for name in ("loss.png", "FID.png"):
        assert (tmp_path / name).stat().st_size > 5000
    losses = compare.loss_figure([trained]).axes[0].lines[0].get_ydata()
    assert np.isfinite(losses).all()
    paths[0].write_text("{}")
    with pytest.raises(UserError, match="no record of a set of samples"):
        read_rows(paths)


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("race", {"inference": "topk", "top_k": 2}, "topk 2"),
        ("race", {}, "threshold"),
        ("diffmoe", {"inference": "topk", "inference_capacity": 0.9}, "topk 0.9"),
        ("expert_choice", {"capacity": 1.5}, "topk 1.5"),
        ("promoe", {}, None),
    ],
)
def test_a_row_says_how_its_layer_routed(name, changes, shown, tmp_path):
    layer = FEED_FORWARDS[name](**changes)
    config = to_plain(dataclasses.asdict(Config(model=ModelConfig(feed_forward=layer))))
    record = {"config": config | {"run_dir": "runs/one"}, "sampler": "euler", "num_steps": 3}
    record |= {"cfg_scale": 1.5, "per_proc_batch_size": 4, "capacity_infer": 2.0, "nfe": 6.0}
    path = tmp_path / "of_earlier.json"
    path.write_text(json.dumps(record | {"step": 100, "images_per_second": 2.0}))
    (row,) = read_rows([path])
    assert row["inference"] == shown


def test_routing_gap_shows_both_rules_of_the_same_noise(trained, tmp_path, monkeypatch, capsys):
    argv = ["--ckpt", trained, "--sample-dir", tmp_path, "--device", "cpu", "--classes", "2,0,1"]
    run(monkeypatch, routing_gap, *argv)
    picture = np.asarray(Image.open(next(tmp_path.glob("*/routing_gap-*n3.png"))))
    assert picture.shape == (2 * 16 + 2, 3 * 16 + 2 * 2, 3)
    loaded = load_pretrained(trained, routing={"inference": "topk"})
    latents, _ = Sampler.of(loaded).latents(range(1, 2), Condition.of_labels([0]))
    image = to_uint8(VAE(loaded.config.data.vae_path).decode(latents))[0].numpy()
    away = picture[:16, 18:34].astype(int) - image
    assert abs(away).max() <= 1  # threads of the two differ
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, routing_gap, *argv[:-2])
    assert "--classes: needed, such as 207,360; of a model of text --p" in capsys.readouterr().err
