"""python -m models.hub push RUN --repo NAME

Publishes a checkpoint on the Hugging Face hub: weights, config, the VAE and text encoder that it
needs where they are folders of this machine, and a model card of what it is, how it was trained and
what it scored. `--ckpt hub:NAME` takes it from there. Log in before: `hf auth login`.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from config.load import dump_config
from config.schema import Config
from core.command_line import Parser
from core.errors import UserError, command
from core.files import complete_folder, file_hash
from core.limits import check_new_folder
from core.logging import get_logger
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
from models.sealed import MANIFEST_FILE, check_seal, seal

CARD_FILE = "README.md"
RECORD_FILE, ARCHIVE_FILE = "set.json", "samples.npz"
PICTURES = {"grid.png": "samples.png", "maps.png": "routing.png"}
"""Pictures of a sample set, and their names in the repository."""
COPIED = {".json", ".safetensors", ".txt", ".model"}
"""Files of a VAE or a text encoder that travel: no pickles, no code."""
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
    (folder / CONFIG_FILE).write_text(dump_config(without_paths(checkpoint.config)))
    state = {key: checkpoint.state.get(key) for key in KEPT}
    (folder / STATE_FILE).write_text(json.dumps(_without_paths(state), indent=2) + "\n")
    seal(folder)  # what comes now may be edited there, and need not be downloaded
    for name, theirs in PICTURES.items():
        found = next((s.folder / name for s in scored if (s.folder / name).exists()), None)
        if found is not None:
            shutil.copy(found, folder / theirs)
    if with_samples:
        for one in scored:
            out = folder / "samples" / one.folder.name
            out.mkdir(parents=True)
            for name in (RECORD_FILE, ARCHIVE_FILE):
                shutil.copy(one.folder / name, out / name)
    facts = training_facts(checkpoint)
    pictures = [name for name in PICTURES.values() if (folder / name).exists()]
    text = card(checkpoint, weights, facts, scored, repo, licence, pictures)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _copy_parts(checkpoint: Checkpoint, folder: Path) -> None:
    """VAE and text encoder, where they are folders; ids of the hub are found by everybody."""
    latents = checkpoint.state["latents"] or {}
    text = latents.get("text") or {}
    carried = checkpoint.path / TEXT_FOLDER
    encoder = str(carried) if carried.is_dir() else text.get("encoder")
    parts = {VAE_FOLDER: checkpoint.config.data.vae_path, TEXT_FOLDER: encoder}
    for name, path in parts.items():
        if path is None or (not Path(path).is_dir() and path.count("/") == 1 and path[0] != "/"):
            continue
        if not Path(path).is_dir():
            raise UserError(f"{checkpoint.path}: its {name}, {path}, is not here; bring it back")
        (folder / name).mkdir()
        for file in sorted(Path(path).iterdir()):
            if file.suffix in COPIED:
                shutil.copy(file, folder / name / file.name)


def without_paths(config: Config) -> Config:
    """The config with names in the place of this machine's paths."""
    data = {
        name: Path(value).name
        for name, value in vars(config.data).items()
        if name.endswith("_path") and isinstance(value, str) and Path(value).is_dir()
    }
    return dataclasses.replace(
        config,
        run_dir=None if config.run_dir is None else f"runs/{Path(config.run_dir).name}",
        init_from=None if config.init_from is None else Path(config.init_from).name,
        data=dataclasses.replace(config.data, **data),
    )


def _without_paths(state: dict) -> dict:
    latents = state["latents"]
    if latents is None:
        return state
    texts = latents.get("text")
    if texts is not None and Path(texts["encoder"]).is_dir():
        texts = texts | {"encoder": Path(texts["encoder"]).name}
    path = latents["vae_path"]
    path = Path(path).name if path is not None and Path(path).is_dir() else path
    return state | {"latents": latents | {"vae_path": path, "text": texts}}


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
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Publish {repo}")
        return f"{api.endpoint}/{repo}"
    except (HfHubHTTPError, HTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--repo: {repo}: the hub did not take it: {reason}; log in by `hf auth login`, or "
            "write the folder by --dry-run DIR"
        ) from error


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
    flags, log = parse_flags(argv), get_logger("hub")
    if flags.repo.count("/") != 1:
        raise UserError(f"--repo: {flags.repo!r}; wanted: OWNER/NAME, such as someone/diffmoe-s")
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
