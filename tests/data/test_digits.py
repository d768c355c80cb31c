"""The embedded digits as an image folder."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from core.errors import UserError
from data.digits import enlarge, split, write_digits
from data.images import ImageFolder


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    assert write_digits(out) == Counter(train=1438, val=359)
    return out


def test_counts_on_disk(digits_folder):
    train, val = ImageFolder(digits_folder / "train"), ImageFolder(digits_folder / "val")
    assert (len(train), len(val)) == (1438, 359)
    assert train.class_names == val.class_names == list("0123456789")
    names = [path.rsplit("/", 1)[1] for path in train.paths + val.paths]
    assert sorted(names) == [f"{index:04d}.png" for index in range(1797)]


def test_split_is_stratified_and_ignores_global_state():
    labels = load_digits().target
    torch.manual_seed(1)
    np.random.seed(1)
    first = split(labels)
    torch.manual_seed(2)
    np.random.seed(2)
    assert np.array_equal(first, split(labels))
    for label in range(10):
        assert first[labels == label].mean() == pytest.approx(0.2, abs=0.005)


def test_images_are_enlarged_scans(digits_folder):
    folder = ImageFolder(digits_folder / "train")
    digits = load_digits()
    for path, label in list(zip(folder.paths, folder.labels, strict=True))[::300]:
        index = int(path[-8:-4])
        image = Image.open(path)
        assert (image.size, image.mode) == ((32, 32), "RGB")
        assert digits.target[index] == label
        assert np.array_equal(image, enlarge(digits.images[index]))
        means = np.asarray(image.convert("L"), dtype=float).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(means.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_complete_folder_is_left_alone(digits_folder):
    before = {path: path.stat().st_mtime_ns for path in digits_folder.rglob("*")}
    write_digits(digits_folder)
    assert before == {path: path.stat().st_mtime_ns for path in digits_folder.rglob("*")}


def test_other_content_is_refused_and_no_temporary_folder_stays(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not the complete digits"):
        write_digits(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
