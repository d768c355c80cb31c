"""The work of sample_ddp.py: a set of images from a checkpoint, and the record of it."""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from config.protocol import Protocol
from core.distributed import Processes
from core.errors import UserError
from core.files import complete_file
from core.logging import get_logger, quiet_other_processes
from data.vae import KNOWN_NAMES, VAE, to_uint8
from models.pretrained import Pretrained, load_pretrained
from sampling.flags import resolve
from sampling.generate import Sampler, SampleSet, generate_set
from sampling.grid import image_grid, save_png
from sampling.labels import LABELS
from sampling.objectives import build_objective
from transport.ode import ADAPTIVE

log: logging.Logger = get_logger("sample")


def sample_from_checkpoint(flags: argparse.Namespace, processes: Processes) -> None:
    """Generate the set that the flags ask for; the main process writes npz, grid and JSON.

    Raises:
        UserError: when checkpoint, VAE and flags do not fit each other.
    """
    quiet_other_processes(processes)
    torch.backends.cuda.matmul.allow_tf32 = flags.tf32
    torch.backends.cudnn.allow_tf32 = flags.tf32
    pretrained = load_pretrained(flags.ckpt, flags.weights)
    protocol = resolve(flags, pretrained)
    vae = VAE(protocol.vae, processes.device)
    _check_vae(vae, pretrained)
    model = pretrained.config.model
    sampler = Sampler(
        pretrained.model.to(processes.device),
        build_objective(pretrained.config.objective),
        protocol.sampling,
        (model.in_channels, model.input_size, model.input_size),
        flags.global_seed,
        processes.device,
    )
    began = time.perf_counter()
    result = generate_set(
        sampler,
        LABELS[protocol.labels](model.num_classes, flags.global_seed, protocol.num_fid_samples),
        lambda latents: to_uint8(vae.decode(latents), protocol.pixels),
        protocol.num_fid_samples,
        protocol.per_proc_batch_size,
        flags.sample_dir / f"{_name(flags, pretrained, protocol)}.npz",
        processes,
    )
    if result is not None:
        seconds = time.perf_counter() - began
        _write_record(flags, pretrained, protocol, vae, result, seconds, processes)


def _check_vae(vae: VAE, pretrained: Pretrained) -> None:
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
        *_differing(protocol, plain, ("labels", "pixels")),
        f"seed{flags.global_seed}",
        f"n{protocol.num_fid_samples}",
    ]
    return "-".join(parts)


def _differing(values: Any, plain: Any, names: Iterable[str]) -> list[str]:
    """`key=value` of the fields `names` that are not as in `plain`."""
    changed = {k: getattr(values, k) for k in names if getattr(values, k) != getattr(plain, k)}
    return [f"{key}={value}".replace(" ", "") for key, value in changed.items()]


def _write_record(
    flags: argparse.Namespace,
    pretrained: Pretrained,
    protocol: Protocol,
    vae: VAE,
    result: SampleSet,
    seconds: float,
    processes: Processes,
) -> None:
    """The grid of the first images beside the npz, and a JSON with every setting."""
    save_png(image_grid(result.first), result.path.with_suffix(".png"))
    record = {
        "checkpoint": str(pretrained.path),
        "step": pretrained.state["step"],
        "weights": flags.weights,
        "num_samples": len(result.labels),
        "image_size": pretrained.config.data.image_size,
        "objective": pretrained.config.objective.name,
        "feed_forward": pretrained.config.model.feed_forward.name,
        "protocol": flags.protocol,
        **dataclasses.asdict(protocol.sampling),
        "nfe": result.nfe,
        "per_proc_batch_size": protocol.per_proc_batch_size,
        "global_seed": flags.global_seed,
        "labels": protocol.labels,
        "label_counts": np.bincount(result.labels).tolist(),
        "pixels": protocol.pixels,
        "vae": vae.path,
        "tf32": flags.tf32,
        "dtype": "float32",
        "device": processes.device.type,
        "world_size": processes.world_size,
        "capacity_infer": result.capacity,
        "images_per_second": len(result.labels) / seconds,
        "torch": torch.__version__,
    }
    path = result.path.with_suffix(".json")
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    capacity = "none" if result.capacity is None else f"{result.capacity:.3f}"
    log.info(
        "%s: %d images, NFE %g, mean C_infer %s",
        result.path,
        len(result.labels),
        result.nfe,
        capacity,
    )
