"""The work of sample_ddp.py: generate a set, and score it on the way where a reference is given."""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.files import file_hash
from core.logging import get_logger
from evaluations.evaluate import (
    add_extractor_flags,
    check_network_flags,
    extractor_from,
    network_from,
)
from evaluations.features import Extractor, Network, Samples, read_samples
from evaluations.given import check_reference, given, kept_of
from evaluations.reference import read_reference
from evaluations.scoring import (
    METRICS,
    PR_MODES,
    Comparison,
    Metric,
    check_count,
    chosen_metrics,
    evaluate,
    settings_of,
)
from sampling.command import Features, sample_set, write_features
from sampling.flags import ABOUT, sampling_parser
from sampling.marks import check_file
from sampling.needs import NotingParser, refuse_typed
from sampling.request import Request, request_of
from sampling.sets import Record, SetFolder, hashes_of

log = get_logger("evaluations.sampled")

SCORING = ("pr_mode", "features", "inception_weights", "inception_sha256", "classifier")
"""Flags that need --metrics."""


def flags_parser(program: str = "sample_ddp.py", doc: str = ABOUT) -> NotingParser:
    """The flags of sample_ddp.py, for it and for programs that make several sets.

    Args:
        program: that takes them.
        doc: of the program.
    """
    parser = sampling_parser(program, doc)
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--metrics", type=Path, metavar="REF.npz", help="reference to score the images against"
    )
    group.add_argument("--pr-mode", choices=PR_MODES, default="float32", help="default float32")
    add_extractor_flags(group)
    return parser


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of sample_ddp.py."""
    return flags_parser().parse_args(argv)


def checked(flags: argparse.Namespace, processes: Processes) -> Request:
    """What the flags ask for, once everything is refused that needs no weights to be refused.

    Raises:
        ConfigError: when checkpoint, reference, flags and machine do not fit each other; on every
            process.
    """
    try:
        request = request_of(flags, processes.device)
        _check_scores(flags, request)
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(str(error)) from error
    return request


def _check_scores(flags: argparse.Namespace, request: Request) -> None:
    if flags.metrics is None:
        refuse_typed(flags, SCORING, "does nothing here; it needs --metrics REF.npz")
        if flags.save == "none":
            raise ConfigError("--save: none leaves nothing without --metrics REF.npz")
        return
    check_network_flags(flags)
    network, metrics = network_from(flags), chosen_metrics(flags.features, None)
    _check_images(request, network, metrics)
    check_reference(given(flags.metrics, network), network, metrics)


def _check_images(request: Request, network: Network, metrics: dict[str, Metric]) -> None:
    """The network must take the images that the checkpoint makes, and so many of them."""
    config, count = request.checkpoint.config, request.protocol.num_fid_samples
    size, classes = config.data.image_size, config.model.num_classes
    if "accuracy" in metrics and request.prompts is not None:
        raise ConfigError(
            f"--features: {network.name} tells classes apart, which prompts are not; allowed: "
            "inception, or python -m evaluations.scene_scores for scenes of digits"
        )
    if network.side not in (None, size):
        raise ConfigError(
            f"--features: {network.name} needs images of {network.side} x {network.side}, "
            f"{request.checkpoint.path} makes {size} x {size}"
        )
    if "accuracy" in metrics and classes > network.widths["logits"]:
        raise ConfigError(
            f"accuracy: {request.checkpoint.path} has {classes} classes, the classifier "
            f"{network.widths['logits']}"
        )
    for metric in metrics.values():
        check_count(metric, "--num-fid-samples", count)


def sample_and_score(flags: argparse.Namespace, processes: Processes) -> Path:
    """Generate the set that the flags ask for; with --metrics, its features and scores as well.

    Features are measured block by block where the images are made, and stay beside them. A set
    that was finished before is scored from what it kept.

    Returns:
        The record of the set.

    Raises:
        UserError: when checkpoint, VAE, reference and flags do not fit each other.
    """
    request = checked(flags, processes)
    if flags.metrics is None:
        return sample_set(request, processes, then=_show).record
    network = network_from(flags)
    extractor = functools.cache(lambda: extractor_from(flags, processes.device))

    def score(folder: SetFolder, record: Record) -> None:
        asked = {
            "reference_sha256": file_hash(flags.metrics),
            "pr_mode": flags.pr_mode,
            **network.about,
        }
        if any(record.get("scored", {}).get(name) != value for name, value in asked.items()):
            record = record | _scores(request, folder, record, network, extractor())
            folder.write_record(record)
        _show(folder, record)

    features = Features(network.about, extractor)
    return sample_set(request, processes, features, score).record


def _scores(
    request: Request, folder: SetFolder, record: Record, network: Network, extractor: Extractor
) -> Record:
    """Scores of a finished set, and what they depend on; its features are kept."""
    kept, flags = kept_of(folder, network), request.flags
    if kept.is_file():
        check_file(kept, record)
    samples = read_samples(kept, extractor, request.protocol.per_proc_batch_size)
    if kept != folder.features:
        wanted = request.wanted()
        labels = [wanted.group(i) for i in range(record["num_samples"])]
        samples = Samples(samples.features, np.array(labels))
        about = hashes_of(record) | network.about
        write_features(folder, samples.features, samples.labels, about)
    reference = read_reference(flags.metrics, extractor)
    comparison = Comparison(reference, samples, network.name, flags.pr_mode)
    scores = evaluate(comparison, list(METRICS[network.name]))
    log.info("%s: features of %d images", folder.features, len(samples.labels))
    return {"scores": scores, "scored": settings_of(comparison, extractor)}


def _show(folder: SetFolder, record: Record) -> None:
    """Print the scores that a set has."""
    for name, value in record.get("scores", {}).items():
        sys.stdout.write(f"{name}: {value:.6g}\n")
