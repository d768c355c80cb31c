"""python -m published.convert_config OLD.yaml [--out NEW.yaml]

Turn a YAML file of the official DiffMoE or DSMoE code into one of ours. What ours cannot express,
or means differently, is reported line by line and left out.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from config.load import to_plain
from config.model import ModelConfig
from config.schema import FEED_FORWARDS
from config.yaml_files import read_yaml
from core.command_line import Parser, new_file
from core.errors import ConfigError, UserError, command, unknown_name
from core.files import complete_file
from core.logging import get_logger
from published.configs import official_config

log: logging.Logger = get_logger("published.convert_config")

TARGETS = {
    "models.models_DiT.DiT": "diffmoe_dense",
    "models.models_TCDiT.DiT": "diffmoe_tc",
    "models.models_ECDiT.DiT": "diffmoe_ec",
    "models.models_DiffMoE.DiT": "diffmoe",
    "models.models_DSMoE.DiT": "dsmoe",
}
"""`model.target` of the official files, as a name only: nothing is imported by it."""

SECTIONS = ("basic", "model", "optim", "lr_sheduler")

RENAMED = {
    "basic.global_seed": "seed",
    "basic.log_every": "train.log_every",
    "basic.ckpt_every": "train.ckpt_every",
    "basic.global_batch_size": "train.global_batch_size",
    "basic.image_size": "data.image_size",
    "basic.num_workers": "data.num_workers",
    "basic.vae_path": "data.vae_path",
    "basic.dataset_config.params.root": "data.cached_path",
    "optim.base_learning_rate": "optim.lr",
    "optim.weight_decay": "optim.weight_decay",
    "optim.betas": "optim.betas",
}

WITHOUT_EFFECT = {
    "basic.rf_ori": (False,),
    "basic.accum_iter": (1,),
    "basic.clip_grad_norm": (None,),
    "basic.timestep_start": (0,),
    "basic.timestep_end": (1000,),
    "basic.results_dir": ("exps/",),
    "basic.dataset_config.target": ("dataset.dataset_cache.CachedFolder",),
    "model.ckpt": (None,),
    "model.target": tuple(TARGETS),
    "lr_sheduler.warmup": (None,),
    "lr_sheduler.train_epoch": (None,),
}
"""Values that say nothing beyond what our code does anyway; any other value is reported."""

REASONS = {
    "basic.data_path": "images are cached by main_cache.py --data_path",
    "basic.epochs": "train.max_steps counts optimizer steps",
    "basic.accum_iter": "accumulation follows from train.micro_batch_size",
    "basic.dataset_config.params.root": "an official cache is another format than ours",
}


def convert(old: dict) -> tuple[dict, list[str]]:
    """Our nested keys for an official file's, and a line for each key that is not expressed.

    Raises:
        UserError: for a file without the official sections, an unknown model or constructor key.
    """
    if not isinstance(old, dict) or not {"basic", "model"} <= old.keys():
        raise UserError(f"not an official config: wanted the sections {', '.join(SECTIONS)}")
    flat = _flat({k: v for k, v in old.items() if k != "model"})
    model = dict(old["model"])
    params = model.pop("params", {})
    flat |= _flat(model, "model")
    if model.get("target") not in TARGETS:
        raise unknown_name("model.target", model.get("target"), TARGETS)
    new: dict[str, Any] = {"objective": {"name": "flow" if flat.pop("basic.rf", False) else "ddpm"}}
    new["model"] = _model(official_config(TARGETS[model["target"]], params))
    if "basic.exp_name" in flat:
        new["run_dir"] = f"runs/{flat.pop('basic.exp_name')}"
    reports = []
    for key, value in flat.items():
        if key in RENAMED:
            _put(new, RENAMED[key], value)
        if key in REASONS or (key not in RENAMED and value not in WITHOUT_EFFECT.get(key, ())):
            if key == "basic.accum_iter" and value == 1:
                continue
            reports.append(f"{key}: {value!r} {REASONS.get(key, 'has no counterpart')}")
    return new, reports


def _model(model: ModelConfig) -> dict:
    """The keys of a model that differ from our defaults, `name` always."""
    layer = model.feed_forward
    defaults = dataclasses.asdict(FEED_FORWARDS[layer.name]())
    chosen = {k: v for k, v in dataclasses.asdict(layer).items() if v != defaults[k]}
    own = dataclasses.asdict(ModelConfig())
    keys = {k: v for k, v in dataclasses.asdict(model).items() if v != own[k]}
    keys["feed_forward"] = {"name": layer.name} | chosen
    return to_plain(keys)


def _put(new: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        new = new.setdefault(section, {})
    new[key] = value


def _flat(values: dict, at: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else str(key)
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat


@command
def main() -> None:
    """Parse the command line, print or write the new file, report what it leaves out."""
    parser = Parser("published.convert_config", __doc__)
    parser.add_argument("old", type=Path, help="YAML file of the official code")
    parser.add_argument("--out", type=new_file, help="file to write; by default it is printed")
    flags = parser.parse_args()
    try:
        new, reports = convert(read_yaml(flags.old))
    except ConfigError:
        raise
    except UserError as error:
        raise UserError(f"{flags.old}: {error}") from error
    text = yaml.safe_dump(new, sort_keys=False)
    if flags.out is None:
        sys.stdout.write(text)
    else:
        with complete_file(flags.out) as temporary:
            temporary.write_text(text)
    for line in reports:
        log.info("not taken over: %s", line)


if __name__ == "__main__":
    main()
