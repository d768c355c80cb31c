"""What differs between the run that wrote a checkpoint and the one that goes on from it."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from config.schema import Config
from core.distributed import Processes
from core.errors import ConfigError
from core.logging import get_logger
from data.dataset import TrainingData
from data.text.facts import TextFacts

log: logging.Logger = get_logger("checkpoint")

TRAINING_ONLY = {"model.dropout", "model.feed_forward.bias_update_rate"}
"""Keys with which a run may go on differently."""

FREE = {"model.expert_backend"}
"""Keys that change how fast a model computes, not what."""

OF_THE_START = {"run_dir", "resume", "init_from", "init_fresh", "init_upcycle"}
"""Keys that say where a run begins, and mean nothing later."""

LATENTS = ("scaling_factor", "shift_factor", "latent_channels", "class_names", "vae_hash")
"""Facts of the latents that decide what the weights mean."""


def facts_of(data: TrainingData, labels: bool) -> dict[str, Any]:
    """What a checkpoint says of the latents and texts that it was trained on.

    Args:
        data: trained on.
        labels: whether its classes mean something to the model.
    """
    source = data.source
    return {
        "vae_path": source.vae_path,
        "scaling_factor": source.scaling_factor,
        "shift_factor": source.shift_factor,
        "latent_channels": source.latent_shape[0],
        "class_names": source.class_names if labels else [],
        "vae_hash": source.vae_hash,
        "text": data.conditions.text_facts(),
    }


def check_same_model(found: Config, wanted: Config, folder: Path) -> None:
    """Refuse a checkpoint whose model or objective differs from the config, naming the keys.

    Keys that concern training alone may differ.
    """
    refused = [
        text for key, text in model_differences(found, wanted).items() if key not in TRAINING_ONLY
    ]
    if refused:
        raise ConfigError(f"{folder}: checkpoint of another architecture: {'; '.join(refused)}")


def check_same_latents(found: dict[str, Any] | None, wanted: dict[str, Any], folder: Path) -> None:
    """Refuse latents that are not those the checkpoint was trained on; null is not known."""
    for key in LATENTS:
        theirs, ours = (found or {}).get(key), wanted.get(key)
        if theirs is not None and ours is not None and theirs != ours:
            where, was, now = _first_difference(theirs, ours)
            raise ConfigError(
                f"{folder}: was trained on other latents: {key}{where} is {was} there, {now} in "
                "this run's data; a model of other latents is a new run (--init_from)"
            )


def check_same_texts(found: dict[str, Any] | None, wanted: dict[str, Any], folder: Path) -> None:
    """Refuse texts of another encoder than that of the checkpoint's facts; null is not known."""
    texts = [(facts or {}).get("text") for facts in (found, wanted)]
    if None not in texts:
        difference = TextFacts.of(texts[0]).difference(TextFacts.of(texts[1]))
        if difference is not None:
            raise ConfigError(f"{folder}: was trained on other texts: {difference}")


def _first_difference(theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """Of two lists the first place in which they differ; anything else as it is."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return "", theirs, ours
    if len(theirs) != len(ours):
        return "", f"{len(theirs)} names", f"{len(ours)} names"
    place = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"[{place}]", repr(theirs[place]), repr(ours[place])


def warn_of_changes(
    found: Config, wanted: Config, facts: dict[str, Any], now: dict[str, Any], processes: Processes
) -> None:
    """Name in one line everything else that is not as it was.

    Args:
        found: config of the checkpoint.
        wanted: config of this run.
        facts: of the checkpoint's state.
        now: the same facts of this run: `world_size`, `num_images`.
        processes: the main one speaks.
    """
    theirs, ours = (_flat(dataclasses.asdict(config)) for config in (found, wanted))
    pool = ", and another pool of tokens" if wanted.model.feed_forward.pools_batch() else ""
    meaning = {
        "train.micro_batch_size": f": other noise and times{pool}",
        "world_size": ": sums in another order, so that results agree up to rounding",
        "num_images": ": another order of the images",
    }
    changes = [
        (key, theirs.get(key), ours.get(key))
        for key in sorted((theirs.keys() | ours.keys()) - FREE - OF_THE_START)
        if theirs.get(key) != ours.get(key)
    ]
    changes += [(key, facts.get(key, here), here) for key, here in now.items()]
    told = [
        f"{key} was {was}, is {here} now{meaning.get(key, '')}"
        for key, was, here in changes
        if was != here
    ]
    if told and processes.is_main:
        log.warning("going on with other settings: %s", "; ".join(told))


def model_differences(found: Config, wanted: Config) -> dict[str, str]:
    """`key is this there, that here` by key, for those of model and objective that differ."""
    differences = {}
    for section in ("model", "objective"):
        theirs = _flat(dataclasses.asdict(getattr(found, section)), section)
        ours = _flat(dataclasses.asdict(getattr(wanted, section)), section)
        for key in sorted((theirs.keys() | ours.keys()) - FREE):
            if theirs.get(key) != ours.get(key):
                differences[key] = f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
    return differences


def _flat(values: dict, at: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else key
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat
