"""The work of sample_ddp.py: a set of images from a checkpoint, and the record of it."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.conditions import Condition
from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.files import complete_file
from core.locks import exclusive
from core.logging import get_logger, quiet_other_processes
from core.precision import set_tf32
from data.text.encoder import TextEncoder
from data.vae import VAE, PixelSpace, open_vae, to_uint8
from models.pretrained import Checkpoint, Pretrained, load_pretrained
from sampling.blocks import Measure, SampleSet, SetPlan, generate_set
from sampling.captioned import captioned_grid
from sampling.flags import routing_of
from sampling.generate import Sampler
from sampling.grid import image_grid, save_png
from sampling.prompts import Prompts, text_encoder_of, warn_of_cuts
from sampling.request import Request
from sampling.sets import Record, SetFolder, hashes_of, read_set

log: logging.Logger = get_logger("sample")

Measured = dict[str, str | None]
NOT_MEASURED: Measured = {"features": None, "features_sha256": None}
"""What features the blocks of a set hold: name of the network, hash of its weights."""

Then = Callable[[SetFolder, Record], None]
"""What the main process does with a finished set while nobody else can touch it."""


@dataclass(frozen=True)
class Features:
    """What is measured of the images.

    Attributes:
        about: name and hash of the network.
        open: gives the network; called when images are made.
    """

    about: Measured
    open: Callable[[], Measure]


def sample_set(
    request: Request,
    processes: Processes,
    features: Features | None = None,
    then: Then | None = None,
) -> SetFolder:
    """The set that is asked for, finished: generated, gone on with, or there already.

    Args:
        request: of the command line.
        processes: all of which call this.
        features: wanted of the images.
        then: called by the main process at last.

    Raises:
        UserError: the set is another one's, in use, or does not fit checkpoint and VAE.
    """
    quiet_other_processes(processes)
    set_tf32(request.protocol.precision != "fp32")
    vae = open_vae(request.protocol.vae, processes.device)
    check_vae(vae, request.checkpoint)
    settings = request.settings(vae)
    about = NOT_MEASURED if features is None else features.about

    def finished() -> bool:
        return _agreed(
            processes,
            lambda: request.folder.is_finished(settings, about, request.flags.overwrite),
        )

    making = encoder = None
    if not finished():  # whatever cannot be read is refused before there is a folder
        pretrained = load_pretrained(
            request.checkpoint.path, request.flags.weights, routing_of(request.flags)
        )
        with processes.main_first():
            measure = None if features is None else features.open()
            if request.prompts is not None:
                encoder = _encoder(request, processes)
        making = pretrained, measure, encoder
    with exclusive(request.folder.path, "--sample-dir", processes):
        if processes.is_main:
            request.folder.tidy()
        if finished():
            log.info("%s: finished before; nothing is sampled", request.folder.path)
        elif making is not None:
            _make(request, settings, about, vae, making, processes)
        else:
            raise ConfigError(f"--sample-dir: {request.folder.path} was replaced meanwhile")
        if then is not None and processes.is_main:
            then(*read_set(request.folder.path))
    return request.folder


def _agreed(processes: Processes, ask: Callable[[], bool]) -> bool:
    """The main process's answer, on every process; so is its refusal."""
    answer, refusal = False, None
    if processes.is_main:
        try:
            answer = ask()
        except UserError as error:
            refusal = str(error)
    answer, refusal = processes.from_main((answer, refusal))
    if refusal is not None:
        raise ConfigError(refusal)
    return answer


