"""Loading the VAE, its interface against diffusers itself, and the rule for uint8."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from core.errors import UserError
from data.vae import KNOWN_NAMES, VAE, load_autoencoder, to_uint8


def test_factors_come_from_its_own_config(vae_folder):
    vae = VAE(str(vae_folder))
    assert (vae.scaling_factor, vae.shift_factor) == (0.7, 0.3)
    assert (vae.latent_channels, vae.factor) == (3, 2)
    assert not vae.model.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in vae.model.parameters())


def test_missing_shift_factor_is_zero(vae_folder, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": None}))
    assert VAE(str(folder)).shift_factor == 0.0


def test_encode_and_decode_equal_diffusers(vae_folder):
    vae = VAE(str(vae_folder))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = vae.encode_moments(images)
    posterior = vae.model.encode(images).latent_dist
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], 1))
    scaled = (posterior.mean - 0.3) * 0.7
    expected = vae.model.decode(posterior.mean).sample.clamp(-1, 1)
    assert torch.allclose(vae.decode(scaled), expected, atol=1e-4)
    assert vae.decode(100 * scaled).abs().max() <= 1


def test_a_block_is_decoded_a_few_at_a_time(vae_folder, monkeypatch):
    vae, sizes = VAE(str(vae_folder)), []
    decode = vae.model.decode
    monkeypatch.setattr(vae.model, "decode", lambda x: (sizes.append(len(x)), decode(x))[1])
    latents = torch.randn(7, 3, 8, 8)
    whole = vae.decode(latents)
    monkeypatch.setattr("data.vae.DECODED", 3 * 16 * 16 + 1)
    torch.testing.assert_close(vae.decode(latents), whole)
    monkeypatch.setattr("data.vae.DECODED", 1)
    torch.testing.assert_close(vae.decode(latents), whole)
    assert sizes == [7, 3, 3, 1, *[1] * 7]


def test_loading_is_quiet(vae_folder, capfd, caplog):
    VAE(str(vae_folder))
    captured = capfd.readouterr()
    assert captured.out + captured.err + caplog.text == ""


def test_short_names():
    assert KNOWN_NAMES == {
        "mse": "stabilityai/sd-vae-ft-mse",
        "ema": "stabilityai/sd-vae-ft-ema",
    }


@pytest.mark.parametrize("path", ["/no/such/folder", "nothing", "./a/b", ""])
def test_missing_folder(path):
    with pytest.raises(UserError, match="save_pretrained"):
        load_autoencoder(path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that raises what it is given, and a list of what was asked of the libraries then."""
    import huggingface_hub
    from diffusers import AutoencoderKL

    asked = []

    def answer(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
        return asked

    def load_config(path, **options):
        asked.append(options)
        return {"_class_name": "UNet2DModel"}

    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    return answer


def test_no_network_is_said_at_once(hub):
    asked = hub(ConnectionError("Name or service\nnot known"))
    with pytest.raises(UserError) as caught:
        VAE("mse")
    assert str(caught.value) == (
        "data.vae_path: stabilityai/sd-vae-ft-mse is not a local folder, and the hub cannot be "
        "reached (Name or service not known); give a folder by save_pretrained, or download it "
        "where there is a network (hf download stabilityai/sd-vae-ft-mse) and copy the folder here"
    )
    assert asked == []


def test_without_a_network_an_earlier_download_serves(hub, monkeypatch):
    asked = hub(ConnectionError())
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/a/copy")
    with pytest.raises(UserError, match="holds UNet2DModel"):
        VAE("mse")
    assert asked == [{"local_files_only": True}]


def test_a_hub_that_answers_with_an_error_is_left_to_the_libraries(hub):
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    response = SimpleNamespace(headers={}, request=None)
    asked = hub(HfHubHTTPError("busy", response=response))
    with pytest.raises(UserError, match="holds UNet2DModel"):
        VAE("mse")
    assert asked == [{"local_files_only": False}]
    hub(RepositoryNotFoundError("none", response=response))
    with pytest.raises(UserError, match="neither a local folder nor a VAE on the hub"):
        VAE("nobody/nothing")


def test_folder_that_is_no_vae(vae_folder, tmp_path):
    with pytest.raises(UserError, match="cannot load a VAE"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="holds UNet2DModel, not AutoencoderKL"):
        load_autoencoder(str(tmp_path))
    shutil.copy(vae_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot load a VAE"):
        load_autoencoder(str(tmp_path))


def test_damaged_or_incomplete_weights(vae_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vae"
    shutil.copytree(vae_folder, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, first encoder\.conv_in\.weight"):
        load_autoencoder(str(folder))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot load a VAE"):
        load_autoencoder(str(folder))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("dit", [0, 0, 128, 191, 255, 255]),
        ("adm", [0, 0, 127, 191, 255, 255]),
        ("jit", [0, 0, 128, 191, 255, 255]),
    ],
)
def test_uint8_rules(rule, wanted):
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    images = values.view(1, 1, 1, 6).expand(1, 3, 2, 6)
    result = to_uint8(images, rule)
    assert result.shape == (1, 2, 6, 3)
    assert result.dtype == torch.uint8
    assert result[0, 0, :, 0].tolist() == wanted
