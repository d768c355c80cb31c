"""Weights in safetensors files, and whole models from a checkpoint folder.

A checkpoint folder holds `config.yaml` (resolved), `model.safetensors`, `ema.safetensors` (or
folders `model`, `ema` of shards), `state.json` (step, facts of the latents) and `manifest.json`
(sizes and hashes); what the trainer needs besides lies there too.
"""

import copy
import dataclasses
import json
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from config.load import load_config
from config.schema import Config
from config.typed import convert
from config.validate import validate
from core.errors import UserError, unknown_name
from models.build import build_model
from models.dit import DiT
from models.remote import fetch, is_remote
from models.sealed import check_seal, checkpoints

CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
VAE_FOLDER, TEXT_FOLDER = "vae", "text_encoder"
"""Where a checkpoint that travels carries them."""
INFERENCE_KEYS = ("inference", "inference_capacity", "fixed_threshold")
"""Of `model.feed_forward`: the rule of routing, C of `topk`, gamma of `fixed`. Only inference looks
at them, and layers read them when they are called."""
LATENT_FACTS = {"vae_path", "scaling_factor", "shift_factor", "latent_channels", "class_names"}
"""What a checkpoint says of the latents that it was trained on."""


@dataclass
class Checkpoint:
    """What a checkpoint says of itself: config, state, and the folder where it lies."""

    config: Config
    state: dict[str, Any]
    path: Path


@dataclass
class Pretrained(Checkpoint):
    """A checkpoint with its model, whose weights are read."""

    model: DiT


def load_pretrained(
    path: str | Path, weights: str = "ema", routing: dict[str, Any] | None = None
) -> Pretrained:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Args:
        path: a checkpoint folder, or a run folder, whose newest checkpoint is taken, or
            `hub:NAME[@revision]`.
        weights: the averaged weights `ema`, another average `ema_<decay>`, or the live `model`.
        routing: other values of INFERENCE_KEYS, as far as the layer has them.

    Raises:
        UserError: when there is no checkpoint, a file is damaged, or weights, config and `routing`
            do not fit each other.
    """
    about = read_checkpoint(path, weights, routing)
    weights_file = weights_path(about.path, weights)
    check_seal(about.path, (weights_file.name,))
    model = build_model(about.config.model)
    load_weights(model, weights_file)
    return Pretrained(about.config, about.state, about.path, model.eval())


def read_checkpoint(
    path: str | Path, weights: str = "ema", routing: dict[str, Any] | None = None
) -> Checkpoint:
    """What `load_pretrained` would give, without the model: no weights are read.

    Args, Raises: as there.
    """
    folder = find_checkpoint(Path(path))
    check_seal(folder, (CONFIG_FILE, STATE_FILE))
    config = load_config(folder / CONFIG_FILE)
    if (folder / VAE_FOLDER).is_dir():
        config.data.vae_path = str(folder / VAE_FOLDER)
    if routing:
        config = _rerouted(config, routing)
    if not weights_path(folder, weights).exists():
        check_seal(folder, (weights_path(folder, weights).name,))  # were they there?
        raise unknown_name(f"{folder}: weights", weights, weights_names(folder))
    return Checkpoint(config, read_state(folder), folder)


def rerouted(pretrained: Pretrained, routing: dict[str, Any]) -> Pretrained:
    """The same weights, not copied, under another rule of routing; what is given stays as it was.

    Args:
        pretrained: a loaded checkpoint.
        routing: other values of INFERENCE_KEYS, as far as the layer has them.

    Raises:
        UserError: the layer has no such key, or does not allow the value.
    """
    config, model = _rerouted(pretrained.config, routing), pretrained.model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Layers hold the section of the config that they were built of: the copies hold the new one.
    shared[id(model.config.feed_forward)] = config.model.feed_forward
    return dataclasses.replace(pretrained, config=config, model=copy.deepcopy(model, shared))


def routing_rules(config: Config) -> tuple[str, ...]:
    """The values of `inference` that a model's layers allow; none where they have no such key."""
    known = typing.get_type_hints(type(config.model.feed_forward)).get("inference")
    return tuple(rule for rule in typing.get_args(known) if _allows(config, rule))


def _allows(config: Config, rule: str) -> bool:
    try:
        _rerouted(config, {"inference": rule})
    except UserError:
        return False
    return True


