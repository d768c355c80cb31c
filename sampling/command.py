"""The work of sample_ddp.py: flags over a checkpoint's settings, the images, their record."""

import argparse
import dataclasses
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch

from config.schema import SAMPLERS, SamplingConfig
from core.distributed import Processes
from core.errors import UserError, unknown_name
from core.files import complete_file
from core.logging import get_logger, quiet_other_processes
from data.vae import VAE
from models.pretrained import Pretrained, load_pretrained
from sampling.generate import Sampler, SampleSet, generate_set
from sampling.grid import image_grid, save_png
from sampling.objectives import build_objective

log: logging.Logger = get_logger("sample")


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of sample_ddp.py; those left out come from the checkpoint's config."""
    parser = argparse.ArgumentParser(
        prog="sample_ddp.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    own = "the checkpoint's config"
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint folder, or a run: its newest")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or live weights")
    add("--image-size", type=int, help="checked against the checkpoint where given")
    add("--num-classes", type=int, help="checked against the checkpoint where given")
    add("--num-fid-samples", type=_positive, default=50_000, help="images to make")
    add(
        "--per-proc-batch-size",
        type=_positive,
        default=32,
        help="images in a block; part of the protocol for DiffMoE, whose routing depends on it",
    )
    add("--cfg-scale", type=float, help=f"guidance scale, 1 for none; default: {own}")
    add("--num-sampling-steps", type=_positive, help=f"default: {own}")
    add("--sampler", "--sampling-method", help=f"{_known_samplers()}; default: {own}")
    add("--atol", type=float, help=f"of dopri5; default: {own}")
    add("--rtol", type=float, help=f"of dopri5; default: {own}")
    add("--global-seed", type=int, default=0, help="of noise and labels")
    add("--vae", help=f"mse, ema, a hub id or a local folder; default: {own}")
    add("--sample-dir", type=Path, default=Path("samples"), help="where the files go")
    add("--tf32", action="store_true", help="TF32 matrix products on GPUs: faster, less exact")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if any")
    return parser.parse_args(argv)


def sample_from_checkpoint(flags: argparse.Namespace, processes: Processes) -> None:
    """Generate the set that the flags ask for; the main process writes npz, grid and JSON.

    Raises:
        UserError: when checkpoint, VAE and flags do not fit each other.
    """
    quiet_other_processes(processes)
    torch.backends.cuda.matmul.allow_tf32 = flags.tf32
    torch.backends.cudnn.allow_tf32 = flags.tf32
    pretrained = load_pretrained(flags.ckpt, flags.weights)
    settings = _settings(flags, pretrained)
    vae = VAE(flags.vae or pretrained.config.data.vae_path, processes.device)
    _check_vae(vae, pretrained)
    model = pretrained.config.model
    sampler = Sampler(
        pretrained.model.to(processes.device),
        build_objective(pretrained.config.objective),
        settings,
        (model.in_channels, model.input_size, model.input_size),
        model.num_classes,
        flags.global_seed,
        processes.device,
    )
    path = flags.sample_dir / f"{_name(flags, pretrained, settings)}.npz"
    began = time.perf_counter()
    result = generate_set(
        sampler, vae, flags.num_fid_samples, flags.per_proc_batch_size, path, processes
    )
    if result is not None:
        seconds = time.perf_counter() - began
        _write_record(flags, pretrained, settings, vae, result, seconds, processes)


def _settings(flags: argparse.Namespace, pretrained: Pretrained) -> SamplingConfig:
    """The checkpoint's sampling settings with the flags over them, checked."""
    config = pretrained.config
    for flag, value, own in (
        ("--image-size", flags.image_size, config.data.image_size),
        ("--num-classes", flags.num_classes, config.model.num_classes),
    ):
        if value is not None and value != own:
            raise UserError(f"{flag}: {value} is not allowed; {pretrained.path} has {own}")
    known = SAMPLERS[config.objective.name]
    if flags.sampler is not None and flags.sampler not in known:
        raise unknown_name(f"--sampler (objective {config.objective.name})", flags.sampler, known)
    steps, total = flags.num_sampling_steps, getattr(config.objective, "num_timesteps", None)
    if steps is not None and total is not None and steps > total:
        raise UserError(f"--num-sampling-steps: {steps} is too many; at most {total} is allowed")
    given = {
        "sampler": flags.sampler,
        "num_steps": steps,
        "cfg_scale": flags.cfg_scale,
        "atol": flags.atol,
        "rtol": flags.rtol,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(config.sampling, **changes)


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


def _name(flags: argparse.Namespace, pretrained: Pretrained, settings: SamplingConfig) -> str:
    steps = "" if settings.sampler == "dopri5" else settings.num_steps
    return (
        f"{pretrained.path.name}-{flags.weights}-{settings.sampler}{steps}"
        f"-cfg{settings.cfg_scale:g}-seed{flags.global_seed}-n{flags.num_fid_samples}"
    )


def _write_record(
    flags: argparse.Namespace,
    pretrained: Pretrained,
    settings: SamplingConfig,
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
        **dataclasses.asdict(settings),
        "per_proc_batch_size": flags.per_proc_batch_size,
        "global_seed": flags.global_seed,
        "labels": "uniform, by (seed, index)",
        "label_counts": np.bincount(result.labels).tolist(),
        "pixels": "clamp(127.5 x + 128, 0, 255), truncated",
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
    log.info("%s: %d images, mean C_infer %s", result.path, len(result.labels), capacity)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; at least 1 is allowed")
    return value


def _known_samplers() -> str:
    return "; ".join(f"{name}: {', '.join(known)}" for name, known in SAMPLERS.items())
