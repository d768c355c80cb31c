"""Folders of images, one folder per class, and the crop that makes them square."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.distributed import Processes
from core.errors import UserError
from core.logging import get_logger, progress

SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)

NO_CLASSES = "all"

CROP_RULE = "adm-center"
"""Name of `center_crop` in a cache's manifest."""

PATIENCE = 2.0
"""Seconds of looking through folders before progress is shown."""

log = get_logger("data.images")


class ImageSource(Protocol):
    """Numbered images with classes.

    Attributes:
        class_names: name of each label.
        paths: of every image, class after class, for messages.
        labels: (N,) int64, label of each image.
    """

    class_names: list[str]
    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Path of an image below where they all lie."""
        ...

    def load(self, index: int, size: int) -> Tensor:
        """Image (3, size, size) of a number; see `load_image`."""
        ...


class ImageFolder:
    """The images under `root/<class>/`, at any depth, in a fixed order.

    Classes are sorted by name and numbered in that order; the images of a class are sorted by
    path. Hidden files and folders are passed over. A folder of images without class folders is one
    class named NO_CLASSES, for models without labels.

    Links to folders are followed, but no folder is entered twice in a class, nor one that the class
    lies in; a warning names the first that is passed over, and images beside the class folders,
    which belong to no class.

    Args:
        root: the folder.
        suffixes: of the files that are taken.
        processes: all that read it, of which one reports; None: this one does.

    Attributes:
        class_names: name of each label.
        paths: every image, class after class.
        labels: (N,) int64, label of each image.

    Raises:
        UserError: no such folder, nothing in it, a folder that cannot be read, or a class without
            an image.
    """

    def __init__(
        self,
        root: str | Path,
        suffixes: tuple[str, ...] = SUFFIXES,
        processes: Processes | None = None,
    ):
        self.root = root = Path(root)
        if not root.is_dir():
            raise UserError(f"image folder: {root} is not a folder")
        scan = _Scan(root, suffixes)
        self.class_names = scan.class_names()
        folders = [root / name for name in self.class_names]
        if not folders:
            self.class_names, folders, scan.loose = [NO_CLASSES], [root], []
        self.paths: list[str] = []
        counts = []
        for folder in progress(folders, processes, "looking through", "class", delay=PATIENCE):
            found = scan.files(folder)
            if not found and folder == root:
                raise UserError(
                    f"image folder: {root} has no class folders; expected {root}/<class>/<images>"
                )
            if not found:
                raise UserError(
                    f"image folder: class folder {folder} has no images ({', '.join(suffixes)})"
                )
            self.paths += found
            counts.append(len(found))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        if processes is None or processes.is_main:
            scan.report()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of an image below `root`."""
        return os.path.relpath(self.paths[index], self.root)

    def load(self, index: int, size: int) -> Tensor:
        """Image (3, size, size) of a number; see `load_image`."""
        return load_image(self.paths[index], size)


class _Scan:
    """Looks for images below `root`, and notes what it passes over."""

    def __init__(self, root: Path, suffixes: Sequence[str]):
        self.root, self.suffixes = root, suffixes
        real = root.resolve()
        self.above = {_identity(folder) for folder in (real, *real.parents)}
        self.links: list[str] = []
        self.loose: list[str] = []

    def class_names(self) -> list[str]:
        """Names of the class folders, sorted."""
        names = []
        for entry in sorted(_entries(self.root), key=lambda entry: entry.name):
            if entry.name[0] == ".":
                continue
            if not _is_folder(entry):
                self.loose += [entry.path] if self._is_image(entry.name) else []
            elif _identity(entry) in self.above:
                self.links.append(entry.path)
            else:
                names.append(entry.name)
        return names

    def files(self, folder: Path) -> list[str]:
        """The images below a class folder, sorted."""
        found, seen, waiting = [], {*self.above, _identity(folder)}, [str(folder)]
        while waiting:
            # Real folders before links to them, so that files have their own names.
            entries = sorted(_entries(waiting.pop()), key=lambda e: (e.is_symlink(), e.name))
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if not _is_folder(entry):
                    found += [entry.path] if self._is_image(entry.name) else []
                elif _identity(entry) in seen:
                    self.links.append(entry.path)
                else:
                    seen.add(_identity(entry))
                    waiting.append(entry.path)
        return sorted(found)

    def report(self) -> None:
        """Warn of what is passed over."""
        links = sorted(set(self.links))
        if links:
            log.warning(
                "image folder: %d link(s) lead to folders that are there already, first %s; "
                "passed over",
                *(len(links), links[0]),
            )
        if self.loose:
            log.warning(
                "image folder: %d image(s) lie beside the class folders, first %s; they belong to "
                "no class and stay out",
                *(len(self.loose), self.loose[0]),
            )

    def _is_image(self, name: str) -> bool:
        return suffix_of(name) in self.suffixes


def suffix_of(name: str) -> str:
    """The ending of a file's name from the last dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def _identity(folder: Path | os.DirEntry) -> tuple[int, int]:
    """What a folder is, by whatever names."""
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"image folder: cannot read {folder}: {error.strerror}") from error


class ImageDataset(Dataset):
    """`folder`'s images as (image (3, size, size) float32 in [-1, 1], label, index)."""

    def __init__(self, folder: ImageFolder, size: int):
        self.folder = folder
        self.size = size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.folder.load(index, self.size)
        return to_float(image), int(self.folder.labels[index]), index


def to_float(image: Tensor) -> Tensor:
    """uint8 values 0 ... 255 as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1.0


def load_image(path: str | Path, size: int, file: BinaryIO | None = None) -> Tensor:
    """The square image (3, size, size), uint8 RGB, cropped by `center_crop`.

    Grey, palette and CMYK images become RGB, 16-bit values keep their high byte, transparent
    pixels show white. Orientation tags are ignored, as in the published ImageNet pipelines.

    Args:
        path: of the file.
        size: side of the square, in pixels.
        file: the file's contents, where they lie in another one.

    Raises:
        UserError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(file or path) as image:
            square = center_crop(_to_rgb(image), size)
    # Pillow's decoders raise nearly anything on a damaged file (SyntaxError, struct.error, ...).
    except Exception as error:
        raise UserError(f"image: cannot read {path}: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion saturates: everything above 255 would turn white.
        high = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 256
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `image`, `size` pixels wide: the crop rule of ADM.

    The image is halved with a box filter while its short side is at least 2 * size, then resized
    bicubically until that side equals `size`, and cropped in the middle. Box halving first keeps
    a large reduction free of aliasing. Rule: Dhariwal & Nichol, "Diffusion Models Beat GANs",
    as every published latent-diffusion comparison on ImageNet uses it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
