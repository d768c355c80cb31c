"""python scripts/quickstart_report.py runs/quickstart

Print the table of a finished quickstart from the records that its stages wrote.
"""

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    """Read the records below `run` and print one line for each figure."""
    entries = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    score = json.loads((run / "score.json").read_text())
    files = {json.loads(p.read_text())["cfg_scale"]: p for p in run.glob("samples/*.json")}
    records = {scale: json.loads(path.read_text()) for scale, path in files.items()}
    scores = {scale: score["files"][str(path.with_suffix(".npz"))] for scale, path in files.items()}
    rates = sorted(entry["images_per_second"] for entry in entries)
    rows = [
        ("training images", f"{score['settings']['train_images']}"),
        ("steps", f"{entries[-1]['step']}"),
        (f"loss, first {entries[0]['step']} steps", f"{entries[0]['loss/loss']:.4f}"),
        ("loss, last steps", f"{entries[-1]['loss/loss']:.4f}"),
        ("training images/s (median)", f"{rates[len(rates) // 2]:.0f}"),
    ]
    for scale in sorted(records):
        capacity = records[scale]["capacity_infer"]
        rows.append((f"mean C_infer, guidance {scale:g}", f"{capacity:.3f}"))
    rows.append(("classifier on held-out digits", f"{score['heldout_accuracy']:.4f}"))
    for scale in sorted(scores):
        row, count = scores[scale], scores[scale]["samples"]
        rows += [
            (f"class accuracy of {count}, guidance {scale:g}", f"{row['accuracy']:.4f}"),
            (f"precision, guidance {scale:g}", f"{row['precision']:.4f}"),
            (f"recall, guidance {scale:g}", f"{row['recall']:.4f}"),
            (f"FD-digits, guidance {scale:g}", f"{row['FD-digits']:.3f}"),
        ]
    rows.append(
        ("FD-digits, training to held-out", f"{score['train_to_heldout']['FD-digits']:.3f}")
    )
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("\n" + "\n".join(f"{n:<{width}}  {v:>8}" for n, v in rows) + "\n")
    grids = ", ".join(str(path.with_suffix(".png")) for _, path in sorted(files.items()))
    sys.stdout.write(f"\nPictures: {grids}\nTensorBoard: tensorboard --logdir {run / 'train'}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
