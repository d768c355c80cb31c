"""python -m evaluations.capacity samples/RUN/SET [--out DIR]

Where the computation of a set of samples went: numbers and figures from what `sample_ddp.py
--capacity` recorded in its folder.
"""

import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from config.load import build_config
from core.command_line import Parser
from core.errors import UserError, command
from core.files import complete_file
from core.limits import check_out_folder
from core.logging import get_logger
from evaluations.features import open_npz
from evaluations.figures import class_figure, expert_figure, map_figure, save_figure, step_figure
from models.summary import summarize
from sampling.marks import check_file
from sampling.recorder import RoutingTable
from sampling.sets import Record, SetFolder, hashes_of, read_set

SIDES = ("conditional", "unconditional")


@dataclass
class CapacityRun:
    """What a set left.

    Attributes:
        folder: of the set.
        record: the settings in it.
        table: pairs by evaluation, half, layer, expert, and class or prompt.
        labels: (N,) class or prompt of each sample.
    """

    folder: SetFolder
    record: Record
    table: RoutingTable
    labels: np.ndarray


def read_run(path: Path) -> CapacityRun:
    """A set that was sampled with --capacity, by its folder or record.

    Raises:
        UserError: no set, one without such records, or files of another set.
    """
    folder, record = read_set(path)
    if not folder.routing.exists():
        raise UserError(f"{folder.path}: has no {folder.routing.name}; sample with --capacity")
    check_file(folder.routing, record)
    with open_npz(folder.routing) as file:
        arrays = {field.name: file.read(field.name) for field in fields(RoutingTable)}
        labels = file.read("labels")
    return CapacityRun(folder, record, RoutingTable(**arrays), labels)


def over_classes(table: RoutingTable) -> np.ndarray:
    """(T, 2, L, E) share of the tokens that each expert computed; NaN where a half was not run."""
    tokens = table.samples.sum(axis=-1)[:, :, None, None] * table.tokens[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return table.pairs.sum(axis=-1) / np.where(tokens > 0, tokens, np.nan)


def average(table: RoutingTable) -> float:
    """C_infer over layers and model evaluations (Eq. 15), every sample counting the same."""
    layers = table.pairs.sum(axis=(0, 1, 3, 4)) / (table.samples.sum() * table.tokens)
    return float(layers.mean())


def by_class(table: RoutingTable, half: int = 0) -> np.ndarray:
    """(K,) C_infer of each class, NaN for classes without a sample."""
    tokens = table.samples[:, half].sum(axis=0) * table.tokens[:, None]  # (L, K)
    pairs = table.pairs[:, half].sum(axis=(0, 2))
    return (pairs / np.where(tokens > 0, tokens, np.nan)).mean(axis=0)


def numbers(run: CapacityRun) -> dict[str, float]:
    """C_infer and activated parameters of a set."""
    shares = over_classes(run.table)
    found = {"C_infer (Eq. 15)": average(run.table)}
    for half, name in enumerate(SIDES):
        if run.table.samples[:, half].any():
            found[f"C_infer, {name}"] = float(np.nanmean(shares[:, half].sum(axis=-1)))
    model = build_config(run.record["config"]).model
    summary, capacity = summarize(model), found["C_infer (Eq. 15)"]
    found["activated parameters, counted"] = summary.activated(capacity)
    if summary.fits_equation:
        found["activated parameters, Eq. 40"] = summary.activated_by_equation(capacity)
    return found


def draw(run: CapacityRun, out: Path) -> list[Path]:
    """The figures of a set, as PNGs in `out`.

    Where every token had as many experts, only which ones they are tells something.
    """
    shares = over_classes(run.table)
    figures = {"experts": expert_figure(shares[:, 0])}
    if np.ptp(run.table.maps) > 0:
        figures |= _capacity_figures(run, shares)
    paths = []
    for name, figure in figures.items():
        paths.append(SetFolder(out).figure(name))
        save_figure(figure, paths[-1], hashes_of(run.record))
    return paths


def _capacity_figures(run: CapacityRun, shares: np.ndarray) -> dict[str, Figure]:
    """Capacity over steps, tokens and classes; `shares` are those of `over_classes`."""
    layers = shares.sum(axis=-1)  # (T, 2, L)
    kind, names = groups_of(run)
    figures = {
        "steps": step_figure(layers, SIDES),
        "maps": map_figure(run.table.times, run.table.maps, images_of(run, len(run.table.maps[0]))),
    }
    classes = by_class(run.table)
    if np.isfinite(classes).sum() > 1:
        figures["classes"] = class_figure(classes, names, run.labels, images_of(run, None), kind)
    return figures


def groups_of(run: CapacityRun) -> tuple[str, list[str]]:
    """What the samples were made of, classes or prompts, and their names."""
    prompts = run.record.get("prompts")
    if prompts is not None:
        return "prompts", [one if isinstance(one, str) else one["prompt"] for one in prompts]
    numbers = [str(i) for i in range(run.table.pairs.shape[-1])]
    return "classes", run.record.get("class_names") or numbers


def images_of(run: CapacityRun, count: int | None) -> np.ndarray | None:
    """The first images of the set, where it kept them."""
    path = run.folder.archive
    if not path.exists():
        return None
    check_file(path, run.record)
    with open_npz(path) as file:
        return file.read("arr_0")[:count]


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.capacity", __doc__)
    parser.add_argument("set", type=Path, help="folder of a set sampled with --capacity")
    parser.add_argument(
        "--out", type=Path, help="folder of numbers and figures; default: the set's"
    )
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, print the numbers and draw the figures."""
    flags = _parse()
    if flags.out is not None:
        check_out_folder("--out", flags.out)
    run = read_run(flags.set)
    own = run.folder.path
    out = own if flags.out is None else flags.out / run.record["run"] / own.absolute().name
    out.mkdir(parents=True, exist_ok=True)
    found = numbers(run)
    for name, value in found.items():
        text = f"{value / 1e6:.2f} M" if "parameters" in name else f"{value:.4f}"
        sys.stdout.write(f"{name}: {text}\n")
    with complete_file(SetFolder(out).numbers) as temporary:
        temporary.write_text(json.dumps(found | hashes_of(run.record), indent=2) + "\n")
    for path in draw(run, out):
        get_logger("evaluations.capacity").info("%s", path)


if __name__ == "__main__":
    main()
