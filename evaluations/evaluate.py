"""python -m evaluations.evaluate REF.npz SAMPLES

Score generated images against a reference: FID, sFID, IS, precision and recall with the definitions
of ADM's evaluator (Dhariwal & Nichol 2021), without TensorFlow.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from core.command_line import Parser, positive
from core.errors import UserError, command, unknown_name
from core.files import complete_file
from evaluations.adm import BLOCK as ADM_BLOCK
from evaluations.adm import adm_precision_recall
from evaluations.digit_classifier import accuracy
from evaluations.features import EXTRACTORS, Extractor, Samples, build_extractor, read_samples
from evaluations.inception import probabilities
from evaluations.metrics import frechet_distance, inception_score, precision_recall, statistics
from evaluations.reference import Reference, read_reference

SPLIT = 5000
NEIGHBOUR = 3
PR_MODES = ("float32", "adm")


@dataclass(frozen=True)
class Comparison:
    """Samples, what they are compared with, and how.

    Attributes:
        reference: real images.
        samples: generated ones.
        extractor: name of the network whose features these are.
        pr_mode: `float32`, or `adm` for that evaluator's float16 distances.
    """

    reference: Reference
    samples: Samples
    extractor: str
    pr_mode: str = "float32"

    def of(self, features: str, metric: str) -> np.ndarray:
        """The samples' features of one kind.

        Raises:
            UserError: there are none.
        """
        if features not in self.samples.features:
            raise UserError(f"{metric}: the samples have no {features} features")
        return self.samples.features[features]

    def frechet(self, features: str, metric: str) -> dict[str, float]:
        """The Fréchet distance in one kind of features."""
        found = self.of(features, metric)
        reference = self.reference.statistics_of(features, metric)
        if len(reference[0]) != found.shape[1]:
            raise UserError(
                f"{metric}: {self.reference.path} has {len(reference[0])} features, the samples "
                f"{found.shape[1]}"
            )
        return {metric: frechet_distance(*reference, *statistics(found))}

    def inception_score(self) -> dict[str, float]:
        """Over contiguous splits of 5,000."""
        return {"IS": inception_score(probabilities(self.of("logits", "IS")), SPLIT)}

    def manifolds(self) -> dict[str, float]:
        """Precision and recall, k = 3."""
        pool = self.of("pool", "precision"), self.reference.pool_of("precision")
        score = adm_precision_recall if self.pr_mode == "adm" else precision_recall
        precision, recall = score(pool[1], pool[0], NEIGHBOUR)
        return {"precision": precision, "recall": recall}

    def accuracy(self) -> dict[str, float]:
        """Share of samples that the classifier takes for their class."""
        labels, logits = self.samples.labels, self.of("logits", "accuracy")
        if labels is None:
            raise UserError("accuracy: the samples have no labels")
        if labels.shape != (len(logits),) or not 0 <= labels.min() <= labels.max() < len(logits[0]):
            raise UserError(
                f"accuracy: needs a label in 0 ... {len(logits[0]) - 1} for each of the "
                f"{len(logits)} samples"
            )
        return {"accuracy": accuracy(logits, labels)}


METRICS: dict[str, dict[str, Callable[[Comparison], dict[str, float]]]] = {
    "inception": {
        "fid": lambda c: c.frechet("pool", "FID"),
        "sfid": lambda c: c.frechet("spatial", "sFID"),
        "is": Comparison.inception_score,
        "pr": Comparison.manifolds,
    },
    "digits": {
        "fd": lambda c: c.frechet("pool", "FD-digits"),
        "accuracy": Comparison.accuracy,
        "pr": Comparison.manifolds,
    },
}
"""What each extractor can score, by the names that --metrics takes."""


def evaluate(comparison: Comparison, metrics: list[str] | None = None) -> dict[str, float]:
    """Scores by name.

    Args:
        comparison: what is compared.
        metrics: names in METRICS of its extractor; None takes all.

    Raises:
        UserError: an unknown metric, or one that reference or samples cannot give.
    """
    known = METRICS[comparison.extractor]
    scores: dict[str, float] = {}
    for name in metrics or known:
        if name not in known:
            raise unknown_name("metrics", name, known)
        scores |= known[name](comparison)
    return scores


def settings_of(comparison: Comparison, extractor: Extractor) -> dict[str, object]:
    """Everything that the scores depend on, beside the images."""
    count = len(next(iter(comparison.samples.features.values())))
    reference = comparison.reference
    adm = {"pr_block": ADM_BLOCK} if comparison.pr_mode == "adm" else {}
    return {
        "reference": str(reference.path),
        "reference_sha256": reference.sha256,
        "reference_images": None if reference.pool is None else len(reference.pool),
        "num_samples": count,
        "features": extractor.name,
        "features_sha256": extractor.weights_hash,
        "is_split": SPLIT,
        "pr_k": NEIGHBOUR,
        "pr_mode": comparison.pr_mode,
        **adm,
        "dtype": "float32",
        "tf32": False,
        "torch": torch.__version__,
        "torch_fidelity": version("torch-fidelity"),
    }


def add_extractor_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which network gives the features."""
    add = parser.add_argument
    add("--features", choices=sorted(EXTRACTORS), default="inception", help="network")
    add("--inception-weights", type=Path, help="its weight file; downloaded by default")
    add("--inception-sha256", help="that the file must have; default: of the published one")
    add("--classifier", type=Path, help="weight file of --features digits")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how that network runs."""
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time")
    devices = ["auto", "cpu", "cuda"]
    parser.add_argument("--device", choices=devices, default="auto", help="auto: a GPU if any")


def extractor_from(flags: argparse.Namespace, device: torch.device | None = None) -> Extractor:
    """The network that the flags name, by default on the device that they name."""
    if device is None and flags.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device or torch.device(flags.device)
    digits = flags.features == "digits"
    weights = flags.classifier if digits else flags.inception_weights
    return build_extractor(flags.features, weights, flags.inception_sha256, device)


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.evaluate", __doc__)
    parser.add_argument("reference", type=Path, help=".npz with mu, sigma, mu_s, sigma_s, arr_0")
    parser.add_argument(
        "samples", type=Path, help=".npz with arr_0 or features, or a folder of images"
    )
    add_extractor_flags(parser)
    add_batch_flags(parser)
    names = "; ".join(f"{name}: {', '.join(known)}" for name, known in METRICS.items())
    parser.add_argument("--metrics", nargs="+", help=f"some of them; {names}")
    parser.add_argument(
        "--pr-mode", choices=PR_MODES, default="float32", help="adm: its float16 distances"
    )
    parser.add_argument("--out", type=Path, help="JSON with scores and settings")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, score and print."""
    flags = _parse()
    extractor = extractor_from(flags)
    metrics = flags.metrics or list(METRICS[flags.features])
    reference = read_reference(flags.reference, extractor, flags.batch_size, images="pr" in metrics)
    samples = read_samples(flags.samples, extractor, flags.batch_size)
    comparison = Comparison(reference, samples, flags.features, flags.pr_mode)
    scores = evaluate(comparison, metrics)
    for name, value in scores.items():
        sys.stdout.write(f"{name}: {value:.6g}\n")
    if flags.out is not None:
        record = {"scores": scores, "samples": str(flags.samples)}
        record |= settings_of(comparison, extractor)
        with complete_file(flags.out) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
