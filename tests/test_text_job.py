"""The text-to-image quickstart on a tiny setting, by its programs, and the example of the docs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import main_cache
import sample_ddp
import train
from data import scenes, tiny_text
from evaluations import capacity, geneval, scene_scores
from evaluations.scene_finder import Finder, save_finder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch):
    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
        module.main()

    return run


@pytest.mark.slow
def test_from_captions_to_scores(call, vae_folder, tmp_path):
    data, run = tmp_path / "shared", tmp_path / "run"
    data.mkdir()
    call(scenes, "--out", data / "scenes", "--train", 24, "--val", 12, "--prompts", 1)
    captions = data / "scenes/train/metadata.jsonl"
    call(tiny_text, "--captions", captions, "--out", data / "encoder", "--steps", 3)
    call(
        *(main_cache, "--img-size", 32, "--vae-path", vae_folder, "--num-workers", 0),
        *("--data-path", data / "scenes/train", "--cached-path", data / "cache"),
        *("--captions", "metadata", "--text-encoder", data / "encoder"),
        *("--text-max-length", 12, "--text-cached-path", data / "texts", "--device", "cpu"),
    )
    sizes = {"input_size": 16, "in_channels": 3, "hidden_size": 16, "num_heads": 2, "depth": 2}
    flags = {f"model.{key}": value for key, value in sizes.items()} | {
        "data.cached_path": data / "cache",
        "data.text_cached_path": data / "texts",
        "data.vae_path": vae_folder,
        "train.max_steps": 2,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 8,
        "train.log_every": 1,
        "train.num_grid_samples": 2,
        "sampling.num_steps": 2,
        "run_dir": run / "train",
        "device": "cpu",
    }
    call(train, "--config", "quickstart_t2i", *(f"--{key}={v}" for key, v in flags.items()))
    prompts = "--prompts", data / "scenes/prompts.jsonl", "--num-per-prompt", 2
    common = "--ckpt", run / "train", "--sample-dir", run / "samples", "--device", "cpu"
    call(sample_ddp, *common, *prompts, "--per-proc-batch-size", 4, "--capacity")
    (folder,) = (run / "samples").glob("*/*")
    finder = data / "finder.safetensors"
    save_finder(finder, Finder(), {})
    results = run / "results_cfg5.jsonl"
    call(scene_scores, folder, "--finder", finder, "--out", results)
    call(scene_scores, data / "scenes/val", "--finder", finder, "--out", data / "heldout.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 12
    asked = [json.loads(line) for line in (data / "scenes/prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [asked[i // 2]["prompt"] for i in range(12)]
    call(geneval, results)
    call(capacity, folder)
    assert (folder / "experts.png").is_file()
    with np.load(folder / "capacity.npz") as recorded:
        assert recorded["pairs"].shape[-1] == 6
    report = [sys.executable, "scripts/quickstart_t2i_report.py", data, run]
    text = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "steps 2, training images/s" in text
    assert [title in text for title in ("guidance 5:", "real held-out scenes:")] == [True, True]
    assert text.count("| Single | Two | Counting | Colors | Position | ColorAttr | Overall |") == 2


def test_the_example_of_the_documents_runs(trained_t2i):
    text = (ROOT / "docs/text_to_image.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(block.replace("runs/quickstart_t2i/train", str(trained_t2i)), names)
    assert names["images"].shape == (2, 16, 16, 3)
