"""What a command line asks of a checkpoint: refused, or named, before any weights are read."""

import argparse
import dataclasses
import hashlib
import json
import os
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
from sampling.labels import LABELS, chosen_labels
from sampling.prompts import Prompts, prompts_of, text_facts
from sampling.sets import Record, SetFolder, run_name, set_hash
from sampling.wanted import ByClass, ByPrompt, Encode, Wanted

GENERATOR_BYTES = 5000
"""Of one sample's noise generator, on the host."""
MOST_RECORDED = 2000
"""Prompts of a record of the routing, in which each has numbers of its own."""
LONGEST_NAME = 200
"""Bytes of a folder's name; file systems allow 255, temporary names need a few."""


@dataclass(frozen=True)
class Request:
    """A set that somebody wants.

    Attributes:
        flags: of the command line.
        checkpoint: config (routing as the flags have it), state and path.
        protocol: sampler, blocks, decoder.
        run: name of the checkpoint's run.
        folder: of the set.
        prompts: for a checkpoint of a model of text.
    """

    flags: argparse.Namespace
    checkpoint: Checkpoint
    protocol: Protocol
    run: str
    folder: SetFolder
    prompts: Prompts | None = None

    def wanted(self, encode: Encode | None = None) -> Wanted:
        """The class or prompt of each sample.

        Args:
            encode: makes rows of prompts, where conditions are asked for.
        """
        flags, count = self.flags, self.protocol.num_fid_samples
        model = self.checkpoint.config.model
        if self.prompts is not None:
            each = self.prompts.num_per_prompt
            return ByPrompt(self.prompts.texts, each, encode, model.text_max_length)
        if flags.classes is not None:
            labels = chosen_labels(flags.classes, flags.num_per_class)
        else:
            labels = LABELS[self.protocol.labels](model.num_classes, flags.global_seed, count)
        return ByClass(labels, model.num_classes)

    def settings(self, vae: VAE | PixelSpace | None = None) -> Record:
        """Everything that decides what the set is, but for the hardware.

        Args:
            vae: the decoder, whose hash is left out where it is not read yet.
        """
        flags, protocol, config = self.flags, self.protocol, self.checkpoint.config
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
            **(self._classes() if self.prompts is None else self._prompts()),
            "pixels": protocol.pixels,
            **decoder,
            "save": flags.save,
            "capacity": flags.capacity,
            "precision": protocol.precision,
            "compile": flags.compile,
            "class_names": (self.checkpoint.state["latents"] or {}).get("class_names", []),
            "config": to_plain(dataclasses.asdict(config)),
        }
        return json.loads(json.dumps(settings))  # as they are read back

    def _classes(self) -> Record:
        flags = self.flags
        own = flags.classes is None
        return {
            "noise": "one generator for each (seed, index)",
            "labels": self.protocol.labels if own else f"{flags.num_per_class} of each class",
            "classes": flags.classes,
        }

    def _prompts(self) -> Record:
        facts = dataclasses.asdict(text_facts(self.checkpoint))
        facts.pop("encoder")  # wherever it lies, its hashes say what it is
        return {
            "noise": "one generator for each (seed, prompt, number)",
            "prompts": self.prompts.entries,
            "num_per_prompt": self.prompts.num_per_prompt,
            "negative_prompt": self.prompts.negative,
            "text": facts,
        }

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
    prompts = prompts_of(flags, checkpoint)
    protocol = resolve(flags, checkpoint, prompts)
    _check_capacity(flags, checkpoint, protocol, prompts)
    _check_block(checkpoint, protocol, device)
    run = run_name(checkpoint.path)
    folder = SetFolder(flags.sample_dir / run / _name(flags, checkpoint, protocol, prompts))
    check_out_folder("--sample-dir", folder.path)
    if flags.save == "npz" and not folder.record.exists():
        size = 3 * checkpoint.config.data.image_size**2
        check_disk("--num-fid-samples", protocol.num_fid_samples, size, folder.path)
    request = Request(flags, checkpoint, protocol, run, folder, prompts)
    folder.is_finished(request.settings(), {}, flags.overwrite)  # refuses another one's
    return request


def _check_capacity(
    flags: argparse.Namespace, checkpoint: Checkpoint, protocol: Protocol, prompts: Prompts | None
) -> None:
    if not flags.capacity:
        return
    if prompts is not None and len(prompts.entries) > MOST_RECORDED:
        raise ConfigError(
            f"--capacity: {prompts.source} has {len(prompts.entries)} prompts; at most "
            f"{MOST_RECORDED} are recorded one by one"
        )
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


def _name(
    flags: argparse.Namespace, checkpoint: Checkpoint, protocol: Protocol, prompts: Prompts | None
) -> str:
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
        *_differing(protocol, plain, ("labels", "pixels", "precision")),
        *(f"{key}={value}" for key, value in routing_of(flags).items()),
        *([] if flags.classes is None else [f"classes={','.join(map(str, flags.classes))}"]),
        *([] if prompts is None else _named_prompts(prompts)),
        f"seed{flags.global_seed}",
        f"n{protocol.num_fid_samples}",
    ]
    name = "-".join(parts)
    written = os.fsencode(name)
    if len(written) <= LONGEST_NAME:
        return name
    whole = written[: LONGEST_NAME - 9].decode(errors="ignore")  # no half of a character
    return f"{whole}-{hashlib.sha256(written).hexdigest()[:8]}"


def _named_prompts(prompts: Prompts) -> list[str]:
    """The file's name, or that there is none, and what tells its contents apart."""
    told = "-".join(word for word in prompts.source.split("/")[-1].split(".")[0].split("-") if word)
    hashed = hashlib.sha256(json.dumps(prompts.entries).encode()).hexdigest()[:8]
    names = [f"prompts={told}.{hashed}", f"x{prompts.num_per_prompt}"]
    if prompts.negative is not None:
        names.append(f"negative={hashlib.sha256(prompts.negative.encode()).hexdigest()[:8]}")
    return names


def _differing(values: Any, plain: Any, names: Iterable[str]) -> list[str]:
    """`key=value` of the fields `names` that are not as in `plain`."""
    changed = {k: getattr(values, k) for k in names if getattr(values, k) != getattr(plain, k)}
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changed.items()}
    return [f"{key}={text}" for key, text in texts.items()]
