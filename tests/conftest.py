"""A tiny random VAE, a small image folder, and the cache made of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.distributed import Processes
from data.caching import CacheOptions, cache_latents

SINGLE = Processes(0, 1, torch.device("cpu"))


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
