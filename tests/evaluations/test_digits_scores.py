"""The digit classifier and its scores, on the real digits and on spoilt copies of them."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.digits import write_digits
from evaluations import digits, evaluate, make_reference
from evaluations.digit_classifier import (
    DigitClassifier,
    DigitSet,
    TrainSettings,
    accuracy,
    features_and_logits,
    load_classifier,
    load_digits,
    save_classifier,
    train_classifier,
)

FEW = TrainSettings(epochs=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    write_digits(out)
    return out


@pytest.fixture(scope="module")
def train(folder) -> DigitSet:
    return load_digits(folder, "train")


@pytest.fixture(scope="module")
def heldout(folder) -> DigitSet:
    return load_digits(folder, "val")


@pytest.fixture(scope="module")
def classifier(train) -> DigitClassifier:
    return train_classifier(train, FEW)


def test_a_few_epochs_do(classifier, heldout):
    assert accuracy(features_and_logits(classifier, heldout.images)[1], heldout.labels) >= 0.97


def test_classifier_is_small_and_its_features_have_full_rank(classifier, heldout):
    assert sum(p.numel() for p in classifier.parameters()) < 50_000
    features, logits = features_and_logits(classifier, heldout.images, batch_size=100)
    assert features.shape == (len(heldout.images), 64)
    assert logits.shape == (len(heldout.images), 10)
    assert np.linalg.matrix_rank(features - features.mean(axis=0)) == 64


def test_training_is_a_function_of_the_seed_and_leaves_the_global_generator(train):
    part = replace(train, images=train.images[::10], labels=train.labels[::10])
    state = torch.get_rng_state()
    first, again, other = (
        train_classifier(part, replace(FEW, epochs=1, seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_file_gives_the_same_classifier_back(classifier, heldout, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier, {"seed": 0})
    loaded = load_classifier(path)
    assert loaded.class_names == classifier.class_names == tuple("0123456789")
    expected, got = (features_and_logits(c, heldout.images) for c in (classifier, loaded))
    np.testing.assert_array_equal(expected[0], got[0])
    np.testing.assert_array_equal(expected[1], got[1])
    content = path.read_bytes()
    save_classifier(path, loaded, {"seed": 0})
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def scores_of(images, labels, folder, weights, tmp_path, monkeypatch):
    """Scores of images against the training digits, by the commands."""
    reference, samples, out = (tmp_path / n for n in ("ref.npz", "smp.npz", "out.json"))
    features = ["--features", "digits", "--classifier", weights]
    if not reference.exists():
        argv = [folder / "train", reference, "--image-size", 32, "--num-workers", 0, *features]
        run(monkeypatch, make_reference, *argv)
    np.savez(samples, arr_0=images, labels=labels)
    run(monkeypatch, evaluate, reference, samples, *features, "--out", out)
    return json.loads(out.read_text())["scores"]


@pytest.fixture
def score(folder, classifier, tmp_path, monkeypatch):
    weights = tmp_path / "c.safetensors"
    save_classifier(weights, classifier)
    return lambda images, labels: scores_of(images, labels, folder, weights, tmp_path, monkeypatch)


def test_training_digits_as_samples(score, train, heldout):
    scores = score(train.images, train.labels)
    assert (scores["precision"], scores["recall"]) == (1.0, 1.0)
    assert scores["FD-digits"] < 1e-6
    assert scores["accuracy"] >= 0.97
    real = score(heldout.images, heldout.labels)
    assert 0.1 < real["FD-digits"] < 3
    assert real["precision"] > 0.7
    assert real["recall"] > 0.7


def test_each_fault_shows_in_its_score(score, heldout):
    real = score(heldout.images, heldout.labels)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, heldout.images.shape, dtype=np.uint8)
    spoilt = score(noise, heldout.labels)
    assert spoilt["accuracy"] < 0.3
    assert spoilt["precision"] < 0.1
    assert spoilt["FD-digits"] > 20 * real["FD-digits"]
    wrong = score(heldout.images, (heldout.labels + 1) % 10)
    assert wrong["accuracy"] < 0.05
    assert wrong["precision"] == real["precision"]
    threes = heldout.labels == 3
    collapsed = score(heldout.images[threes], heldout.labels[threes])
    assert collapsed["precision"] > 0.7
    assert collapsed["recall"] < 0.3
    assert collapsed["FD-digits"] > 20 * real["FD-digits"]


def run(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    module.main()


def test_command(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    weights = tmp_path / "c.safetensors"
    run(monkeypatch, digits, "--data", folder, "--out", weights, "--epochs", 1)
    assert "held-out accuracy" in caplog.text
    assert load_classifier(weights).class_names == tuple("0123456789")


def test_command_reports_a_user_error_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, digits, "--data", tmp_path / "none", "--out", tmp_path / "c")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: data: no folder")
    assert "python -m data.digits" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("images", "labels", "wanted"),
    [
        (np.zeros((5, 32, 32, 3), np.uint8), np.full(5, 10), r"a label in 0 \.\.\. 9 for each of"),
        (np.zeros((5, 32, 32, 3), np.uint8), np.arange(4), "for each of the 5 samples"),
        (np.zeros((5, 16, 16, 3), np.uint8), np.arange(5), r"images of 32 x 32, got \(16, 16\)"),
    ],
)
def test_scoring_errors(score, images, labels, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        score(images, labels)
    assert re.search(wanted, capsys.readouterr().err)


def test_classifier_file_errors(classifier, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match="classifier: no file"):
        load_classifier(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot read"):
        load_classifier(path)
    save_file(classifier.state_dict(), path)
    with pytest.raises(UserError, match="is no digit classifier"):
        load_classifier(path)
    with pytest.raises(UserError, match="out: no folder"):
        save_classifier(tmp_path / "none" / "c.safetensors", classifier)


@pytest.mark.parametrize("settings", [replace(FEW, epochs=0), replace(FEW, batch_size=10_000)])
def test_setting_errors(settings, train):
    with pytest.raises(UserError, match="need at least 1 epoch and batches of 2"):
        train_classifier(train, settings)


def test_accuracy():
    assert accuracy(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1])) == 0.5
