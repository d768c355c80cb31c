"""python -m evaluations.make_reference IMAGES OUT.npz --image-size 256

Make a reference as ADM's from a folder of images: statistics of all of them, and as many images as
precision and recall need, drawn by seed. Images are cropped as for training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core.distributed import Processes
from core.errors import UserError, command
from core.files import complete_file
from core.logging import get_logger, progress
from core.rng import generator
from data.images import ImageFolder, load_image
from evaluations.evaluate import add_batch_flags, add_extractor_flags, extractor_from
from evaluations.features import Extractor
from evaluations.reference import PAIRS
from evaluations.statistics import RunningStatistics


class _Cropped(Dataset):
    def __init__(self, folder: ImageFolder, size: int):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return load_image(self.folder.paths[index], self.size).permute(1, 2, 0)
        except UserError as error:
            return str(error)


def make_reference(
    folder: ImageFolder,
    size: int,
    extractor: Extractor,
    kept: int = 10_000,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Arrays of a reference.

    Args:
        folder: the images.
        size: their side after the crop, in pixels.
        extractor: gives the features.
        kept: images in `arr_0`.
        batch_size: images at a time.
        num_workers: processes that read.
        seed: of the choice of `arr_0`.

    Returns:
        `mu`, `sigma` and perhaps `mu_s`, `sigma_s` (float64), `arr_0` (kept, H, W, 3) uint8 and
        their `labels`.

    Raises:
        UserError: an unreadable image.
    """
    order = torch.randperm(len(folder), generator=generator(seed, "reference images"))
    chosen = sorted(order[:kept].tolist())
    place = {index: row for row, index in enumerate(chosen)}
    images = np.empty((len(chosen), size, size, 3), np.uint8)
    running: dict[str, RunningStatistics] = {}
    loader = DataLoader(
        _Cropped(folder, size), batch_size, num_workers=num_workers, collate_fn=list
    )
    index = 0
    alone = Processes(0, 1, torch.device("cpu"))
    with progress(None, alone, "reference", "img", total=len(folder)) as bar:
        for batch in loader:
            for image in batch:
                if isinstance(image, str):
                    raise UserError(image)
                if index in place:
                    images[place[index]] = image
                index += 1
            for name, values in extractor(torch.stack(batch)).items():
                if name in PAIRS:
                    if name not in running:
                        running[name] = RunningStatistics(values.shape[1], values.device)
                    running[name].update(values)
            bar.update(len(batch))
    arrays = {"arr_0": images, "labels": folder.labels[chosen]}
    for name, sums in running.items():
        arrays |= dict(zip(PAIRS[name], sums.result(), strict=True))
    return arrays


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.make_reference",
        description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, help="folder, IMAGES/<class>/<images> or IMAGES/<images>")
    add("out", type=Path, help=".npz to write")
    add("--image-size", type=int, required=True, default=argparse.SUPPRESS, help="in pixels")
    add("--num-images", type=int, default=10_000, help="in arr_0, for precision and recall")
    add("--num-workers", type=int, default=4, help="processes that read")
    add("--seed", type=int, default=0, help="of the choice of those images")
    add_extractor_flags(parser)
    add_batch_flags(parser)
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, make the reference and write it."""
    flags = _parse()
    for name in ("image_size", "num_images", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: at least 1 is allowed")
    folder = ImageFolder(flags.images)
    options = (flags.num_images, flags.batch_size, flags.num_workers, flags.seed)
    arrays = make_reference(folder, flags.image_size, extractor_from(flags), *options)
    with complete_file(flags.out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    get_logger("evaluations.make_reference").info(
        "%s: statistics of %d images, %d of them for precision and recall",
        *(flags.out, len(folder), len(arrays["arr_0"])),
    )


if __name__ == "__main__":
    main()
