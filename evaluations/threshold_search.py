"""torchrun -m evaluations.threshold_search --ckpt RUN --metrics REF.npz [--write DIR] [FLAGS]

Interval search of DiffMoE's threshold (Section 3.4, Table 10): samples and scores one set for each
gamma and one with the dynamic thresholds, prints C_infer and FID, draws them (as Fig. 7) and names
the best threshold whose C_infer is at most 1. The picture lies in the folder of the run. FLAGS are
those of sample_ddp.py.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure

from config.load import dump_config
from core.distributed import NO_HURRY, processes
from core.errors import UserError, command
from core.files import complete_folder
from core.limits import check_new_folder
from core.logging import get_logger
from evaluations.compare import markdown, read_rows
from evaluations.figures import save_figure
from evaluations.sampled import flags_parser
from evaluations.sweep import Combination, flags_of, run_sets
from models.pretrained import CONFIG_FILE, Pretrained, load_pretrained
from models.sealed import MANIFEST_FILE, seal
from sampling.needs import NotingParser
from sampling.sets import read_set, set_hash, shared_name

log = get_logger("evaluations.threshold_search")

GAMMAS = (
    *("0.999", "0.99", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1"),
    *("1e-2", "1e-3", "1e-4", "1e-5", "1e-6", "1e-7", "1e-8", "1e-9", "0.0"),
)
"""Of Table 10."""


def combinations(gammas: tuple[str, ...] = GAMMAS) -> list[Combination]:
    """One for each threshold, and the dynamic ones."""
    fixed = [{"inference": "fixed", "fixed_threshold": gamma} for gamma in gammas]
    return [*fixed, {"inference": "dynamic"}]


def best_of(rows: list[dict], score: str) -> dict | None:
    """The row of the lowest score among those of C_infer at most 1."""
    cheap = [row for row in rows if row["C_infer"] <= 1]
    return min(cheap, key=lambda row: row[score], default=None)


def figure_of(rows: list[dict], score: str) -> Figure:
    """Score against capacity: thresholds in blue, the dynamic ones in red."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(rows[:-1], key=lambda row: row["C_infer"])
    points = [row["C_infer"] for row in ordered], [row[score] for row in ordered]
    axes.plot(*points, marker="o", ms=4, lw=0.8, color="tab:blue", label="one threshold")
    dynamic = rows[-1]
    axes.scatter(
        dynamic["C_infer"], dynamic[score], color="tab:red", zorder=3, label="dynamic thresholds"
    )
    axes.axvline(1.0, color="grey", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="C_infer", ylabel=score)
    axes.legend(frameon=False)
    return figure


def write_checkpoint(pretrained: Pretrained, rule: str, out: Path) -> None:
    """A copy of a checkpoint whose config routes by `rule`, `fixed GAMMA` or `dynamic`.

    Raises:
        UserError: `out` exists.
    """
    name, _, gamma = rule.partition(" ")
    changes = {"inference": name} | ({"fixed_threshold": float(gamma)} if gamma else {})
    config = pretrained.config
    layer = dataclasses.replace(config.model.feed_forward, **changes)
    model = dataclasses.replace(config.model, feed_forward=layer)
    with complete_folder(out) as folder:
        shutil.copytree(pretrained.path, folder, dirs_exist_ok=True)
        (folder / MANIFEST_FILE).unlink()
        (folder / CONFIG_FILE).write_text(dump_config(dataclasses.replace(config, model=model)))
        seal(folder)


def _parser() -> NotingParser:
    parser = flags_parser("evaluations.threshold_search", __doc__)
    parser.hide("inference", "inference_capacity", "fixed_threshold")
    parser.add_argument("--gammas", default=",".join(GAMMAS), help="default: those of Table 10")
    parser.add_argument("--write", type=Path, help="checkpoint folder to write with the best one")
    parser.require("ckpt", "metrics")
    return parser


def _picture(paths: list[Path]) -> Path:
    """Beside the sets, named by what they share, and by all of them and their reference."""
    found = [read_set(path) for path in paths]
    name = shared_name([folder.path.name for folder, _ in found])
    marks = [[r["set_sha256"], r["scored"]["reference_sha256"]] for _, r in found]
    digest = set_hash({"sets": marks})[:8]
    return found[0][0].path.parent / f"threshold_search-{name}-{digest}.png"


@command
def main() -> None:
    """Parse the command line, search, print and draw."""
    parser, argv = _parser(), sys.argv[1:]
    flags = parser.parse_args(argv)
    if flags.write is not None:
        check_new_folder("--write", flags.write)
    chosen = flags_of(parser, argv, combinations(tuple(flags.gammas.split(","))))
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as group:
        paths = run_sets(chosen, group)
        if not group.is_main:
            return
        rows = read_rows(paths)
        score = "FID" if rows[0]["FID"] is not None else "FD-digits"
        shown = [{k: row[k] for k in ("inference", "C_infer", score)} for row in rows]
        sys.stdout.write(markdown(shown) + "\n")
        picture = _picture(paths)
        save_figure(figure_of(rows, score), picture)
        log.info("%s", picture)
        best = best_of(rows, score)
        if best is None:
            raise UserError("threshold_search: no threshold gives C_infer of at most 1")
        sys.stdout.write(f"\nbest with C_infer <= 1: {best['inference']}\n")
        if flags.write is not None:
            write_checkpoint(load_pretrained(flags.ckpt), best["inference"], flags.write)
            log.info("%s", flags.write)


if __name__ == "__main__":
    main()
