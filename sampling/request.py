"""What a command line asks of a checkpoint: refused, or named, before any weights are read."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from config.load import to_plain
from config.model import ModelConfig
from config.objective import ADAPTIVE
from config.protocol import Protocol
from core.errors import ConfigError
from core.files import file_hash
from core.limits import check_disk, check_memory, check_out_folder
from data.vae import KNOWN_NAMES, VAE, PixelSpace
from models.pretrained import Checkpoint, read_checkpoint
from models.sealed import MANIFEST_FILE
from sampling.flags import resolve, routing_of
from sampling.labels import LABELS, Labels, chosen_labels
from sampling.sets import Record, SetFolder, run_name, set_hash

GENERATOR_BYTES = 5000
"""Of one sample's noise generator, on the host."""
LONGEST_NAME = 200
"""Characters of a folder's name; file systems allow 255 bytes, temporary names need a few."""


@dataclass(frozen=True)
class Request:
    """A set that somebody wants.

    Attributes:
        flags: of the command line.
        checkpoint: config (routing as the flags have it), state and path.
        protocol: sampler, blocks, decoder.
        run: name of the checkpoint's run.
        folder: of the set.
    """

    flags: argparse.Namespace
    checkpoint: Checkpoint
    protocol: Protocol
    run: str
    folder: SetFolder

    @property
    def labels(self) -> Labels:
        """The class of each sample."""
        flags, count = self.flags, self.protocol.num_fid_samples
        if flags.classes is not None:
            return chosen_labels(flags.classes, flags.num_per_class)
        classes = self.checkpoint.config.model.num_classes
        return LABELS[self.protocol.labels](classes, flags.global_seed, count)

    def settings(self, vae: VAE | PixelSpace | None = None) -> Record:
        """Everything that decides what the set is, but for the hardware.

        Args:
            vae: the decoder, whose hash is left out where it is not read yet.
        """
        flags, protocol, config = self.flags, self.protocol, self.checkpoint.config
        own = flags.classes is None
        decoder = {} if vae is None else {"vae_sha256": vae.weights_hash()}
        settings = {
            "checkpoint_sha256": file_hash(self.checkpoint.path / MANIFEST_FILE),
            "step": self.checkpoint.state["step"],
            "weights": flags.weights,
            "num_samples": protocol.num_fid_samples,
            "image_size": config.data.image_size,
            "objective": config.objective.name,
            "feed_forward": config.model.feed_forward.name,
            **dataclasses.asdict(protocol.sampling),
            "per_proc_batch_size": protocol.per_proc_batch_size,
            "global_seed": flags.global_seed,
            "noise": "one generator for each (seed, index)",
            "labels": protocol.labels if own else f"{flags.num_per_class} of each class",
            "classes": flags.classes,
            "pixels": protocol.pixels,
            **decoder,
            "save": flags.save,
            "capacity": flags.capacity,
            "tf32": protocol.tf32,
            "dtype": "float32",
            "class_names": (self.checkpoint.state["latents"] or {}).get("class_names", []),
            "config": to_plain(dataclasses.asdict(config)),
        }
        return json.loads(json.dumps(settings))  # as they are read back

    def record(self, settings: Record, vae: VAE | PixelSpace) -> Record:
        """The settings, their hash, and where everything came from."""
        return {
            "run": self.run,
            "checkpoint": str(self.checkpoint.path),
            "set_sha256": set_hash(settings),
            **settings,
            "vae": vae.path,
            "protocol": self.flags.protocol,
        }


def request_of(flags: argparse.Namespace, device: torch.device) -> Request:
    """What the flags ask for.

    Args:
        flags: of the command line.
        device: that will sample.

    Raises:
        UserError: checkpoint, protocol, flags and machine do not fit each other.
    """
    check_out_folder("--sample-dir", flags.sample_dir)
    checkpoint = read_checkpoint(flags.ckpt, flags.weights, routing_of(flags))
    protocol = resolve(flags, checkpoint)
    _check_capacity(flags, checkpoint, protocol)
    _check_block(checkpoint, protocol, device)
    run = run_name(checkpoint.path)
    folder = SetFolder(flags.sample_dir / run / _name(flags, checkpoint, protocol))
    check_out_folder("--sample-dir", folder.path)
    if flags.save == "npz" and not folder.record.exists():
        size = 3 * checkpoint.config.data.image_size**2
        check_disk("--num-fid-samples", protocol.num_fid_samples, size, folder.path)
    request = Request(flags, checkpoint, protocol, run, folder)
    folder.is_finished(request.settings(), {}, flags.overwrite)  # refuses another one's
    return request


def _check_capacity(flags: argparse.Namespace, checkpoint: Checkpoint, protocol: Protocol) -> None:
    if not flags.capacity:
        return
    if not checkpoint.config.model.moe_blocks():
        raise ConfigError(
            f"--capacity: {checkpoint.path} is a dense model, without routing to record"
        )
    if protocol.sampling.sampler in ADAPTIVE:
        raise ConfigError(
            f"--capacity: {protocol.sampling.sampler} takes other steps in every block, whose "
            "records do not fit together; allowed: a sampler of fixed steps, such as heun"
        )


def _check_block(checkpoint: Checkpoint, protocol: Protocol, device: torch.device) -> None:
    """One block must fit in memory."""
    count, size = protocol.per_proc_batch_size, block_bytes(checkpoint.config.model)
    on_host = GENERATOR_BYTES + (size if device.type == "cpu" else 0)
    check_memory("--per-proc-batch-size", count, on_host, torch.device("cpu"))
    check_memory("--per-proc-batch-size", count, size, device)


def block_bytes(model: ModelConfig) -> int:
    """What one sample needs at least while a model computes it: noise, latent, one activation."""
    tokens = (model.input_size // model.patch_size) ** 2
    return 4 * (2 * model.in_channels * model.input_size**2 + tokens * model.hidden_size)


def _name(flags: argparse.Namespace, checkpoint: Checkpoint, protocol: Protocol) -> str:
    """Names the settings that most sets differ in, and every other one that is not the default."""
    settings, plain = protocol.sampling, Protocol()
    vae, own = (KNOWN_NAMES.get(v, v) for v in (protocol.vae, checkpoint.config.data.vae_path))
    named = ("sampler", "num_steps", "cfg_scale")
    others = [f.name for f in dataclasses.fields(settings) if f.name not in named]
    steps = "" if settings.sampler in ADAPTIVE else settings.num_steps
    parts = [
        checkpoint.path.resolve().name,
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
    name = "-".join(parts)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _differing(values: Any, plain: Any, names: Iterable[str]) -> list[str]:
    """`key=value` of the fields `names` that are not as in `plain`."""
    changed = {k: getattr(values, k) for k in names if getattr(values, k) != getattr(plain, k)}
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changed.items()}
    return [f"{key}={text}" for key, text in texts.items()]
