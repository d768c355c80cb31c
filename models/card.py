"""The model card of a published checkpoint."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from config.load import to_plain
from config.schema import Config
from models.pretrained import Checkpoint
from models.summary import summarize

NAMES = {
    "dense": "dense DiT",
    "token_choice": "token choice",
    "expert_choice": "expert choice",
    "diffmoe": "DiffMoE",
    "deepseek": "DeepSeek-style experts",
    "race": "Expert Race",
    "promoe": "ProMoE",
}
"""Feed-forward layers as their papers call them."""


@dataclass(frozen=True)
class Scored:
    """A sample set: its folder and its record."""

    folder: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class TrainingFacts:
    """What a run's folder says of its training; None for what it does not.

    Attributes:
        hours: on the machine, from the speeds in the log.
        devices: that computed, each kind once, with how many.
        commit: of the code at the last start.
        versions: of packages.
    """

    hours: float | None
    devices: str | None
    commit: str | None
    versions: dict[str, str]


def training_facts(checkpoint: Checkpoint) -> TrainingFacts:
    """Of the run that a checkpoint lies in; nothing for an imported one."""
    run, nothing = checkpoint.path.parent.parent, TrainingFacts(None, None, None, {})
    attempts = sorted((run / "attempts").glob("*.json"))
    if checkpoint.path.parent.name != "checkpoints" or not attempts:
        return nothing
    last = json.loads(attempts[-1].read_text())
    devices = last.get("devices") or []
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    hours = _hours(run / "metrics.jsonl", checkpoint)
    return TrainingFacts(hours, kinds or None, last.get("commit"), last.get("versions") or {})


def _hours(log: Path, checkpoint: Checkpoint) -> float | None:
    """Images by the speeds that were logged while they were trained on."""
    if not log.exists():
        return None
    batch, before, seconds = checkpoint.config.train.global_batch_size, 0, 0.0
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "images_per_second" in entry and entry["step"] <= checkpoint.state["step"]:
            seconds += (entry["step"] - before) * batch / entry["images_per_second"]
            before = entry["step"]
    return seconds / 3600 if before else None


def card(
    checkpoint: Checkpoint,
    weights: str,
    facts: TrainingFacts,
    scored: list[Scored],
    repo: str,
    licence: str | None,
    pictures: list[str],
) -> str:
    """The card in Markdown, with the hub's header.

    Args:
        checkpoint: what is published.
        weights: which of its averages.
        facts: of its training.
        scored: sample sets.
        repo: NAME on the hub.
        licence: of the weights, if it was said.
        pictures: names of files beside the card.
    """
    config = checkpoint.config
    name = config.model.feed_forward.name
    system = NAMES.get(name, name)  # a layer of somebody's own has its own name
    parts = [
        _header(config, licence),
        f"# {repo.partition('/')[2]}",
        _sentence(checkpoint, weights, system),
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        _use(config, repo),
        "## Model",
        _differing(config),
        "## Training",
        _table(("", ""), _training_rows(checkpoint, facts)),
        "## Scores",
        _scores(scored),
        "## Licence",
        f"{licence}." if licence else "Not stated by whoever published it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(config: Config, licence: str | None) -> str:
    text = config.model.text_hidden_size is not None
    experts = ["mixture-of-experts"] if config.model.moe_blocks() else []
    tags = ("diffusion", *experts, config.model.feed_forward.name)
    lines = [
        "---",
        "library_name: diffmoe",
        f"pipeline_tag: {'text-to-image' if text else 'unconditional-image-generation'}",
        *([f"license: {licence}"] if licence else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _sentence(checkpoint: Checkpoint, weights: str, system: str) -> str:
    config, summary = checkpoint.config, summarize(checkpoint.config.model)
    activated = summary.activated(summary.capacity)
    size = config.data.image_size
    kind = "averaged" if weights != "model" else "live"
    return (
        f"A diffusion transformer with **{system}** feed-forward layers for images of {size} x "
        f"{size} pixels: {summary.total / 1e6:.1f} M parameters, of which {activated / 1e6:.1f} M "
        f"work on average for a token. These are the {kind} weights (`{weights}`) after "
        f"{checkpoint.state['step']:,} steps."
    )


def _use(config: Config, repo: str) -> str:
    text = config.model.text_hidden_size is not None
    what = '--prompt "..."' if text else "--num-fid-samples 16"
    one = '["..."]' if text else "[0, 1, 2]"
    return (
        "## Use\n\nWith DiffMoE installed:\n\n"
        f"```bash\npython sample_ddp.py --ckpt hub:{repo} {what}\n```\n\n"
        f"```python\nfrom sampling.pipeline import load\n\n"
        f'result = load("hub:{repo}").sample({one})\n```'
    )


def _differing(config: Config) -> str:
    """Model and objective as YAML, without what is the default anyway."""

    def keys(section: object) -> dict[str, Any]:
        own = {}
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                own[field.name] = keys(value)
            elif field.name == "name" or value != field.default:
                own[field.name] = value
        return own

    parts = {"model": keys(config.model), "objective": keys(config.objective)}
    text = yaml.safe_dump(to_plain(parts), sort_keys=False, default_flow_style=False)
    return f"What differs from the defaults; all keys are in `config.yaml`.\n\n```yaml\n{text}```"


def _training_rows(checkpoint: Checkpoint, facts: TrainingFacts) -> list[tuple[str, object]]:
    config, train = checkpoint.config, checkpoint.config.train
    images = checkpoint.state.get("num_images")
    rows = {
        "images": None if images is None else f"{images:,}",
        "steps": f"{checkpoint.state['step']:,}",
        "batch": f"{train.global_batch_size} in forward passes of {train.micro_batch_size}",
        "learning rate": f"{config.optim.peak_lr(train.global_batch_size):g}",
        "optim.ema_decay": config.optim.ema_decay,
        "precision": train.precision,
        "seed": config.seed,
        "time": None if facts.hours is None else f"{facts.hours:.2f} hours",
        "hardware": facts.devices,
        "commit": facts.commit,
        "versions": ", ".join(f"{k} {v}" for k, v in facts.versions.items()) or None,
    }
    return [(key, value) for key, value in rows.items() if value is not None]


def _scores(scored: list[Scored]) -> str:
    if not scored:
        return "No samples were scored for this card."
    names = list(dict.fromkeys(name for one in scored for name in one.record.get("scores") or {}))
    settings = ("sampler", "num_steps", "cfg_scale", "global_seed", "num_samples", "nfe")
    header = (*settings, "C_infer", *names, "protocol")
    rows = []
    for one in scored:
        record, found = one.record, one.record.get("scores") or {}
        capacity = record.get("capacity_infer")
        rows.append(
            (
                *(record[key] for key in settings),
                "" if capacity is None else f"{capacity:.3f}",
                *(f"{found[name]:.4g}" if name in found else "" for name in names),
                record.get("protocol") or "",
            )
        )
    against = {
        (s["reference"], s["features"], s["reference_images"])
        for one in scored
        if (s := one.record.get("scored"))
    }
    notes = [
        f"Compared with {images} images of `{Path(reference).name}` in features `{features}`."
        for reference, features, images in sorted(against)
    ]
    return "\n\n".join([_table(header, rows), *notes])


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
