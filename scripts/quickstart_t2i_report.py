"""python scripts/quickstart_t2i_report.py runs/quickstart_t2i runs/quickstart_t2i_dense

Print the scores of a finished text-to-image quickstart: those of the real held-out scenes lie in
the first folder, those of the run in the second.
"""

import json
import sys
from pathlib import Path

from evaluations.geneval import read_results, summary, table


def main(shared: Path, run: Path) -> None:
    """Read the records and print a table for each guidance."""
    entries = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss/loss" in entry]
    rates = sorted(entry["images_per_second"] for entry in entries)
    write = sys.stdout.write
    write(f"\nsteps {entries[-1]['step']}, training images/s {rates[len(rates) // 2]:.0f} (median)")
    write(
        f", loss {entries[0]['loss/loss']:.4f} at first, {entries[-1]['loss/loss']:.4f} at last\n"
    )
    for path in (*sorted(run.glob("results_cfg*.jsonl")), shared / "heldout.jsonl"):
        scale = path.stem.removeprefix("results_cfg")
        title = "real held-out scenes" if path.stem == "heldout" else f"guidance {scale}"
        write(f"\n{title}:\n\n{table(summary(read_results(path)))}\n")
    grids = ", ".join(str(path) for path in sorted(run.glob("samples/*/*/grid.png")))
    write(
        f"\nPictures: {grids}; where the computation goes: experts.png and its like beside them\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
