"""Train a digit classifier, and score generated digits with it.

    python -m evaluations.digits train --data DIR --out classifier.safetensors
    python -m evaluations.digits score --data DIR --classifier classifier.safetensors SAMPLES.npz

DIR is written by `python -m data.digits --out DIR`. The scores rest on the features of a small
classifier, hence the name FD-digits: the numbers are no FID and compare with no published one.
"""

import argparse
import hashlib
import json
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError, command
from core.files import complete_file
from core.logging import get_logger
from evaluations.digit_classifier import (
    DigitClassifier,
    DigitSet,
    TrainSettings,
    check_folder,
    check_images,
    features_and_logits,
    load_classifier,
    load_digits,
    save_classifier,
    train_classifier,
)
from evaluations.metrics import frechet_distance, precision_recall, statistics

__all__ = [
    "DigitClassifier",
    "DigitReference",
    "DigitSet",
    "TrainSettings",
    "accuracy",
    "digit_reference",
    "features_and_logits",
    "load_classifier",
    "load_digits",
    "read_samples",
    "save_classifier",
    "score_samples",
    "train_classifier",
]

_log = get_logger("evaluations.digits")


@dataclass(frozen=True)
class DigitReference:
    """The real digits as `classifier` sees them.

    Attributes:
        train_statistics: mean (F,) and covariance (F, F) of the training digits' features.
        heldout_features: (N, F) float32.
        train_scores: what the training digits would score as samples, except for FD-digits, which
            is the distance between training and held-out digits: the marks that generated digits
            are to be read against.
        heldout_accuracy: of the classifier.
        k: neighbour that gives precision and recall their radius.
    """

    classifier: DigitClassifier
    train_statistics: tuple[np.ndarray, np.ndarray]
    heldout_features: np.ndarray
    train_scores: dict[str, float]
    heldout_accuracy: float
    k: int


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows of `logits` (N, K) that are largest at their label (N,)."""
    return float((logits.argmax(axis=1) == labels).mean())


def digit_reference(
    classifier: DigitClassifier, train: DigitSet, heldout: DigitSet, k: int = 3
) -> DigitReference:
    """Features and scores of the real digits.

    Raises:
        UserError: the sets' classes are not those of `classifier`.
    """
    for part in (train, heldout):
        if part.class_names != classifier.class_names:
            raise UserError(
                f"data: classes {', '.join(part.class_names)} are not the classifier's "
                f"{', '.join(classifier.class_names)}"
            )
    train_features, train_logits = features_and_logits(classifier, train.images)
    features, logits = features_and_logits(classifier, heldout.images)
    train_statistics = statistics(train_features)
    precision, recall = precision_recall(features, train_features, k)
    scores = {
        "samples": len(train.images),
        "accuracy": accuracy(train_logits, train.labels),
        "precision": precision,
        "recall": recall,
        "FD-digits": frechet_distance(*train_statistics, *statistics(features)),
    }
    return DigitReference(
        classifier, train_statistics, features, scores, accuracy(logits, heldout.labels), k
    )


def score_samples(
    reference: DigitReference, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Scores of generated digits.

    Args:
        reference: the real digits, by `digit_reference`.
        images: (N, 32, 32, 1 or 3) uint8, N more than the reference's `k`.
        labels: (N,) class that each image was generated for.

    Returns:
        `samples` (N), `accuracy` (share that the classifier takes for its label), `precision` and
        `recall` against the held-out digits, and `FD-digits`, the squared Fréchet distance to the
        training digits. Like every Fréchet distance that one falls with N for equal images:
        compare equal numbers of samples.

    Raises:
        UserError: images or labels of another type or shape, labels out of range, too few images.
    """
    check_images("images", images)
    classes = len(reference.classifier.class_names)
    if labels.shape != images.shape[:1]:
        raise UserError(f"labels: need one per image, {images.shape[:1]}, got {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"labels: need classes 0 ... {classes - 1}, got {labels.min()} ... {labels.max()}; "
            "samples without a class cannot be scored"
        )
    if len(images) <= reference.k:
        raise UserError(f"images: k = {reference.k} needs more than k images, got {len(images)}")
    features, logits = features_and_logits(reference.classifier, images)
    precision, recall = precision_recall(reference.heldout_features, features, reference.k)
    return {
        "samples": len(images),
        "accuracy": accuracy(logits, labels),
        "precision": precision,
        "recall": recall,
        "FD-digits": frechet_distance(*reference.train_statistics, *statistics(features)),
    }


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """`arr_0` (N, 32, 32, 1 or 3) uint8 and `labels` (N,) int64 of an npz file.

    Raises:
        UserError: no such file, an array missing, or of another type or shape.
    """
    if not Path(path).is_file():
        raise UserError(f"samples: no file {path}")
    arrays = []
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ("arr_0", "labels"):
                if name not in file:
                    raise UserError(f"samples: {path} has no array {name!r}")
                arrays.append(file[name])
    # A .npy file gives an array, which is no context manager and has no names.
    except (OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"samples: {path} is no readable npz file: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"samples: {path} is no npz file of plain arrays: {error}") from error
    images, labels = arrays
    check_images(f"samples: arr_0 of {path}", images)
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"samples: labels of {path}: need int64 {images.shape[:1]}, "
            f"got {labels.dtype} {labels.shape}"
        )
    return images, labels


