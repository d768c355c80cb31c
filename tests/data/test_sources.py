"""Published caches, images encoded while training, and the guards between data and config."""

import shutil

import numpy as np
import pytest
import torch

from config.load import parse_config
from core.distributed import Processes
from core.errors import ConfigError, UserError
from data.convert_cache import convert_cache
from data.dataset import EncodedDataset, LatentDataset
from data.images import ImageFolder
from data.latents import JoinedCaches, LatentCache
from data.loader import training_batches
from data.making import made_alone
from data.published import PublishedCache
from data.sampler import Position
from data.sources import training_data, validation_data
from data.vae import VAE

ALONE = Processes(0, 1, torch.device("cpu"))
ITEMS = [(epoch, index) for epoch in (0, 3) for index in range(23)]


@pytest.fixture(scope="module")
def vae(vae_folder):
    return VAE(str(vae_folder))


@pytest.fixture(scope="module")
def exact(make_cache, tmp_path_factory):
    """The cache in float32."""
    return LatentCache(make_cache(tmp_path_factory.mktemp("exact") / "cache", dtype="float32"))


def as_published(cache, image_root, root, change):
    """Write a cache's views as one file per image, after `change`(mean, logvar) -> array."""
    folder = ImageFolder(image_root)
    for index, path in enumerate(folder.paths):
        arrays = {}
        for view, key in enumerate(("moments", "moments_flip")):
            mean, logvar = cache.moments([index], [view])[0].double().chunk(2)
            arrays[key] = change(mean, logvar).float().numpy()
        out = root / f"{path.removeprefix(str(image_root))[1:]}.npz"
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, **arrays)
    return str(root)


# Shift 0.3 and scale 0.7, as the VAE of these tests has them.
PUBLISHED = {
    "posterior": lambda mean, logvar: torch.cat([mean, logvar]),
    "scaled_posterior": lambda mean, logvar: torch.cat(
        [(mean - 0.3) * 0.7, (logvar.exp() * 0.49).log()]
    ),
    "latent": lambda mean, logvar: mean,
    "scaled_latent": lambda mean, logvar: (mean - 0.3) * 0.7,
}


@pytest.mark.parametrize("contents", PUBLISHED)
def test_published_files_mean_the_same(exact, image_root, vae, tmp_path, contents):
    root = as_published(exact, image_root, tmp_path / "npz", PUBLISHED[contents])
    source = PublishedCache(root, contents, vae)
    assert (len(source), source.latent_shape) == (23, (3, 8, 8))
    assert source.class_names == exact.class_names
    indices, views = [22, 0, 5], [0, 1, 1]
    assert torch.equal(source.labels(indices), exact.labels(indices))
    expected = exact.moments(indices, views)
    if contents.endswith("latent"):
        expected[:, 3:] = -30.0  # no spread
    torch.testing.assert_close(source.moments(indices, views), expected, atol=1e-5, rtol=1e-5)
    ours = LatentDataset(source, 4).__getitems__(ITEMS)
    if contents.endswith("posterior"):
        cached = LatentDataset(exact, 4).__getitems__(ITEMS)
        torch.testing.assert_close(ours[0], cached[0], atol=1e-5, rtol=1e-5)
    else:
        means = ours[0] / 0.7 + 0.3
        either = [exact.moments([i for _, i in ITEMS], [v] * 46)[:, :3] for v in (0, 1)]
        away = torch.stack([(means - mean).abs().amax((1, 2, 3)) for mean in either])
        assert away.amin(0).max() < 1e-4


def test_published_files_convert(exact, image_root, vae, tmp_path):
    root = as_published(exact, image_root, tmp_path / "npz", PUBLISHED["posterior"])
    source = PublishedCache(root, "posterior", vae)
    out = tmp_path / "cache"
    convert_cache(source, out, 16, vae.weights_hash(), "float32", shard_size=9, num_workers=1)
    cache = LatentCache(out)
    cache.verify()
    indices = list(range(23))
    for view in range(2):
        views = [view] * 23
        assert torch.equal(cache.moments(indices, views), exact.moments(indices, views))
    assert torch.equal(cache.labels(indices), exact.labels(indices))
    assert cache.manifest.vae_hash == exact.vae_hash
    assert [shard.count for shard in cache.manifest.shards] == [9, 9, 5]
    names = (out / "names-00002.txt").read_text().split()
    assert names == [source.name(i) for i in range(18, 23)]
    with pytest.raises(UserError, match="exists"):
        convert_cache(source, out, 16, "x")
    JoinedCaches([cache, exact])


def test_published_files_are_converted_by_one_process_at_a_time(exact, image_root, vae, tmp_path):
    root = as_published(exact, image_root, tmp_path / "npz", PUBLISHED["posterior"])
    source, out = PublishedCache(root, "posterior", vae), tmp_path / "cache"
    with made_alone(out), pytest.raises(ConfigError, match=r"--out: .* is in use by process"):
        convert_cache(source, out, 16, "x")


