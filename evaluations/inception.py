"""The Inception-V3 of 2015 behind FID, as ADM's evaluator runs it.

Its blocks come from torch-fidelity, whose weight file is the published TensorFlow graph's; what
happens around them is ADM's: the resize of TensorFlow 1, (x - 128) / 128, pool_3, the spatial
features of sFID, and logits without their bias.

Shapes: N images, H and W of an image.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.errors import UserError

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of torch-fidelity's weight file, weights-inception-2015-12-05-6726825d.pth."""

WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
"""Features of each kind."""

SIDE = 299
SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """Inception-V3 with 1008 classes; its tensors have the names of torch-fidelity's file."""

    def __init__(self):
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as blocks

        conv = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.trunk = [name for name, _ in self.named_children()]
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (N, H, W, 3) uint8.

        Returns:
            `pool` (N, 2048): pool_3. `spatial` (N, 2023): see `spatial_features`. `logits`
            (N, 1008): of the classes, without the bias.
        """
        x = resize(images.permute(0, 3, 1, 2).float())  # (N, 3, 299, 299)
        x = (x - 128) * 0.0078125
        spatial = None
        for name in self.trunk:
            if name == "Mixed_6d":
                # The branch's convolution ends with BN and ReLU; ADM takes its output.
                spatial = spatial_features(self.Mixed_6d.branch1x1(x))
            x = getattr(self, name)(x)
        pool = x.mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def resize(images: Tensor, size: int = SIDE) -> Tensor:
    """Bilinear resize of (N, C, H, W) float32 as TensorFlow 1 does it: pixel i lies at i H / size.

    No half-pixel shift and no averaging when it shrinks: `ResizeBilinear` with
    align_corners=False, half_pixel_centers=False. Bit for bit on the CPU.
    """

    def places(n: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(n, dtype=torch.float32) / size
        place = torch.arange(size, dtype=torch.float32) * scale
        low = place.floor()
        index = low.long().to(images.device)
        return index, (index + 1).clamp(max=n - 1), (place - low).to(images.device)

    top, bottom, down = places(images.shape[2])
    left, right, across = places(images.shape[3])

    def along_rows(rows: Tensor) -> Tensor:
        picked = images[:, :, rows]  # (N, C, size, W)
        return picked[..., left] + (picked[..., right] - picked[..., left]) * across

    above = along_rows(top)
    return above + (along_rows(bottom) - above) * down[:, None]


def spatial_features(branch: Tensor) -> Tensor:
    """sFID's rows (N, 2023) of (N, C, 17, 17): 7 channels, flattened by height, width, channel."""
    return branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def load_inception(
    path: Path | None = None, sha256: str = SHA256, device: str | torch.device = "cpu"
) -> Inception:
    """The network with torch-fidelity's published weights, or those of a file in their format.

    Args:
        path: of the file; None downloads it once into torch's cache.
        sha256: that the file must have; it is compared before anything is read.
        device: where it computes.

    Raises:
        UserError: no file, another hash, or tensors that do not fit.
    """
    path = _downloaded() if path is None else path
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"inception-weights: cannot read {path}: {error}") from error
    if found != sha256.lower():
        raise UserError(
            f"inception-weights: {path} has SHA-256 {found}, not {sha256}; "
            "--inception-sha256 names another one that you trust"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on what is no checkpoint
        raise UserError(f"inception-weights: cannot read {path}: {error}") from error
    network = Inception()
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"inception-weights: {path} does not fit the network: {error}") from error
    return network.to(device)


def _downloaded() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise UserError(
            f"inception-weights: cannot download {url}: {error}; give the file with "
            "--inception-weights PATH"
        ) from error
    return path


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits (N, C), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    return odds / odds.sum(axis=1, keepdims=True)
