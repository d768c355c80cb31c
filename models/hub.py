"""python -m models.hub push RUN --repo NAME

Publishes a checkpoint on the Hugging Face hub: weights, config, the VAE and text encoder that it
needs where they are folders of this machine, and a model card of what it is, how it was trained and
what it scored. `--ckpt hub:NAME` takes it from there. Log in before: `hf auth login`.
"""

import argparse
import dataclasses
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from config.load import build_config, dump_config, to_plain
from core.command_line import Parser
from core.errors import UserError, command
from core.files import complete_folder, file_hash
from core.limits import check_new_folder
from core.logging import get_logger
from data.vae import KNOWN_NAMES
from models.card import Scored, card, training_facts
from models.pretrained import (
    CONFIG_FILE,
    STATE_FILE,
    TEXT_FOLDER,
    VAE_FOLDER,
    Checkpoint,
    read_checkpoint,
    read_tensors,
    weights_path,
)
from models.remote import TEXT_FILES, VAE_FILES, in_one_line
from models.sealed import MANIFEST_FILE, check_seal, seal

log: logging.Logger = get_logger("hub")

CARD_FILE = "README.md"
RECORD_FILE, ARCHIVE_FILE = "set.json", "samples.npz"
PICTURES = {"grid.png": "samples.png", "maps.png": "routing.png"}
"""Pictures of a sample set, and their names in the repository."""
KEPT = ("step", "latents", "num_images")
"""Of a checkpoint's state: what sampling needs, not what resuming does."""


def write_repository(
    checkpoint: Checkpoint,
    weights: str,
    scored: list[Scored],
    repo: str,
    licence: str | None,
    with_samples: bool,
    folder: Path,
) -> None:
    """Fill an empty `folder` with what is published.

    Args:
        checkpoint: of the run.
        weights: which of its averages become `ema`, the weights that are loaded by default.
        scored: sample sets of it.
        repo: NAME on the hub.
        licence: of the weights, by the hub's names.
        with_samples: the sets' images too.
        folder: where to.
    """
    source = weights_path(checkpoint.path, weights)
    check_seal(checkpoint.path, (source.name, CONFIG_FILE, STATE_FILE))
    save_file(read_tensors(source), folder / "ema.safetensors")
    _copy_parts(checkpoint, folder)
    config = build_config(without_paths(to_plain(dataclasses.asdict(checkpoint.config))))
    (folder / CONFIG_FILE).write_text(dump_config(config))
    state = {key: checkpoint.state.get(key) for key in KEPT}
    (folder / STATE_FILE).write_text(json.dumps(without_paths(state), indent=2) + "\n")
    seal(folder)  # what comes now may be edited there, and need not be downloaded
    for name, theirs in PICTURES.items():
        found = next((s.folder / name for s in scored if (s.folder / name).exists()), None)
        if found is not None:
            shutil.copy(found, folder / theirs)
    for one in scored if with_samples else ():
        out = folder / "samples" / one.folder.name
        out.mkdir(parents=True)
        (out / RECORD_FILE).write_text(json.dumps(without_paths(one.record), indent=2) + "\n")
        shutil.copy(one.folder / ARCHIVE_FILE, out / ARCHIVE_FILE)
    facts = training_facts(checkpoint)
    pictures = [name for name in PICTURES.values() if (folder / name).exists()]
    text = card(checkpoint, weights, facts, scored, repo, licence, pictures)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _copy_parts(checkpoint: Checkpoint, folder: Path) -> None:
    """VAE and text encoder, where they are folders; ids of the hub are found by everybody."""
    text = (checkpoint.state["latents"] or {}).get("text") or {}
    carried = checkpoint.path / TEXT_FOLDER
    encoder = str(carried) if carried.is_dir() else text.get("encoder")
    vae = checkpoint.config.data.vae_path
    parts = {
        VAE_FOLDER: (KNOWN_NAMES.get(vae, vae), VAE_FILES),
        TEXT_FOLDER: (encoder, TEXT_FILES),
    }
    for name, (path, patterns) in parts.items():
        if path is None:
            continue
        if Path(path).is_dir():
            _copy_part(Path(path), folder / name, patterns)
        elif is_id(path):
            log.info("%s: %s is taken for an id of the hub, and stays there", name, path)
        else:
            raise UserError(f"{checkpoint.path}: its {name}, {path}, is not here; bring it back")


