"""python -m data.scenes --out DIR

Write small scenes of one to four coloured handwritten digits with captions, without any download:
real scans of scikit-learn's digits in the quadrants of 32 x 32 RGB images, in the six tasks of
GenEval and with its own description of each scene. DIR/train has scans of the training split,
DIR/val others; some digits never stand in some colours or relations in DIR/train, and
DIR/prompts.jsonl asks for these and for the rest.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from core.command_line import Parser, positive
from core.errors import command
from core.logging import get_logger, progress
from data.compositions import DIGITS, PALETTE, TAGS, Draw, Placed, arrange, scene
from data.digits import split
from data.making import made_alone, refuse_taken

SIZE = 32
DIGIT = 14
"""Side of a digit's square in a quadrant of 16."""

METADATA = "metadata.jsonl"
PROMPTS = "prompts.jsonl"


def paint(placed: list[Placed], scans: dict[str, np.ndarray], draw: Draw) -> Image.Image:
    """The image of a scene.

    Args:
        placed: its digits.
        scans: (N, 8, 8) of each digit, values 0 ... 16.
        draw: which scan, and where in its quadrant.
    """
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    for one in placed:
        scan = scans[one.digit][draw.below(len(scans[one.digit]))]
        grey = Image.fromarray((scan / 16.0).astype(np.float32))
        ink = np.asarray(grey.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)).clip(0, 1)
        spare = SIZE // 2 - DIGIT + 1
        top = one.quadrant[0] * SIZE // 2 + draw.below(spare)
        left = one.quadrant[1] * SIZE // 2 + draw.below(spare)
        color = np.array(PALETTE[one.color], np.float32)
        canvas[top : top + DIGIT, left : left + DIGIT] = ink[..., None] * color
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def scans_of(val: bool) -> dict[str, np.ndarray]:
    """Real scans (N, 8, 8) of each digit, of the training split or of the held-out one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = split(digits.target) == val
    return {
        name: digits.images[chosen & (digits.target == label)] for label, name in enumerate(DIGITS)
    }


def write_scenes(out: str | Path, train: int, val: int, prompts: int, seed: int = 0) -> Counter:
    """Write `out`/train and `out`/val with METADATA, and `out`/PROMPTS.

    Args:
        out: folder to make.
        train, val: scenes in each.
        prompts: to sample for each of the six tasks.
        seed: of every draw.

    Returns:
        How many scenes, or prompts, there are of each.

    Raises:
        UserError: `out` holds something, is being made, or cannot be written.
    """
    out = Path(out)
    refuse_taken(out, "holds something else")
    with made_alone(out) as folder:
        for name, count in (("train", train), ("val", val)):
            _write_split(folder / name, name, count, seed)
        asked = [scene(seed, "prompts", i, seen_only=False) for i in range(prompts * len(TAGS))]
        lines = [json.dumps(asdict(one)) for one in asked]
        (folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines))
    counts = Counter(train=train, val=val, prompts=len(asked))
    get_logger("data.scenes").info("%s: %s", out, dict(counts))
    return counts


def _write_split(folder: Path, name: str, count: int, seed: int) -> None:
    """Images and METADATA of the training or the held-out scenes."""
    folder.mkdir()
    scans, seen_only = scans_of(name == "val"), name == "train"
    with (folder / METADATA).open("w") as file:
        for index in progress(range(count), None, f"{name} scenes", "img", leave=False):
            asked = scene(seed, name, index, seen_only)
            draw = Draw(seed, f"picture {name}", index)
            picture = paint(arrange(asked, draw, seen_only), scans, draw)
            picture.save(folder / f"{index:06d}.png")
            about = asdict(asked)
            entry = {"file_name": f"{index:06d}.png", "text": about.pop("prompt")} | about
            file.write(json.dumps(entry) + "\n")


@command
def main() -> None:
    """Parse the command line and write the scenes."""
    parser = Parser("data.scenes", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=positive, default=12_000, help="training scenes")
    parser.add_argument("--val", type=positive, default=1_200, help="held-out scenes")
    parser.add_argument("--prompts", type=positive, default=50, help="of each of the six tasks")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    flags = vars(parser.parse_args())
    write_scenes(**flags)


if __name__ == "__main__":
    main()
