"""Images without a cache: for models of pixels, or encoded while a model trains on them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError
from data.images import ImageFolder, to_float
from data.vae import VAE, PixelSpace


class Images:
    """An image folder, and the VAE that encodes it or the identity in its place.

    Args:
        path: image folder, `path/<class>/<images>`.
        image_size: side of the cropped images, in pixels.
        vae: encodes on its own device; copies that travel to other processes are without it.
        processes: all that read it, of which one reports.

    Attributes:
        path, vae_path, vae_hash, scaling_factor, shift_factor, image_size, latent_shape,
        class_names: as those of `data.latents.Moments`.

    Raises:
        UserError: no such folder, or a size that the VAE cannot encode.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        vae: VAE | PixelSpace,
        processes: Processes | None = None,
    ):
        if image_size % vae.factor:
            raise UserError(
                f"data.image_size: {image_size} is not a multiple of the VAE's {vae.factor}"
            )
        self.path, self.image_size, self.vae = path, image_size, vae
        self.folder = ImageFolder(path, processes=processes)
        self.class_names = self.folder.class_names
        self.vae_path, self.vae_hash = vae.path, vae.weights_hash()
        self.scaling_factor, self.shift_factor = vae.scaling_factor, vae.shift_factor
        side = image_size // vae.factor
        self.latent_shape = (vae.latent_channels, side, side)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"vae": None}

    def __len__(self) -> int:
        return len(self.folder)

    def names(self) -> list[str]:
        """Paths of all images below the folder, in order."""
        return [self.folder.name(index) for index in range(len(self))]

    def images(self, indices: Sequence[int]) -> Tensor:
        """Cropped images (B, 3, H, W) uint8."""
        return torch.stack([self.folder.load(index, self.image_size) for index in indices])

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64."""
        return torch.from_numpy(self.folder.labels[list(indices)])

    def floats(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 in [-1, 1], on the device."""
        return to_float(images.to(self.vae.device))

    def encode(self, images: Tensor) -> Tensor:
        """Posterior moments (B, 2C, h, w) float32 of images (B, 3, H, W) uint8."""
        return self.vae.encode_moments(self.floats(images))