def _copy_part(source: Path, out: Path, patterns: tuple[str, ...]) -> None:
    """The files of a folder that are read, without the paths that libraries leave in them."""
    out.mkdir()
    for file in sorted(source.iterdir()):
        if not any(file.match(pattern) for pattern in patterns):
            continue
        if "config" in file.name and file.suffix == ".json":
            values = json.loads(file.read_text())
            kept = {k: v for k, v in values.items() if k not in ("_name_or_path", "name_or_path")}
            (out / file.name).write_text(json.dumps(kept, indent=2) + "\n")
        else:
            shutil.copy(file, out / file.name)
    wanted = {"config.json"}
    for index in out.glob("*.index.json"):
        wanted |= set(json.loads(index.read_text())["weight_map"].values())
    missing = sorted(name for name in wanted if not (out / name).exists())
    if missing or not any(out.glob("*.safetensors")):
        lacking = missing[0] if missing else "weights in safetensors"
        raise UserError(f"{source}: has no {lacking}; it cannot be published")


PATHS = {"run_dir", "init_from", "checkpoint", "vae", "encoder", "text_encoder", "reference"}
PATHS |= {"inception_weights", "classifier", "captions"}
"""Keys, besides those that end with `_path`, that hold paths of a machine or ids of the hub."""


def without_paths(values: Any, key: str = "") -> Any:
    """Nested values with names in the place of this machine's paths."""
    if isinstance(values, dict):
        return {name: without_paths(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [without_paths(value, key) for value in values]
    if not isinstance(values, str) or not (key in PATHS or key.endswith("_path")):
        return values
    name = Path(values).name
    if key == "run_dir":
        return f"runs/{name}"
    return values if is_id(values) and not Path(values).exists() else name


def is_id(path: str) -> bool:
    """Whether a text has the form of an id of the hub, OWNER/NAME."""
    return path.count("/") == 1 and path[0] not in "/.~" and path[-1] != "/"


def read_scored(folders: list[Path], checkpoint: Checkpoint, with_samples: bool) -> list[Scored]:
    """The records of sample sets of this checkpoint.

    Raises:
        UserError: no set, one of another checkpoint, or one without its images.
    """
    found, own = [], file_hash(checkpoint.path / MANIFEST_FILE)
    for folder in folders:
        try:
            record = json.loads((folder / RECORD_FILE).read_text())
            theirs = record["checkpoint_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--samples: {folder} is no finished sample set ({RECORD_FILE}: {error})"
            ) from None
        if theirs != own:
            raise UserError(
                f"--samples: {folder} is of {record.get('checkpoint')}, not of {checkpoint.path}"
            )
        if with_samples and not (folder / ARCHIVE_FILE).exists():
            raise UserError(f"--with-samples: {folder} has no {ARCHIVE_FILE}")
        found.append(Scored(folder, record))
    return found


def upload(folder: Path, repo: str, private: bool) -> str:
    """Send a folder to the hub, as one commit; returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with in_one_line(f"--repo: {repo}", repo, "write the folder by --dry-run DIR"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Publish {repo}")
        return f"{api.endpoint}/{repo}"


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("models.hub", __doc__)
    parser.add_argument("action", choices=["push"], help="push: publish a checkpoint")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint's")
    add = parser.add_argument
    add("--repo", required=True, help="NAME on the hub, such as someone/diffmoe-s")
    add("--weights", default="ema", help="which average: ema, ema_<decay>, or the live model")
    add("--samples", type=Path, nargs="+", default=[], help="sample sets whose scores are told")
    add("--with-samples", action="store_true", help="publish the images of these sets too")
    add("--licence", "--license", help="of the weights, such as mit or cc-by-nc-4.0")
    add("--private", action="store_true", help="make a repository that only you can see")
    add("--dry-run", type=Path, metavar="DIR", help="write the same folder here, send nothing")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Write the repository, and send it unless it is a dry run."""
    flags = parse_flags(argv)
    if flags.repo.count("/") != 1:
        raise UserError(f"--repo: {flags.repo!r}; wanted: OWNER/NAME, such as someone/diffmoe-s")
    if flags.licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", flags.licence):
        raise UserError(
            f"--licence: {flags.licence!r}; wanted: an id of the hub, such as mit or cc-by-nc-4.0"
        )
    if flags.dry_run is not None:
        check_new_folder("--dry-run", flags.dry_run)
    checkpoint = read_checkpoint(flags.run, flags.weights)
    scored = read_scored(flags.samples, checkpoint, flags.with_samples)
    how = flags.repo, flags.licence, flags.with_samples
    if flags.dry_run is not None:
        with complete_folder(flags.dry_run) as folder:
            write_repository(checkpoint, flags.weights, scored, *how, folder)
        log.info("%s: what would be sent to %s", flags.dry_run, flags.repo)
        return
    with tempfile.TemporaryDirectory() as name:
        write_repository(checkpoint, flags.weights, scored, *how, Path(name))
        address = upload(Path(name), flags.repo, flags.private)
    log.info("%s; take it by --ckpt hub:%s", address, flags.repo)


if __name__ == "__main__":
    main()