def _make(
    request: Request,
    settings: Record,
    about: Measured,
    vae: VAE | PixelSpace,
    making: tuple[Pretrained, Measure | None, TextEncoder | None],
    processes: Processes,
) -> None:
    """Generate what is missing; the main process writes what belongs to the set, and the record."""
    (pretrained, measure, encoder), protocol = making, request.protocol
    sampler = Sampler.of(pretrained, protocol.sampling, request.flags.global_seed, processes.device)
    sampler.record = request.flags.capacity
    sampler.bf16 = protocol.precision == "bf16"
    if request.flags.compile:
        sampler.compile()
    if request.prompts is not None and request.prompts.negative is not None:
        rows = encoder.encode([request.prompts.negative])
        sampler.negative = Condition.of_rows(rows, encoder.max_length)
    record = request.record(settings, vae)
    plan = SetPlan(
        request.wanted(None if encoder is None else encoder.encode),
        protocol.num_fid_samples,
        protocol.per_proc_batch_size,
        request.folder,
        request.flags.save,
        hashes_of(record),
    )
    if processes.is_main:
        request.folder.begin(settings, about)
    processes.barrier()
    began = time.perf_counter()

    def decode(latents: Tensor) -> Tensor:
        return to_uint8(vae.decode(latents), protocol.pixels)

    result = generate_set(sampler, decode, measure, plan, processes)
    if result is not None:
        seconds = time.perf_counter() - began
        _write(plan, result, about, request.prompts)
        request.folder.write_record(record | _measured(result, seconds, processes))
        request.folder.tidy()  # the blocks are not needed any more


def _encoder(request: Request, processes: Processes) -> TextEncoder:
    """The checkpoint's text encoder on this process's device."""
    path = request.flags.text_encoder
    encoder = text_encoder_of(request.checkpoint, path, processes.device)
    if processes.is_main:
        negative = request.prompts.negative
        warn_of_cuts(encoder, request.prompts.texts + ([] if negative is None else [negative]))
    return encoder


def check_vae(vae: VAE | PixelSpace, checkpoint: Checkpoint) -> None:
    """The decoder must read latents of the scale that the model was trained on.

    Raises:
        ConfigError: it reads others.
    """
    latents = checkpoint.state["latents"]
    if latents is None:  # an imported checkpoint does not say
        return
    for name, here in (
        ("scaling_factor", vae.scaling_factor),
        ("shift_factor", vae.shift_factor),
        ("latent_channels", vae.latent_channels),
    ):
        if here != latents[name]:
            raise ConfigError(
                f"--vae: {vae.path} has {name} {here}, the checkpoint's latents {latents[name]}"
            )


def _measured(result: SampleSet, seconds: float, processes: Processes) -> Record:
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


def _write(plan: SetPlan, result: SampleSet, about: Measured, prompts: Prompts | None) -> None:
    """The grid of the first images, features and where the computation went."""
    folder = plan.folder
    if prompts is None:
        grid = image_grid(result.first)
    else:
        each = prompts.num_per_prompt
        shown = -(-len(result.first) // each)
        grid = captioned_grid(result.first, prompts.texts[:shown], each)
        if plan.save == "geneval":
            _write_geneval(folder, prompts)
    save_png(grid, folder.grid, plan.hashes)
    if result.features:
        write_features(folder, result.features, result.labels, plan.hashes | about)
    if result.routing is not None:
        arrays = vars(result.routing) | {"labels": result.labels} | plan.hashes
        with complete_file(folder.routing) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    capacity = "none" if result.capacity is None else f"{result.capacity:.3f}"
    log.info(
        "%s: %d images, NFE %g, mean C_infer %s",
        *(folder.path, len(result.labels), result.nfe, capacity),
    )


def _write_geneval(folder: SetFolder, prompts: Prompts) -> None:
    """What is asked for, beside the images of each prompt."""
    for number, entry in enumerate(prompts.entries):
        with complete_file(folder.geneval_prompt(number)) as temporary:
            temporary.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def write_features(
    folder: SetFolder,
    features: dict[str, np.ndarray],
    labels: np.ndarray,
    about: dict[str, str | None],
) -> None:
    """Keep features (N, D) by name, the classes (N,), and which set and network they are of."""
    with complete_file(folder.features) as temporary, temporary.open("wb") as file:
        np.savez(file, **features, labels=labels, **about)
