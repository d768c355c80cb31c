"""What files say that they have, looked at before anything is computed or sampled."""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from core.npz import NpzReader
from evaluations.features import Network, image_batches, image_files, open_npz, read_image
from evaluations.reference import PAIRS, check_statistics
from evaluations.scoring import Metric, check_count
from sampling.marks import check_file, marks
from sampling.sets import SetFolder, hashes_of, read_set


@dataclass(frozen=True)
class Given:
    """What there is of images or of their features.

    Attributes:
        path: file or folder.
        count: of images, or rows of features; 0 where there are only statistics.
        features: width of each kind, stored or computed from images.
        statistics: width of each kind whose mean and covariance are stored.
        labels: how many; None without.
        names: of arrays.
    """

    path: Path
    count: int
    features: dict[str, int]
    statistics: dict[str, int] = field(default_factory=dict)
    labels: int | None = None
    names: frozenset[str] = frozenset()


def given(path: Path, network: Network) -> Given:
    """What a reference, a file of samples or a folder of images has for a network.

    Raises:
        UserError: no such file, arrays that are no images or statistics, or images of a size that
            the network does not take.
    """
    if path.is_dir():
        files = image_files(path)
        if network.side is not None:
            _check_side(files[0], read_image(files[0]).shape[:2], network)
        return Given(path, len(files), network.widths)
    with open_npz(path) as file:
        statistics, names = {}, frozenset(file.names)
        for kind, pair in PAIRS.items():
            if names.issuperset(pair):
                check_statistics(path, pair[0], *map(file.describe, pair))
                statistics[kind] = file.describe(pair[0])[0][0]
        labels = _rows(file, "labels")
        if "pool" in file.names:
            kinds = [kind for kind in ("pool", "spatial", "logits") if kind in file.names]
            features = {kind: _width(file, kind, path) for kind in kinds}
            return Given(path, _rows(file, "pool"), features, statistics, labels, names)
        if "arr_0" not in file.names:
            return Given(path, 0, {}, statistics, labels, names)
        _, count = image_batches(file, path, 1)
        _check_side(path, file.describe("arr_0")[0][1:3], network)
        return Given(path, count, network.widths, statistics, labels, names)


def _rows(file: NpzReader, name: str) -> int | None:
    shape = file.describe(name)[0] if name in file.names else ()
    return shape[0] if shape else None


def _width(file: NpzReader, kind: str, path: Path) -> int:
    shape, _ = file.describe(kind)
    if len(shape) != 2:
        raise UserError(f"{path}: {kind} must be features (N, D), got {shape}")
    return shape[1]


def _check_side(path: Path, size: tuple[int, int], network: Network) -> None:
    side = network.side
    if side is not None and tuple(size) != (side, side):
        raise UserError(
            f"{path}: --features {network.name} needs images of {side} x {side}, got {size}"
        )


def check_reference(found: Given, network: Network, metrics: dict[str, Metric]) -> None:
    """Refuse a reference that one of the metrics cannot use.

    Raises:
        UserError: naming metric and file.
    """
    if found.path.is_dir():
        raise UserError(f"{found.path}: is a folder; a reference is an .npz file")
    if not found.statistics and not found.features:
        raise UserError(
            f"{found.path}: no reference; needs mu and sigma, arr_0 or pool, and has "
            f"{', '.join(sorted(found.names)) or 'nothing'}"
        )
    for metric in metrics.values():
        if metric.reference is None:
            continue
        widths = found.features
        if metric.reference == "statistics":
            widths = widths | found.statistics
        if metric.features not in widths:
            lacks = f"neither {' and '.join(PAIRS[metric.features])} nor arr_0"
            if metric.reference == "rows":
                lacks = "no arr_0, images to compare with"
            raise UserError(f"{metric.label}: {found.path} has {lacks}")
        width, wanted = widths[metric.features], network.widths[metric.features]
        if width != wanted:
            raise UserError(
                f"{metric.label}: {found.path} has {width} features, the samples {wanted}"
            )
        stored = metric.reference == "statistics" and metric.features in found.statistics
        if not stored:
            check_count(metric, found.path, found.count)


def check_samples(found: Given, network: Network, metrics: dict[str, Metric]) -> None:
    """Refuse samples that one of the metrics cannot use.

    Raises:
        UserError: naming metric and file.
    """
    if not found.features:
        names = ", ".join(sorted(found.names))
        raise UserError(f"{found.path}: has no arr_0 and no pool, but {names}")
    for metric in metrics.values():
        if metric.features not in found.features:
            raise UserError(
                f"{metric.label}: the samples have no {metric.features} features; {found.path}"
            )
        width, wanted = found.features[metric.features], network.widths[metric.features]
        if width != wanted:
            raise UserError(
                f"{metric.label}: {found.path} has {width} features, {network.name} {wanted}"
            )
        check_count(metric, found.path, found.count)
        if metric.label == "accuracy":
            check_labels(found.labels, found.count, network)


def check_labels(labels: int | None, count: int, network: Network) -> None:
    """Refuse samples without a class each.

    Raises:
        UserError: saying what accuracy needs.
    """
    if labels is None:
        raise UserError("accuracy: the samples have no labels")
    if labels != count:
        raise UserError(
            f"accuracy: needs a label in 0 ... {network.widths['logits'] - 1} for each of the "
            f"{count} samples"
        )


@dataclass(frozen=True)
class Source:
    """Where the samples of a path are.

    Attributes:
        path: `.npz` or folder of images.
        hashes: of checkpoint and set, where they are those of a set.
    """

    path: Path
    hashes: dict[str, str] = field(default_factory=dict)


def source_of(path: Path, network: Network) -> Source:
    """Where the features or images of a set, a file or a folder are.

    Of a set, its features by this network where it has them, else its images.

    Raises:
        UserError: a file that does not belong to the set beside it, features of another network,
            or a set that kept nothing.
    """
    folder = SetFolder(path)
    if not folder.record.is_file() and SetFolder(path.parent).record.is_file():
        folder = SetFolder(path.parent)
    if not folder.record.is_file() or path not in (folder.path, *_kept(folder)):
        if path.is_file():
            _check_network(path, network)
        return Source(path)
    _, record = read_set(folder.path)
    if path == folder.path:
        path = kept_of(folder, network)
    if path.is_file():
        check_file(path, record)
        _check_network(path, network)
    return Source(path, hashes_of(record))


def kept_of(folder: SetFolder, network: Network) -> Path:
    """Features of a set by this network, or its images.

    Raises:
        UserError: there is neither.
    """
    features, *images = _kept(folder)
    if features.exists() and marks(features).get("features_sha256") == network.weights_hash:
        return features
    for path in images:
        if path.exists():
            return path
    raise UserError(
        f"--metrics: {folder.path} keeps neither images nor features of {network.name} "
        f"{network.weights_hash[:12]}...; sample with --overwrite to make it again"
    )


def _kept(folder: SetFolder) -> tuple[Path, Path, Path]:
    return folder.features, folder.archive, folder.images


def _check_network(path: Path, network: Network) -> None:
    """Features say whose they are, where `sample_ddp.py` wrote them."""
    with open_npz(path):
        pass
    found = marks(path)
    name, digest = found.get("features"), found.get("features_sha256")
    if digest is not None and digest != network.weights_hash:
        raise UserError(
            f"{path}: features of {name} {digest[:12]}..., not of {network.name} "
            f"{network.weights_hash[:12]}..."
        )
