"""python scripts/quickstart_report.py runs/quickstart runs/quickstart_dsmoe

Print the table of a finished quickstart from the records that its stages wrote: those that all
variants share lie in the first folder, those of the variant in the second.
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open


def main(shared: Path, run: Path) -> None:
    """Read the records and print one line for each figure."""
    entries = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    sets = sorted(run.glob("samples/*/*/set.json"))
    records = {path: json.loads(path.read_text()) for path in sets}
    heldout = json.loads((shared / "heldout.json").read_text())
    rates = sorted(entry["images_per_second"] for entry in entries)
    rows = [
        ("training images", f"{len(list((shared / 'images/train').rglob('*.png')))}"),
        ("steps", f"{entries[-1]['step']}"),
        (f"loss, first {entries[0]['step']} steps", f"{entries[0]['loss/loss']:.4f}"),
        ("loss, last steps", f"{entries[-1]['loss/loss']:.4f}"),
        ("training images/s (median)", f"{rates[len(rates) // 2]:.0f}"),
    ]
    for path, record in records.items():
        if "scores" not in record:  # stopped in between
            sys.exit(f"error: {path} has no scores; remove {path.parent} and start again")
        scores, at = record["scores"], f"guidance {record['cfg_scale']:g}"
        rows += [
            (f"mean C_infer, {at}", f"{record['capacity_infer']:.3f}"),
            (f"class accuracy of {record['num_samples']}, {at}", f"{scores['accuracy']:.4f}"),
            (f"precision, {at}", f"{scores['precision']:.4f}"),
            (f"recall, {at}", f"{scores['recall']:.4f}"),
            (f"FD-digits, {at}", f"{scores['FD-digits']:.3f}"),
        ]
    rows.append(("FD-digits, training to held-out", f"{heldout['scores']['FD-digits']:.3f}"))
    with safe_open(shared / "classifier.safetensors", "np") as file:
        (about,) = map(json.loads, file.metadata().values())
    rows.append(("classifier on held-out digits", f"{about['record']['heldout_accuracy']:.4f}"))
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("\n" + "\n".join(f"{n:<{width}}  {v:>8}" for n, v in rows) + "\n")
    grids = ", ".join(str(path.with_name("grid.png")) for path in records)
    grids += "; where the computation goes: experts.png and its like beside them"
    sys.stdout.write(f"\nPictures: {grids}\nTensorBoard: tensorboard --logdir {run / 'train'}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
