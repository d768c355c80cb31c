"""The published cache format: one `.npz` for each image, in the class folders of the images.

Each file holds `moments` and `moments_flip`, of the image and of its mirror image. What the
numbers are stands nowhere in the files, and published code has written and read several things
under these names, so it is asked for:

    posterior          (2C, h, w) mean and log-variance, as the VAE gives them
    scaled_posterior   (2C, h, w) mean and log-variance of the latents that the model sees
    latent             (C, h, w) a sample of the posterior
    scaled_latent      (C, h, w) the same, shifted and scaled as the model sees it
"""

import math
import os
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError
from data.images import ImageFolder
from data.manifest import VIEWS
from data.vae import VAE

CONTENTS = ("posterior", "scaled_posterior", "latent", "scaled_latent")
VIEW_KEYS = ("moments", "moments_flip")
SURE = -30.0
"""Log-variance of what has none: diffusers' lower limit, a deviation of 3e-7."""


class PublishedCache:
    """Moments from a folder of `.npz` files; see `data.latents.Moments` for the attributes.

    Args:
        path: `path/<class>/<name>.npz`.
        contents: what the arrays are, one of CONTENTS.
        vae: whose scale and shift they have, or will get.
        processes: all that read it, of which one reports.

    Raises:
        UserError: no such folder, or files that do not hold what `contents` says.
    """

    vae_hash = None
    image_size = None
    views = VIEWS

    def __init__(self, path: str, contents: str, vae: VAE, processes: Processes | None = None):
        self.path, self.contents = path, contents
        self.folder = ImageFolder(path, (".npz",), processes)
        self.class_names = self.folder.class_names
        self.vae_path = vae.path
        self.scaling_factor, self.shift_factor = vae.scaling_factor, vae.shift_factor
        channels, height, width = self._read(0, 0).shape
        self._halves = 2 if contents.endswith("posterior") else 1
        if channels != self._halves * vae.latent_channels:
            raise UserError(
                f"data.npz_contents: {contents} has {self._halves * vae.latent_channels} channels "
                f"with the VAE {vae.path}, {self.folder.paths[0]} has {channels}; known: "
                f"{', '.join(CONTENTS)}"
            )
        self.latent_shape = (vae.latent_channels, height, width)
        # Files of a class lie together.
        ends = np.cumsum(np.bincount(self.folder.labels))
        self.shards = [(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def __len__(self) -> int:
        return len(self.folder)

    def name(self, index: int) -> str:
        """Path of an image's file below the folder, without `.npz`."""
        return os.path.relpath(self.folder.paths[index], self.path).removesuffix(".npz")

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Moments (B, 2C, h, w) float32 as the VAE gives them, of `indices` in `views`."""
        channels, height, width = self.latent_shape
        out = torch.full((len(indices), 2 * channels, height, width), SURE)
        held = self._halves * channels
        for row, index, view in zip(out, indices, views, strict=True):
            values = self._read(int(index), int(view))
            if values.shape != (held, height, width):
                raise UserError(
                    f"data.cached_path: {self.folder.paths[index]} holds {values.shape}, "
                    f"{self.folder.paths[0]} {(held, height, width)}"
                )
            row[:held] = torch.from_numpy(values.astype(np.float32, copy=False))
        if self.contents.startswith("scaled"):
            mean, logvar = out.chunk(2, dim=1)
            mean.div_(self.scaling_factor).add_(self.shift_factor)
            if self._halves == 2:
                logvar.sub_(2 * math.log(self.scaling_factor))
        return out

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64."""
        return torch.from_numpy(self.folder.labels[np.asarray(indices)])

    def _read(self, index: int, view: int) -> np.ndarray:
        path, key = self.folder.paths[index], VIEW_KEYS[view]
        try:
            with np.load(path, allow_pickle=False) as file:
                values = file[key]
            if values.ndim != 3 or values.dtype.kind != "f":
                raise ValueError(f"{key} is {values.dtype} {values.shape}, not a (channels, h, w)")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"data.cached_path: cannot read {path}: {error}") from error
        if not np.isfinite(values).all():
            raise UserError(f"data.cached_path: {path}: {key} is not finite")
        return values
