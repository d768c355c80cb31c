"""The evaluator on images: the network, references, and what it refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.files import file_hash
from evaluations import evaluate, make_reference
from evaluations.inception import load_inception
from evaluations.metrics import frechet_distance, inception_score, precision_recall, statistics
from evaluations.statistics import RunningStatistics

FEATURES = {"pool": 2048, "spatial": 2023, "logits": 1008}


@pytest.fixture(scope="module")
def weights(inception_weights):
    return inception_weights


@pytest.fixture(scope="module")
def images():
    """40 smooth random images of 24 pixels, uint8 (N, H, W, 3)."""
    draws = np.random.default_rng(0).integers(0, 256, (40, 3, 3, 3), dtype=np.uint8)
    grown = [Image.fromarray(x).resize((24, 24), Image.Resampling.BICUBIC) for x in draws]
    return np.stack([np.asarray(image) for image in grown])


def run(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    module.main()


def test_the_network_is_torch_fidelitys(weights, images):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(weights))
    batch = torch.from_numpy(images[:4])
    pool, logits = theirs(batch.permute(0, 3, 1, 2))
    ours = load_inception(weights, file_hash(weights))(batch)
    assert {name: values.shape[1] for name, values in ours.items()} == FEATURES
    torch.testing.assert_close(ours["pool"], pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-4)


def test_spatial_features_come_from_the_first_branch_of_mixed_6d(weights, images):
    network = load_inception(weights, file_hash(weights))
    seen = {}
    branch = network.Mixed_6d.branch1x1
    branch.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    found = network(torch.from_numpy(images[:2]))["spatial"]
    x = torch.nn.functional.conv2d(seen["x"], branch.conv.weight)
    bn = branch.bn
    x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    x = (x * bn.weight[:, None, None] + bn.bias[:, None, None]).relu()
    assert x.shape[2:] == (17, 17)
    expected = x[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0


def test_weights_are_checked_before_they_are_read(weights, tmp_path):
    with pytest.raises(UserError, match=r"has SHA-256 .*, not 6726825d.*--inception-sha256"):
        load_inception(weights)
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="does not fit the network"):
        load_inception(other, file_hash(other))
    pickled = tmp_path / "pickled.pth"
    torch.save({"x": RunningStatistics(1)}, pickled)
    with pytest.raises(UserError, match=r"cannot read .*pickled\.pth"):
        load_inception(pickled, file_hash(pickled))
    with pytest.raises(UserError, match="cannot read"):
        load_inception(tmp_path / "missing.pth")


@pytest.fixture(scope="module")
def features(weights, images):
    network = load_inception(weights, file_hash(weights))
    return {name: x.numpy() for name, x in network(torch.from_numpy(images)).items()}


def flags(weights):
    return ["--inception-weights", weights, "--inception-sha256", file_hash(weights)]


def expected_scores(features):
    """Of images 16 ... 39 against images 0 ... 15."""
    ref, smp = ({k: v[part] for k, v in features.items()} for part in (slice(16), slice(16, 40)))
    shifted = np.exp(smp["logits"] - smp["logits"].max(1, keepdims=True)).astype(np.float64)
    precision, recall = precision_recall(ref["pool"], smp["pool"])
    return {
        "FID": frechet_distance(*statistics(ref["pool"]), *statistics(smp["pool"])),
        "sFID": frechet_distance(*statistics(ref["spatial"]), *statistics(smp["spatial"])),
        "IS": inception_score(shifted / shifted.sum(1, keepdims=True)),
        "precision": precision,
        "recall": recall,
    }


@pytest.mark.parametrize("form", ["npz", "folder", "features"])
def test_every_form_of_samples_scores_the_same(
    form, weights, images, features, tmp_path, monkeypatch, capsys
):
    np.savez(tmp_path / "ref.npz", arr_0=images[:16])
    samples = tmp_path / "samples.npz"
    if form == "npz":
        np.savez(samples, arr_0=images[16:], labels=np.arange(24))
    elif form == "features":
        np.savez(samples, **{name: x[16:] for name, x in features.items()})
    else:
        samples = tmp_path / "samples"
        (samples / "deep").mkdir(parents=True)
        for i, image in enumerate(images[16:]):
            Image.fromarray(image).save(samples / ("deep" if i % 2 else ".") / f"{i:02d}.png")
    out = tmp_path / "out.json"
    argv = [tmp_path / "ref.npz", samples, *flags(weights), "--batch-size", 7, "--out", out]
    run(monkeypatch, evaluate, *argv)
    record = json.loads(out.read_text())
    expected = expected_scores(features)
    assert record["scores"] == pytest.approx(expected, rel=2e-3)
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert {k: float(v) for k, v in printed.items()} == pytest.approx(record["scores"], rel=1e-4)
    assert (record["num_samples"], record["reference_images"]) == (24, 16)
    assert record["features_sha256"] == file_hash(weights)
    assert record["reference_sha256"] == file_hash(tmp_path / "ref.npz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_the_reference_are_used(dtype, weights, features, tmp_path, monkeypatch):
    draws = np.random.default_rng(1)
    given = {}
    for name, keys in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        mu, sigma = statistics(features[name][:16] + draws.normal(size=FEATURES[name]))
        given |= dict(zip(keys, (mu.astype(dtype), sigma.astype(dtype)), strict=True))
    np.savez(tmp_path / "ref.npz", **given)
    np.savez(tmp_path / "smp.npz", **{name: x[16:] for name, x in features.items()})
    argv = [tmp_path / "ref.npz", tmp_path / "smp.npz", *flags(weights)]
    out = tmp_path / "out.json"
    run(monkeypatch, evaluate, *argv, "--metrics", "fid", "sfid", "--out", out)
    scores = json.loads(out.read_text())["scores"]
    exact = [given[key].astype(np.float64) for key in ("mu", "sigma")]
    assert scores["FID"] == pytest.approx(
        frechet_distance(*exact, *statistics(features["pool"][16:])), rel=1e-9
    )
    assert set(scores) == {"FID", "sFID"}


def refusal(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, evaluate, *argv)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_a_reference_cannot_give_is_named(weights, features, tmp_path, monkeypatch, capsys):
    mu, sigma = statistics(features["pool"][:16])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "smp.npz", **{name: x[16:] for name, x in features.items()})
    both = [tmp_path / "ref.npz", tmp_path / "smp.npz", *flags(weights)]
    said = refusal(monkeypatch, capsys, *both, "--metrics", "sfid")
    assert said.endswith("ref.npz has neither mu_s and sigma_s nor arr_0")
    assert "sFID:" in said
    said = refusal(monkeypatch, capsys, *both, "--metrics", "fid", "pr")
    assert "precision: " in said
    assert "has no arr_0" in said
    assert "unknown 'fod'; known: fid, is, pr, sfid" in refusal(
        monkeypatch, capsys, *both, "--metrics", "fod"
    )
    np.savez(tmp_path / "ref.npz", mu=mu[:5], sigma=sigma)
    assert "must be floats (D,) and (D, D)" in refusal(monkeypatch, capsys, *both)
    np.savez(tmp_path / "ref.npz", mu=mu[:5], sigma=sigma[:5, :5])
    assert "has 5 features, the samples 2048" in refusal(
        monkeypatch, capsys, *both, "--metrics", "fid"
    )
    np.savez(tmp_path / "ref.npz", x=mu)
    assert "no reference; needs mu and sigma" in refusal(monkeypatch, capsys, *both)
    (tmp_path / "ref.npz").write_bytes(b"words")
    assert "no readable .npz" in refusal(monkeypatch, capsys, *both)


def test_what_is_no_set_of_samples_is_named(weights, images, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "ref.npz", arr_0=images[:16])
    base = [tmp_path / "ref.npz", tmp_path / "smp.npz", *flags(weights)]
    np.savez(tmp_path / "smp.npz", x=np.zeros(3))
    assert "has no arr_0 and no pool, but x" in refusal(monkeypatch, capsys, *base)
    np.savez(tmp_path / "smp.npz", arr_0=images[:3].astype(np.float32))
    assert "must be uint8 (N, H, W, 3), got float32" in refusal(monkeypatch, capsys, *base)
    np.savez(tmp_path / "smp.npz", arr_0=images[:5])
    content = bytearray((tmp_path / "smp.npz").read_bytes())
    content[2000] ^= 1  # inside the array: zip's own checksum notices
    (tmp_path / "smp.npz").write_bytes(content)
    assert "smp.npz: no readable .npz file: Bad CRC-32" in refusal(monkeypatch, capsys, *base)
    np.savez(tmp_path / "smp.npz", arr_0=images[:5], labels=np.array([{}], dtype=object))
    assert "smp.npz: no readable .npz file: Object arrays" in refusal(monkeypatch, capsys, *base)
    base[1] = tmp_path / "folder"
    base[1].mkdir()
    assert "no images in it" in refusal(monkeypatch, capsys, *base)
    Image.fromarray(images[0]).save(base[1] / "a.png")
    Image.fromarray(images[0][:20]).save(base[1] / "b.png")
    assert "b.png: (20, 24, 3), the images before it (24, 24, 3)" in refusal(
        monkeypatch, capsys, *base, "--metrics", "is"
    )


def test_a_reference_is_made(weights, images, tmp_path, monkeypatch):
    for i, image in enumerate(images[:20]):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    out = tmp_path / "ref.npz"
    argv = [tmp_path / "images", out, "--image-size", 24, "--num-images", 6, "--batch-size", 7]
    run(monkeypatch, make_reference, *argv, "--num-workers", 0, *flags(weights))
    made = dict(np.load(out))
    order = [i for part in (0, 1) for i in range(part, 20, 2)]  # class after class
    network = load_inception(weights, file_hash(weights))
    found = network(torch.from_numpy(images[order]))
    for name, keys in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        for key, value in zip(keys, statistics(found[name].numpy()), strict=True):
            np.testing.assert_allclose(made[key], value, rtol=1e-3, atol=1e-6 * abs(value).max())
            assert made[key].dtype == np.float64
    assert made["arr_0"].shape == (6, 24, 24, 3)
    rows = [next(i for i, x in enumerate(images) if (x == y).all()) for y in made["arr_0"]]
    assert made["labels"].tolist() == [row % 2 for row in rows]
    assert len(set(rows)) == 6
    (tmp_path / "other").mkdir()
    Image.fromarray(images[30]).save(tmp_path / "other" / "x.png")
    argv += ["--pr-images", tmp_path / "other", "--num-workers", 0, *flags(weights)]
    run(monkeypatch, make_reference, *argv)
    np.testing.assert_array_equal(np.load(out)["mu"], made["mu"])
    np.testing.assert_array_equal(np.load(out)["arr_0"], images[30:31])


def test_running_statistics_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(size=(50, 7)) + 3
    sums = RunningStatistics(7)
    for part in np.split(rows, [13, 20, 44]):
        sums.update(torch.from_numpy(part))
    mu, sigma = sums.result()
    np.testing.assert_allclose(mu, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="at least 2 rows"):
        RunningStatistics(3).result()
