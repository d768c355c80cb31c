"""The work of sample_ddp.py: a set of images from a checkpoint, and the record of it."""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config.load import to_plain
from config.protocol import Protocol
from core.distributed import Processes
from core.errors import UserError
from core.files import complete_file, file_hash
from core.logging import get_logger, quiet_other_processes
from core.precision import set_tf32
from data.vae import KNOWN_NAMES, VAE, PixelSpace, open_vae, to_uint8
from models.pretrained import Pretrained, load_pretrained
from models.sealed import MANIFEST_FILE
from sampling.flags import resolve, routing_of
from sampling.generate import Measure, Sampler, SampleSet, SetPlan, generate_set
from sampling.grid import image_grid, save_png
from sampling.labels import LABELS, Labels, chosen_labels
from transport.ode import ADAPTIVE

log: logging.Logger = get_logger("sample")


@dataclass
class Outcome:
    """A finished set.

    Attributes:
        result: images and features.
        path: of the files that were written, without suffix.
        record: every setting, for `path`.json.
    """

    result: SampleSet
    path: Path
    record: dict[str, Any]

    @property
    def record_path(self) -> Path:
        """`path`.json."""
        return self.path.with_name(f"{self.path.name}.json")

    def write_record(self) -> None:
        """Write the record."""
        with complete_file(self.record_path) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2) + "\n")


def sample_from_checkpoint(
    flags: argparse.Namespace,
    processes: Processes,
    measure: Measure | None = None,
    measured: dict[str, str] | None = None,
) -> Outcome | None:
    """Generate the set that the flags ask for; the main process writes images and a grid.

    Args:
        flags: of the command line.
        processes: all of which call this.
        measure: makes features of the images, where they are wanted.
        measured: what these features are, for the record.

    Raises:
        UserError: when checkpoint, VAE and flags do not fit each other.
    """
    quiet_other_processes(processes)
    pretrained = load_pretrained(flags.ckpt, flags.weights, routing_of(flags))
    if flags.capacity and not pretrained.config.model.moe_blocks():
        raise UserError(
            f"--capacity: {pretrained.path} is a dense model, without routing to record"
        )
    protocol = resolve(flags, pretrained)
    set_tf32(protocol.tf32)
    vae = open_vae(protocol.vae, processes.device)
    _check_vae(vae, pretrained)
    sampler = Sampler.of(pretrained, protocol.sampling, flags.global_seed, processes.device)
    sampler.record = flags.capacity
    num_classes = max(pretrained.config.model.num_classes, 1)
    settings = _settings(flags, pretrained, protocol, vae) | (measured or {})
    plan = SetPlan(
        _labels(flags, protocol, pretrained.config.model.num_classes),
        protocol.num_fid_samples,
        protocol.per_proc_batch_size,
        flags.sample_dir / _name(flags, pretrained, protocol),
        flags.save,
        num_classes,
        settings,
    )
    began = time.perf_counter()

    def decode(latents: Tensor) -> Tensor:
        return to_uint8(vae.decode(latents), protocol.pixels)

    result = generate_set(sampler, decode, measure, plan, processes)
    if result is None:
        return None
    seconds = time.perf_counter() - began
    return _report(plan, result, settings | _measured(result, seconds, processes))


def _labels(flags: argparse.Namespace, protocol: Protocol, num_classes: int) -> Labels:
    """The class of each sample."""
    if flags.classes is None:
        return LABELS[protocol.labels](num_classes, flags.global_seed, protocol.num_fid_samples)
    return chosen_labels(flags.classes, flags.num_per_class)


def _check_vae(vae: VAE | PixelSpace, pretrained: Pretrained) -> None:
    """The decoder must read latents of the scale that the model was trained on."""
    latents = pretrained.state["latents"]
    if latents is None:  # an imported checkpoint does not say
        return
    for name, here in (
        ("scaling_factor", vae.scaling_factor),
        ("shift_factor", vae.shift_factor),
        ("latent_channels", vae.latent_channels),
    ):
        if here != latents[name]:
            raise UserError(
                f"--vae: {vae.path} has {name} {here}, the checkpoint's latents {latents[name]}"
            )


