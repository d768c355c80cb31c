"""A set of samples on the disk: where it lies, what is in its folder, and whose it is.

A set lies in `<sample-dir>/<run>/<set>/`. Its record, `set.json`, holds every setting, what was
measured, and two hashes that all files derived from it carry: of the checkpoint's manifest, and of
the settings.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from config.load import build_config, to_plain
from core.errors import ConfigError, UserError
from core.files import complete_file, sweep

RECORD_FILE = "set.json"
FIGURES = ("steps", "experts", "maps", "classes")
"""Of `evaluations.capacity`."""
HASHES = ("checkpoint_sha256", "set_sha256")
"""Names of what ties a file to its set."""

Record = dict[str, Any]


@dataclass(frozen=True)
class SetFolder:
    """The folder of a set, and the files in it."""

    path: Path

    @property
    def record(self) -> Path:
        """Settings, measurements and scores; where it is, the set is finished."""
        return self.path / RECORD_FILE

    @property
    def archive(self) -> Path:
        """`arr_0` (N, H, W, 3) uint8, as ADM's evaluator reads it, and `labels`."""
        return self.path / "samples.npz"

    @property
    def images(self) -> Path:
        """PNGs, in place of the archive."""
        return self.path / "images"

    def image(self, index: int) -> Path:
        """PNG of one sample."""
        return self.images / f"{index:06d}.png"

    @property
    def geneval(self) -> Path:
        """A folder for each prompt, as GenEval's evaluator reads them, in place of the archive."""
        return self.path / "geneval"

    def geneval_prompt(self, prompt: int) -> Path:
        """One line that says what is asked for."""
        return self.geneval / f"{prompt:05d}" / "metadata.jsonl"

    def geneval_image(self, prompt: int, number: int) -> Path:
        """PNG of one sample of a prompt."""
        return self.geneval / f"{prompt:05d}" / "samples" / f"{number:05d}.png"

    @property
    def grid(self) -> Path:
        """The first images as one picture."""
        return self.path / "grid.png"

    @property
    def features(self) -> Path:
        """Of the images, for scores."""
        return self.path / "features.npz"

    @property
    def routing(self) -> Path:
        """Where the computation went."""
        return self.path / "capacity.npz"

    @property
    def numbers(self) -> Path:
        """What `evaluations.capacity` makes of it."""
        return self.path / "capacity.json"

    def figure(self, name: str) -> Path:
        """One of FIGURES."""
        return self.path / f"{name}.png"

    @property
    def parts(self) -> Path:
        """Blocks of a set that is not finished."""
        return self.path / "parts"

    @property
    def plan(self) -> Path:
        """Settings of these blocks."""
        return self.parts / "settings.json"

    def part(self, first: int) -> Path:
        """The block that starts at index `first`."""
        return self.parts / f"{first:09d}.npz"

    def clear(self) -> None:
        """Remove the set, its record first, so that the rest never passes for finished."""
        files = (self.archive, self.grid, self.features, self.routing, self.numbers)
        for file in (self.record, *files, *map(self.figure, FIGURES)):
            file.unlink(missing_ok=True)
        for folder in (self.parts, self.images, self.geneval):
            shutil.rmtree(folder, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what killed processes left; for the owner of the folder's lock."""
        geneval = self.geneval.glob("*"), self.geneval.glob("*/samples")
        for folder in (self.path, self.parts, self.images, *chain(*geneval)):
            sweep(folder)
        if self.record.exists():
            shutil.rmtree(self.parts, ignore_errors=True)

    def is_finished(self, settings: Record, blocks: Record, overwrite: bool) -> bool:
        """Whether the set of these settings is there, all of it.

        Args:
            settings: plain ones, that decide the images; those that are left out are not compared.
            blocks: what the files of unfinished blocks hold besides.
            overwrite: whatever is here counts for nothing; `begin` still goes on with blocks of
                the same settings.

        Raises:
            ConfigError: a set of other settings is here, or one that cannot be read.
        """
        begun = self.plan.exists() or any(self.parts.glob("*.npz"))
        finished = self.record.exists()
        if overwrite or not (finished or begun):
            return False
        found, wanted = self.plan, settings | blocks
        if finished:
            found, wanted = self.record, settings
        try:
            other = differences(_completed(read_json(found)), wanted)
        except UserError as error:
            raise ConfigError(f"--sample-dir: {error}; --overwrite replaces the set") from error
        if other:
            what = "a set" if finished else "unfinished blocks"
            raise ConfigError(
                f"--sample-dir: {self.path} holds {what} of other settings: {'; '.join(other)}; "
                "--overwrite replaces it, another --sample-dir keeps both"
            )
        return finished

    def begin(self, settings: Record, blocks: Record) -> None:
        """Make room for blocks, unless those of the same settings are there.

        For the owner of the lock, who may remove what else is here.
        """
        wanted = settings | blocks
        try:
            if not self.record.exists() and not differences(read_json(self.plan), wanted):
                return
        except UserError:
            pass
        self.clear()
        self.parts.mkdir(parents=True)
        with complete_file(self.plan) as temporary:
            temporary.write_text(json.dumps(wanted))

    def write_record(self, record: Record) -> None:
        """Write the record: the set is finished."""
        with complete_file(self.record) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


def run_name(checkpoint: Path) -> str:
    """A name for the run that a checkpoint belongs to, for a folder and for tables.

    `runs/quickstart/train/checkpoints/step_0002000` gives `quickstart_train`: what comes after a
    folder `runs`, joined, or the run folder's own name. A checkpoint elsewhere gives its own, one
    of the hub the repository's.
    """
    folder = checkpoint.resolve() if checkpoint.is_symlink() else checkpoint.absolute()
    if folder.parent.name == "snapshots":  # a download from the hub
        return folder.parent.parent.name.removeprefix("models--").replace("--", "_")
    if folder.parent.name != "checkpoints":
        return folder.name
    parts = folder.parent.parent.parts
    last = len(parts) - 1 - parts[::-1].index("runs") if "runs" in parts else len(parts)
    return "_".join(parts[last + 1 :] or parts[-1:])


def _completed(record: Record) -> Record:
    """A record with the keys that configs have had since it was written, at their defaults."""
    try:
        config = build_config(record["config"])
    except (KeyError, ConfigError):  # what differs is said by whoever compares
        return record
    return record | {"config": json.loads(json.dumps(to_plain(asdict(config))))}


def set_hash(settings: Record) -> str:
    """SHA-256 of settings, whatever their order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hashes_of(record: Record) -> dict[str, str]:
    """What the files of the record's set carry."""
    return {name: record[name] for name in HASHES}


def differences(there: Record, here: Record) -> list[str]:
    """The first settings `here` that are other ones `there`, as `key is X there, Y here`."""
    there, here = _flat(there), _flat(here)
    texts = [
        f"{key} is {short(there.get(key))} there, {short(value)} here"
        for key, value in here.items()
        if there.get(key) != value
    ]
    more = [f"and {len(texts) - 2} more"] if len(texts) > 2 else []
    return texts[:2] + more


def _flat(settings: Record, before: str = "") -> Record:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def short(value: object) -> str:
    """A value as a line of an error shows it."""
    text = "nothing" if value is None else json.dumps(value).strip('"')
    return text if len(text) <= 24 else f"{text[:12]}..."


def read_set(path: Path) -> tuple[SetFolder, Record]:
    """A finished set, by its folder or its record.

    Raises:
        UserError: there is none.
    """
    folder = SetFolder(path.parent if path.name == RECORD_FILE else path)
    if not folder.record.is_file():
        begun = "; it is not finished" if folder.parts.is_dir() else ""
        raise UserError(f"{path}: no set of samples; wanted: a folder with {RECORD_FILE}{begun}")
    record = read_json(folder.record)
    missing = [name for name in (*HASHES, "config") if name not in record]
    if missing:
        raise UserError(f"{folder.record}: no record of a set of samples: no {missing[0]}")
    return folder, record


def read_json(path: Path) -> Record:
    """A file of settings.

    Raises:
        UserError: it is not readable, or holds none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not readable: holds no settings")
    return found


def shared_name(names: list[str]) -> str:
    """What the names of several sets have in common, for what is made of all of them."""
    first, *others = (name.split("-") for name in names)
    return "-".join(part for part in first if all(part in other for other in others))
