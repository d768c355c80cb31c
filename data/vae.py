"""The VAE between images and latents: diffusers' AutoencoderKL behind a small interface.

Shapes: B batch, C latent channels, H and W of the image, h = H / factor and w = W / factor.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import UserError
from core.precision import exact_float32
from core.tensors import tensors_hash
from data.hub import is_local, on_hub, quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KNOWN_NAMES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
"""Short names of the two VAEs that DiT and its successors use."""


DECODED = 2**21
"""Pixels that are decoded at once: 32 images of 256 x 256. The decoder's widest features take some
hundred times their memory, far more than the model that made the latents."""


class VAE:
    """A frozen VAE in float32, in evaluation mode.

    Args:
        path: a hub id, a local folder made by `save_pretrained`, or a name of KNOWN_NAMES.
        device: where it computes; inputs are moved there.

    Attributes:
        path: hub id or folder, with short names resolved.
        scaling_factor: latents as the model sees them are (z - shift_factor) * scaling_factor.
        shift_factor: see there; 0 where the VAE has none.
        latent_channels: C.
        factor: image side / latent side.

    Raises:
        UserError: the VAE cannot be loaded.
    """

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        self.path = KNOWN_NAMES.get(path, path)
        self.device = torch.device(device)
        model = load_autoencoder(self.path)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)
        self.latent_channels = int(model.config.latent_channels)
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)

    def weights_hash(self) -> str:
        """SHA-256 over names and values of all weights: the same for any file that holds them."""
        return tensors_hash(self.model.state_dict())

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, neither shifted nor scaled.

        Never with TF32: latents that are cached and latents that are encoded while training are
        the same.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W are multiples of `factor`.

        Returns:
            (B, 2C, h, w): C channels of means, then C of log-variances.
        """
        with exact_float32():
            posterior = self.model.encode(images.to(self.device, torch.float32)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w) as the model sees them.

        A few at a time, so that memory does not grow with B but by the images themselves.
        """
        latents = latents.to(self.device, torch.float32)
        unscaled = latents / self.scaling_factor + self.shift_factor
        pixels = unscaled.shape[-2:].numel() * self.factor**2
        parts = unscaled.split(max(1, DECODED // pixels))
        return torch.cat([self.model.decode(part).sample.clamp(-1.0, 1.0) for part in parts])


class PixelSpace:
    """The identity in place of a VAE, for models of images themselves.

    Attributes: as those of `VAE`.
    """

    path = None
    scaling_factor, shift_factor = 1.0, 0.0
    latent_channels, factor = 3, 1

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    def weights_hash(self) -> None:
        """There are no weights."""

    def decode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), cut to [-1, 1]."""
        return images.float().clamp(-1.0, 1.0)


def open_vae(path: str | None, device: str | torch.device = "cpu") -> VAE | PixelSpace:
    """The VAE of a config's `vae_path`, or the identity where it is null.

    Raises:
        UserError: the VAE cannot be loaded.
    """
    return PixelSpace(device) if path is None else VAE(path, device)


PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "adm": lambda x: (x + 1) * 127.5,
    "dit": lambda x: 127.5 * x + 128.0,
    "jit": lambda x: ((x + 1) / 2 * 255).round(),
}
"""Rules from [-1, 1] to 0 ... 255 by the published sampler that has them; fractions are cut."""


def to_uint8(images: Tensor, rule: str = "dit") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3) on the CPU.

    FID compares with a published one only under its `rule`, one of PIXELS.
    """
    values = PIXELS[rule](images.float()).clamp(0.0, 255.0)
    return values.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous()


def load_autoencoder(path: str) -> "AutoencoderKL":
    """diffusers' AutoencoderKL from a hub id or a local folder, weights from safetensors only.

    Raises:
        UserError: nothing is there, it is no AutoencoderKL, or its weights do not fit.
    """
    allowed = "allowed: a hub id such as stabilityai/sd-vae-ft-mse, or a folder by save_pretrained"
    local = is_local(path, "data.vae_path", allowed)
    offline = not local and not on_hub(path, "data.vae_path", "a VAE")
    from diffusers import AutoencoderKL
    from diffusers.utils import logging
    from safetensors import SafetensorError

    try:
        with quiet(logging):
            name = AutoencoderKL.load_config(path, local_files_only=offline).get("_class_name")
            if name != "AutoencoderKL":
                raise UserError(f"data.vae_path: {path} holds {name}, not AutoencoderKL; {allowed}")
            model, info = AutoencoderKL.from_pretrained(
                path,
                local_files_only=offline,
                use_safetensors=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"data.vae_path: cannot load a VAE from {path}: {error}; {allowed}"
        ) from error
    if info["missing_keys"]:
        missing = info["missing_keys"]
        raise UserError(f"data.vae_path: {path} lacks {len(missing)} weights, first {missing[0]}")
    return model
