"""Checkpoints of a run: what `models.pretrained` reads, and what training needs to go on."""

import dataclasses
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor

from config.load import load_config
from config.schema import Config
from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.logging import get_logger
from data.sampler import Position
from models import upcycling
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
from models.sealed import DamagedError, check_seal, checkpoints, patiently
from training.attempts import is_restart_of
from training.changes import (
    check_same_latents,
    check_same_model,
    check_same_texts,
    model_differences,
    warn_of_changes,
)
from training.ema import EMA
from training.optim import load_optimizer_tensors, optimizer_tensors
from training.saving import CheckpointWriter

log: logging.Logger = get_logger("checkpoint")

OPTIMIZER = "optimizer"
LABELS = ("label_embed.",)
HEAD = ("final.linear.",)
TEXT = ("text_embed.", "null_text", "null_mask", ".cross.", ".norm_cross.")
FRESH = {
    "nothing": (),
    "labels": LABELS,
    "head": HEAD,
    "both": LABELS + HEAD,
    "text": TEXT + LABELS,
}
"""Parts of the names of what a new run does not take over."""

OF_EXPERTS = ("model.feed_forward.", "model.moe_every", "model.leading_dense")
"""Keys in which a model with experts differs from the dense one that it is made of."""


@dataclass
class TrainingState:
    """Everything that a run goes on from.

    Attributes:
        config: resolved.
        model: without wrapper, possibly sharded.
        emas: averages by the name of their file.
        optimizer: over the parameters of `model`.
        latents: facts of the latents trained on.
        num_images: in the data set.
        step: optimizer steps taken.
        position: in the data.
        running: what telemetry has summed since its last entry, on this process.
    """

    config: Config
    model: DiT
    emas: dict[str, EMA]
    optimizer: torch.optim.Optimizer
    latents: dict
    num_images: int = 0
    step: int = 0
    position: Position = field(default_factory=Position)
    running: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Weights by the name of their file."""
        return {"model": self.model} | {name: ema.model for name, ema in self.emas.items()}


def saved_tensors(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file and name; moments only once there are some."""
    tensors = {name: module.state_dict() for name, module in state.modules().items()}
    return tensors | {OPTIMIZER: optimizer_tensors(state.model, state.optimizer)}


def save_checkpoint(state: TrainingState, writer: CheckpointWriter, last: bool = False) -> bool:
    """Begin to write <run_dir>/checkpoints/step_<step>; `writer.finish` waits for it.

    All processes call this function; with sharded weights each writes its part.

    Args:
        state: to save.
        writer: of the run.
        last: this one must not be skipped.

    Returns:
        Whether it was begun.
    """
    facts = {
        "step": state.step,
        "position": dataclasses.asdict(state.position),
        "latents": state.latents,
        "num_images": state.num_images,
        "world_size": writer.processes.world_size,
        "running": writer.processes.gather(state.running),
    }
    return writer.save(state.step, saved_tensors(state), facts, last)


def checkpoint_of(config: Config, processes: Processes) -> Path | None:
    """The checkpoint that this run goes on from: the newest that is not damaged; None for none.

    Raises:
        ConfigError: when the run has checkpoints and must not resume, or when all of them are
            damaged or the newest cannot be read.
    """
    folder = processes.from_main(_choose(config) if processes.is_main else None)
    if isinstance(folder, UserError):
        raise folder
    return folder


def resume(state: TrainingState, folder: Path, processes: Processes) -> None:
    """Load a checkpoint of the run.

    Raises:
        UserError: when it is of another architecture, objective or VAE, or cannot be read.
    """
    found = patiently(lambda: load_config(folder / CONFIG_FILE), folder / CONFIG_FILE)
    facts = patiently(lambda: read_state(folder), folder / STATE_FILE)
    check_same_model(found, state.config, folder)
    check_same_latents(facts["latents"], state.latents, folder)
    check_same_texts(facts["latents"], state.latents, folder)
    for name, module in state.modules().items():
        path = weights_path(folder, name)
        if name.startswith("ema_") and not path.exists():
            path = weights_path(folder, "ema")
            if processes.is_main:
                log.warning("%s: has no %s, which starts from its ema", folder, name)
        _fill(module.state_dict(), path)
    moments = weights_path(folder, OPTIMIZER)
    load_optimizer_tensors(state.model, state.optimizer, lambda found: _fill(found, moments))
    now = {"world_size": processes.world_size, "num_images": state.num_images}
    warn_of_changes(found, state.config, facts, now, processes)
    state.step = facts["step"]
    state.position = _position(facts, found, state.num_images)
    running = facts.get("running", [])
    if len(running) == processes.world_size:
        state.running = running[processes.rank]
    if processes.is_main:
        log.info("%s: going on from there", folder)


