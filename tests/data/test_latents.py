"""The cache's reader, its errors, and the draws of the dataset."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from config.model import ModelConfig
from config.schema import DataConfig
from core.errors import UserError
from data.dataset import LatentDataset
from data.images import ImageFolder, load_image, to_float
from data.latents import JoinedCaches, LatentCache
from data.manifest import KINDS, MANIFEST, VIEWS, Manifest, Shard
from data.sources import check_fits
from data.vae import VAE


@pytest.fixture
def copied_cache(cache_folder, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache_folder, folder)
    return folder


def gaussian_cache(folder, count, mean, logvar, scale=1.0, shift=0.0):
    """A cache of one latent value per view: `mean` for the image, -`mean` for its mirror."""
    folder.mkdir()
    moments = np.empty((count, 2, 2, 1, 1), dtype=np.float32)
    moments[:, 0, 0], moments[:, 1, 0], moments[:, :, 1] = mean, -mean, logvar
    labels = np.zeros(count, dtype=np.int64)
    shard = Shard.write(folder, 0, moments, labels, [str(i) for i in range(count)])
    rest = (1, "none", (1, 1, 1), "float32", ["a"], count, [shard])
    Manifest("x", "y", scale, shift, *rest).write(folder)
    return LatentCache(folder)


def test_properties(cache_folder, vae_folder):
    cache = LatentCache(cache_folder)
    assert len(cache) == 23
    assert cache.class_names == ["class0", "class1", "class2"]
    assert cache.latent_shape == (3, 8, 8)
    assert (cache.image_size, cache.vae_path) == (16, str(vae_folder))
    assert (cache.scaling_factor, cache.shift_factor) == (0.7, 0.3)
    assert cache.manifest.dtype == "float16"
    assert cache.manifest.crop == "adm-center"
    assert [shard.count for shard in cache.manifest.shards] == [10, 10, 3]


def test_moments_and_labels_equal_direct_encoding(cache_folder, image_root, vae_folder):
    cache, folder, vae = LatentCache(cache_folder), ImageFolder(image_root), VAE(str(vae_folder))
    indices, views = [22, 0, 9, 10, 10, 19], [0, 1, 0, 0, 1, 1]
    moments = cache.moments(indices, views)
    assert moments.dtype == torch.float16
    moments = moments.float()
    for row, index, view in zip(moments, indices, views, strict=True):
        image = to_float(load_image(folder.paths[index], 16))
        direct = vae.encode_moments((image.flip(-1) if view else image)[None])[0]
        assert torch.allclose(row, direct, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(row, vae.encode_moments(image.flip(-1 - view)[None])[0], atol=0.1)
    labels = cache.labels(torch.tensor(indices))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [folder.labels[index] for index in indices]


def test_folder_without_manifest_is_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="not a finished cache"):
            LatentCache(folder)


def flip_last_bit(file, offset=-1):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_flipped_byte_is_named_at_first_read_and_by_verify(copied_cache):
    flip_last_bit(copied_cache / "moments-00001.npy")
    cache = LatentCache(copied_cache)
    others = [index for index in range(23) if index != 19]
    assert torch.isfinite(cache.moments(others, [1] * 22)).all()
    cache.moments([19], [0])  # the damage is in the other view
    for _ in range(2):
        with pytest.raises(UserError, match=r"moments-00001\.npy changed .* at image 9"):
            cache.moments([3, 19], [0, 1])
    with pytest.raises(UserError, match=r"moments-00001\.npy changed"):
        cache.verify()


@pytest.mark.parametrize("kind", ["labels", "checks"])
def test_flipped_byte_in_a_small_file_is_named_at_first_read(copied_cache, kind):
    flip_last_bit(copied_cache / f"{kind}-00002.npy")
    cache = LatentCache(copied_cache)
    cache.moments([0, 12], [0, 1])
    with pytest.raises(UserError, match=rf"{kind}-00002\.npy changed"):
        cache.labels([22])
    with pytest.raises(UserError, match=rf"{kind}-00002\.npy changed"):
        LatentDataset(cache, seed=0)[(0, 22)]


def test_damaged_header_is_named(copied_cache):
    file = copied_cache / "moments-00000.npy"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"(10, 2, 6, 8, 8)", b"(10, 6, 2, 8, 8)"))
    with pytest.raises(UserError, match=r"cannot read .*moments-00000\.npy: holds"):
        LatentCache(copied_cache).moments([0], [0])
    flip_last_bit(file, 0)
    with pytest.raises(UserError, match=r"cannot read .*moments-00000\.npy"):
        LatentCache(copied_cache).moments([0], [0])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"count": 24}, "count 24 is not that of the shards, 23"),
        (
            {"dtype": "float32"},
            r"shard 0 has \d+ bytes of moments, 10 images of .* in float32 need",
        ),
        ({"dtype": "int8"}, "dtype 'int8' is none of"),
        ({"latent_shape": [3, 8]}, r"latent_shape \[3, 8\] is not"),
        ({"latent_shape": [3, 8, 9]}, "bytes of moments"),
        ({"scaling_factor": 0}, "scaling_factor 0 is not above 0"),
        ({"scaling_factor": "x"}, "is damaged: scaling_factor 'x' is not float"),
        ({"scaling_factor": True}, "scaling_factor True is not float"),
        ({"scaling_factor": float("inf")}, "scaling_factor inf is not above 0"),
        ({"shift_factor": float("nan")}, "shift_factor nan is not finite"),
        ({"count": "23"}, "count '23' is not int"),
        ({"image_size": None}, "image_size None is not int"),
        ({"vae_hash": 3}, "vae_hash 3 is not str"),
        ({"latent_shape": "3x8x8"}, "latent_shape '3x8x8' is not a list of int"),
        ({"latent_shape": ["3", 8, 8]}, "latent_shape .* is not a list of int"),
        ({"class_names": None}, "class_names None is not a list of str"),
        ({"class_names": [0, 1, 2]}, "class_names .* is not a list of str"),
        ({"shards": {}}, "count 23 is not that of the shards, 0"),
        ({"shards": [1]}, "is damaged"),
        ({"unknown": 3}, "unknown"),
    ],
)
def test_wrong_manifest_is_refused(copied_cache, changes, wanted):
    path = copied_cache / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=wanted):
        LatentCache(copied_cache)


@pytest.mark.parametrize(
    ("entry", "value", "wanted"),
    [
        ("number", "0", "a shard's number '0' is not a whole number"),
        ("count", 10.0, "a shard's count 10.0 is not a whole number"),
        ("count", -1, "a shard's count -1"),
        ("number", 1, r"numbers of shards \[1, 1, 2\] are not all different"),
        ("sizes", [1, 2], "shard 0: sizes does not name moments, checks"),
        ("sizes", {"moments": 3}, "shard 0: sizes does not name moments, checks"),
        ("sizes", dict.fromkeys(KINDS, "3"), "shard 0: sizes .* are not int"),
        ("sha256", dict.fromkeys(KINDS, None), "shard 0: sha256 .* are not str"),
    ],
)
def test_wrong_shard_is_refused(copied_cache, entry, value, wanted):
    path = copied_cache / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["shards"][0][entry] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"is damaged: {wanted}.*; make the cache again"):
        LatentCache(copied_cache)


def test_joined_caches_are_one_after_the_other(make_cache, cache_folder, tmp_path):
    other = LatentCache(make_cache(tmp_path / "other", dtype="float32", shard_size=7))
    one = LatentCache(cache_folder)
    both = JoinedCaches([one, other])
    assert len(both) == 46
    assert both.shards == [*one.shards, *((23 + a, 23 + b) for a, b in other.shards)]
    indices, views = [45, 3, 23, 22], [0, 1, 1, 0]
    expected = [other.moments([22], [0]), one.moments([3], [1])]
    expected += [other.moments([0], [1]), one.moments([22], [0])]
    assert torch.equal(both.moments(indices, views), torch.cat([e.float() for e in expected]))
    assert both.labels(indices).tolist() == [one.labels([i]).item() for i in (22, 3, 0, 22)]
    copy = pickle.loads(pickle.dumps(both))
    assert torch.equal(copy.moments(indices, views), both.moments(indices, views))


def test_caches_of_different_kinds_are_not_joined(cache_folder, copied_cache):
    path = copied_cache / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae_hash": "another"}))
    with pytest.raises(UserError, match=rf"{cache_folder} and {copied_cache} cannot .* vae_hash"):
        JoinedCaches([LatentCache(cache_folder), LatentCache(copied_cache)])


def test_read_only_folder_is_enough(copied_cache):
    for path in (*copied_cache.iterdir(), copied_cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    cache = LatentCache(copied_cache)
    assert cache.moments([0, 22], [0, 1]).shape == (2, 6, 8, 8)
    copied_cache.chmod(0o755)


def test_nothing_is_loaded_but_what_is_asked_for(tmp_path):
    """A cache of 400 MB: reading one image of each shard keeps private memory where it was."""
    count, shape = 500, (VIEWS, 8, 40, 80)
    folder = tmp_path / "large"
    folder.mkdir()
    moments = np.zeros((count, *shape), dtype=np.float32)
    names, labels = [str(i) for i in range(count)], np.zeros(count, dtype=np.int64)
    shards = [Shard.write(folder, number, moments, labels, names) for number in range(4)]
    rest = (1, "none", (4, 40, 80), "float32", ["a"], 4 * count, shards)
    Manifest("x", "y", 1.0, 0.0, *rest).write(folder)
    del moments
    cache = LatentCache(folder)
    before = private_bytes()
    for index in range(0, 4 * count, 100):
        cache.moments([index], [0])
    assert private_bytes() - before < 20e6
    assert sum(file.stat().st_size for file in folder.glob("moments*")) > 400e6


def private_bytes() -> int:
    """Memory of this process that is not pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.parametrize(
    "name", ["moments-00001.npy", "labels-00002.npy", "names-00000.txt", "checks-00001.npy"]
)
def test_truncated_and_missing_files_are_named(copied_cache, name):
    file = copied_cache / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes, the manifest says"):
        LatentCache(copied_cache)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        LatentCache(copied_cache)


