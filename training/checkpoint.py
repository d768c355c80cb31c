"""Checkpoints of a run: what `models.pretrained` reads, and what training needs to go on."""

import dataclasses
import json
import logging
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from config.load import dump_config, load_config
from config.schema import Config
from core.distributed import Processes, restarts
from core.errors import ConfigError, UserError
from core.files import complete_folder
from core.logging import get_logger
from models.dit import DiT
from models.pretrained import (
    CONFIG_FILE,
    STATE_FILE,
    check_tensors,
    find_checkpoint,
    load_weights,
    read_state,
    read_tensors,
    weights_path,
)
from models.sealed import DamagedError, check_seal, checkpoints, seal
from training.ema import EMA
from training.optim import load_optimizer_tensors, optimizer_tensors

log: logging.Logger = get_logger("checkpoint")

OPTIMIZER = "optimizer"
LATEST = "latest"
LABELS = ("label_embed.",)
HEAD = ("final.linear.",)


@dataclass
class TrainingState:
    """Everything that a run goes on from.

    Attributes:
        config: resolved.
        model: without wrapper, possibly sharded.
        emas: averages by the name of their file.
        optimizer: over the parameters of `model`.
        latents: facts of the latents trained on.
        step: optimizer steps taken.
        running: what telemetry has summed since its last entry, on this process.
    """

    config: Config
    model: DiT
    emas: dict[str, EMA]
    optimizer: torch.optim.Optimizer
    latents: dict
    step: int = 0
    running: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Weights by the name of their file."""
        return {"model": self.model} | {name: ema.model for name, ema in self.emas.items()}


def save_checkpoint(state: TrainingState, processes: Processes) -> Path:
    """Write <run_dir>/checkpoints/step_<step>, under another name until it is complete.

    All processes call this function; with sharded weights each writes its part. Afterwards
    `checkpoints/latest` points there, and older checkpoints go as the config says.
    """
    parent = Path(state.config.run_dir) / "checkpoints"
    folder = parent / f"step_{state.step:07d}"
    running = processes.gather(state.running)
    with ExitStack() as stack:
        temporary = None
        if processes.is_main:
            temporary = stack.enter_context(complete_folder(folder))
        temporary = processes.from_main(temporary)
        for name, module in state.modules().items():
            _write_tensors(module.state_dict(), temporary, name, processes)
        moments = optimizer_tensors(state.model, state.optimizer)
        _write_tensors(moments, temporary, OPTIMIZER, processes)
        processes.barrier()
        if processes.is_main:
            (temporary / CONFIG_FILE).write_text(dump_config(state.config))
            facts = {
                "step": state.step,
                "latents": state.latents,
                "micro_batch_size": state.config.train.micro_batch_size,
                "world_size": processes.world_size,
                "running": running,
            }
            (temporary / STATE_FILE).write_text(json.dumps(facts, indent=2))
            seal(temporary)
    if processes.is_main:
        _point_latest(folder)
        _remove_old(state.config)
    processes.barrier()
    return folder


def _write_tensors(
    tensors: dict[str, Tensor], folder: Path, name: str, processes: Processes
) -> None:
    """One file by the main process, or a folder of shards by all."""
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    if any(isinstance(value, DTensor) for value in tensors.values()):
        writer = HuggingFaceStorageWriter(str(folder / name), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    elif processes.is_main:
        save_file(tensors, folder / f"{name}.safetensors")


def _point_latest(folder: Path) -> None:
    """Let `latest` beside the checkpoint lead to it, in one move."""
    temporary = folder.with_name(f".{LATEST}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, folder.with_name(LATEST))


def _remove_old(config: Config) -> None:
    """Keep the newest `keep_last` checkpoints, and those of every `keep_every` steps."""
    last, every = config.train.keep_last, config.train.keep_every
    if last == 0:
        return
    for folder in checkpoints(Path(config.run_dir))[last:]:
        if every == 0 or int(folder.name[5:]) % every != 0:
            going = folder.with_name(f".{folder.name}.old")
            os.replace(folder, going)  # never half a checkpoint under its name
            shutil.rmtree(going)


def resume(state: TrainingState, processes: Processes) -> None:
    """Load the newest checkpoint of the run that is not damaged, if `config.resume` says so.

    Raises:
        UserError: when the run has checkpoints and must not resume, when all of them are damaged,
            or when the newest is of another architecture or objective.
    """
    folder = processes.from_main(_choose(state.config) if processes.is_main else None)
    if isinstance(folder, ConfigError):
        raise folder
    if folder is None:
        return
    check_same_model(load_config(folder / CONFIG_FILE), state.config, folder)
    for name, module in state.modules().items():
        path = weights_path(folder, name)
        if name.startswith("ema_") and not path.exists():
            path = weights_path(folder, "ema")
            log.warning("%s: has no %s, which starts from its ema", folder, name)
        _fill(module.state_dict(), path)
    moments = weights_path(folder, OPTIMIZER)
    load_optimizer_tensors(state.model, state.optimizer, lambda found: _fill(found, moments))
    facts = read_state(folder)
    _warn_of_changes(facts, state.config, processes)
    state.step = facts["step"]
    running = facts.get("running", [])
    if len(running) == processes.world_size:
        state.running = running[processes.rank]
    if processes.is_main:
        log.info("%s: going on from there", folder)


def _choose(config: Config) -> Path | ConfigError | None:
    """The checkpoint to go on from, on the main process; damaged ones are set aside."""
    found = checkpoints(Path(config.run_dir))
    if not found:
        return None
    if config.resume == "never" and restarts() == 0:
        return ConfigError(
            f"run_dir: {config.run_dir} has checkpoints; give --resume auto to continue, or "
            "another --run_dir"
        )
    for folder in found:
        try:
            check_seal(folder)
        except DamagedError as error:
            log.warning("damaged checkpoint, taking the one before: %s", error)
            damaged = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(folder, damaged)
        else:
            return folder
    return ConfigError(
        f"run_dir: every checkpoint of {config.run_dir} is damaged; start another run"
    )


def _warn_of_changes(facts: dict, config: Config, processes: Processes) -> None:
    """What may differ from the run so far, but changes what it computes."""
    here = {
        "micro_batch_size": config.train.micro_batch_size,
        "world_size": processes.world_size,
    }
    meaning = {
        "micro_batch_size": "other noise and times"
        + (", and another pool of tokens" if config.model.feed_forward.pools_batch() else ""),
        "world_size": "sums in another order, so that results agree up to rounding",
    }
    for key, value in here.items():
        if processes.is_main and facts.get(key, value) != value:
            log.warning("%s: was %s, is %s now: %s", key, facts[key], value, meaning[key])


def _fill(targets: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors at `path` into `targets`, whole or sharded on either side.

    Raises:
        UserError: naming the first differences in names and shapes.
    """
    if path.is_dir() and any(isinstance(t, DTensor) for t in targets.values()):
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(path)))
        return
    found = read_tensors(path)
    check_tensors(found, targets, path)
    for name, target in targets.items():
        value = found[name].to(target.device)
        if isinstance(target, DTensor):  # every process cuts out its own part
            mesh, placements = target.device_mesh, target.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        target.detach().copy_(value)


