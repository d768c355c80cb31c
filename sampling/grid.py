"""Several images as one picture."""

import math
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from core.files import complete_file


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images (N, H, W, 3) uint8 in rows: one picture (H', W', 3), white between them.

    Args:
        images: in the order of reading.
        columns: images in a row; by default 10, or fewer where a square needs fewer.
        gap: pixels between images.
    """
    N, H, W, _ = images.shape
    columns = columns or (10 if N >= 40 else math.ceil(math.sqrt(N)))
    rows = math.ceil(N / columns)
    grid = torch.full(
        (rows * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images.cpu()):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        grid[top : top + H, left : left + W] = image
    return grid


def save_png(grid: Tensor, path: str | Path, texts: dict[str, str] | None = None) -> None:
    """Write a picture (H, W, 3) uint8, with texts by name in its metadata."""
    about = PngInfo()
    for name, text in (texts or {}).items():
        about.add_text(name, text)
    with complete_file(Path(path)) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, format="png", pnginfo=about)