def _position(facts: dict[str, Any], config: Config, num_images: int) -> Position:
    """Where the checkpoint stood in its data; older ones say it by their steps alone."""
    if "position" in facts:
        return Position(**facts["position"])
    size = config.train.global_batch_size
    return Position.after_steps(facts["step"], size, max(size, num_images))


def _choose(config: Config) -> Path | UserError | None:
    """The checkpoint to go on from, on the main process; damaged ones are set aside."""
    found = checkpoints(Path(config.run_dir))
    if not found:
        return None
    if config.resume == "never" and not is_restart_of(Path(config.run_dir)):
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
        except UserError as error:
            return ConfigError(str(error))
        else:
            return folder
    return ConfigError(
        f"run_dir: every checkpoint of {config.run_dir} is damaged; start another run"
    )


def _fill(targets: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors at `path` into `targets`, whole or sharded on either side.

    Raises:
        UserError: naming the first differences in names and shapes.
    """
    if path.is_dir() and any(isinstance(t, DTensor) for t in targets.values()):
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(path)))
        return
    found = patiently(lambda: read_tensors(path), path)
    check_tensors(found, targets, path)
    for name, target in targets.items():
        value = found[name].to(target.device)
        if isinstance(target, DTensor):  # every process cuts out its own part
            mesh, placements = target.device_mesh, target.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        target.detach().copy_(value)


def check_start(config: Config, processes: Processes) -> None:
    """See that the checkpoint `config.init_from` is whole, where one is named; the main one looks.

    Raises:
        ConfigError: it is not.
    """
    refusal = None
    if processes.is_main and config.init_from is not None:
        try:
            check_seal(find_checkpoint(Path(config.init_from)))
        except UserError as error:
            refusal = str(error)
    refusal = processes.from_main(refusal)
    if refusal is not None:
        raise ConfigError(refusal)


def initialise(config: Config, model: DiT, texts: dict[str, Any] | None) -> None:
    """Fill a new run's model from the checkpoint `config.init_from`, where one is named.

    `texts` are the facts of the run's text encoder.

    What else differs between the two models or objectives is said: weights of the right shape may
    have been trained to compute something else.

    Raises:
        UserError: when the rest of the weights, `config.init_fresh` left out, do not fit.
    """
    if config.init_from is None:
        return
    folder = find_checkpoint(Path(config.init_from))
    weights = weights_path(folder, "ema")
    if config.init_fresh != "text":
        theirs = read_state(folder)["latents"]
        try:
            check_same_texts(theirs, {"text": texts}, folder)
        except ConfigError as error:
            raise ConfigError(f"init_from: {error}; --init_fresh text starts it anew") from None
    found = load_config(folder / CONFIG_FILE)
    if config.init_upcycle:
        _upcycle(config, model, found, weights)
    else:
        load_weights(model, weights, FRESH[config.init_fresh])
    if config.init_fresh == "text":
        _take_labels(model, weights)
    for key, difference in model_differences(found, config).items():
        if not (config.init_upcycle and key.startswith(OF_EXPERTS)):
            log.warning("init_from: %s: %s", folder, difference)


def _upcycle(config: Config, model: DiT, found: Config, weights: Path) -> None:
    """Fill `model` from a dense one, and say whether it computes the same at first."""
    dense, own = found.model, model.state_dict()
    fresh = FRESH[config.init_fresh] + upcycling.FRESH
    load_weights(
        model, weights, fresh, lambda tensors: upcycling.upcycle(tensors, dense, config.model, own)
    )
    blocks = ", ".join(map(str, config.model.moe_blocks()))
    about = "init_upcycle: the experts of the %s layers (blocks %s) come from MLPs"
    reasons = upcycling.departures(dense, config.model)
    if reasons:
        told = f"{about}; there the first forward is not the dense model's: %s"
        log.warning(told, config.model.feed_forward.name, blocks, "; ".join(reasons))
    else:
        told = f"{about}; there the first forward is the dense model's"
        log.info(told, config.model.feed_forward.name, blocks)


def _take_labels(model: DiT, path: Path) -> None:
    """The labels of the weights at `path`; of "no class" alone, where the model has no others."""
    (name, mine), *_ = model.label_embed.state_dict(prefix=LABELS[0]).items()
    theirs = read_tensors(path)[name]
    found = {name: theirs[-1:] if len(mine) == 1 else theirs}
    check_tensors(found, {name: mine}, path)
    mine.copy_(found[name])