def _name(flags: argparse.Namespace, pretrained: Pretrained, protocol: Protocol) -> str:
    """Names the settings that most sets differ in, and every other one that is not the default."""
    settings, plain = protocol.sampling, Protocol()
    vae, own = (KNOWN_NAMES.get(v, v) for v in (protocol.vae, pretrained.config.data.vae_path))
    named = ("sampler", "num_steps", "cfg_scale")
    others = [f.name for f in dataclasses.fields(settings) if f.name not in named]
    steps = "" if settings.sampler in ADAPTIVE else settings.num_steps
    parts = [
        pretrained.path.name,
        flags.weights,
        f"{settings.sampler}{steps}",
        f"cfg{settings.cfg_scale:g}",
        f"b{protocol.per_proc_batch_size}",
        *_differing(settings, plain.sampling, others),
        *([] if vae == own else [f"vae={vae.rstrip('/').rpartition('/')[2]}"]),
        *_differing(protocol, plain, ("labels", "pixels", "tf32")),
        *(f"{key}={value}" for key, value in routing_of(flags).items()),
        *([] if flags.classes is None else [f"classes={','.join(map(str, flags.classes))}"]),
        f"seed{flags.global_seed}",
        f"n{protocol.num_fid_samples}",
    ]
    return "-".join(parts)


def _differing(values: Any, plain: Any, names: Iterable[str]) -> list[str]:
    """`key=value` of the fields `names` that are not as in `plain`."""
    changed = {k: getattr(values, k) for k in names if getattr(values, k) != getattr(plain, k)}
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changed.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def _settings(
    flags: argparse.Namespace, pretrained: Pretrained, protocol: Protocol, vae: VAE | PixelSpace
) -> dict[str, Any]:
    """Everything that decides the images, but for the hardware."""
    labels = protocol.labels if flags.classes is None else f"{flags.num_per_class} of each class"
    return {
        "checkpoint": str(pretrained.path),
        "checkpoint_sha256": file_hash(pretrained.path / MANIFEST_FILE),
        "step": pretrained.state["step"],
        "weights": flags.weights,
        "num_samples": protocol.num_fid_samples,
        "image_size": pretrained.config.data.image_size,
        "objective": pretrained.config.objective.name,
        "feed_forward": pretrained.config.model.feed_forward.name,
        "protocol": flags.protocol,
        **dataclasses.asdict(protocol.sampling),
        "per_proc_batch_size": protocol.per_proc_batch_size,
        "global_seed": flags.global_seed,
        "noise": "one generator for each (seed, index)",
        "labels": labels,
        "classes": flags.classes,
        "pixels": protocol.pixels,
        "vae": vae.path,
        "vae_sha256": vae.weights_hash(),
        "save": flags.save,
        "capacity": flags.capacity,
        "tf32": protocol.tf32,
        "dtype": "float32",
        "class_names": (pretrained.state["latents"] or {}).get("class_names", []),
        "config": to_plain(dataclasses.asdict(pretrained.config)),
    }


def _measured(result: SampleSet, seconds: float, processes: Processes) -> dict[str, Any]:
    """What the run found."""
    return {
        "nfe": result.nfe,
        "label_counts": np.bincount(result.labels).tolist(),
        "device": processes.device.type,
        "world_size": processes.world_size,
        "capacity_infer": result.capacity,
        "images_per_second": result.made / seconds,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _report(plan: SetPlan, result: SampleSet, record: dict[str, Any]) -> Outcome:
    """The grid of the first images beside the set; the record is left to be written."""
    save_png(image_grid(result.first), plan.path.with_name(f"{plan.path.name}.png"))
    if result.routing is not None:
        out = plan.path.with_name(f"{plan.path.name}.capacity.npz")
        with complete_file(out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **vars(result.routing), labels=result.labels)
    capacity = "none" if result.capacity is None else f"{result.capacity:.3f}"
    log.info(
        "%s: %d images, NFE %g, mean C_infer %s",
        *(plan.path, len(result.labels), result.nfe, capacity),
    )
    return Outcome(result, plan.path, record)
