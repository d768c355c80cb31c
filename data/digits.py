"""python -m data.digits --out DIR

Write scikit-learn's handwritten digits as a folder of images, without any download: 1,797 real
scans of 8 x 8 pixels, enlarged to 32 x 32, as DIR/{train,val}/<class>/<index>.png.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.command_line import Parser
from core.errors import command
from core.logging import get_logger
from core.rng import generator
from data.making import made_alone, refuse_taken

SIZE = 32
VAL_SHARE = 0.2
SPLIT_SEED = 0


def split(labels: np.ndarray) -> np.ndarray:
    """(N,) True where an image belongs to the validation fifth of its class; always the same."""
    val = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator(SPLIT_SEED, "digits", int(label)))
        val[members[order[: round(VAL_SHARE * len(members))].numpy()]] = True
    return val


def enlarge(scan: np.ndarray) -> Image.Image:
    """A scan (8, 8) with values 0 ... 16 as an RGB image of 32 x 32, white on black."""
    grey = Image.fromarray((scan * (255.0 / 16.0)).astype(np.float32))
    large = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(np.rint(large), 0, 255).astype(np.uint8)).convert("RGB")


def write_digits(out: str | Path) -> Counter:
    """Write the image folders `out`/train and `out`/val unless they are there already.

    Returns:
        The number of images in `train` and in `val`.

    Raises:
        UserError: `out` holds something else, is being made, or cannot be written.
    """
    from sklearn.datasets import load_digits

    out = Path(out)
    digits = load_digits()
    places = [
        f"{'val' if val else 'train'}/{label}/{index:04d}.png"
        for index, (val, label) in enumerate(zip(split(digits.target), digits.target, strict=True))
    ]
    counts = Counter(place.split("/")[0] for place in places)
    log = get_logger("data.digits")
    if all((out / place).is_file() for place in places):
        log.info("%s is complete already; left as it is", out)
        return counts
    refuse_taken(out, "is not the complete digits")
    with made_alone(out) as folder:
        for place, scan in zip(places, digits.images, strict=True):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            enlarge(scan).save(folder / place)
    log.info("%s: %d training and %d validation images", out, counts["train"], counts["val"])
    return counts


@command
def main() -> None:
    """Parse the command line and write the images."""
    parser = Parser("data.digits", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    write_digits(parser.parse_args().out)


if __name__ == "__main__":
    main()