def test_damaged_and_wrong_published_files_are_named(exact, image_root, vae, tmp_path):
    root = as_published(exact, image_root, tmp_path / "npz", PUBLISHED["posterior"])
    with pytest.raises(UserError, match=r"npz_contents: scaled_latent has 3 channels .* has 6"):
        PublishedCache(root, "scaled_latent", vae)
    source = PublishedCache(root, "posterior", vae)
    path = tmp_path / "npz" / "class1" / "04.png.npz"
    index = source.folder.paths.index(str(path))
    whole = path.read_bytes()
    for content in (b"", whole[:200], b"words"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*04\.png\.npz"):
            source.moments([index], [0])
    moments = np.zeros((6, 8, 8), np.float32)
    np.savez(path, moments=moments)
    with pytest.raises(UserError, match=r"04\.png\.npz: .*moments_flip"):
        source.moments([index], [1])
    np.savez(path, moments=moments[:, :4])
    with pytest.raises(UserError, match=r"holds \(6, 4, 8\)"):
        source.moments([index], [0])
    np.savez(path, moments=moments * np.nan)
    with pytest.raises(UserError, match="not finite"):
        convert_cache(source, tmp_path / "out", 16, "x")
    assert not (tmp_path / "out").exists()


def flags(cached_path, vae_folder, **changes):
    values = {
        "data.cached_path": cached_path,
        "data.vae_path": vae_folder,
        "data.image_size": 16,
        "data.num_workers": 0,
        "model.input_size": 8,
        "model.in_channels": 3,
        "model.num_classes": 3,
        "model.feed_forward.num_experts": 4,
        "train.max_steps": 4,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    given = {key: value for key, value in values.items() if value is not None}
    return parse_config([f"--{key}={value}" for key, value in given.items()], "train.py")


def test_online_encoding_equals_the_cache(exact, image_root, vae_folder):
    stored = training_data(flags(exact.path, vae_folder), ALONE)
    online = training_data(
        flags(None, vae_folder, data__source="images", data__data_path=image_root), ALONE
    )
    assert isinstance(online, EncodedDataset)
    indices = list(range(23))
    images = online.source.images(indices)
    for view, pixels in enumerate((images, images.flip(-1))):
        moments = online.source.encode(pixels)
        torch.testing.assert_close(
            moments, exact.moments(indices, [view] * 23), atol=1e-5, rtol=1e-5
        )
    one = stored.finish(stored.__getitems__(ITEMS))
    other = online.finish(online.__getitems__(ITEMS))
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_both_sources_are_the_same(exact, image_root, vae_folder, num_workers):
    images = {"data__source": "images", "data__data_path": image_root}
    batches = []
    for changes in ({}, images):
        path = None if changes else exact.path
        config = flags(path, vae_folder, data__num_workers=num_workers, **changes)
        data = training_data(config, ALONE)
        batches.append(list(training_batches(data, config, ALONE, Position(0, 8), 3)))
    assert len(batches[0]) == len(batches[1]) == 3 * 2
    for one, other in zip(*batches, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_several_caches_and_the_order_of_shards(cache_folder, vae_folder):
    config = flags(f"[{cache_folder}, {cache_folder}]", vae_folder, data__order="shards")
    assert config.data.cached_path == [str(cache_folder)] * 2
    data = training_data(config, ALONE)
    assert len(data) == 46
    batches = list(training_batches(data, config, ALONE, Position(), 4))
    assert len(batches) == 8
    assert all(x.shape == (4, 3, 8, 8) for x, _ in batches)


def test_no_classes(cache_folder, vae_folder):
    config = flags(cache_folder, vae_folder, model__num_classes=0)
    data = training_data(config, ALONE)
    latents, cond = data.__getitems__(ITEMS)
    assert cond.labels.tolist() == [0] * 46
    with_classes = training_data(flags(cache_folder, vae_folder), ALONE)
    assert torch.equal(latents, with_classes.__getitems__(ITEMS)[0])


def test_latents_of_another_vae_are_refused(cache_folder, vae_folder, tmp_path):
    from diffusers import AutoencoderKL

    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(vae_folder, copy)
    training_data(flags(cache_folder, copy), ALONE)  # another name, the same weights
    model = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        model.encoder.conv_in.bias += 1e-3
    model.save_pretrained(other)
    refusal = rf"vae_path: {other} is configured, .* {cache_folder} were made by {vae_folder} with"
    held_out = {"data__val_cached_path": cache_folder, "train__val_every": 2}
    for read in (training_data, validation_data):
        with pytest.raises(UserError, match=refusal):
            read(flags(cache_folder, other, **held_out), ALONE)
    with pytest.raises(UserError, match=rf"nowhere.* not a folder; .* made by {vae_folder}"):
        training_data(flags(cache_folder, tmp_path / "nowhere"), ALONE)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model__num_classes": 1000}, r"num_classes: 1000 is configured, but .* has 3"),
        ({"model__in_channels": 4}, r"\(4, 8, 8\) is configured, but .* has \(3, 8, 8\)"),
        ({"data__image_size": 24}, r"image_size: 24 is configured, but .* has 16"),
    ],
)
def test_data_that_does_not_fit_names_both_sides(cache_folder, vae_folder, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        training_data(flags(cache_folder, vae_folder, **changes), ALONE)


def test_image_size_must_fit_the_vae(image_root, vae_folder):
    online = {"data__source": "images", "data__data_path": image_root, "data__image_size": 15}
    with pytest.raises(UserError, match="image_size: 15 is not a multiple of the VAE's 2"):
        training_data(flags(None, vae_folder, **online), ALONE)


def test_mirrored_images_that_a_cache_does_not_have(make_cache, vae_folder, tmp_path):
    cache = make_cache(tmp_path / "one", views=1)
    training_data(flags(cache, vae_folder, data__horizontal_flip=False), ALONE)
    with pytest.raises(UserError, match=r"data\.horizontal_flip: .*one has no mirrored images"):
        training_data(flags(cache, vae_folder, data__horizontal_flip=True), ALONE)
