"""Images in tar files, as WebDataset writes them: NAME.jpg with NAME.txt or NAME.json beside it."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError
from core.logging import progress
from data.images import (
    NO_CLASSES,
    PATIENCE,
    SUFFIXES,
    ImageFolder,
    ImageSource,
    load_image,
    suffix_of,
)

TAR = ".tar"


def open_images(path: str | Path, processes: Processes | None = None) -> ImageSource:
    """The images of a folder, or of tar files: one, or all in a folder.

    Raises:
        UserError: as `ImageFolder` and `TarImages`.
    """
    return TarImages(path, processes) if tar_files(path) else ImageFolder(path, processes=processes)


def tar_files(path: str | Path) -> list[Path]:
    """The tar files that `path` is, or that lie in the folder; mostly none."""
    path = Path(path)
    if path.suffix.lower() == TAR and path.is_file():
        return [path]
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if file.suffix.lower() == TAR and file.is_file())


def folder_of(path: str | Path) -> Path:
    """The folder that images of `path` are named in: that of a single tar file, or itself."""
    return Path(path).parent if Path(path).is_file() else Path(path)


class TarFiles:
    """Files in uncompressed tar files, found once and read by their place.

    Args:
        path: a tar file, or a folder with some.
        processes: all that read it, of which one reports.

    Attributes:
        root: folder of the tar files.
        names: of all files, `<tar>/<path within>`, tar after tar, in their order.

    Raises:
        UserError: a tar file cannot be read, or holds a name twice.
    """

    def __init__(self, path: str | Path, processes: Processes | None = None):
        shards = tar_files(path)
        self.root = folder_of(path)
        self._places: dict[str, tuple[int, int]] = {}
        for shard in progress(shards, processes, "looking through", "tar", delay=PATIENCE):
            self._add(shard)
        self.names = list(self._places)

    def _add(self, shard: Path) -> None:
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    name = f"{shard.name}/{os.path.normpath(member.name)}"
                    if not member.isfile() or os.path.basename(name)[0] == ".":
                        continue
                    if name in self._places:
                        raise UserError(f"image folder: {shard} holds {member.name} twice")
                    self._places[name] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"image folder: cannot read {shard}: {error}") from error
        # The library says nothing about a file that was cut off at the right place.
        if not _is_ended(shard):
            raise UserError(f"image folder: {shard} is cut off; its end is missing")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is none of this name.
            OSError: its tar file cannot be read, or is shorter than it was.
        """
        if name not in self._places:
            raise FileNotFoundError(name)
        place, size = self._places[name]
        shard = self.root / name.partition("/")[0]
        with shard.open("rb") as file:
            file.seek(place)
            content = file.read(size)
        if len(content) != size:
            raise OSError(0, "cut off", str(shard))
        return content


def _is_ended(shard: Path) -> bool:
    """Whether a tar file has the zeros that end it."""
    with shard.open("rb") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() < tarfile.BLOCKSIZE:
            return False
        file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
        return not any(file.read())


class TarImages:
    """The images in tar files: one class, NO_CLASSES; see `data.images.ImageSource`.

    Args:
        path: a tar file, or a folder with some.
        processes: all that read it, of which one reports.

    Raises:
        UserError: a tar file cannot be read, or there is no image.
    """

    def __init__(self, path: str | Path, processes: Processes | None = None):
        self.files = TarFiles(path, processes)
        self.class_names = [NO_CLASSES]
        self._names = [name for name in self.files.names if suffix_of(name) in SUFFIXES]
        if not self._names:
            raise UserError(f"image folder: {path} has no images ({', '.join(SUFFIXES)})")
        self.paths = [os.path.join(self.files.root, name) for name in self._names]
        self.labels = np.zeros(len(self._names), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """`<tar>/<path within>` of an image."""
        return self._names[index]

    def load(self, index: int, size: int) -> Tensor:
        """Image (3, size, size) of a number; see `load_image`."""
        try:
            content = self.files.read(self._names[index])
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"image: cannot read {self.paths[index]}: {reason}") from error
        return load_image(self.paths[index], size, io.BytesIO(content))
