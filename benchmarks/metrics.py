"""python -m benchmarks.metrics [--samples 50000] [--references 10000] [--out FILE.json]

Seconds and extra memory of the Fréchet distance and of precision and recall at the size of FID-50K,
on random features.
"""

import resource
import time
from collections.abc import Callable

import torch

from benchmarks.measure import machine, report
from core.command_line import Parser, file_to_write, positive
from core.errors import command
from evaluations.metrics import frechet_distance, precision_recall, statistics

WIDTH = 2048


def measured(name: str, call: Callable[[], object]) -> dict[str, object]:
    """A row: seconds of one call and what it added to the largest resident memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"what": name, "seconds": seconds, "GiB more": more / 2**20}


@command
def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure and report."""
    parser = Parser("benchmarks.metrics", __doc__)
    parser.add_argument("--samples", type=positive, default=50_000, help="images, N")
    parser.add_argument("--references", type=positive, default=10_000, help="reference images, M")
    parser.add_argument("--width", type=positive, default=WIDTH, help="of the features")
    parser.add_argument("--out", type=file_to_write, help="JSON file to write")
    flags = parser.parse_args(argv)
    draws = torch.Generator().manual_seed(0)
    shape = (flags.samples, flags.width)
    # Skewed and not negative, as pool_3's are.
    samples = torch.randn(shape, generator=draws).relu_()
    references = torch.randn((flags.references, flags.width), generator=draws).relu_().add_(0.01)
    found: dict[str, tuple] = {}
    rows = [
        measured("statistics of the samples", lambda: found.update(s=statistics(samples))),
        measured("statistics of the references", lambda: found.update(r=statistics(references))),
        measured("Fréchet distance", lambda: frechet_distance(*found["r"], *found["s"])),
        measured("precision and recall", lambda: precision_recall(references, samples)),
    ]
    settings = {k: v for k, v in vars(flags).items() if k != "out"} | machine(torch.device("cpu"))
    title = f"{flags.samples} samples, {flags.references} references, {flags.width} features"
    report(title, rows, settings, flags.out)


if __name__ == "__main__":
    main()
