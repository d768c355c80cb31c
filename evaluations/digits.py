"""python -m evaluations.digits --data DIR --out classifier.safetensors

Train the digit classifier that `--features digits` scores with. DIR is written by `python -m
data.digits --out DIR`. Distances in its features are named FD-digits: they are no FID and compare
with no published number.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from core.command_line import Parser, positive
from core.errors import command
from core.limits import check_out_file
from core.logging import get_logger
from evaluations.digit_classifier import (
    TrainSettings,
    accuracy,
    features_and_logits,
    load_digits,
    save_classifier,
    train_classifier,
)


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.digits", __doc__)
    add = parser.add_argument
    needed = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    add("--data", **needed, help="folder that holds train/ and val/")
    add("--out", **needed, help="safetensors file to write")
    add("--seed", type=int, default=TrainSettings.seed, help="of weights and augmentation")
    add("--epochs", type=positive, default=TrainSettings.epochs, help="passes over DIR/train")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, train and write the classifier."""
    flags = _parse()
    check_out_file("--out", flags.out)
    train, heldout = load_digits(flags.data, "train"), load_digits(flags.data, "val")
    settings = TrainSettings(seed=flags.seed, epochs=flags.epochs)
    start = time.perf_counter()
    classifier = train_classifier(train, settings)
    seconds = time.perf_counter() - start
    right = accuracy(features_and_logits(classifier, heldout.images)[1], heldout.labels)
    save_classifier(flags.out, classifier, asdict(settings) | {"heldout_accuracy": right})
    get_logger("evaluations.digits").info(
        "%s: held-out accuracy %.4f (%d images), trained on %d images in %.1f s",
        *(flags.out, right, len(heldout.images), len(train.images), seconds),
    )


if __name__ == "__main__":
    main()