def test_other_version_and_damaged_manifest(copied_cache):
    path = copied_cache / MANIFEST
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"version": 3}))
    with pytest.raises(UserError, match="has version 3, this code reads 2"):
        LatentCache(copied_cache)
    path.write_text(json.dumps({"version": 2, "shards": []}))
    with pytest.raises(UserError, match="is damaged"):
        LatentCache(copied_cache)
    path.write_text("[]")
    with pytest.raises(UserError, match="has version None"):
        LatentCache(copied_cache)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        LatentCache(copied_cache)


def test_guard_names_both_sides(cache_folder):
    cache = LatentCache(cache_folder)
    data = DataConfig(image_size=16)
    good = {"input_size": 8, "in_channels": 3, "num_classes": 3}
    check_fits(cache, data, ModelConfig(**good))
    with pytest.raises(UserError, match=r"num_classes: 1000 is configured, but .* has 3"):
        check_fits(cache, data, ModelConfig(**good | {"num_classes": 1000}))
    with pytest.raises(UserError, match=r"\(4, 8, 8\) is configured, .* has \(3, 8, 8\)"):
        check_fits(cache, data, ModelConfig(**good | {"in_channels": 4}))
    with pytest.raises(UserError, match=r"image_size: 256 is configured, .* has 16"):
        check_fits(cache, DataConfig(), ModelConfig(**good))