def _rerouted(config: Config, routing: dict[str, Any]) -> Config:
    """The config with other values of what inference looks at."""
    layer, changes = config.model.feed_forward, {}
    known = typing.get_type_hints(type(layer))
    for key, value in routing.items():
        if key not in INFERENCE_KEYS:
            raise unknown_name("routing", key, INFERENCE_KEYS)
        if key not in known:
            raise UserError(f"{key}: model.feed_forward {layer.name} has no such key")
        # Layers mean different rules by one key.
        changes[key] = convert(value, known[key], f"{key} of model.feed_forward {layer.name}")
    if "inference_capacity" in known and changes.get("inference", "topk") != "topk":
        changes.setdefault("inference_capacity", None)  # the checkpoint's own, which is of topk
    layer = dataclasses.replace(layer, **changes)
    changed = dataclasses.replace(
        config, model=dataclasses.replace(config.model, feed_forward=layer)
    )
    validate(changed, world_size=None)
    return changed


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint folder, else the newest checkpoint of the run at `path`.

    Raises:
        UserError: there is none, or `hub:NAME` cannot be downloaded.
    """
    if is_remote(path):
        path = fetch(path)
    if (path / STATE_FILE).is_file():
        return path
    found = [folder for folder in checkpoints(path) if (folder / STATE_FILE).is_file()]
    if not found:
        raise UserError(
            f"{path}: no checkpoint here; wanted: a folder <run>/checkpoints/step_<number> with "
            f"{STATE_FILE}, or a run folder that has one"
        )
    return found[0]


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: `step`, and the facts of its `latents` (null if imported).

    Raises:
        UserError: naming the file, when it is damaged or lacks one of them.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    whole = isinstance(state, dict) and state.keys() >= {"step", "latents"}
    latents = state["latents"] if whole else {}
    if latents is not None and not (isinstance(latents, dict) and latents.keys() >= LATENT_FACTS):
        wanted = ", ".join(sorted(LATENT_FACTS))
        raise UserError(f"{path}: damaged; wanted: step, and latents with {wanted}")
    return state


def weights_names(folder: Path) -> list[str]:
    """Weights that a checkpoint has: `model`, `ema`, other averages."""
    names = {path.name.removesuffix(".safetensors") for path in folder.iterdir()}
    return sorted(name for name in names if name == "model" or name.split("_")[0] == "ema")


def weights_path(folder: Path, name: str) -> Path:
    """Where the tensors `name` of a checkpoint lie: one file, or a folder of shards."""
    return folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder of shards, whole and by name.

    Raises:
        UserError: naming the file, when it is missing, truncated or not of that format.
    """
    try:
        return _read_shards(path) if path.is_dir() else load_file(path)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def _read_shards(path: Path) -> dict[str, Tensor]:
    """What several processes wrote by torch.distributed.checkpoint, put together."""
    reader = HuggingFaceStorageReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors


def save_weights(module: nn.Module, path: Path) -> None:
    """Parameters and buffers of `module` by name."""
    save_file({name: t.detach().contiguous() for name, t in module.state_dict().items()}, path)


def load_weights(
    module: nn.Module,
    path: Path,
    fresh: tuple[str, ...] = (),
    adapted: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Fill `module` from a file that holds exactly its parameters and buffers.

    Args:
        module: to be filled.
        path: safetensors file.
        adapted: makes the module's tensors of those of the file, by name.
        fresh: parts of names that keep what they have, whatever the file says.

    Raises:
        UserError: naming the first differences between file and model.
    """
    found, wanted = (
        {name: t for name, t in tensors.items() if not any(part in name for part in fresh)}
        for tensors in (adapted(read_tensors(path)), module.state_dict())
    )
    check_tensors(found, wanted, path)
    module.load_state_dict(found, strict=not fresh)


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Compare names and shapes of tensors read from `path` with those of a model.

    Raises:
        UserError: naming the first differences.
    """
    differences = [f"{n} is missing in the file" for n in wanted if n not in found]
    differences += [f"{n} is not in the model" for n in found if n not in wanted]
    differences += [
        f"{n} is {tuple(found[n].shape)} in the file, {tuple(wanted[n].shape)} in the model"
        for n in wanted
        if n in found and found[n].shape != wanted[n].shape
    ]
    if differences:
        more = f" (and {len(differences) - 2} more)" if len(differences) > 2 else ""
        raise UserError(f"{path}: another architecture: {'; '.join(differences[:2])}{more}")
