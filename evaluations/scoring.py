"""The scores: what each compares, what it needs, and the settings that it depends on."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch

from core.errors import ConfigError, UserError, unknown_name
from evaluations.adm import BLOCK as ADM_BLOCK
from evaluations.adm import adm_precision_recall
from evaluations.digit_classifier import accuracy
from evaluations.features import Extractor, Samples
from evaluations.inception import probabilities
from evaluations.metrics import frechet_distance, inception_score, precision_recall, statistics
from evaluations.reference import Reference

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


@dataclass(frozen=True)
class Metric:
    """A score, or two that come together.

    Attributes:
        label: its name for people.
        features: of the samples, that it looks at.
        reference: what it needs of the reference: `statistics` or `rows` of these features.
        score: computes it.
    """

    label: str
    features: str
    reference: Literal["statistics", "rows"] | None
    score: Callable[[Comparison], dict[str, float]]


_MANIFOLDS = Metric("precision", "pool", "rows", Comparison.manifolds)

METRICS: dict[str, dict[str, Metric]] = {
    "inception": {
        "fid": Metric("FID", "pool", "statistics", lambda c: c.frechet("pool", "FID")),
        "sfid": Metric("sFID", "spatial", "statistics", lambda c: c.frechet("spatial", "sFID")),
        "is": Metric("IS", "logits", None, Comparison.inception_score),
        "pr": _MANIFOLDS,
    },
    "digits": {
        "fd": Metric("FD-digits", "pool", "statistics", lambda c: c.frechet("pool", "FD-digits")),
        "accuracy": Metric("accuracy", "logits", None, Comparison.accuracy),
        "pr": _MANIFOLDS,
    },
}
"""What each extractor can score, by the names that --metrics takes."""


def chosen_metrics(extractor: str, names: list[str] | None) -> dict[str, Metric]:
    """The metrics `names` of an extractor, or all.

    Raises:
        ConfigError: an unknown one.
    """
    known = METRICS[extractor]
    for name in names or known:
        if name not in known:
            raise unknown_name("--metrics", name, known, ConfigError)
    return {name: known[name] for name in names or known}


def check_count(metric: Metric, where: object, count: int) -> None:
    """Refuse too few images for a metric that compares them with a reference.

    Raises:
        UserError: naming metric and number.
    """
    least = {None: 1, "statistics": 2, "rows": NEIGHBOUR + 1}[metric.reference]
    if count < least:
        raise UserError(f"{metric.label}: needs at least {least} images, {where} has {count}")


def evaluate(comparison: Comparison, metrics: list[str] | None = None) -> dict[str, float]:
    """Scores by name.

    Args:
        comparison: what is compared.
        metrics: names in METRICS of its extractor; None takes all.

    Raises:
        UserError: an unknown metric, or one that reference or samples cannot give.
    """
    scores: dict[str, float] = {}
    for metric in chosen_metrics(comparison.extractor, metrics).values():
        scores |= metric.score(comparison)
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
