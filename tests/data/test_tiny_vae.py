"""A few steps of the tiny VAE's training: deterministic, normalised, readable by `data.vae`."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.distributed import Processes
from core.errors import UserError
from data.tiny_vae import (
    TinyVAEOptions,
    build,
    load_images,
    make_tiny_vae,
    posterior_sample,
    reconstruction_mse,
    train,
)
from data.vae import VAE

OPTIONS = TinyVAEOptions(steps=4, batch_size=4, lr=3e-3, kl_weight=1e-3, seed=3)
GROUP = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """12 smooth grey images of 32 x 32 in one class."""
    root = tmp_path_factory.mktemp("squares")
    (root / "a").mkdir()
    for number in range(12):
        ramp = np.linspace(10 * number, 255 - 10 * number, 32)
        Image.fromarray(np.tile(ramp, (32, 1)).astype(np.uint8)).save(root / "a" / f"{number}.png")
    return str(root)


def test_saved_vae_normalises_its_latents(squares, tmp_path):
    out = str(tmp_path / "vae")
    error = make_tiny_vae(squares, squares, out, OPTIONS, GROUP)
    vae = VAE(out)
    assert (vae.latent_channels, vae.factor) == (4, 4)
    images = load_images(squares)
    sample = posterior_sample(vae.model, images, OPTIONS.seed)
    assert sample.shape == (12, 4, 8, 8)
    scaled = (sample - vae.shift_factor) * vae.scaling_factor
    assert scaled.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scaled.std().item() == pytest.approx(1.0, abs=1e-5)
    assert reconstruction_mse(vae.model, images) == pytest.approx(error, rel=1e-6)
    assert 0.1e6 < sum(p.numel() for p in vae.model.parameters()) < 0.4e6


def test_training_is_a_function_of_the_seed(squares):
    images = load_images(squares)

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))
        model = build(seed)
        train(model, images, TinyVAEOptions(2, 4, 3e-3, 1e-3, seed), GROUP)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_training_reduces_the_error(squares):
    images = load_images(squares)
    model = build(0)
    before = reconstruction_mse(model, images)
    train(model, images, TinyVAEOptions(40, 8, 3e-3, 1e-3, 0), GROUP)
    assert reconstruction_mse(model, images) < 0.25 * before


def test_existing_folders(squares, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_text("{}")
    assert make_tiny_vae(squares, squares, str(kept), OPTIONS, GROUP) is None
    assert [path.name for path in kept.iterdir()] == ["config.json"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").write_text("")
    with pytest.raises(UserError, match="holds no VAE"):
        make_tiny_vae(squares, squares, str(other), OPTIONS, GROUP)
