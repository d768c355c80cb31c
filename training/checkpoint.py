"""Checkpoints of a run: what `models.pretrained` reads, and what training needs to go on."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from config.load import dump_config, load_config
from config.schema import Config
from core.errors import UserError
from core.files import complete_folder
from models.dit import DiT
from models.pretrained import (
    CONFIG_FILE,
    STATE_FILE,
    find_checkpoint,
    load_weights,
    newest_checkpoint,
    read_state,
    read_tensors,
    save_weights,
)
from training.ema import EMA
from training.optim import load_optimizer_tensors, optimizer_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
LABELS = ("label_embed.",)
HEAD = ("final.linear.",)


def save_checkpoint(
    config: Config,
    step: int,
    model: DiT,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    latents: dict,
) -> Path:
    """Write <run_dir>/checkpoints/step_<step>, under another name until it is complete.

    Args:
        config: resolved.
        step: optimizer steps taken.
        model, ema, optimizer: their states are written.
        latents: facts of the latents trained on, for `state.json`.
    """
    folder = Path(config.run_dir) / "checkpoints" / f"step_{step:07d}"
    with complete_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(dump_config(config))
        save_weights(model, temporary / "model.safetensors")
        save_weights(ema.model, temporary / "ema.safetensors")
        save_file(optimizer_tensors(model, optimizer), temporary / OPTIMIZER_FILE)
        state = {"step": step, "latents": latents}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2))
    return folder


def resume(config: Config, model: DiT, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint of the run, if `config.resume` says so; steps taken so far.

    Raises:
        UserError: when the run has checkpoints and must not resume, or when the newest is of
            another architecture or objective.
    """
    folder = newest_checkpoint(Path(config.run_dir))
    if folder is None:
        return 0
    if config.resume == "never":
        raise UserError(
            f"run_dir: {config.run_dir} has checkpoints; give --resume auto to continue, or "
            "another --run_dir"
        )
    check_same_model(load_config(folder / CONFIG_FILE), config, folder)
    load_weights(model, folder / "model.safetensors")
    load_weights(ema.model, folder / "ema.safetensors")
    load_optimizer_tensors(model, optimizer, read_tensors(folder / OPTIMIZER_FILE))
    return read_state(folder)["step"]


def initialise(config: Config, model: DiT) -> None:
    """Fill a new run's model from the checkpoint `config.init_from`, where one is named.

    Raises:
        UserError: when the rest of the weights, `config.init_fresh` left out, do not fit.
    """
    if config.init_from is None:
        return
    fresh = {"nothing": (), "labels": LABELS, "head": HEAD, "both": LABELS + HEAD}
    folder = find_checkpoint(Path(config.init_from))
    load_weights(model, folder / "ema.safetensors", fresh[config.init_fresh])


def check_same_model(found: Config, wanted: Config, folder: Path) -> None:
    """Refuse a checkpoint whose model or objective differs from the config, naming the keys."""
    differences = []
    for section in ("model", "objective"):
        theirs = _flat(dataclasses.asdict(getattr(found, section)), section)
        ours = _flat(dataclasses.asdict(getattr(wanted, section)), section)
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                differences.append(f"{key} is {theirs.get(key)} there, {ours.get(key)} here")
    if differences:
        raise UserError(f"{folder}: checkpoint of another architecture: {'; '.join(differences)}")


def _flat(values: dict, at: str) -> dict:
    flat = {}
    for key, value in values.items():
        path = f"{at}.{key}"
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat
