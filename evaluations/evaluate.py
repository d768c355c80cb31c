"""python -m evaluations.evaluate REF.npz SAMPLES

Score generated images against a reference: FID, sFID, IS, precision and recall with the definitions
of ADM's evaluator (Dhariwal & Nichol 2021), without TensorFlow.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from core.command_line import positive
from core.errors import ConfigError, command
from core.files import complete_file
from core.limits import check_memory, check_out_file
from evaluations.features import (
    EXTRACTORS,
    Extractor,
    Network,
    build_extractor,
    network_of,
    read_samples,
)
from evaluations.given import Source, check_reference, check_samples, given, source_of
from evaluations.inception import SIDE
from evaluations.reference import read_reference
from evaluations.scoring import (
    METRICS,
    PR_MODES,
    Comparison,
    chosen_metrics,
    evaluate,
    settings_of,
)
from sampling.needs import NotingParser, refuse_typed


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


def check_network_flags(flags: argparse.Namespace) -> None:
    """Refuse weights of the network that is not used.

    Raises:
        ConfigError: naming the flag.
    """
    other = ("inception_weights", "inception_sha256")
    other = other if flags.features == "digits" else ("classifier",)
    wanted = "inception" if flags.features == "digits" else "digits"
    refuse_typed(flags, other, f"does nothing here; it needs --features {wanted}")


def network_from(flags: argparse.Namespace) -> Network:
    """What is known of the network that the flags name, before its weights are read."""
    return network_of(flags.features, _weights(flags), flags.inception_sha256)


def device_of(flags: argparse.Namespace) -> torch.device:
    """The device that --device names."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.device == "cuda" and found == "cpu":
        raise ConfigError("--device: cuda is not available on this machine; allowed: auto, cpu")
    return torch.device(found if flags.device == "auto" else flags.device)


def check_batch_size(
    flags: argparse.Namespace, images: int, network: Network, device: torch.device
) -> None:
    """Refuse a --batch-size whose inputs alone do not fit in memory.

    Raises:
        ConfigError: naming both numbers.
    """
    size = 4 * 3 * (network.side or SIDE) ** 2  # one image as the network sees it, float32
    check_memory("--batch-size", min(flags.batch_size, images), size, device)


def extractor_from(flags: argparse.Namespace, device: torch.device) -> Extractor:
    """The network that the flags name."""
    return build_extractor(flags.features, _weights(flags), flags.inception_sha256, device)


def _weights(flags: argparse.Namespace) -> Path | None:
    return flags.classifier if flags.features == "digits" else flags.inception_weights


def _parse() -> argparse.Namespace:
    parser = NotingParser("evaluations.evaluate", __doc__)
    parser.add_argument("reference", type=Path, help=".npz with mu, sigma, mu_s, sigma_s, arr_0")
    parser.add_argument(
        "samples",
        type=Path,
        help="folder of a set, .npz with arr_0 or features, or a folder of images",
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


def _check(flags: argparse.Namespace, device: torch.device) -> Source:
    """Refuse what cannot be scored before any feature is computed, and find the samples."""
    metrics = chosen_metrics(flags.features, flags.metrics)
    if "pr" not in metrics:
        refuse_typed(flags, ["pr_mode"], "does nothing here; it needs --metrics pr")
    check_network_flags(flags)
    if flags.out is not None:
        check_out_file("--out", flags.out)
    network = network_from(flags)
    source = source_of(flags.samples, network)
    reference, samples = given(flags.reference, network), given(source.path, network)
    check_reference(reference, network, metrics)
    check_samples(samples, network, metrics)
    check_batch_size(flags, max(reference.count, samples.count), network, device)
    return source


@command
def main() -> None:
    """Parse the command line, score and print."""
    flags = _parse()
    device = device_of(flags)
    source = _check(flags, device)
    extractor = extractor_from(flags, device)
    metrics = list(chosen_metrics(flags.features, flags.metrics))
    reference = read_reference(flags.reference, extractor, flags.batch_size, images="pr" in metrics)
    samples = read_samples(source.path, extractor, flags.batch_size)
    comparison = Comparison(reference, samples, flags.features, flags.pr_mode)
    scores = evaluate(comparison, metrics)
    for name, value in scores.items():
        sys.stdout.write(f"{name}: {value:.6g}\n")
    if flags.out is not None:
        record = {"scores": scores, "samples": str(flags.samples), **source.hashes}
        record |= settings_of(comparison, extractor)
        with complete_file(flags.out) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
