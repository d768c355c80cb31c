"""The digit classifier and its scores, on the real digits and on spoilt copies of them."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.digits import write_digits
from evaluations import digits
from evaluations.digits import (
    DigitClassifier,
    DigitSet,
    TrainSettings,
    accuracy,
    digit_reference,
    features_and_logits,
    load_classifier,
    load_digits,
    read_samples,
    save_classifier,
    score_samples,
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


@pytest.fixture(scope="module")
def reference(classifier, train, heldout):
    return digit_reference(classifier, train, heldout)


def test_a_few_epochs_do(reference):
    assert reference.heldout_accuracy >= 0.97
    assert reference.train_scores["accuracy"] >= 0.97


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


def test_heldout_digits_as_samples(reference, heldout):
    scores = score_samples(reference, heldout.images, heldout.labels)
    assert scores["accuracy"] == reference.heldout_accuracy
    assert (scores["precision"], scores["recall"]) == (1.0, 1.0)
    assert scores["FD-digits"] == pytest.approx(reference.train_scores["FD-digits"], rel=1e-9)


def test_training_digits_as_samples(reference, train):
    scores = score_samples(reference, train.images, train.labels)
    assert scores["FD-digits"] < 1e-6 < reference.train_scores["FD-digits"]
    for name in ("samples", "accuracy", "precision", "recall"):
        assert scores[name] == reference.train_scores[name]


def test_each_fault_shows_in_its_score(reference, heldout):
    real = score_samples(reference, heldout.images, heldout.labels)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, heldout.images.shape, dtype=np.uint8)
    spoilt = score_samples(reference, noise, heldout.labels)
    assert spoilt["accuracy"] < 0.3
    assert spoilt["precision"] < 0.1
    assert spoilt["FD-digits"] > 20 * real["FD-digits"]
    wrong = score_samples(reference, heldout.images, (heldout.labels + 1) % 10)
    assert wrong["accuracy"] < 0.05
    assert wrong["precision"] == 1.0
    threes = heldout.labels == 3
    collapsed = score_samples(reference, heldout.images[threes], heldout.labels[threes])
    assert collapsed["precision"] == 1.0
    assert collapsed["recall"] < 0.3
    assert collapsed["FD-digits"] > 20 * real["FD-digits"]


def test_grey_images_score_like_rgb(reference, heldout):
    colour = score_samples(reference, heldout.images, heldout.labels)
    grey = score_samples(reference, heldout.images[..., :1], heldout.labels)
    assert grey == pytest.approx(colour)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["digits", *map(str, arguments)])
    digits.main()


def test_commands(folder, heldout, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    weights, samples, out = (tmp_path / n for n in ("c.safetensors", "val.npz", "score.json"))
    run(monkeypatch, "train", "--data", folder, "--out", weights, "--epochs", 1)
    assert "held-out accuracy" in caplog.text
    np.savez(samples, arr_0=heldout.images, labels=heldout.labels)
    run(
        monkeypatch,
        *("score", "--data", folder, "--classifier", weights, samples, "--out", out),
    )
    report = json.loads(out.read_text())
    scores = report["files"][str(samples)]
    assert scores["samples"] == len(heldout.images)
    assert scores["accuracy"] == report["heldout_accuracy"] > 0.5
    assert scores["FD-digits"] == pytest.approx(report["train_to_heldout"]["FD-digits"])
    assert report["settings"]["k"] == 3
    assert "FD-digits" in caplog.text
    assert "FID" not in caplog.text


def test_command_reports_a_user_error_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", "--data", tmp_path / "none", "--out", tmp_path / "c")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: data: no folder")
    assert "python -m data.digits" in error
    assert "\n" not in error


IMAGES = np.zeros((5, 32, 32, 3), np.uint8)
LABELS = np.arange(5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "no array 'arr_0'"),
        ({"arr_0": IMAGES}, "no array 'labels'"),
        ({"arr_0": IMAGES / 2, "labels": LABELS}, "need uint8 .* got float64"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS}, r"got uint8 \(5, 3, 32, 32\)"),
        ({"arr_0": IMAGES[:0], "labels": LABELS[:0]}, r"got uint8 \(0, 32, 32, 3\)"),
        ({"arr_0": IMAGES, "labels": LABELS[:4]}, r"need int64 \(5,\), got int64 \(4,\)"),
        ({"arr_0": IMAGES, "labels": LABELS / 2}, "got float64"),
        ({"arr_0": np.array([{}], dtype=object), "labels": LABELS}, "no npz file of plain arrays"),
    ],
)
def test_samples_errors(arrays, message, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_samples(tmp_path / "s.npz")


def test_samples_that_are_no_npz(tmp_path):
    with pytest.raises(UserError, match="samples: no file"):
        read_samples(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", IMAGES)
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=IMAGES, labels=LABELS)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-200])
    for name in ("text.npz", "array.npy", "cut.npz"):
        with pytest.raises(UserError, match="npz file"):
            read_samples(tmp_path / name)


def test_scoring_errors(reference):
    with pytest.raises(UserError, match=r"classes 0 \.\.\. 9, got 10 \.\.\. 10"):
        score_samples(reference, IMAGES, np.full(5, 10))
    with pytest.raises(UserError, match="one per image"):
        score_samples(reference, IMAGES, LABELS[:2])
    with pytest.raises(UserError, match="k = 3 needs more than k images, got 3"):
        score_samples(reference, IMAGES[:3], LABELS[:3])


def test_classes_must_be_the_classifiers(classifier, train, heldout):
    with pytest.raises(UserError, match="are not the classifier's"):
        digit_reference(classifier, train, replace(heldout, class_names=("a", "b")))


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
