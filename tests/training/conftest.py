"""Tiny runs of random latents, in the test or beside it."""

import pytest
import torch
from programs import Program

from training.verify_resume import write_cache


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """A disk that does not answer is asked again at once."""
    monkeypatch.setattr("models.sealed.PAUSES", (0.01, 0.01))


@pytest.fixture(scope="module")
def one_thread():
    """What is tested here takes no computation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("random") / "cache")


@pytest.fixture
def flags(cache, tmp_path):
    """A call that gives the flags of a tiny run, changed as asked."""

    def make(run="run", **changes):
        values = {
            "run_dir": tmp_path / run,
            "resume": "auto",
            "device": "cpu",
            "data.cached_path": cache,
            "data.image_size": 32,
            "data.num_workers": 0,
            "model.input_size": 4,
            "model.patch_size": 1,
            "model.hidden_size": 16,
            "model.num_heads": 2,
            "model.depth": 2,
            "model.num_classes": 3,
            "model.feed_forward.num_experts": 4,
            "train.max_steps": 8,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 4,
            "train.log_every": 2,
            "train.ckpt_every": 2,
            "train.sample_every": 0,
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return make


@pytest.fixture
def start(tmp_path):
    """A call that starts train.py with flags beside the test."""
    started = []

    def call(argv, first=""):
        started.append(tmp_path / f"log_{len(started)}")
        return Program("train", argv, started[-1], first)

    return call