def initialise(config: Config, model: DiT) -> None:
    """Fill a new run's model from the checkpoint `config.init_from`, where one is named.

    What else differs between the two models or objectives is said: weights of the right shape may
    have been trained to compute something else.

    Raises:
        UserError: when the rest of the weights, `config.init_fresh` left out, do not fit.
    """
    if config.init_from is None:
        return
    fresh = {"nothing": (), "labels": LABELS, "head": HEAD, "both": LABELS + HEAD}
    folder = find_checkpoint(Path(config.init_from))
    check_seal(folder)
    load_weights(model, weights_path(folder, "ema"), fresh[config.init_fresh])
    for difference in _differences(load_config(folder / CONFIG_FILE), config):
        log.warning("init_from: %s: %s", folder, difference)


def check_same_model(found: Config, wanted: Config, folder: Path) -> None:
    """Refuse a checkpoint whose model or objective differs from the config, naming the keys.

    Keys that concern training alone may differ, which is said.
    """
    differences = _differences(found, wanted)
    refused = [text for text in differences if text.split()[0] not in TRAINING_ONLY]
    if refused:
        raise UserError(f"{folder}: checkpoint of another architecture: {'; '.join(refused)}")
    for text in differences:
        log.warning("%s: %s", folder, text)


def _differences(found: Config, wanted: Config) -> list[str]:
    """`key is this there, that here` for the keys of model and objective that differ."""
    differences = []
    for section in ("model", "objective"):
        theirs = _flat(dataclasses.asdict(getattr(found, section)), section)
        ours = _flat(dataclasses.asdict(getattr(wanted, section)), section)
        for key in sorted((theirs.keys() | ours.keys()) - FREE):
            if theirs.get(key) != ours.get(key):
                differences.append(f"{key} is {theirs.get(key)} there, {ours.get(key)} here")
    return differences


TRAINING_ONLY = {"model.dropout", "model.feed_forward.bias_update_rate"}
"""Keys with which a run may go on differently."""

FREE = {"model.expert_backend"}
"""Keys that change how fast a model computes, not what."""


def _flat(values: dict, at: str) -> dict:
    flat = {}
    for key, value in values.items():
        path = f"{at}.{key}"
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat
