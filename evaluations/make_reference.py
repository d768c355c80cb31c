"""python -m evaluations.make_reference IMAGES OUT.npz --image-size 256

Make a reference as ADM's from a folder of images: statistics of all of them, and as many images as
precision and recall need, drawn by seed from these or from others that were held out. Images are
cropped as for training.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from core.command_line import natural, positive
from core.distributed import Processes
from core.errors import ConfigError, UserError, command
from core.files import complete_file
from core.limits import check_out_file
from core.logging import get_logger, progress
from core.rng import generator
from data.images import ImageFolder, load_image
from data.workers import steady
from evaluations.evaluate import (
    add_batch_flags,
    add_extractor_flags,
    check_batch_size,
    check_network_flags,
    device_of,
    extractor_from,
    network_from,
)
from evaluations.features import Extractor
from evaluations.reference import PAIRS
from evaluations.statistics import RunningStatistics
from sampling.needs import NotingParser, refuse_typed


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


def reference_statistics(
    folder: ImageFolder, size: int, extractor: Extractor, batch_size: int = 64, num_workers: int = 0
) -> dict[str, np.ndarray]:
    """`mu`, `sigma` and perhaps `mu_s`, `sigma_s` (float64) of all images, `size` pixels wide.

    Raises:
        UserError: an unreadable image.
    """
    running: dict[str, RunningStatistics] = {}
    indices = list(range(len(folder)))
    for images in _batches(folder, size, indices, batch_size, num_workers, "statistics"):
        for name, values in extractor(images).items():
            if name in PAIRS:
                if name not in running:
                    running[name] = RunningStatistics(values.shape[1], values.device)
                running[name].update(values)
    return {
        key: value
        for name, sums in running.items()
        for key, value in zip(PAIRS[name], sums.result(), strict=True)
    }


def reference_images(
    folder: ImageFolder, size: int, count: int = 10_000, num_workers: int = 0, seed: int = 0
) -> dict[str, np.ndarray]:
    """`arr_0` (count, H, W, 3) uint8 and `labels`, of images drawn by `seed`.

    Raises:
        UserError: an unreadable image.
    """
    order = torch.randperm(len(folder), generator=generator(seed, "reference images"))
    chosen = sorted(order[:count].tolist())
    parts = _batches(folder, size, chosen, 64, num_workers, "images")
    return {"arr_0": torch.cat(list(parts)).numpy(), "labels": folder.labels[chosen]}


def _batches(
    folder: ImageFolder,
    size: int,
    indices: list[int],
    batch_size: int,
    num_workers: int,
    what: str,
) -> Iterator[torch.Tensor]:
    """Images (B, H, W, 3) uint8."""
    data = Subset(_Cropped(folder, size), indices)
    loader = DataLoader(
        data, batch_size, num_workers=num_workers, collate_fn=list, worker_init_fn=steady
    )
    alone = Processes(0, 1, torch.device("cpu"))
    with progress(None, alone, what, "img", total=len(indices)) as bar:
        for batch in loader:
            for image in batch:
                if isinstance(image, str):
                    raise UserError(image)
            yield torch.stack(batch)
            bar.update(len(batch))


def _parse() -> argparse.Namespace:
    parser = NotingParser("evaluations.make_reference", __doc__)
    add = parser.add_argument
    add("images", type=Path, help="folder, IMAGES/<class>/<images> or IMAGES/<images>")
    add("out", type=Path, help=".npz to write")
    add("--image-size", type=positive, required=True, default=argparse.SUPPRESS, help="in pixels")
    add("--pr-images", type=Path, help="folder of arr_0, such as held-out images; default: IMAGES")
    add("--num-images", type=positive, default=10_000, help="in arr_0, for precision and recall")
    add("--num-workers", type=natural, default=4, help="processes that read")
    add("--seed", type=int, default=0, help="of the choice of those images")
    add_extractor_flags(parser)
    add_batch_flags(parser)
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, make the reference and write it."""
    flags = _parse()
    check_network_flags(flags)
    check_out_file("OUT", flags.out)
    device, network = device_of(flags), network_from(flags)
    if network.side not in (None, flags.image_size):
        raise ConfigError(
            f"--image-size: {flags.image_size} is not allowed; --features {network.name} needs "
            f"{network.side}"
        )
    folder = ImageFolder(flags.images)
    other = folder if flags.pr_images is None else ImageFolder(flags.pr_images)
    check_batch_size(flags, len(folder), network, device)
    if flags.num_images >= len(other):
        refuse_typed(flags, ["seed"], f"does nothing here; all {len(other)} images are taken")
    extractor = extractor_from(flags, device)
    size, workers = flags.image_size, flags.num_workers
    arrays = reference_statistics(folder, size, extractor, flags.batch_size, workers)
    arrays |= reference_images(other, size, flags.num_images, workers, flags.seed)
    with complete_file(flags.out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    get_logger("evaluations.make_reference").info(
        "%s: statistics of %d images, %d images for precision and recall",
        *(flags.out, len(folder), len(arrays["arr_0"])),
    )


if __name__ == "__main__":
    main()