def test_draws_do_not_depend_on_grouping(cache_folder):
    dataset = LatentDataset(LatentCache(cache_folder), seed=5)
    items = [(epoch, index) for epoch in (0, 1) for index in range(23)]
    latents, cond = dataset.__getitems__(items)
    labels = cond.labels
    assert latents.shape == (46, 3, 8, 8)
    assert latents.dtype == torch.float32
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(99)
    for part in order.split(7):
        again, again_cond = dataset.__getitems__([items[i] for i in part])
        assert torch.equal(again, latents[part])
        assert torch.equal(again_cond.labels, labels[part])
    single, cond = dataset[(1, 4)]
    assert torch.equal(single, latents[27])
    assert cond.labels.tolist() == [labels[27]]


def test_epoch_seed_and_index_change_the_draw(cache_folder):
    cache = LatentCache(cache_folder)
    dataset = LatentDataset(cache, seed=5)
    first = dataset[(0, 3)][0]
    assert torch.equal(first, LatentDataset(cache, seed=5)[(0, 3)][0])
    for other in (dataset[(1, 3)], dataset[(0, 4)], LatentDataset(cache, seed=6)[(0, 3)]):
        assert not torch.allclose(first, other[0])


def test_draw_is_the_scaled_posterior(tmp_path):
    count, scale, shift = 20_000, 0.5, 1.0
    cache = gaussian_cache(tmp_path / "g", count, 3.0, math.log(4.0), scale, shift)
    dataset = LatentDataset(cache, seed=0, horizontal_flip=False)
    values = dataset.__getitems__([(0, index) for index in range(count)])[0].double().flatten()
    # Five standard errors of the mean and of the variance.
    deviation = 2.0 * scale
    assert values.mean().item() == pytest.approx(
        (3 - shift) * scale, abs=5 * deviation / count**0.5
    )
    assert values.var().item() == pytest.approx(
        deviation**2, abs=5 * deviation**2 * (2 / count) ** 0.5
    )
    standard = (values - (3 - shift) * scale) / deviation
    within = (standard.abs() < 1).double().mean().item()
    assert within == pytest.approx(math.erf(2**-0.5), abs=5 * 0.5 / count**0.5)


def test_half_of_the_draws_are_mirrored_and_the_switch_keeps_the_noise(tmp_path):
    count = 4000
    cache = gaussian_cache(tmp_path / "g", count, 50.0, 0.0)
    items = [(7, index) for index in range(count)]
    both = LatentDataset(cache, seed=0).__getitems__(items)[0].flatten()
    plain = LatentDataset(cache, seed=0, horizontal_flip=False).__getitems__(items)[0].flatten()
    mirrored = both < 0
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    assert (plain > 0).all()
    assert torch.allclose(both + 100.0 * mirrored, plain, atol=1e-4)


def test_pickled_reader_reopens_its_files(cache_folder):
    cache = LatentCache(cache_folder)
    expected = cache.moments([1, 15], [0, 1])
    cache.labels([0])
    content = pickle.dumps(cache)
    assert len(content) < 6000
    copied = pickle.loads(content)
    assert torch.equal(copied.moments([1, 15], [0, 1]), expected)
    assert torch.equal(copied.labels([1, 15]), cache.labels([1, 15]))


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(cache_folder, method):
    dataset = LatentDataset(LatentCache(cache_folder), seed=1)
    batches = [[(epoch, i) for i in range(first, 23, 3)] for epoch in (0, 1) for first in range(3)]

    def load(**options):
        return list(DataLoader(dataset, batch_sampler=batches, collate_fn=as_it_is, **options))

    alone = load(num_workers=0)
    shared = load(num_workers=2, multiprocessing_context=method)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1].labels, other[1].labels)
