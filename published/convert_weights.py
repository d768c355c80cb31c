"""python -m published.convert_weights --official FILE.pt --config dit/XL_ddpm --out DIR
python -m published.convert_weights --to-official CHECKPOINT --out FILE.pt
python -m published.convert_weights --gather CHECKPOINT --out DIR

Turn a published checkpoint into a checkpoint folder that sample_ddp.py and
`train.py --init-from` read, one of ours into a file with the official names, or the shards of an
FSDP run into single files.
"""

import argparse
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from config.load import dump_config, parse_config
from config.promoe import ProMoEConfig
from config.schema import Config
from core.command_line import Parser
from core.errors import UserError, command
from core.files import complete_file, complete_folder
from core.logging import get_logger
from models.build import build_model
from models.pretrained import (
    CONFIG_FILE,
    STATE_FILE,
    find_checkpoint,
    load_pretrained,
    read_tensors,
    save_weights,
    weights_names,
    weights_path,
)
from models.sealed import check_seal, seal
from published.entries import is_ditmoe, is_jit
from published.export import check_exportable
from published.weights import load_official, to_official

log: logging.Logger = get_logger("published.convert_weights")

AVERAGES = {"model": "model", "ema": "ema", "model_ema1": "ema", "model_ema2": "ema2"}
"""Official names of live and averaged weights (JiT has two averages), and ours."""


PREFIX = "net."
"""Before every name in the files of JiT, whose model is a part of its denoiser."""


def read_official(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts of an official file under the names of AVERAGES, or `model` alone.

    A `.safetensors` file holds one. Of others only tensors, plain containers and
    `argparse.Namespace` are unpickled.

    Raises:
        UserError: when the file is missing, damaged, or holds any other global, which is named.
    """
    loaded = read_tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    parts = {}
    for theirs, ours in AVERAGES.items():
        state = _get(loaded, theirs)
        if _is_state(state):
            parts[ours] = _bare(state)
    if not parts and _is_state(loaded):
        parts = {"model": _bare(loaded)}
    if not parts:
        names = ", ".join(AVERAGES)
        raise UserError(f"--official: {path}: holds no state dict, flat or under {names}")
    return parts


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
        name = next((g for g in found.groups() if g), "?") if found else None
        reason = f"it holds the global {name}, which is refused" if name else "not a weights file"
        raise UserError(f"--official: {path}: {reason}") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"--official: {path}: not readable: {error}") from None


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without JiT's prefix."""
    if not all(name.startswith(PREFIX) for name in state):
        return state
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def import_official(path: Path, config: Config, out: Path) -> None:
    """Write a checkpoint folder with the weights of an official file.

    `ema.safetensors` has the averaged weights where the file has them, else the live ones. A
    second average becomes the first of the config's optim.extra_ema_decays.

    Raises:
        UserError: of ProMoE and DiT-MoE also for keys that their code does not have: no tensor
            says which way the signs turn, or what the expert for no class has seen.
    """
    if isinstance(config.model.feed_forward, ProMoEConfig) or is_ditmoe(config.model):
        check_exportable(config.model, config.objective.name)
    parts = read_official(path)
    names = {"model": "model", "ema": "ema"}
    if "ema2" in parts and config.optim.extra_ema_decays:
        names["ema2"] = f"ema_{config.optim.extra_ema_decays[0]:g}"
    elif "ema2" in parts:
        log.warning("%s: its second average is left out; optim.extra_ema_decays names none", path)
    with complete_folder(out) as folder:
        for part, name in names.items():
            source = part if part in parts else next(iter(parts))
            model = build_model(config.model)
            load_official(model, config.model, parts[source])
            save_weights(model, folder / f"{name}.safetensors")
            log.info("%s.safetensors: from %r of %s", name, source, path)
        (folder / CONFIG_FILE).write_text(dump_config(config))
        (folder / STATE_FILE).write_text(json.dumps({"step": 0, "latents": None}))
        seal(folder)


def gather_shards(checkpoint: Path, out: Path) -> None:
    """Write the weights of a sharded checkpoint as single files: a checkpoint to sample from."""
    source = find_checkpoint(checkpoint)
    check_seal(source)
    with complete_folder(out) as folder:
        for name in weights_names(source):
            save_file(read_tensors(weights_path(source, name)), folder / f"{name}.safetensors")
        for name in (CONFIG_FILE, STATE_FILE):
            shutil.copy(source / name, folder / name)
        seal(folder)
    log.info("%s: weights of %s", out, source)


def export_official(checkpoint: Path, out: Path) -> None:
    """Write the weights of a checkpoint as the official code names them: `model` and averages.

    Raises:
        UserError: for a model that the official code cannot compute, naming the key.
    """
    config = load_pretrained(checkpoint).config
    check_exportable(config.model, config.objective.name)
    jit = is_jit(config.model)
    names = {"model": "model", "ema": "model_ema1" if jit else "ema"}
    if jit and config.optim.extra_ema_decays:
        names[f"ema_{config.optim.extra_ema_decays[0]:g}"] = "model_ema2"
    parts = {}
    for ours, theirs in names.items():
        state = to_official(load_pretrained(checkpoint, ours).model)
        prefix = PREFIX if jit else ""
        parts[theirs] = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    with complete_file(out) as temporary:
        torch.save(parts, temporary)
    log.info("%s: %s of %s", out, ", ".join(parts), checkpoint)


def _get(loaded: Any, key: str) -> Any:
    return loaded.get(key) if isinstance(loaded, dict) else None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


@command
def main() -> None:
    """Parse the command line and convert in one of the directions."""
    parser = Parser("published.convert_weights", __doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--official", type=Path, help="published .pt file")
    direction.add_argument("--to-official", type=Path, help="checkpoint or run folder of ours")
    direction.add_argument("--gather", type=Path, help="sharded checkpoint, to be single files")
    parser.add_argument("--config", help="with --official: config of the published model")
    parser.add_argument("--out", type=Path, required=True, help="folder, or .pt file")
    flags, keys = parser.parse_known_args()
    if flags.out.exists() and (flags.out.is_file() or any(flags.out.iterdir())):
        raise UserError(f"--out: {flags.out} exists; remove it or choose another name")
    if flags.official is None and flags.config is not None:
        raise UserError("--config: goes with --official only")
    if flags.config is None:
        parser.refuse(keys)
    if flags.to_official is not None:
        export_official(flags.to_official, flags.out)
    elif flags.gather is not None:
        gather_shards(flags.gather, flags.out)
    elif flags.config is None:
        raise UserError(
            "--config: needed with --official, a YAML file or a name, that describes the model"
        )
    else:
        argv = ["--config", flags.config, *keys]
        config = parse_config(argv, "published.convert_weights", world_size=None)
        import_official(flags.official, config, flags.out)


if __name__ == "__main__":
    main()