def _train(args: argparse.Namespace) -> None:
    check_folder(args.out)
    train, heldout = load_digits(args.data, "train"), load_digits(args.data, "val")
    settings = TrainSettings(seed=args.seed, epochs=args.epochs)
    start = time.perf_counter()
    classifier = train_classifier(train, settings)
    seconds = time.perf_counter() - start
    reference = digit_reference(classifier, train, heldout)
    record = asdict(settings) | {"heldout_accuracy": reference.heldout_accuracy}
    save_classifier(args.out, classifier, record)
    _log.info(
        "%s: held-out accuracy %.4f (%d images), trained on %d images in %.1f s",
        *(args.out, reference.heldout_accuracy, len(heldout.images), len(train.images), seconds),
    )


def _score(args: argparse.Namespace) -> None:
    check_folder(args.out)
    samples = {str(path): read_samples(path) for path in args.samples}
    classifier = load_classifier(args.classifier)
    train, heldout = load_digits(args.data, "train"), load_digits(args.data, "val")
    reference = digit_reference(classifier, train, heldout, args.k)
    files = {
        path: score_samples(reference, images, labels) for path, (images, labels) in samples.items()
    }
    report = {
        "settings": {
            "data": str(args.data),
            "classifier": str(args.classifier),
            "classifier_sha256": hashlib.sha256(args.classifier.read_bytes()).hexdigest(),
            "k": args.k,
            "feature_width": classifier.feature_width,
            "train_images": len(train.images),
            "heldout_images": len(heldout.images),
        },
        "heldout_accuracy": reference.heldout_accuracy,
        "train_to_heldout": reference.train_scores,
        "files": files,
    }
    with complete_file(args.out) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _log_table({"(training digits)": reference.train_scores} | files)
    _log.info(
        "FD-digits of the training digits is to the %d held-out ones; the classifier is right on "
        "%.4f of those. Written to %s",
        *(len(heldout.images), reference.heldout_accuracy, args.out),
    )


def _log_table(rows: dict[str, dict[str, float]]) -> None:
    width = max(len(name) for name in rows)
    columns = ("samples", "accuracy", "precision", "recall", "FD-digits")
    _log.info("%s  %s", " " * width, "  ".join(f"{column:>9}" for column in columns))
    for name, row in rows.items():
        values = (f"{row[c]:9d}" if c == "samples" else f"{row[c]:9.4f}" for c in columns)
        _log.info("%s  %s", name.ljust(width), "  ".join(values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{train,score}")
    train = commands.add_parser("train", help="train the classifier on DIR/train")
    train.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    train.add_argument("--seed", type=int, default=TrainSettings.seed, help="default %(default)s")
    train.add_argument(
        "--epochs", type=int, default=TrainSettings.epochs, help="default %(default)s"
    )
    train.set_defaults(run=_train)
    score = commands.add_parser("score", help="score files of samples against the real digits")
    score.add_argument(
        "samples",
        type=Path,
        nargs="+",
        metavar="SAMPLES.npz",
        help="arr_0 uint8 (N, 32, 32, 3) and labels int64 (N,), the classes asked for",
    )
    score.add_argument("--classifier", type=Path, required=True, help="file written by `train`")
    score.add_argument(
        "--out", type=Path, default=Path("score.json"), help="JSON to write, default %(default)s"
    )
    score.add_argument(
        "--k", type=int, default=3, help="neighbour for precision and recall, default %(default)s"
    )
    score.set_defaults(run=_score)
    for part in (train, score):
        part.add_argument(
            "--data", type=Path, required=True, help="folder that holds train/ and val/"
        )
    return parser


@command
def main() -> None:
    """Parse the command line and run the chosen command."""
    args = _parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
