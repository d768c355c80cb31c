"""A tiny random VAE, a small image folder, and the cache made of both."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import WIDTH, write_encoder

from config.load import parse_config
from core.distributed import Processes
from core.files import file_hash
from data.caching import CacheOptions, cache_latents
from data.latents import LatentCache
from data.text.caching import TextOptions, cache_text
from data.text.captions import CaptionOptions
from training.trainer import train

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SINGLE = Processes(0, 1, torch.device("cpu"))


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
NEEDS = {"gpu": "a GPU", "browser": "Chromium"}
"""What the tests of a marker need."""
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU or a browser its cases are left out; the last lines say how many."""
    there = {"gpu": torch.cuda.is_available(), "browser": CHROMIUM is not None}
    missing = [name for name in NEEDS if not there[name]]
    gone = {name: [i for i in items if i.get_closest_marker(name)] for name in missing}
    left = {item for those in gone.values() for item in those}
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=list(left))
    config.stash[LEFT_OUT] = {name: len(those) for name, those in gone.items()}
    if hasattr(config, "workeroutput"):  # of a process of pytest-xdist
        config.workeroutput["cases left out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """What a process of pytest-xdist found; all find the same."""
    found = getattr(node, "workeroutput", {}).get("cases left out")
    if found is not None:
        node.config.stash[LEFT_OUT] = found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The counts, after everything else."""
    for name, count in config.stash.get(LEFT_OUT, {}).items():
        if count:
            terminalreporter.write_line(f"{count} cases need {NEEDS[name]}; there is none here")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser of tests with the marker `browser`."""
    return CHROMIUM


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Where a test computes: on the CPU, and on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            latent_channels=3,
            norm_num_groups=2,
            scaling_factor=0.7,
            shift_factor=0.3,
        )
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_root(tmp_path_factory) -> Path:
    """23 random images in three classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(23):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (20, 17 + number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def make_cache(image_root, vae_folder):
    """A call that caches `image_root` into a folder."""

    def make(out: Path, **changes) -> Path:
        options = {
            "data_path": str(image_root),
            "cached_path": str(out),
            "vae_path": str(vae_folder),
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
            "dtype": "float16",
            "shard_size": 10,
            "overwrite": False,
        }
        cache_latents(CacheOptions(**(options | changes)), SINGLE)
        return out

    return make


@pytest.fixture(scope="session")
def cache_folder(make_cache, tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "small")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A weight file in torch-fidelity's format: random tensors that keep the scale of features."""
    from evaluations.inception import Inception

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Inception()
        for name, tensor in network.state_dict().items():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
            if name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            if name.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, cache_folder, vae_folder):
    """A config file for the small cache: 23 images, 3 classes, latents 3 x 8 x 8."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
base: {ROOT}/config/quickstart.yaml
data: {{cached_path: {cache_folder}, vae_path: {vae_folder}, image_size: 16}}
model:
  {{input_size: 8, in_channels: 3, patch_size: 2, hidden_size: 16, depth: 2, num_heads: 2,
    num_classes: 3, feed_forward: {{num_experts: 4}}}}
train:
  {{max_steps: 4, global_batch_size: 8, micro_batch_size: 4, log_every: 2, ckpt_every: 2,
    sample_every: 0}}
sampling: {{num_steps: 3, cfg_scale: 1.5}}
"""
    )
    return path


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory) -> Path:
    """A random BERT of width 16 and its tokenizer."""
    return write_encoder(tmp_path_factory.mktemp("text encoder") / "bert")


@pytest.fixture(scope="session")
def text_cache_folder(cache_folder, text_encoder_folder, tmp_path_factory) -> Path:
    """Texts of two captions for each image of the small cache."""
    folder = tmp_path_factory.mktemp("texts")
    words = ("a red dog", "two green cat", "one cat", "the photo of a dog")
    rows = [
        {"img": name, "short": words[i % 4], "long": f"{words[i % 4]} and {words[i % 3]}"}
        for i, name in enumerate(LatentCache(cache_folder).names())
    ]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    captions = CaptionOptions(str(folder / "captions.jsonl"), None, "img", ("short", "long"))
    paths = str(cache_folder), str(folder / "cache"), str(text_encoder_folder)
    cache_text(TextOptions(captions, *paths, max_length=12), SINGLE)
    return folder / "cache"


@pytest.fixture(scope="session")
def tiny_t2i(tmp_path_factory, tiny_config, text_cache_folder) -> Path:
    """The tiny config with captions in the place of classes."""
    path = tmp_path_factory.mktemp("config") / "tiny_t2i.yaml"
    path.write_text(
        f"""
base: {tiny_config}
data: {{text_cached_path: {text_cache_folder}}}
model: {{num_classes: 0, text_hidden_size: {WIDTH}, text_max_length: 12, text_refiner: 1}}
"""
    )
    return path


@pytest.fixture(scope="session")
def trained_t2i(tiny_t2i, tmp_path_factory) -> Path:
    """A finished run of a model of text, and what it wrote."""
    run_dir = tmp_path_factory.mktemp("runs") / "t2i"
    argv = ["--config", tiny_t2i, "--run_dir", run_dir, "--train.sample_every", "2"]
    argv += ["--train.num_grid_samples", "3"]
    train(parse_config([str(a) for a in argv], "train.py"), SINGLE)
    return run_dir


@pytest.fixture(scope="session")
def trained(tiny_config, tmp_path_factory) -> Path:
    """A finished run of DiffMoE with flow, and what it wrote."""
    run_dir = tmp_path_factory.mktemp("runs") / "diffmoe"
    argv = ["--config", tiny_config, "--run_dir", run_dir, "--train.sample_every", "2"]
    argv += ["--train.num_grid_samples", "3"]
    train(parse_config([str(a) for a in argv], "train.py"), SINGLE)
    return run_dir


@pytest.fixture(scope="session")
def scoring(tmp_path_factory, inception_weights):
    """Flags of scoring: a reference of random images, and a network with random weights."""
    folder = tmp_path_factory.mktemp("scoring")
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", arr_0=images)
    flags = ["--metrics", folder / "ref.npz", "--inception-weights", inception_weights]
    return [*flags, "--inception-sha256", file_hash(inception_weights)]
