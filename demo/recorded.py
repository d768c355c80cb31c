"""A recorded set of samples, for machines that cannot run the model."""

from pathlib import Path

import numpy as np

from config.load import build_config
from core.errors import UserError
from demo.drawn import Drawn
from evaluations.capacity import CapacityRun, by_class, groups_of, images_of, over_classes, read_run
from sampling.pipeline import expert_cost

MOST_SHOWN = 5
"""Images of a class."""


def read(path: Path) -> tuple[Drawn, CapacityRun]:
    """A set that `sample_ddp.py --capacity` left, as the page shows it.

    Raises:
        UserError: no such set, or a damaged one.
    """
    try:
        run = read_run(path)
        return _drawn(run), run
    except (KeyError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: the record is damaged: {error}") from error


def _drawn(run: CapacityRun) -> Drawn:
    maps = run.table.maps.astype(np.float32)  # (T, M, S)
    count = maps.shape[1]
    images = images_of(run, count)
    if images is None:
        side = round(maps.shape[-1] ** 0.5)
        images = np.zeros((count, 4 * side, 4 * side, 3), np.uint8)
    shares = over_classes(run.table).sum(axis=-1)  # (T, 2, L)
    lines = np.nanmean(shares, axis=1)
    _, names = groups_of(run)
    top = max(1.0, float(np.quantile(maps, 0.995)))
    return Drawn(
        f"{run.record['run']}, {run.folder.path.name}",
        [names[label] for label in run.labels[:count]],
        images[None],
        images,
        [maps],
        lines,
        None,
        top,
        expert_cost(build_config(run.record["config"]).model),
    )


def classes(run: CapacityRun) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names, C_infer (1,) and some images (n, H, W, 3) of classes or prompts that have samples."""
    spent, (_, names) = by_class(run.table), groups_of(run)
    images = images_of(run, None)
    known = np.flatnonzero(np.isfinite(spent)).tolist()
    shown = []
    for label in known:
        there = np.flatnonzero(run.labels == label)[:MOST_SHOWN]
        shown.append(np.empty((0, 1, 1, 3), np.uint8) if images is None else images[there])
    return [names[label] for label in known], [spent[[label]] for label in known], shown
