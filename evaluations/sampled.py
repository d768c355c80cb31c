"""The work of sample_ddp.py: generate a set, and score it on the way where a reference is given."""

import argparse
import sys
from pathlib import Path

import numpy as np

from core.distributed import Processes
from core.errors import UserError
from core.files import complete_file
from core.logging import get_logger
from evaluations.evaluate import (
    METRICS,
    PR_MODES,
    Comparison,
    add_extractor_flags,
    evaluate,
    extractor_from,
    settings_of,
)
from evaluations.features import Extractor, Samples, open_npz
from evaluations.reference import read_reference
from sampling.command import Outcome, sample_from_checkpoint
from sampling.flags import sampling_parser

log = get_logger("evaluations.sampled")


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of sample_ddp.py."""
    parser = sampling_parser()
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--metrics", type=Path, metavar="REF.npz", help="reference to score the images against"
    )
    group.add_argument("--pr-mode", choices=PR_MODES, default="float32", help="default float32")
    add_extractor_flags(group)
    return parser.parse_args(argv)


def sample_and_score(flags: argparse.Namespace, processes: Processes) -> Path | None:
    """Generate the set that the flags ask for; with --metrics, its features and scores as well.

    Features are measured block by block where the images are made, and lie in
    `<name>.features.npz`, which `evaluations.evaluate` takes in place of the images.

    Returns:
        The JSON of the set, on the main process.

    Raises:
        UserError: when checkpoint, VAE, reference and flags do not fit each other.
    """
    if flags.metrics is None:
        if flags.save == "none":
            raise UserError("--save: none leaves nothing without --metrics REF.npz")
        outcome = sample_from_checkpoint(flags, processes)
        if outcome is not None:
            outcome.write_record()
        return None if outcome is None else outcome.record_path
    with open_npz(flags.metrics):  # hours before it is needed
        pass
    with processes.main_first():
        extractor = extractor_from(flags, processes.device)
    facts = {"features": extractor.name, "features_sha256": extractor.weights_hash}
    outcome = sample_from_checkpoint(flags, processes, extractor, facts)
    if outcome is not None:
        _score(flags, extractor, outcome)
    return None if outcome is None else outcome.record_path


def _score(flags: argparse.Namespace, extractor: Extractor, outcome: Outcome) -> None:
    """Keep the features, score them, and add the scores to the record."""
    result = outcome.result
    path = outcome.path.with_name(f"{outcome.path.name}.features.npz")
    with complete_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **result.features, labels=result.labels)
    reference = read_reference(flags.metrics, extractor)
    samples = Samples(result.features, result.labels)
    comparison = Comparison(reference, samples, extractor.name, flags.pr_mode)
    scores = evaluate(comparison, list(METRICS[extractor.name]))
    outcome.record |= {"scores": scores} | settings_of(comparison, extractor)
    outcome.write_record()
    log.info("%s: features of %d images", path, len(result.labels))
    for name, value in scores.items():
        sys.stdout.write(f"{name}: {value:.6g}\n")
